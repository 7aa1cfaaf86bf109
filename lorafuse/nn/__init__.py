"""Modules for code that owns its model."""

from lorafuse.nn.experts import LoRAExperts
from lorafuse.nn.group import LoRAGatedMLP, LoRAQKV
from lorafuse.nn.linear import LoRALinear
from lorafuse.nn.multi import LoRALinearMulti
from lorafuse.nn.multi_experts import LoRAExpertsMulti

__all__ = ["LoRAExperts", "LoRAExpertsMulti", "LoRAGatedMLP", "LoRALinear", "LoRALinearMulti", "LoRAQKV"]
