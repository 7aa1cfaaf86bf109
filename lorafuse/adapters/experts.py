"""Experts of transformers' models in a pool."""

from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.integrations.hf_transformers import FLAGS, base_stacks, block_operands, first_projection
from lorafuse.nn.multi import AdapterStack, refuse_late_call
from lorafuse.nn.multi_experts import ExpertsMulti
from lorafuse.operands import Weight

__all__ = ["PooledExperts", "stack_names"]


def stack_names(module: nn.Module) -> tuple[str, ...]:
    """What an experts module of transformers calls its two stacks, the first projection first; () for another."""
    return (first_projection(module), "down_proj") if all(hasattr(module, flag) for flag in FLAGS) else ()


class PooledExperts(ExpertsMulti):
    """An experts module of transformers, frozen, with the factors of many adapters; it is called as the module is.

    Raises ValueError for a module that cannot run as one operator, with the reason.
    """

    def __init__(self, base: nn.Module, adapter_dtype: torch.dtype) -> None:
        base.requires_grad_(False)
        operands = _operands(base)
        if isinstance(operands, str):
            raise ValueError(operands)
        gate_up, down = (
            t if isinstance(t, Weight) else Weight(t, operands["is_transposed"])
            for t in (operands["gate_up"], operands["down"])
        )
        super().__init__(gate_up, down, False, adapter_dtype)
        self.base = base
        # whether the last `AdapterPool.use_adapters` gave it any rows
        self.had_rows = False

    @property
    def stacks(self) -> dict[str, AdapterStack]:
        """The factors of both projections by the names of their parameters, the first one first."""
        return dict(zip(stack_names(self.base), (self.gate_up_adapters, self.down_adapters), strict=True))

    def operands(self) -> dict[str, Any]:
        """Those of the base as it is now. Raises RuntimeError where it can no longer run as one operator."""
        operands = _operands(self.base)
        if isinstance(operands, str):
            raise RuntimeError(f"experts of a pool cannot run: {operands}")
        return operands

    def forward(self, x: Tensor, topk_index: Tensor, topk_weight: Tensor) -> Tensor:
        """See `ExpertsMulti`; the base is the module's own forward."""
        if self.rows is None:
            refuse_late_call(self.had_rows)
            return self.base(x, topk_index, topk_weight)
        return super().forward(x, topk_index.long(), topk_weight)


def _operands(base: Any) -> dict[str, Any] | str:
    operands = block_operands(base, base_stacks(base))
    if isinstance(operands, dict):
        if not isinstance(operands["activation"], str):
            return f"the activation of its {type(base).__name__} is none of lorafuse.activation"
        if operands["is_transposed"] and base.num_experts == 1:
            return "a single expert stored transposed, which PEFT adapts in another layout"
    return operands
