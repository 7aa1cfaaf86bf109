"""Operands of any number of dimensions as matrices, and results back in their shape."""

import math

import torch
from torch import Tensor

__all__ = ["contiguous_rows", "matrix", "shaped_like"]

_unsafe_view = torch.ops.aten._unsafe_view.default


def matrix(t: Tensor) -> Tensor:
    """`t [..., K]` as `[rows, K]`; K may be 0. Copies only where the strides of `t` allow no view."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def contiguous_rows(t: Tensor) -> Tensor:
    """`matrix(t)` with contiguous rows that do not overlap, as the kernels read it; copies only where it must."""
    flat = matrix(t)
    if flat.shape[0] == 1:
        # the stride of a single row can be anything, and TMA reads it
        return flat.reshape(-1).unsqueeze(0)
    return flat if flat.stride(1) == 1 and flat.stride(0) >= flat.shape[1] else flat.contiguous()


def shaped_like(result: Tensor, t: Tensor) -> Tensor:
    """`result [rows, N]` as `[..., N]` with the leading sizes of `t`; the matrix must not be used afterwards.

    The result is no view to autograd, which forbids in-place operations on views made inside a custom Function.
    """
    return result if t.dim() == 2 else _unsafe_view(result, (*t.shape[:-1], result.shape[1]))
