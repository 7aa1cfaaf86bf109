"""Expert layers with LoRA in plain torch: tokens sorted by expert once, then one group of rows after the other.

    u = W₁ x + bias₁ + scale₁ · b₁ (a₁ x)        h = act(u)        y = W₂ h + bias₂ + scale₂ · b₂ (a₂ h)
    out[t] = Σ_j weight[t, j] · y of expert index[t, j] for token t

Shapes: x [T, H], index and weight [T, k], W₁ [E, U, H] and W₂ [E, H, I], or [E, H, U] and [E, I, H] when transposed;
biases [E, U] and [E, H]; a₁ [E, R, H], b₁ [E, U, R], a₂ [E, R', I], b₂ [E, H, R']. An index of E or more is a
sentinel: that choice adds nothing. Experts without rows are not touched.

Saved for backward: x, u, xa = a₁ x, ha = a₂ h, all over the T·k rows in the order of their experts. h is computed
again; the gradient of a router weight is ⟨W₂ᵀ dout, h⟩ with the low-rank part included, so y is not saved. There is
no temporary of a weight's size and no gradient of W₁ or W₂. The sum over k is that of a fixed order.

Each kind of product runs over all groups before the next one does: between two base products, which stream a weight
through the caches, the small ones of the low-rank path take twice the time. Where the groups end is read on the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafuse.activation import Activation, Recomputed
from lorafuse.backends.factors import Stack, stack

__all__ = ["experts_backward", "experts_forward", "grouped_backward", "grouped_forward"]

# of the rows of a product by dtype: oneDNN, which multiplies these, compiles a kernel for each size it meets
_STEP = {torch.bfloat16: 32, torch.float16: 32}
# group, its rows
_Segments = Sequence[tuple[int, slice]]


def _segments(ends: Tensor) -> list[tuple[int, slice]]:
    """Every group that has rows."""
    bounds = [0, *ends.tolist()]
    return [
        (e, slice(first, last))
        for e, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        if last > first
    ]


def _route(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """`(order [T·k], ends [E])`: choices in the order of their experts, and where each expert's end."""
    flat = index.reshape(-1)
    if flat.numel() and int(flat.min()) < 0:
        raise ValueError(f"topk_index holds {int(flat.min())}; it must be an expert, 0 to {experts - 1}, or a sentinel")
    order = flat.argsort(stable=True)
    counts = flat.clamp(max=experts).bincount(minlength=experts + 1)[:experts]
    return order, counts.cumsum(0)


def _combine(y: Tensor, order: Tensor, ends: Tensor, k: int, weight: Tensor | None) -> Tensor:
    """`Σ_j weight[t, j] · y` of choice j of token t, `[T, H]`, for rows y in the order of their experts."""
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    if order.shape[0] == 0:
        return y.new_empty((0, y.shape[1]))
    if weight is not None:
        # a sentinel adds nothing, whatever its weight is; its row is zero
        weight = weight.to(y.dtype).masked_fill((place >= ends[-1]).view(-1, k), 0)
    return F.embedding_bag(place.view(-1, k), y, mode="sum", per_sample_weights=weight)


def _oriented(w: Tensor, transposed: bool) -> Tensor:
    """The weight of one expert as `[K, N]`, a right operand."""
    return w if transposed else w.t()


def _rounded_up(rows: slice, last: int, dtype: torch.dtype) -> slice:
    """A group's rows and some of the next ones', which are computed with theirs later, so that sizes are few."""
    step = _STEP.get(dtype, 1)
    return slice(rows.start, min(rows.start + -(-(rows.stop - rows.start) // step) * step, last))


def _base(x: Tensor, right: Tensor, y: Tensor, rows: slice, last: int, accumulate: bool) -> None:
    """`y[rows] = x[rows] right`, or added to what y holds."""
    wide = _rounded_up(rows, last, x.dtype)
    if not accumulate:
        torch.mm(x[wide], right, out=y[wide])
        return
    beyond = slice(rows.stop, wide.stop)
    kept = y[beyond].clone()
    y[wide].addmm_(x[wide], right)
    y[beyond] = kept


def _over_rows(left: Tensor, right: Tensor) -> Tensor:
    """`leftᵀ right`; a multiple of some rows and the rest apart, so that sizes are few, their sum in fp32.

    A sum over rows leaves fp16's range where its terms and its product with the scale do not: there it is all fp32.
    """
    if left.dtype is torch.float16:
        left, right = left.float(), right.float()
    step, wide = _STEP.get(left.dtype, 1), torch.promote_types(left.dtype, torch.float32)
    whole = left.shape[0] // step * step
    if whole in (0, left.shape[0]):
        return torch.mm(left.t(), right)
    parts = (torch.mm(left[rows].t(), right[rows]) for rows in (slice(whole), slice(whole, None)))
    return torch.add(*parts, out=left.new_empty((left.shape[1], right.shape[1]), dtype=wide))


def _rank(a: Tensor | None) -> int:
    return 0 if a is None else a.shape[1]


def _forward(
    segments: _Segments,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    transposed: bool,
    y: Tensor,
) -> tuple[Tensor, Tensor]:
    """`(y, xa)`; y is written into."""
    last = segments[-1][1].stop if segments else 0
    xa = x.new_empty((x.shape[0], _rank(a)))
    if a is not None and b is not None:
        factors = Stack(a, x.dtype)
        for e, rows in segments:
            wide = _rounded_up(rows, last, x.dtype)
            torch.mm(x[wide], factors[e].t(), out=xa[wide])
        factors = Stack(b, x.dtype, scale=scale)
        for e, rows in segments:
            wide = _rounded_up(rows, last, x.dtype)
            torch.mm(xa[wide], factors[e].t(), out=y[wide])
    for e, rows in segments:
        _base(x, _oriented(w[e], transposed), y, rows, last, accumulate=a is not None)
        if bias is not None:
            y[rows].add_(bias[e])
    y[last:].zero_()
    xa[last:].zero_()
    return y, xa


def grouped_forward(
    x: Tensor,
    ends: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """`(y [S, N], xa [S, R])`: group e's linear layer over rows `ends[e-1] … ends[e]`; rows after the last are zero.

    Raises ValueError for ends that descend or lead outside x.
    """
    bounds = [0, *ends.tolist(), x.shape[0]]
    if bounds != sorted(bounds):
        raise ValueError(f"offsets are {bounds[1:-1]}; they must ascend from 0 to at most {x.shape[0]}, the rows of x")
    y = x.new_empty((x.shape[0], w.shape[2] if transposed else w.shape[1]))
    return _forward(_segments(ends), x, w, bias, a, b, scale, transposed, y)


def _backward(
    segments: _Segments,
    dy: Tensor,
    x: Tensor | None,
    xa: Tensor | None,
    w: Tensor,
    a: Stack | None,
    b: Stack | None,
    transposed: bool,
    dx: Tensor | None,
    need_da: bool,
    need_db: bool,
    factor: Tensor | None = None,
) -> None:
    """dx is written into last, unless it is None; da and db without their scale are collected in their stacks, where
    `factor [S, 1]` is that of each row. a is read scaled and b is not, so that `dyb` stays in fp16's range.
    """
    dyb = None
    last = segments[-1][1].stop if segments else 0
    if a is not None and b is not None and (dx is not None or need_da):
        dyb = dy.new_empty((dy.shape[0], a.shape[1]))
        for e, rows in segments:
            wide = _rounded_up(rows, last, dy.dtype)
            torch.mm(dy[wide], b[e], out=dyb[wide])
    if need_db:
        assert b is not None
        assert xa is not None
        scaled = xa if factor is None else xa * factor
        for e, rows in segments:
            b.collect(e, _over_rows(dy[rows], scaled[rows]))
    if need_da:
        assert a is not None
        assert x is not None
        assert dyb is not None
        scaled = dyb if factor is None else dyb * factor
        for e, rows in segments:
            a.collect(e, _over_rows(scaled[rows], x[rows]))
    if dx is not None:
        if dyb is not None:
            assert a is not None
            for e, rows in segments:
                wide = _rounded_up(rows, last, dy.dtype)
                torch.mm(dyb[wide], a[e], out=dx[wide])
        for e, rows in segments:
            _base(dy, _oriented(w[e], transposed).t(), dx, rows, last, accumulate=dyb is not None)
        dx[last:].zero_()


def grouped_backward(
    dy: Tensor,
    x: Tensor | None,
    xa: Tensor | None,
    ends: Tensor,
    w: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    transposed: bool,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`(dx, da, db)`, None where not needed; da and db in their parameters' dtypes, zero for groups without rows."""
    low = stack(a, dy.dtype, need_da, scale), stack(b, dy.dtype, need_db)
    dx = dy.new_empty((dy.shape[0], w.shape[1] if transposed else w.shape[2])) if need_dx else None
    _backward(_segments(ends), dy, x, xa, w, *low, transposed, dx, need_da, need_db)
    da, db = (None if s is None else s.gradient(ends, scale) for s in low)
    return dx, da, db


def experts_forward(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    up_scale: float,
    down_scale: float,
    transposed: bool,
    act: Activation | Recomputed,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(out [T, H], u [S, U], xa [S, R], ha [S, R'], order [S], ends [E])` with S = T·k, in x's dtype."""
    k = index.shape[1]
    order, ends = _route(index, up.shape[0])
    segments = _segments(ends)
    rows = x.index_select(0, order // k)
    u = x.new_empty((order.shape[0], up.shape[2] if transposed else up.shape[1]))
    u, xa = _forward(segments, rows, up, up_bias, up_a, up_b, up_scale, transposed, u)
    # x is not read again: y takes its place
    y, ha = _forward(segments, act.forward(u), down, down_bias, down_a, down_b, down_scale, transposed, rows)
    return _combine(y, order, ends, k, weight), u, xa, ha, order, ends


def experts_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    up_scale: float,
    down_scale: float,
    transposed: bool,
    act: Activation | Recomputed,
    u: Tensor,
    xa: Tensor,
    ha: Tensor,
    order: Tensor,
    ends: Tensor,
    need_dx: bool,
    need_dweight: bool,
    need_up: bool,
    need_down: bool,
) -> tuple[Tensor | None, ...]:
    """`(dx, dweight, d up_a, d up_b, d down_a, d down_b)`, None where not needed or where there is no adapter.

    `need_up` and `need_down` ask for both factors of an adapter.
    """
    k, dtype = weight.shape[1], x.dtype
    need_up, need_down = need_up and up_a is not None, need_down and down_a is not None
    segments, token = _segments(ends), order // k
    factor = weight.reshape(-1, 1).index_select(0, order).to(dtype)
    h, g = act.forward(u), dout.index_select(0, token)
    low = stack(down_a, dtype, need_down, down_scale), stack(down_b, dtype, need_down)
    dh = torch.empty_like(h) if need_dx or need_dweight or need_up else None
    _backward(segments, g, h, ha, down, *low, transposed, dh, need_down, need_down, factor)
    d_down = [None if s is None else s.gradient(ends, down_scale) for s in low]
    dx = dweight = None
    if need_dweight:
        assert dh is not None
        share = torch.linalg.vecdot(dh, h)
        if down_bias is not None:
            for e, rows in segments:
                share[rows] += torch.mv(g[rows], down_bias[e])
        # an activation may make of a sentinel's row what is no number
        share[segments[-1][1].stop if segments else 0 :] = 0
        dweight = weight.new_empty(weight.shape)
        dweight.view(-1)[order] = share.to(weight.dtype)
    low = stack(up_a, dtype, need_up, up_scale), stack(up_b, dtype, need_up)
    if need_dx or need_up:
        assert dh is not None
        del h
        du = act.backward(u, dh.mul_(factor))
        # g is not read again: x in the order of the experts takes its place, and then dx
        rows_x = torch.index_select(x, 0, token, out=g) if need_up else None
        dx = g if need_dx else None
        _backward(segments, du, rows_x, xa, up, *low, transposed, dx, need_up, need_up)
    d_up = [None if s is None else s.gradient(ends, up_scale) for s in low]
    return None if dx is None else _combine(dx, order, ends, k, None), dweight, *d_up, *d_down
