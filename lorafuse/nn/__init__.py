"""Modules for code that owns its model."""

from lorafuse.nn.linear import LoRALinear

__all__ = ["LoRALinear"]
