"""`LoRALinearMulti`: a frozen linear layer with many LoRA adapters, whose rows one call may mix."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorafuse.formats import adopt
from lorafuse.functional import MultiProjection, lora_linears_multi
from lorafuse.operands import Weight

if TYPE_CHECKING:
    from lorafuse.nn.multi_groups import MultiSiblings

__all__ = ["AdapterRows", "AdapterStack", "LoRALinearMulti", "multi_projections", "refuse_late_call", "shared_rows"]


class AdapterRows:
    """Which adapter each row of a call has: `index` int64, `[B]` for each sample or `[B, T, …]` for each token.

    Adapters are 0 … count - 1, and `count` is none. `is_sorted` says that they ascend, so that no row is moved.
    `seeds` int64 `[count]` are those of their dropout masks, None without.
    """

    def __init__(self, index: Tensor, count: int, is_sorted: bool, seeds: Tensor | None = None) -> None:
        self.index, self.count, self.is_sorted, self.seeds = index, count, is_sorted, seeds
        self._rows: dict[tuple[int, ...], tuple[Tensor, Tensor | None, Tensor | None]] = {}

    def of(self, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`(offsets, order, place)` of x `[*sizes, K]`: row i of the sorted ones is row `order[i]` of x, and row j of x
        is row `place[j]`; both None where they are in order. Raises ValueError for sizes that the index does not fit.
        """
        if sizes not in self._rows:
            # rows of a generation may be those of a training step too, whose backward saves them
            with torch.inference_mode(False):
                self._rows[sizes] = self._sorted(sizes)
        return self._rows[sizes]

    def _sorted(self, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        given = tuple(self.index.shape)
        if given != sizes[: len(given)]:
            raise ValueError(
                f"adapters are given for {list(given)} samples or tokens, x is [{', '.join(map(str, sizes))}, K]; "
                "the first sizes must be the same"
            )
        index = self.index.reshape(*given, *[1] * (len(sizes) - len(given))).expand(sizes).reshape(-1).contiguous()
        order = place = None
        if not self.is_sorted:
            index, order = index.sort(stable=True)
            place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        adapters = torch.arange(self.count, device=index.device)
        return torch.searchsorted(index, adapters, right=True, out_int32=True), order, place

    def sorted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of x `[*sizes, K]` in the order of their adapters, `[rows, K]`, and where each adapter's end."""
        offsets, order, _ = self.of(tuple(x.shape[:-1]))
        flat = x.reshape(-1, x.shape[-1])
        return flat if order is None else flat.index_select(0, order), offsets

    def restored(self, y: Tensor, x: Tensor) -> Tensor:
        """y `[rows, N]` of sorted rows as x has them, `[*sizes, N]`."""
        _, _, place = self.of(tuple(x.shape[:-1]))
        y = y if place is None else y.index_select(0, place)
        return y.view(*x.shape[:-1], y.shape[-1])


def shared_rows(layers: Sequence[LoRALinearMulti]) -> AdapterRows | None:
    """The rows of layers that run as one operator; None without. Raises ValueError for rows that are not the same."""
    every = {id(layer.rows): layer.rows for layer in layers}
    if len(every) > 1:
        raise ValueError("layers that run as one operator have rows of different pools, or some have none")
    return next(iter(every.values()), None)


def multi_projections(layers: Sequence[nn.Module], rows: AdapterRows) -> list[MultiProjection]:
    """Layers of many adapters and frozen `nn.Linear`s, as the operators take them."""
    return [
        layer.projection(rows) if isinstance(layer, LoRALinearMulti) else MultiProjection(layer.weight, bias=layer.bias)  # type: ignore[arg-type]
        for layer in layers
    ]


class AdapterStack(nn.Module):
    """The factors of many adapters of one weight, stacked: parameters `a [ΣR, K]` and `b [ΣR, N]` (transposed).

    Of experts they are `[ΣR, E, K]` and `[ΣR, E, N]`, so that an adapter's part is one block of memory; a factor that
    all experts have in common lacks E. Backward adds their gradients to `a_grad` and `b_grad`, for the adapters with
    rows alone, until somebody zeroes them.
    """

    a_grad: Tensor
    b_grad: Tensor

    def __init__(
        self, a: tuple[int, ...], b: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:  # fmt: skip
        """`a` and `b` are the sizes of one rank, `(K,)` or `(E, K)`."""
        super().__init__()
        self.ranks: tuple[int, ...] = ()
        self.scales: tuple[float, ...] = ()
        self.dropout_p: tuple[float, ...] = ()
        self.register_buffer("a_grad", None, persistent=False)
        self.register_buffer("b_grad", None, persistent=False)
        self._hold(*(torch.empty(0, *size, dtype=dtype, device=device) for size in (a, b, a, b)))

    def insert(self, at: int, a: Tensor, b: Tensor) -> None:
        """Put the factors of an adapter, of its rank, before the one at this place; their gradients are zero."""
        first = sum(self.ranks[:at])
        parts = a, b, torch.zeros_like(a), torch.zeros_like(b)
        self._hold(*(
            torch.cat((t[:first], part.to(t), t[first:])) for t, part in zip(self._tensors(), parts, strict=True)
        ))  # fmt: skip
        self.ranks = (*self.ranks[:at], a.shape[0], *self.ranks[at:])

    def fill(self, factors: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Hold these adapters alone, each as `insert` takes it; gradients are zero."""
        empty = [t[:0] for t in self._tensors()[:2]]
        a, b = (torch.cat([t, *(pair[i].to(t) for pair in factors)]) for i, t in enumerate(empty))
        self._hold(a, b, torch.zeros_like(a), torch.zeros_like(b))
        self.ranks = tuple(len(one) for one, _ in factors)

    def remove(self, at: int) -> None:
        """Take an adapter out."""
        mine = self.of(at)
        self._hold(*(torch.cat((t[: mine.start], t[mine.stop :])) for t in self._tensors()))
        self.ranks = (*self.ranks[:at], *self.ranks[at + 1 :])

    def of(self, i: int) -> slice:
        """Which rows of the stacks are those of the i-th adapter."""
        bounds = tuple(itertools.accumulate(self.ranks[: i + 1], initial=0))
        return slice(bounds[i], bounds[i + 1])

    def operands(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """a `[(E,) ΣR, K]`, b `[(E,) N, ΣR]` and the buffers of their gradients, as the operators take them."""
        return _left(self.a), _left(self.b).mT, (_left(self.a_grad), _left(self.b_grad).mT)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.a.detach(), self.b.detach(), self.a_grad, self.b_grad

    @torch.no_grad()
    def _hold(self, a: Tensor, b: Tensor, a_grad: Tensor, b_grad: Tensor) -> None:
        # backward of a call before would add to the former buffers, which nobody reads: autograd refuses what it saved
        # as changed in place
        for t in (self._parameters.get("a"), self._parameters.get("b")):
            if t is not None:
                torch.autograd.graph.increment_version(t)
        self.a, self.b, self.a_grad, self.b_grad = nn.Parameter(a), nn.Parameter(b), a_grad, b_grad


def _left(stack: Tensor) -> Tensor:
    return stack if stack.dim() == 2 else stack.transpose(0, 1)


def refuse_late_call(had_rows: bool) -> None:
    """Raise RuntimeError for a call without rows within backward of one that had some: a checkpoint's, whose gradients
    would be lost.
    """
    if had_rows and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a layer with many adapters runs forward again in backward (a checkpoint) outside of use_adapters: "
            "keep backward within it; for calls of the base alone, within use_adapters([-1, …])"
        )


class LoRALinearMulti(AdapterStack):
    """`base`, frozen, plus for each row the low-rank path of its adapter.

    The adapters are stacked in `a`, `b` and the buffers of their gradients (`AdapterStack`). `rows` says which rows the
    next calls have; None is the base alone. `lorafuse.adapters.AdapterPool` fills all of these.

    base is an `nn.Linear` or a quantized layer that `lorafuse.formats.adopt` knows, which is computed in x's dtype;
    TypeError for another.
    """

    def __init__(self, base: nn.Module, adapter_dtype: torch.dtype = torch.float32) -> None:
        weight = _weight_of(base)
        N, K = weight.sizes
        super().__init__((K,), (N,), adapter_dtype, weight.data.device)
        self.base = base.requires_grad_(False)
        self.rows: AdapterRows | None = None
        # whether the last `AdapterPool.use_adapters` gave it any
        self.had_rows = False
        # the layers that it may run with as one operator
        self.siblings: MultiSiblings | None = None
        # of the mask, so that layers of one call do not have the same
        self.number = 0

    @property
    def weight(self) -> Weight:
        """That of the base as it is now."""
        return _weight_of(self.base)

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.sizes[1]

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.sizes[0]

    def projection(self, rows: AdapterRows) -> MultiProjection:
        """The layer as the operators take it."""
        a, b, buffers = self.operands()
        return MultiProjection(
            self.weight,
            a,
            b,
            self.ranks,
            self.scales,
            self.base.bias,  # type: ignore[arg-type]
            self.dropout_p if self.training else None,
            None if rows.seeds is None else rows.seeds + self.number,
            buffers,
        )

    def forward(self, x: Tensor) -> Tensor:
        """y `[…, N]` for x `[…, K]`."""
        rows = self.rows
        if rows is None:
            refuse_late_call(self.had_rows)
            return self.base(x)
        if self.siblings is not None:
            y = self.siblings.output(self, x)
            if y is not None:
                return y
        # through the operator where no adapter has ranks here too, whose rows keep their bits then
        flat, offsets = rows.sorted(x)
        (y,) = lora_linears_multi(flat, offsets, [self.projection(rows)])
        return rows.restored(y, x)


def _weight_of(base: nn.Module) -> Weight:
    weight = base._parameters.get("weight")
    is_linear = type(base).forward is nn.Linear.forward
    # every call asks, and adopt tries one format after the other
    if is_linear and type(weight) is nn.Parameter:
        return Weight(weight)
    stored = adopt(base)
    if stored is None and is_linear and weight is not None:
        stored = adopt(weight)
    if stored is None:
        raise TypeError(f"got a {type(base).__name__}; it must be an nn.Linear or a quantized layer")
    return stored
