"""Expert layers with LoRA in plain torch: tokens sorted by expert once, then each expert's rows on their own.

    u = W₁ x + bias₁ + scale₁ · b₁ (a₁ x)        h = act(u)        y = W₂ h + bias₂ + scale₂ · b₂ (a₂ h)
    out[t] = Σ_j weight[t, j] · y of expert index[t, j] for token t

Shapes: x [T, H], index and weight [T, k], W₁ [E, U, H] and W₂ [E, H, I], or [E, H, U] and [E, I, H] when transposed;
biases [E, U] and [E, H]; a₁ [E, R, H], b₁ [E, U, R], a₂ [E, R', I], b₂ [E, H, R']. An index of E or more is a
sentinel: that choice adds nothing. Experts without rows are not touched.

Saved for backward: x, u, xa = a₁ x, ha = a₂ h, all over the T·k rows in the order of their experts. h is computed
again; the gradient of a router weight is ⟨W₂ᵀ dout, h⟩ with the low-rank part included, so y is not saved. There is
no temporary of a weight's size and no gradient of W₁ or W₂. The sum over k is that of a fixed order.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lorafuse.activation import Activation, Recomputed

__all__ = ["experts_backward", "experts_forward", "grouped_backward", "grouped_forward"]


def _segments(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """`(group, first row, last row + 1)` of every group that has rows."""
    first = 0
    for group, last in enumerate(ends.tolist()):
        if last > first:
            yield group, first, last
        first = last


def _route(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """`(order [T·k], ends [E])`: choices in the order of their experts, and where each expert's end."""
    flat = index.reshape(-1)
    if flat.numel() and int(flat.min()) < 0:
        raise ValueError(f"topk_index holds {int(flat.min())}; it must be an expert, 0 to {experts - 1}, or a sentinel")
    order = flat.argsort(stable=True)
    counts = flat.clamp(max=experts).bincount(minlength=experts + 1)[:experts]
    return order, counts.cumsum(0)


def _oriented(w: Tensor, transposed: bool) -> Tensor:
    """The weight of one expert as `[K, N]`, a right operand."""
    return w if transposed else w.t()


def _apply(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float, y: Tensor, xa: Tensor
) -> None:
    """`y = x w + bias + scale · xa bᵀ`, with `xa = x aᵀ`, both written into; w is `[K, N]`."""
    if bias is None:
        torch.mm(x, w, out=y)
    else:
        torch.addmm(bias, x, w, out=y)
    if a is not None and b is not None:
        torch.mm(x, a.t(), out=xa)
        y.addmm_(xa, b.t(), alpha=scale)


def _in(dtype: torch.dtype, *factors: Tensor | None) -> list[Tensor | None]:
    """Factors in x's dtype, each group's contiguous: PEFT packs lora_B with neighbours from different experts."""

    def convert(t: Tensor) -> Tensor:
        if t.stride(0) == 0:
            # one factor shared by all groups stays one
            return t[:1].to(dtype).contiguous().expand_as(t)
        return t.to(dtype, memory_format=torch.contiguous_format)

    return [None if t is None else convert(t) for t in factors]


def _factors(e: int, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if a is None or b is None else (a[e], b[e])


def _rank(a: Tensor | None) -> int:
    return 0 if a is None else a.shape[1]


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
    """`(y [S, N], xa [S, R])`: group e's linear layer over rows `ends[e-1] … ends[e]`; rows after the last are zero."""
    a, b = _in(x.dtype, a, b)
    y = x.new_empty((x.shape[0], w.shape[2] if transposed else w.shape[1]))
    xa = x.new_empty((x.shape[0], _rank(a)))
    last = 0
    for e, first, last in _segments(ends):
        rows = slice(first, last)
        low = _factors(e, a, b)
        _apply(x[rows], _oriented(w[e], transposed), None if bias is None else bias[e], *low, scale, y[rows], xa[rows])
    y[last:].zero_()
    xa[last:].zero_()
    return y, xa


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
    da = torch.zeros_like(a, memory_format=torch.contiguous_format) if need_da and a is not None else None
    db = torch.zeros_like(b, memory_format=torch.contiguous_format) if need_db and b is not None else None
    a, b = _in(dy.dtype, a, b)
    dx = dy.new_empty((dy.shape[0], w.shape[1] if transposed else w.shape[2])) if need_dx else None
    last = 0
    for e, first, last in _segments(ends):
        rows = slice(first, last)
        if a is not None and b is not None and (need_dx or need_da):
            dyb = torch.mm(dy[rows], b[e]).mul_(scale)
        if dx is not None:
            torch.mm(dy[rows], _oriented(w[e], transposed).t(), out=dx[rows])
            if a is not None:
                dx[rows].addmm_(dyb, a[e])
        if da is not None:
            assert x is not None
            da[e] = torch.mm(dyb.t(), x[rows])
        if db is not None:
            assert xa is not None
            db[e] = torch.mm(dy[rows].t(), xa[rows]).mul_(scale)
    if dx is not None:
        dx[last:].zero_()
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
    (T, H), k = x.shape, index.shape[1]
    up_a, up_b, down_a, down_b = _in(x.dtype, up_a, up_b, down_a, down_b)
    order, ends = _route(index, up.shape[0])
    S = order.shape[0]
    # rows of sentinels are never read as anything but zero
    u = x.new_zeros((S, up.shape[2] if transposed else up.shape[1]))
    xa, ha = x.new_zeros((S, _rank(up_a))), x.new_zeros((S, _rank(down_a)))
    y = x.new_zeros((S, H))
    factors = weight.reshape(-1).to(x.dtype)
    for e, first, last in _segments(ends):
        rows, chosen = slice(first, last), order[first:last]
        low = _factors(e, up_a, up_b)
        bias = None if up_bias is None else up_bias[e]
        _apply(x[chosen // k], _oriented(up[e], transposed), bias, *low, up_scale, u[rows], xa[rows])
        h = act.forward(u[rows])
        low = _factors(e, down_a, down_b)
        bias = None if down_bias is None else down_bias[e]
        y_e = x.new_empty((last - first, H))
        _apply(h, _oriented(down[e], transposed), bias, *low, down_scale, y_e, ha[rows])
        y[chosen] = y_e.mul_(factors[chosen].unsqueeze(1))
    return y.view(T, k, H).sum(1), u, xa, ha, order, ends


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
    (T, H), k = x.shape, weight.shape[1]
    dtype = x.dtype
    grads = [
        torch.zeros_like(t, memory_format=torch.contiguous_format) if need and t is not None else None
        for need, t in ((need_up, up_a), (need_up, up_b), (need_down, down_a), (need_down, down_b))
    ]
    d_up_a, d_up_b, d_down_a, d_down_b = grads
    up_a, up_b, down_a, down_b = _in(dtype, up_a, up_b, down_a, down_b)
    dweight = torch.zeros_like(weight).reshape(-1) if need_dweight else None
    dx = x.new_zeros((order.shape[0], H)) if need_dx else None
    factors = weight.reshape(-1).to(dtype).unsqueeze(1)
    for e, first, last in _segments(ends):
        rows, chosen = slice(first, last), order[first:last]
        token, factor = chosen // k, factors[chosen]
        g, h = dout[token], act.forward(u[rows])
        dh = torch.mm(g, _oriented(down[e], transposed).t())
        if down_a is not None and down_b is not None:
            gb = torch.mm(g, down_b[e]).mul_(down_scale)
            dh.addmm_(gb, down_a[e])
            if d_down_a is not None and d_down_b is not None:
                d_down_a[e] = torch.mm((gb * factor).t(), h)
                d_down_b[e] = torch.mm(g.t(), ha[rows] * factor).mul_(down_scale)
        if dweight is not None:
            share = torch.linalg.vecdot(dh, h)
            if down_bias is not None:
                share += torch.mv(g, down_bias[e])
            dweight[chosen] = share.to(dweight.dtype)
        if not need_dx and d_up_a is None:
            continue
        du = act.backward(u[rows], dh.mul_(factor))
        if up_a is not None and up_b is not None:
            dyb = torch.mm(du, up_b[e]).mul_(up_scale)
            if d_up_a is not None and d_up_b is not None:
                d_up_a[e] = torch.mm(dyb.t(), x[token])
                d_up_b[e] = torch.mm(du.t(), xa[rows]).mul_(up_scale)
        if dx is not None:
            dx_e = torch.mm(du, _oriented(up[e], transposed).t())
            if up_a is not None:
                dx_e.addmm_(dyb, up_a[e])
            dx[chosen] = dx_e
    return (
        None if dx is None else dx.view(T, k, H).sum(1),
        None if dweight is None else dweight.view_as(weight),
        *grads,
    )
