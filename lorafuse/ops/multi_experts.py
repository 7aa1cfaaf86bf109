"""`lorafuse::lora_experts_multi`: a block of experts whose tokens are of many adapters.

    u = W₁[e] x + bias₁[e] + scale₁ · b₁[e, g] (a₁[e, g] x)           e an expert of token t, g the token's adapter
    h = act(u)
    y = W₂[e] h + bias₂[e] + scale₂ · b₂[e, g] (a₂[e, g] h)           out[t] = Σ_j weight[t, j] · y

Shapes: x `[T, H]`, its tokens those of adapter 0, then of adapter 1, …, as `ops.multi` has rows; index and weight
`[T, k]`. The S = T·k rows of a projection are sorted once, by expert and then by adapter, so that one product of an
expert's rows is one of consecutive rows, and E · (L + 1) groups have adapters of their own. An index of E or more is a
sentinel: that choice adds nothing.

a₁ and b₂ may be shared by all experts, which is by token: xa = a₁ x and dyb = dout b₂ are computed once a token and
gathered for its choices; da₁ and db₂ are sums over tokens of what is added up over their choices first.

Returned besides out: u, xa of both projections (by token where shared), the order of the rows and where groups end. h
is computed again; the gradient of a router weight is ⟨W₂ᵀ dout, h⟩ with the low-rank part included.
"""

import torch
from torch import Tensor

from lorafuse.activation import Activation, GateLayout
from lorafuse.backends.multi import Dots, rows_by_adapter
from lorafuse.backends.protocol import Backend
from lorafuse.operands import Rows, refuse_negative
from lorafuse.ops import plain
from lorafuse.ops._define import LIBRARY, implement
from lorafuse.ops.multi import FORMS, GRADIENTS, Form
from lorafuse.ops.multi_layers import SCHEMA, MultiLayer, layers_of, low_dtype, running, widest

__all__: list[str] = []

_OPTIONS = "str activation, str gate_layout"
LIBRARY.define(
    f"lora_experts_multi(Tensor x, Tensor offsets, Tensor index, Tensor weight, {SCHEMA}, {_OPTIONS})"
    " -> (Tensor out, Tensor u, Tensor xa, Tensor ha, Tensor order, Tensor ends)"
)
LIBRARY.define(
    "lora_experts_multi_backward(Tensor dout, Tensor x, Tensor weight, Tensor u, Tensor xa, Tensor ha, Tensor order,"
    f" Tensor ends, Tensor offsets, {SCHEMA}, {GRADIENTS}, {_OPTIONS}) -> (Tensor dx, Tensor dweight)"
)


def _routed(run: Backend, index: Tensor, offsets: Tensor, experts: int) -> Rows:
    """The choices by expert and adapter."""
    refuse_negative(index, experts)
    token = torch.arange(index.shape[0], device=index.device, dtype=offsets.dtype)
    each = offsets.shape[0] + 1
    group = index * each + torch.searchsorted(offsets, token, right=True).unsqueeze(1)
    # a sentinel belongs to no group
    rows = run.route(group.masked_fill(index >= experts, experts * each), experts * each)
    return Rows(rows.count, rows.offsets.int(), rows.order, rows.choices, cache=rows.cache)


def _parts(u: Tensor, layout: str) -> tuple[Tensor, Tensor | None]:
    """Gate and up."""
    if layout == GateLayout.NONE:
        return u, None
    if layout == GateLayout.INTERLEAVED:
        return u[:, ::2], u[:, 1::2]
    half = u.shape[1] // 2
    return u[:, :half], u[:, half:]


def _is_shared(factor: Tensor) -> bool:
    return factor.dim() == 2


def _forward(x, offsets, index, weight, *arguments):
    *of_layers, activation, layout = arguments
    layers = layers_of(x, False, of_layers)
    up, down = layers
    with running(layers, x) as run:
        x = run.matrix(x)
        tokens, rows = rows_by_adapter(offsets, x.shape[0]), _routed(run, index, offsets, up.weight.stored[0])
        given, gathered = run.in_order(x, rows, None)
        xa = up.xa(x, tokens) if _is_shared(up.a) else up.xa(given, gathered)
        u = up.y(given, xa.index_select(0, rows.token) if _is_shared(up.a) else xa, gathered)
        h = up.multi.activate(activation, *_parts(u, layout), rows, up.adapters)
        ha = down.xa(h, rows)
        out = run.combine(down.y(h, ha, rows), rows, weight)
        return out, u, xa, ha, rows.order, rows.offsets


def _fake_forward(x, offsets, index, weight, *arguments):
    (up, rank), (_, down_rank) = widest(arguments)
    S, low = index.shape[0] * index.shape[1], low_dtype(x, arguments[14])
    xa = x.new_empty((x.shape[0] if _is_shared(arguments[2][0]) else S, rank), dtype=low)
    made = x.new_empty((S, up.sizes[0])), xa, x.new_empty((S, down_rank), dtype=low)
    groups = up.stored[0] * (offsets.shape[0] + 1)
    return torch.empty_like(x), *made, index.new_empty(S), offsets.new_empty(groups)


def _backward(dout, x, weight, u, xa, ha, order, ends, offsets, *arguments):
    *of_layers, da, db, needs, activation, layout = arguments
    layers = layers_of(dout, True, of_layers)
    up, down = layers
    need_dx, *of_factors, need_dweight = needs
    # nobody may adapt a projection: there are no ranks to sum then
    adapted = [layer.adapters.widest > 0 for layer in (up, down)] * 2
    need_up_a, need_down_a, need_up_b, need_down_b = (
        need and here for need, here in zip(of_factors, adapted, strict=True)
    )
    dx = dweight = None
    with running(layers, dout) as run:
        dout, x = run.matrix(dout), run.matrix(x)
        tokens = rows_by_adapter(offsets, x.shape[0])
        rows = Rows(order.shape[0], ends, order, weight.shape[1])
        row_scale = weight.reshape(-1)[order]
        g, gathered = run.in_order(dout, rows, None)
        gb = _of_outputs(down, dout, g, tokens, gathered)
        need_du = need_dx or need_up_a or need_up_b
        if need_du or need_dweight:
            dh, du = down.dx(g, gb, gathered), torch.empty_like(u)
            gradients, dots = _parts(du, layout), Dots(g, gathered, down.bias) if need_dweight else None
            h, dots = down.multi.activate_backward(
                activation, dh, *_parts(u, layout), *gradients, rows, up.adapters, row_scale=row_scale, dots=dots
            )
            if need_dweight:
                # what an activation makes of rows of no group may be no number
                beyond = torch.arange(rows.count, device=ends.device) >= ends[-1]
                dots = dots.to(weight.dtype).masked_fill_(beyond, 0)
                dweight = weight.new_empty(weight.numel()).scatter_(0, order, dots).view(weight.shape)
        else:
            h = down.multi.activate(activation, *_parts(u, layout), rows, up.adapters)
        factor = row_scale.unsqueeze(1)
        if need_down_a:
            down.add_da(gb * factor.to(gb.dtype), h, rows, da[1])
        if need_down_b and _is_shared(down.b):
            # combine may write into what it sums
            down.add_db(run.combine(ha.clone(), rows, weight), dout, tokens, db[1])
        elif need_down_b:
            down.add_db(ha * factor.to(ha.dtype), g, gathered, db[1])
        del h, g
        if need_du:
            dyb = up.dyb(du, rows)
            if need_up_b:
                of_rows = xa.index_select(0, rows.token) if _is_shared(up.a) else xa
                up.add_db(of_rows, du, rows, db[0])
            if need_dx:
                dx = run.combine(up.dx(du, dyb, rows), rows, None)
            if need_up_a and _is_shared(up.a):
                up.add_da(run.combine(dyb, rows, None), x, tokens, da[0])
            elif need_up_a:
                up.add_da(dyb, *run.in_order(x, rows, None), da[0])
    return dout.new_empty(0) if dx is None else dx, dout.new_empty(0) if dweight is None else dweight


def _of_outputs(down: MultiLayer, dout: Tensor, g: Tensor, tokens: Rows, gathered: Rows) -> Tensor:
    """dyb of the second projection, for every row."""
    return down.dyb(dout, tokens).index_select(0, gathered.token) if _is_shared(down.b) else down.dyb(g, gathered)


def _fake_backward(dout, x, weight, *arguments):
    needs = arguments[-3]
    return x.new_empty(x.shape if needs[0] else 0), weight.new_empty(weight.shape if needs[-1] else 0)


implement("lora_experts_multi", _forward, _fake_forward)
implement("lora_experts_multi_backward", _backward, _fake_backward)


def _run(x, offsets, others, arguments, options):
    out, *saved = torch.ops.lorafuse.lora_experts_multi(x, offsets, *others, *arguments, *options)
    return [out], saved


def _run_backward(douts, x, saved, offsets, others, arguments, gradients, options):
    op = torch.ops.lorafuse.lora_experts_multi_backward
    return op(douts[0], x, others[1], *saved, offsets, *arguments, *gradients, *options)


def _plain(x, offsets, others, layers, options):
    activation, layout = options
    each = [(w, bias, a, b, ranks, scales) for w, bias, a, b, _, ranks, scales, _ in layers]
    return [plain.experts_multi(x, offsets, *others, each, Activation(activation, GateLayout(layout)))]


FORMS["experts"] = Form(_run, _run_backward, _plain)
