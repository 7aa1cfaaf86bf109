"""Modules for code that owns its model."""

from lorafuse.nn.experts import LoRAExperts
from lorafuse.nn.group import LoRAGatedMLP, LoRAQKV
from lorafuse.nn.linear import LoRALinear

__all__ = ["LoRAExperts", "LoRAGatedMLP", "LoRALinear", "LoRAQKV"]
