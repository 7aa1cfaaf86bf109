"""Expert layers and grouped linear layers with LoRA, their base products in the CUDA kernel of csrc over ragged rows.

As `grouped_experts`, with `y = x w + xa b` and `dx = dy wᵀ + dyb a` in one kernel each, the low-rank product as more
reduction of the same tiles. The skinny products are torch's grouped_mm, the activation is torch's.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorafuse.backends import grouped_experts
from lorafuse.backends.cuda_linear import TYPES, Runner

__all__ = ["functions"]

# block_n, stages, cluster, group_m and SMs (all of them); nothing was measured
_TILING = (256, 3, 1, 16, 0)


def _matrix(t: Tensor, transposed: bool) -> Tensor:
    """A right operand `[E, K, N]` as the kernel reads it: contiguous as it is, or with columns and rows exchanged."""
    return t.contiguous() if transposed else t.mT.contiguous()


def _projection(run: Runner) -> type[grouped_experts.Projection]:
    class FusedProjection(grouped_experts.Projection):
        def __init__(self, ends: Tensor, w: Tensor, *factors: Any) -> None:
            instead = "use 'triton', 'eager' or 'auto'"
            if w.dtype not in (torch.bfloat16, torch.float16):
                raise TypeError(f"backend={run.name!r}: its kernels run bfloat16 and float16, not {w.dtype}; {instead}")
            if any(size % 8 for size in w.shape[1:]):
                shape = list(w.shape)
                raise ValueError(
                    f"backend={run.name!r}: TMA needs the sizes of weights {shape} to be multiples of 8; {instead}"
                )
            if not (w.is_contiguous() or w.mT.is_contiguous()):
                # a copy of the stack would cost more than the kernel gains
                raise ValueError(
                    f"backend={run.name!r}: its kernels read stacks of matrices without gaps; the strides of weights "
                    f"{list(w.shape)} are {w.stride()}: {instead}"
                )
            super().__init__(ends, w, *factors)

        def _fused(self, x: Tensor, w: Tensor, low: Tensor, b: Tensor) -> Tensor:
            (E, K, N), rows = w.shape, x.shape[0]
            y = x.new_empty((rows, N))
            if y.numel() == 0 or K == 0:
                return y.zero_()
            transposed = w.is_contiguous()
            w, b, ends = _matrix(w, transposed), _matrix(b, transposed), self._offs.long()
            with run.guard(x.device):
                run.native.grouped_linear(
                    type=TYPES[x.dtype], rows=rows, groups=E, N=N, K=K, R=low.shape[1], transposed=transposed,
                    offsets=ends.data_ptr(), x=x.data_ptr(), stride_x=x.stride(0), w=w.data_ptr(), xa=low.data_ptr(),
                    stride_xa=low.stride(0), b=b.data_ptr(), y=y.data_ptr(), stride_y=N,
                    tiling=_TILING, stream=run.stream(x.device),
                )  # fmt: skip
            return y

    return FusedProjection


def functions(run: Runner) -> tuple[Any, ...]:
    """`(experts_forward, experts_backward, grouped_forward, grouped_backward)` of a backend."""
    found = _projection(run)
    return tuple(partial(getattr(grouped_experts, name), projection=found) for name in (
        "experts_forward", "experts_backward", "grouped_forward", "grouped_backward",
    ))  # fmt: skip
