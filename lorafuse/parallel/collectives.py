"""Collectives that autograd differentiates, for tensors that are equal on every rank or a part of one on each.

| function | forward | backward |
| --- | --- | --- |
| `replicated` | nothing | all-reduce: each rank has a part of the gradient |
| `summed` | all-reduce of partial sums | nothing: every rank has the whole gradient |
| `gathered` | all-gather of parts along a dimension | reduce-scatter |
| `scattered` | reduce-scatter of partial sums | all-gather |
| `exchanged` | all-to-all of rows | the same in the other direction |
| `averaged` | nothing | nothing is sent: a gradient that is already a sum over the ranks is divided by their number |

None of them writes into its input.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup as Group

__all__ = ["averaged", "exchanged", "gathered", "replicated", "scattered", "summed"]

# the name since torch 2.13, where the former one warns
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim)


def _reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    # parts along the first dimension, which are contiguous
    rows = x.movedim(dim, 0).contiguous()
    part = rows.new_empty((rows.shape[0] // group.size(), *rows.shape[1:]))
    _reduce_scatter_single(part, rows, group=group)
    return part.movedim(0, dim)


def _all_to_all(x: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
    y = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(y, x.contiguous(), received, sent, group=group)
    return y


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(dx, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _all_gather(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(dy, ctx.group, ctx.dim), None, None


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _reduce_scatter(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(dy, ctx.group, ctx.dim), None, None


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
        ctx.counts = received, sent, group
        return _all_to_all(x, received, sent, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        received, sent, group = ctx.counts
        return _all_to_all(dy, sent, received, group), None, None, None


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.count = group.size()
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx / ctx.count, None


def averaged(x: Tensor, group: Group) -> Tensor:
    """x, whose gradient is a sum over the losses of all ranks, with that of their mean."""
    return _Averaged.apply(x, group)


def replicated(x: Tensor, group: Group) -> Tensor:
    """x, equal on every rank, where each rank computes a part of what depends on it."""
    return _Replicated.apply(x, group)


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum of x over the ranks, equal on every rank."""
    return _Summed.apply(x, group)


def gathered(x: Tensor, group: Group, dim: int) -> Tensor:
    """The parts of all ranks, as large on each, one after the other along a dimension."""
    return _Gathered.apply(x, group, dim)


def scattered(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's part along a dimension of the sum over the ranks. Raises ValueError where parts would differ."""
    if x.shape[dim] % group.size():
        raise ValueError(f"dimension {dim} of {list(x.shape)} does not divide among {group.size()} ranks: pad it")
    return _Scattered.apply(x, group, dim)


def exchanged(x: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
    """Rows of x `[sum(sent), …]`, so many to each rank, for those that they send here `[sum(received), …]`."""
    return _Exchanged.apply(x, received, sent, group)
