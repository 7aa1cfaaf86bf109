"""Modules for code that owns its model."""

from lorafuse.nn.experts import LoRAExperts
from lorafuse.nn.linear import LoRALinear

__all__ = ["LoRAExperts", "LoRALinear"]
