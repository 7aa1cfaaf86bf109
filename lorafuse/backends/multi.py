"""The primitives over rows of many adapters that a backend may offer, and what they share.

Rows stand in groups: number e (L + 1) + g are those of expert e and adapter g, of which number L is none. A dense layer
is one expert; rows of no group hold anything. The factors of the adapters are stacked, `[ΣR, C]` with any strides, a as
it is, b transposed, or `[E, ΣR, C]`, one stack an expert, where an expert stride of 0 shares one. `rows` may gather x
and `wide`. What depends on the rows, ranks, scale and seed of one adapter has the same bits whatever the rest of the
batch is.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lorafuse.operands import Adapters, Rows, Weight
from lorafuse.philox import rescaled
from lorafuse.plan import Plan

if TYPE_CHECKING:
    from lorafuse.backends.protocol import Backend

__all__ = ["Dots", "Multi", "adapters_on", "constant", "rank_bounds", "rows_by_adapter"]


class Multi(Protocol):
    """See the module. `is_masked` says whether dropout masks the operand: x, the low-rank product, or `wide`."""

    def project(
        self, run: Backend, x: Tensor, f: Tensor, rows: Rows, adapters: Adapters, plan: Plan | None, is_masked: bool,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """`drop(x) f[e, g]ᵀ`, `[S, adapters.widest]` in `dtype`; anything beyond an adapter's rank."""
        ...

    def matmul(
        self, run: Backend, x: Tensor, w: Weight, xa: Tensor, f: Tensor, rows: Rows, adapters: Adapters,
        plan: Plan | None, bias: Tensor | None, is_masked: bool, batch_invariant: bool, total: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`x wᵀ[e] + bias[e] + drop(xa (scale[g] · f[e, g]))`, `[S, N]` in x's dtype, w `[(E,) N, K]`; added to
        `total`, which may be written into.
        """
        ...

    def outer(
        self, run: Backend, narrow: Tensor, wide: Tensor, out: Tensor, rows: Rows, adapters: Adapters,
        plan: Plan | None, is_masked: bool,
    ) -> None:  # fmt: skip
        """`out[e, g] += scale[g] · narrowᵀ drop(wide)` of the groups with rows; out `[(E,) ΣR, C]`."""
        ...

    def activate(self, name: str, gate: Tensor, up: Tensor | None, rows: Rows, adapters: Adapters) -> Tensor:
        """h `[S, I]`: `lorafuse.activation`'s `name` of gate and up `[S, I]`, of the same strides; up None without."""
        ...

    def activate_backward(
        self, name: str, dh: Tensor, gate: Tensor, up: Tensor | None, dgate: Tensor, dup: Tensor | None, rows: Rows,
        adapters: Adapters, *, row_scale: Tensor | None = None, dots: Dots | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """`(h, ⟨dh, h⟩ + ⟨dy, bias[e]⟩ [S])`, the second None without `dots`; the gradients for `row_scale · dh` are
        written into dgate and dup, which have gate's strides. dh is used up.
        """
        ...


@dataclass(slots=True, eq=False)
class Dots:
    """The gradient of a row's factor: its second term is there with a bias `[E, H]`; `rows` may gather dy."""

    dy: Tensor
    rows: Rows
    bias: Tensor | None


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
