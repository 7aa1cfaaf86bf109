"""What the primitives of a backend compute with: values that say where an operand lies and how to read it.

Dense layers are one group. `lorafuse.backends.protocol` states the primitives; `lorafuse.formats` holds how weights are
stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorafuse.activation import Activation, Recomputed
from lorafuse.formats.weight import Weight

__all__ = [
    "Activate",
    "ActivateBackward",
    "Adapters",
    "Dropout",
    "Epilogue",
    "LowRank",
    "Rows",
    "Weight",
    "contiguous_rows",
    "matrix",
    "refuse_negative",
    "route",
    "shaped_like",
]

_unsafe_view = torch.ops.aten._unsafe_view.default


@dataclass(slots=True, eq=False)
class Dropout:
    """The mask of `lorafuse.philox`: `seed` int64 `[1]`, `p` the probability to drop. What is kept is not rescaled."""

    seed: Tensor
    p: float


@dataclass(slots=True, eq=False)
class LowRank:
    """What a product adds: `scale · xa bᵀ`, xa `[S, R]`, b `[(G,) N, R]`, or `[(G,) R, N]` when `is_transposed`.

    `dropout` masks the sum (that of dx). An fp32 xa over 16-bit operands keeps the whole low-rank product in fp32.
    """

    xa: Tensor
    b: Tensor
    scale: float = 1.0
    is_transposed: bool = False
    dropout: Dropout | None = None


@dataclass(slots=True, eq=False)
class Activate:
    """Epilogue of an expert's first projection: the product is u, the results are `(u, h = activation(u))`."""

    activation: Activation | Recomputed


@dataclass(slots=True, eq=False)
class ActivateBackward:
    """Epilogue of the product that gives dh: the results are `(du, h, router_grad)`.

    du is the gradient of u for `row_scale ⊙ dh`, u `[S, U]` being that of forward; router_grad `[S]` in at least fp32
    is `⟨dh, h⟩` of each row, None unless `need_router_grad`.
    """

    activation: Activation | Recomputed
    u: Tensor
    row_scale: Tensor
    need_router_grad: bool


Epilogue = Activate | ActivateBackward


@dataclass(slots=True, eq=False)
class Rows:
    """Which rows belong to which group; a dense layer, all of whose rows are one group's, has None instead.

    Rows stand in the order of their groups: group g has rows `offsets[g - 1] … offsets[g]`, int32 or int64 `[G]`, and
    rows after the last offset belong to none. `order` `[S]`, int64, is there where rows are choices of tokens: row s is
    choice `order[s]` of all T·k, that is, of token `order[s] // choices`. A backend that `gathers` reads operands of
    tokens `[T, …]` through `index`.
    """

    count: int
    offsets: Tensor
    order: Tensor | None = None
    choices: int = 1
    gathers: bool = False
    # what a backend derives from these, by a name of its own; `gathered` shares it
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return self.offsets.shape[0]

    @property
    def gathered(self) -> Rows:
        """The same rows of an operand that holds one row a token."""
        return Rows(self.count, self.offsets, self.order, self.choices, True, self.cache)

    @property
    def token(self) -> Tensor:
        """`[S]`, int64: the token of each row."""
        assert self.order is not None
        if "token" not in self.cache:
            self.cache["token"] = self.order // self.choices
        return self.cache["token"]

    @property
    def index(self) -> Tensor | None:
        """`[S]`, int64: which row of an operand each row is; None where the operand is in order."""
        return self.token if self.gathers else None

    def zero_rest(self, t: Tensor) -> Tensor:
        """`t [S, …]`, the rows of no group zeroed in place."""
        if t.is_cpu:
            t[int(self.offsets[-1]) if self.groups else 0 :] = 0
            return t
        rest = torch.arange(self.count, device=t.device) >= self.offsets[-1]
        return t.masked_fill_(rest.view(-1, *[1] * (t.dim() - 1)), 0)


@dataclass(slots=True, eq=False)
class Adapters:
    """What differs between the L adapters of a batch, whose factors are stacked: a `[ΣR, K]`, and b as `[ΣR, N]`.

    On the host `ranks`, and `scales`, those of what dropout masked. On the device `ends` int32 `[L]`, where each one's
    ranks end in the stacks, and `factors` fp32 `[L]`, the scales. With dropout `seeds` int64 `[L]`, `p` on the host and
    `below` int32 `[L]`, its thresholds as the kernels read them; None without. An adapter's mask is that of a matrix of
    its own rows alone.
    """

    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    ends: Tensor
    factors: Tensor
    seeds: Tensor | None = None
    p: tuple[float, ...] | None = None
    below: Tensor | None = None

    @property
    def widest(self) -> int:
        """The largest rank."""
        return max(self.ranks, default=0)


def route(index: Tensor, groups: int) -> Rows:
    """The rows of choices `index [T, k]`, int64, among `groups`; an index of `groups` or more belongs to none.

    Raises ValueError for a negative index on a CPU; elsewhere nothing waits for the device, and a device-side assertion
    says so.
    """
    flat = index.reshape(-1)
    refuse_negative(flat, groups)
    # a radix sort reads its keys once for each byte of them; choices of no group stay behind the others
    keys = torch.int16 if groups < 2**15 else torch.int32
    ordered, order = flat.clamp(max=groups).to(keys).sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(groups, dtype=keys, device=index.device), right=True)
    return Rows(flat.shape[0], offsets, order, index.shape[1])


def refuse_negative(index: Tensor, groups: int, valid: Tensor | None = None) -> None:
    """Raises as `route` does; `valid`, bool `[1]`, is there where a kernel has looked."""
    if not index.is_cpu:
        torch._assert_async((index >= 0).all() if valid is None else valid, "topk_index holds a negative expert")
    elif index.numel() and int(index.min()) < 0:
        raise ValueError(f"topk_index holds {int(index.min())}; it must be an expert, 0 to {groups - 1}, or a sentinel")


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
    if t.dim() == 2:
        return result
    sizes = *t.shape[:-1], result.shape[1]
    # the same number of elements: nothing moves, and it takes half the time of the operator
    return result.resize_(sizes) if result.is_contiguous() else _unsafe_view(result, sizes)
