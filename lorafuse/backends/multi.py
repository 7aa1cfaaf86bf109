"""The primitives over rows of many adapters that a backend may offer, and what they share.

One weight serves all rows; the factors of the adapters are stacked, `[ΣR, C]` with any strides: a as it is, b
transposed. The last group of `rows` has no adapter. What depends on the rows, ranks, scale and seed of one adapter has
the same bits whatever the rest of the batch is.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lorafuse.operands import Adapters, Rows, Weight
from lorafuse.philox import rescaled
from lorafuse.plan import Plan

if TYPE_CHECKING:
    from lorafuse.backends.protocol import Backend

__all__ = ["Multi", "adapters_on", "constant", "rank_bounds", "rows_by_adapter"]


class Multi(Protocol):
    """See the module. `is_masked` says whether dropout masks the operand: x, the low-rank product, or `wide`."""

    def project(
        self, run: Backend, x: Tensor, f: Tensor, rows: Rows, adapters: Adapters, plan: Plan | None, is_masked: bool,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """`drop(x) f[g]ᵀ`, `[S, adapters.widest]` in `dtype`; anything beyond an adapter's rank."""
        ...

    def matmul(
        self, run: Backend, x: Tensor, w: Weight, xa: Tensor, f: Tensor, rows: Rows, adapters: Adapters,
        plan: Plan | None, bias: Tensor | None, is_masked: bool, batch_invariant: bool,
    ) -> Tensor:  # fmt: skip
        """`x wᵀ + bias + drop(xa (scale[g] · f[g]))`, `[S, N]` in x's dtype, of every row."""
        ...

    def outer(
        self, run: Backend, narrow: Tensor, wide: Tensor, out: Tensor, rows: Rows, adapters: Adapters,
        plan: Plan | None, is_masked: bool, is_sum: bool,
    ) -> None:  # fmt: skip
        """`out[g] = scale[g] · narrowᵀ drop(wide)`, zero without rows; if `is_sum`, added to out `[ΣR, C]`."""
        ...


@lru_cache(maxsize=256)
def constant(values: tuple[int | float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host on a device, copied there once: a captured graph finds them."""
    return torch.tensor(values, dtype=dtype, device=device)


@lru_cache(maxsize=256)
def rank_bounds(ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Where the ranks of each adapter start in a stack, and where the last ones' end."""
    return tuple(itertools.accumulate(ranks, initial=0))


def adapters_on(
    device: torch.device, ranks: tuple[int, ...], scales: tuple[float, ...], p: tuple[float, ...] | None,
    seeds: Tensor | None,
) -> Adapters:  # fmt: skip
    """The adapters of a call; `scales` are alpha / R."""
    ends = constant(rank_bounds(ranks)[1:], torch.int32, device)
    if p is None or seeds is None:
        return Adapters(ranks, scales, ends, constant(scales, torch.float32, device))
    scales = _rescaled(scales, p)
    factors, below = constant(scales, torch.float32, device), constant(_below(p), torch.int32, device)
    return Adapters(ranks, scales, ends, factors, seeds, p, below)


@lru_cache(maxsize=256)
def _rescaled(scales: tuple[float, ...], p: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(map(rescaled, scales, p))


@lru_cache(maxsize=256)
def _below(p: tuple[float, ...]) -> tuple[int, ...]:
    """The thresholds `floor(p · 2³²) − 1` of `lorafuse.kernels.philox`, as signed numbers of 32 bits."""
    bits = (max(0, min(int(one * 2**32), 2**32) - 1) for one in p)
    return tuple(b - 2**32 if b >= 2**31 else b for b in bits)


def rows_by_adapter(offsets: Tensor, count: int) -> Rows:
    """The rows of a batch: those of each adapter, and of one group more the rest."""
    rest = torch.full((1,), count, dtype=torch.int32, device=offsets.device)
    return Rows(count, torch.cat((offsets.int(), rest)))
