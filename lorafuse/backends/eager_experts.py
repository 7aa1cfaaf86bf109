"""Expert layers with LoRA in plain torch. Shapes, formula and what is saved: `loop_experts`.

Two modules hold these four functions and save the same tensors: `grouped_experts`, by torch's grouped_mm, where torch
has a fast kernel for it; `loop_experts`, one group after the other, everywhere else. Arguments that the choice does not
need are passed on.
"""

from types import ModuleType

from torch import Tensor

from lorafuse.backends import grouped_experts, loop_experts
from lorafuse.backends.probe import runs_grouped_mm

__all__ = ["experts_backward", "experts_forward", "grouped_backward", "grouped_forward"]


def _run(rows: int, x: Tensor, *weights: Tensor) -> ModuleType:
    """The module that runs `rows` over all groups; grouped_mm refuses sizes of 0."""
    some = rows and all(w.numel() for w in weights)
    return grouped_experts if some and runs_grouped_mm(x, *weights) else loop_experts


def grouped_forward(x: Tensor, ends: Tensor, w: Tensor, *rest) -> tuple[Tensor, Tensor]:
    return _run(x.shape[0], x, w).grouped_forward(x, ends, w, *rest)


def grouped_backward(dy: Tensor, x: Tensor | None, xa: Tensor | None, ends: Tensor, w: Tensor, *rest) -> tuple:
    return _run(dy.shape[0], dy, w).grouped_backward(dy, x, xa, ends, w, *rest)


def experts_forward(x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, *rest) -> tuple[Tensor, ...]:
    return _run(index.numel(), x, up, down).experts_forward(x, index, weight, up, down, *rest)


def experts_backward(dout: Tensor, x: Tensor, weight: Tensor, up: Tensor, down: Tensor, *rest) -> tuple:
    return _run(weight.numel(), x, up, down).experts_backward(dout, x, weight, up, down, *rest)
