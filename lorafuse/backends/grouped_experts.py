"""Expert layers with LoRA by torch's grouped_mm, for the GPUs on which torch has a fast kernel for it.

The same functions as in `loop_experts`, where shapes, formula and saved tensors are said. Where the groups end stays on
the device and nothing waits for it. Of one projection, P being R and the bias's rank rounded up to 16 bytes:

    y = x W + [xa | 1 | 0] [scale b | bias | 0]ᵀ      dyb = dy [scale b | bias | 0]      dx = dy Wᵀ + dyb [a ; 0]
    da = dybᵀ x      db = scale dyᵀ xa

Each product is a grouped one; those over rows, da and db, come for all groups at once. A bias is one more rank, of
ones, so that no row looks up its group. grouped_mm leaves rows after the last group's as it finds them: products do not
read them, sums over a token's choices skip them, and what is returned for them is zeroed. Beyond the base product a
projection writes and adds a second y, since grouped_mm cannot accumulate onto the first; `cuda_experts` gives the
functions a `projection` whose kernel does both at once.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafuse.activation import Activation, Recomputed
from lorafuse.backends.routing import route

__all__ = ["experts_backward", "experts_forward", "grouped_backward", "grouped_forward"]

# grouped_mm takes rows that start on such boundaries only
_ALIGNMENT = 16


def _combine(y: Tensor, order: Tensor, ends: Tensor, k: int, weight: Tensor | None) -> Tensor:
    """`Σ_j weight[t, j] · y` of choice j of token t, `[T, H]`; y is in the order of the experts and written into."""
    S = y.shape[0]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(S, device=order.device))
    # the last row is a sentinel's if any is: zeroed, it stands for all of them
    y[-1:].masked_fill_(ends[-1] < S, 0)
    beyond = place >= ends[-1]
    place.masked_fill_(beyond, S - 1)
    if weight is not None:
        weight = weight.to(y.dtype).masked_fill(beyond.view(-1, k), 0)
    return F.embedding_bag(place.view(-1, k), y, mode="sum", per_sample_weights=weight)


def _beyond(ends: Tensor, rows: int) -> Tensor:
    """`[rows, 1]`: which rows belong to no group."""
    return (torch.arange(rows, device=ends.device) >= ends[-1]).unsqueeze(1)


def _rows(t: Tensor) -> Tensor:
    """`t`, copied unless its rows are contiguous and start on 16-byte boundaries."""
    step = t.stride(0) * t.element_size()
    fits = t.stride(1) == 1 and t.stride(0) >= t.shape[1] and step % _ALIGNMENT == t.data_ptr() % _ALIGNMENT == 0
    return t if fits else t.clone(memory_format=torch.contiguous_format)


class Projection:
    """One linear layer of every group: w `[E, N, K]`, or `[E, K, N]` when transposed; its factors in w's dtype."""

    def __init__(
        self,
        ends: Tensor,
        w: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
        transposed: bool,
    ) -> None:
        self._offs = ends.int()
        self._w = w if transposed else w.mT
        self._given, self._scale, self._bias = (a, b), scale, bias
        self.rank = 0 if a is None else a.shape[1]
        E, K, N = self._w.shape
        wanted = self.rank + (bias is not None)
        per = _ALIGNMENT // w.element_size()
        self._ranks = -(-wanted // per) * per
        self._a = self._b = None
        if a is not None:
            self._a = w.new_zeros((E, self._ranks, K))
            self._a[:, : self.rank] = a
        if wanted:
            self._b = w.new_zeros((E, N, self._ranks))
            if b is not None:
                self._b[..., : self.rank] = b * scale
            if bias is not None:
                self._b[..., self.rank] = bias

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        return F.grouped_mm(left, right, offs=self._offs)

    def _fused(self, x: Tensor, w: Tensor, low: Tensor, b: Tensor) -> Tensor:
        """`x w + low b` for w `[E, K, N]` and b `[E, P, N]`."""
        y = self._product(x, w)
        y += self._product(low, b)
        return y

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(y, xa [S, R])`."""
        if self._b is None:
            return self._product(x, self._w), x.new_empty((x.shape[0], 0))
        low = x.new_zeros((x.shape[0], self._ranks)) if self._a is None else self._product(x, self._a.mT)
        if self._bias is not None:
            low[:, self.rank] = 1
        return self._fused(x, self._w, low, self._b.mT), low[:, : self.rank].contiguous()

    def project_back(self, dy: Tensor) -> Tensor | None:
        """dyb `[S, P]`: after the ranks, ⟨dy, bias⟩; None without either."""
        return None if self._b is None else self._product(dy, self._b)

    def dx(self, dy: Tensor, dyb: Tensor | None) -> Tensor:
        if self._a is None:
            return self._product(dy, self._w.mT)
        assert dyb is not None
        return self._fused(dy, self._w.mT, dyb, self._a)

    def da(self, dyb: Tensor, x: Tensor) -> Tensor:
        return self._gradient(self._given[0], self._product(dyb.t(), x)[:, : self.rank], 1.0)

    def db(self, dy: Tensor, xa: Tensor) -> Tensor:
        xa = _rows(F.pad(xa, (0, self._ranks - self.rank)))
        return self._gradient(self._given[1], self._product(dy.t(), xa)[..., : self.rank], self._scale)

    def _gradient(self, given: Tensor | None, found: Tensor, scale: float) -> Tensor:
        """`scale · found` in the factor's dtype and packing, exactly zero for groups without rows."""
        assert given is not None
        grad = torch.empty_like(given).copy_(found)
        if scale != 1.0:
            grad *= scale
        empty = self._offs.diff(prepend=self._offs.new_zeros(1)) == 0
        return grad.masked_fill_(empty.view(-1, 1, 1), 0)


def grouped_forward(
    x: Tensor,
    ends: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    transposed: bool,
    projection: type[Projection] = Projection,
) -> tuple[Tensor, Tensor]:
    """`(y [S, N], xa [S, R])`; rows after the last group's are zero."""
    y, xa = projection(ends, w, bias, a, b, scale, transposed).forward(_rows(x))
    beyond = _beyond(ends, x.shape[0])
    return y.masked_fill_(beyond, 0), xa.masked_fill_(beyond, 0)


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
    projection: type[Projection] = Projection,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`(dx, da, db)`, None where not needed; da and db in their parameters' dtypes, zero for groups without rows."""
    layer, dy = projection(ends, w, None, a, b, scale, transposed), _rows(dy)
    dyb = layer.project_back(dy) if need_dx or need_da else None
    dx = da = db = None
    if need_dx:
        dx = layer.dx(dy, dyb).masked_fill_(_beyond(ends, dy.shape[0]), 0)
    if need_da:
        assert dyb is not None
        assert x is not None
        da = layer.da(dyb, _rows(x))
    if need_db:
        assert xa is not None
        db = layer.db(dy, xa)
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
    projection: type[Projection] = Projection,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(out [T, H], u [S, U], xa [S, R], ha [S, R'], order [S], ends [E])`; rows of sentinels are not written."""
    k = index.shape[1]
    order, ends = route(index, up.shape[0])
    first = projection(ends, up, up_bias, up_a, up_b, up_scale, transposed)
    u, xa = first.forward(x.index_select(0, order // k))
    second = projection(ends, down, down_bias, down_a, down_b, down_scale, transposed)
    y, ha = second.forward(_rows(act.forward(u)))
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
    projection: type[Projection] = Projection,
) -> tuple[Tensor | None, ...]:
    """`(dx, dweight, d up_a, d up_b, d down_a, d down_b)`, None where not needed or where there is no adapter."""
    k, dtype = weight.shape[1], x.dtype
    need_up, need_down = need_up and up_a is not None, need_down and down_a is not None
    token = order // k
    factor = weight.reshape(-1, 1).index_select(0, order).to(dtype)
    dx = dweight = d_up_a = d_up_b = d_down_a = d_down_b = dh = None
    second = projection(ends, down, down_bias, down_a, down_b, down_scale, transposed)
    h, g = _rows(act.forward(u)), dout.index_select(0, token)
    gb = second.project_back(g)
    if need_dx or need_dweight or need_up:
        dh = second.dx(g, gb)
    if need_down:
        assert gb is not None
        d_down_a, d_down_b = second.da(gb * factor, h), second.db(g, ha * factor)
    if need_dweight:
        assert dh is not None
        share = (dh * h).sum(1, dtype=torch.float32)
        if down_bias is not None:
            assert gb is not None
            share += gb[:, second.rank]
        share.masked_fill_(_beyond(ends, share.shape[0]).squeeze(1), 0)
        dweight = weight.new_empty(weight.numel()).scatter_(0, order, share.to(weight.dtype)).view(weight.shape)
    if need_dx or need_up:
        assert dh is not None
        del h
        first = projection(ends, up, None, up_a, up_b, up_scale, transposed)
        du = _rows(act.backward(u, dh.mul_(factor)))
        dyb = first.project_back(du)
        if need_up:
            assert dyb is not None
            # g is not read again: x in the order of the experts takes its place
            d_up_a, d_up_b = first.da(dyb, torch.index_select(x, 0, token, out=g)), first.db(du, xa)
        if need_dx:
            dx = _combine(first.dx(du, dyb), order, ends, k, None)
    return dx, dweight, d_up_a, d_up_b, d_down_a, d_down_b
