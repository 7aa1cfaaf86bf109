"""`lorafuse::lora_experts`: schema, fake kernels, autograd; the experts of a mixture-of-experts block with LoRA.

    u = W₁ x + bias₁ + scale₁ · b₁ (a₁ x)        h = act(u)        y = W₂ h + bias₂ + scale₂ · b₂ (a₂ h)
    out[t] = Σ_j weight[t, j] · y of expert index[t, j] for token t

Shapes: x [T, H], index and weight [T, k], W₁ [E, U, H] and W₂ [E, H, I], or [E, H, U] and [E, I, H] when transposed;
biases [E, U] and [E, H]; a₁ [E, R, H], b₁ [E, U, R], a₂ [E, R', I], b₂ [E, H, R']. An index of E or more is a
sentinel: that choice adds nothing.

Returned besides out, so that a compiled graph holds what backward needs: u, xa = a₁ x and ha = a₂ h over the S = T·k
rows in the order of their experts, that order, and where each expert's rows end. h is computed again; the gradient of a
router weight is ⟨W₂ᵀ dout, h⟩ with the low-rank part included, so y is not saved. There is no gradient of an expert's
weights or biases. Gradients of gradients, and calls under a transform, are those of `plain`.
"""

from collections.abc import Callable
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lorafuse.activation import Activation, GateLayout, Recomputed, lookup
from lorafuse.backends import base, problems
from lorafuse.backends.protocol import Backend
from lorafuse.operands import Activate, ActivateBackward, LowRank, Rows, Weight
from lorafuse.ops import plain
from lorafuse.ops._define import LIBRARY, implement, no_gradients
from lorafuse.ops.autocast import outside_autocast
from lorafuse.ops.checks import check_gathered
from lorafuse.ops.choose import choose
from lorafuse.ops.grouped import kept, low_rank, rank
from lorafuse.ops.transforms import is_transformed, needs_plain_backward
from lorafuse.plan import Plan

__all__ = ["lora_experts", "lora_experts_recomputed"]

_ADAPTERS = "Tensor{opt} up_a, Tensor{opt} up_b, Tensor{opt} down_a, Tensor{opt} down_b".format(opt="?")
_ACT = "float up_scale, float down_scale, bool transposed, str activation, str gate_layout"
_FORMAT = "str up_format='dense', str down_format='dense', Tensor[]? up_statistics=None, Tensor[]? down_statistics=None"
LIBRARY.define(
    "lora_experts(Tensor x, Tensor index, Tensor weight, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias,"
    f" {_ADAPTERS}, {_ACT}, str backend, {_FORMAT})"
    " -> (Tensor out, Tensor u, Tensor xa, Tensor ha, Tensor order, Tensor offsets)"
)
LIBRARY.define(
    "lora_experts_backward(Tensor dout, Tensor x, Tensor weight, Tensor up, Tensor down, Tensor? down_bias,"
    f" {_ADAPTERS}, {_ACT}, Tensor u, Tensor xa, Tensor ha, Tensor order, Tensor offsets, bool[] needs, str backend,"
    f" {_FORMAT})"
    " -> (Tensor dx, Tensor dweight, Tensor d_up_a, Tensor d_up_b, Tensor d_down_a, Tensor d_down_b)"
)

# activations that are functions, which no schema holds: by the name that the operator gets instead
functions: WeakValueDictionary[str, Recomputed] = WeakValueDictionary()


def _activation(name: str, layout: str) -> Activation | Recomputed:
    return functions[name] if name in functions else lookup(name, GateLayout(layout))


def _weights(
    up, down, transposed, up_format="dense", down_format="dense", up_statistics=None, down_statistics=None
):  # fmt: skip
    return tuple(
        Weight(w, transposed, tuple(statistics or ()), format)
        for w, format, statistics in ((up, up_format, up_statistics), (down, down_format, down_statistics))
    )


def _choose(backend, x, k, up, down, up_a, down_a, act, backward):
    # gated is None for an activation that no epilogue computes
    gated = act.gated if isinstance(act, Activation) else None
    return choose(
        backend, x, lambda: problems.experts_problems(x, k, up, down, up_a, down_a, gated, backward), up.data, down.data
    )  # fmt: skip


def _plans(plan: Plan | None) -> tuple[Plan | None, Plan | None]:
    return (None, None) if plan is None else (plan.of(0), plan.of(1))


def forward(
    run: Backend, plan: Plan | None, x: Tensor, rows: Rows, weight: Tensor, up: Weight, down: Weight,
    up_bias: Tensor | None, down_bias: Tensor | None, up_a: Tensor | None, up_b: Tensor | None, down_a: Tensor | None,
    down_b: Tensor | None, up_scale: float, down_scale: float, act: Activation | Recomputed,
) -> tuple[Tensor, Tensor, LowRank | None, LowRank | None]:  # fmt: skip
    """`(out [T, H], u [S, U], what each adapter adds)`; `rows` are the choices of tokens."""
    first, second = _plans(plan)
    x, gathered = run.in_order(x, rows, first)
    of_up = low_rank(run, first, x, up_a, up_b, up_scale, gathered)
    u, h = run.matmul(x, up, gathered, first, low=of_up, bias=up_bias, epilogue=Activate(act))
    del x
    h = run.matrix(h)
    of_down = low_rank(run, second, h, down_a, down_b, down_scale, rows)
    y = run.matmul(h, down, rows, second, low=of_down, bias=down_bias)
    return run.combine(y, rows, weight), u, of_up, of_down


def backward(
    run: Backend, plan: Plan | None, dout: Tensor, x: Tensor, rows: Rows, weight: Tensor, up: Weight, down: Weight,
    down_bias: Tensor | None, up_a: Tensor | None, up_b: Tensor | None, down_a: Tensor | None, down_b: Tensor | None,
    up_scale: float, down_scale: float, act: Activation | Recomputed, u: Tensor, xa: Tensor, ha: Tensor,
    need_dx: bool, need_dweight: bool, need_up: bool, need_down: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """`(dx, dweight, d up_a, d up_b, d down_a, d down_b)`, None where not needed."""
    first, second = _plans(plan)
    row_scale = weight.reshape(-1)[rows.order]
    dx = dweight = du = None
    d_up = d_down = (None, None)
    g, gathered = run.in_order(dout, rows, second)
    gb = dyb = db = None
    if down_b is not None:
        of_ha = ha if need_down else None
        gb, db = run.project_outer_rows(g, down_b, of_ha, gathered, second, scale=down_scale, row_scale=row_scale)
    if need_dx or need_dweight or need_up:
        low = None if gb is None else LowRank(gb, down_a, down_scale, is_transposed=True)
        epilogue = ActivateBackward(act, u, row_scale, need_dweight)
        du, h, router_grad = run.matmul(g, down.t, gathered, second, low=low, epilogue=epilogue)
        if need_dweight:
            if down_bias is not None:
                of_bias = run.project(g, down_bias.unsqueeze(1), gathered, second).squeeze(1)
                router_grad = router_grad + of_bias
            # an activation may make of a row of no group what is no number
            router_grad = rows.zero_rest(router_grad).to(weight.dtype)
            dweight = weight.new_empty(weight.numel()).scatter_(0, rows.order, router_grad).view(weight.shape)
    else:
        h = act.forward(u)
    if need_down:
        h, of_a = run.matrix(h), {"like": down_a, "scale": down_scale, "row_scale": row_scale}
        d_down = run.outer(gb, h, rows, second, **of_a), db
    del g, h
    if need_dx or need_up:
        du = run.matrix(du)
        if up_b is not None:
            dyb, db = run.project_outer_rows(du, up_b, xa if need_up else None, rows, first, scale=up_scale)
        if need_up:
            x, gathered = run.in_order(x, rows, first)
            d_up = run.outer(dyb, x, gathered, first, like=up_a, scale=up_scale), db
        if need_dx:
            low = None if dyb is None else LowRank(dyb, up_a, up_scale, is_transposed=True)
            dx = run.combine(run.matmul(du, up.t, rows, first, low=low), rows, None)
    return dx, dweight, *d_up, *d_down


def _forward(
    x, index, weight, up, down, up_bias, down_bias, up_a, up_b, down_a, down_b, up_scale, down_scale, transposed,
    activation, gate_layout, backend, *stored,
):  # fmt: skip
    act = _activation(activation, gate_layout)
    up, down = _weights(up, down, transposed, *stored)
    k = index.shape[1]
    run, plan = _choose(backend, x, k, up, down, up_a, down_a, act, False)
    with outside_autocast(x), run.guard(x.device):
        rows = run.route(index, up.stored[0])
        out, u, of_up, of_down = forward(
            run, plan, run.matrix(x), rows, weight, up, down, up_bias, down_bias, up_a, up_b, down_a, down_b, up_scale,
            down_scale, act,
        )  # fmt: skip
    xa, ha = (x.new_empty((rows.count, 0)) if low is None else low.xa for low in (of_up, of_down))
    return out, u, xa, ha, rows.order, rows.offsets


def _fake_forward(
    x, index, weight, up, down, up_bias, down_bias, up_a, up_b, down_a, down_b, up_scale, down_scale, transposed,
    activation, gate_layout, backend, *stored,
):  # fmt: skip
    up, _ = _weights(up, down, transposed, *stored)
    rows = index.shape[0] * index.shape[1]
    low = x.new_empty((rows, rank(up_a))), x.new_empty((rows, rank(down_a)))
    made = x.new_empty((rows, up.sizes[0])), *low, index.new_empty((rows,)), index.new_empty((up.stored[0],))
    return torch.empty_like(x), *made


def _backward(
    dout, x, weight, up, down, down_bias, up_a, up_b, down_a, down_b, up_scale, down_scale, transposed, activation,
    gate_layout, u, xa, ha, order, offsets, needs, backend, *stored,
):  # fmt: skip
    act = _activation(activation, gate_layout)
    up, down = _weights(up, down, transposed, *stored)
    k = weight.shape[1]
    run, plan = _choose(backend, x, k, up, down, up_a, down_a, act, True)
    need_dx, need_dweight, *adapters = needs
    need_up, need_down = any(adapters[:2]) and up_a is not None, any(adapters[2:]) and down_a is not None
    with outside_autocast(x), run.guard(x.device):
        grads = backward(
            run, plan, run.matrix(dout), run.matrix(x), Rows(order.shape[0], offsets, order, k), weight, up,
            down, down_bias, up_a, up_b, down_a, down_b, up_scale, down_scale, act, u, xa, ha, need_dx, need_dweight,
            need_up, need_down,
        )  # fmt: skip
    return kept(grads, dout)


def _fake_backward(dout, x, weight, up, down, down_bias, up_a, up_b, down_a, down_b, *rest):
    # the settings, what forward saved, and then
    needs = rest[10]
    pairs = any(needs[2:4]), any(needs[4:6])
    made = (needs[0], needs[1], pairs[0], pairs[0], pairs[1], pairs[1])
    like = (x, weight, up_a, up_b, down_a, down_b)
    return tuple(
        t.new_empty(t.shape) if need and t is not None else dout.new_empty(0)
        for t, need in zip(like, made, strict=True)
    )


# of lora_experts: which inputs may have a gradient, in the order of lora_experts_backward's results
_DIFFERENTIABLE = (0, 2, 7, 8, 9, 10)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.no_gradients = no_gradients(inputs, ("dense", "dense", None, None))
    ctx.settings, ctx.backend, ctx.formats = inputs[11:16], inputs[16], inputs[17:19]
    up_statistics, down_statistics = (tuple(statistics or ()) for statistics in inputs[19:])
    ctx.statistics = len(up_statistics)
    # index and up_bias for second derivatives alone
    ctx.save_for_backward(*inputs[:11], *output[1:], *up_statistics, *down_statistics)
    # held here, or a function is gone before backward
    ctx.activation = _activation(*inputs[14:16])


def _differentiate(ctx, dout, *_):
    grads = [*ctx.no_gradients]
    needed = [i for i in _DIFFERENTIABLE if ctx.needs_input_grad[i]]
    if dout is None:
        return tuple(grads)
    # read once: a checkpoint hands them out once
    tensors = ctx.saved_tensors
    inputs, saved, statistics = tensors[:11], tensors[11:16], tensors[16:]
    stored = *ctx.formats, statistics[: ctx.statistics], statistics[ctx.statistics :]
    check_gathered("lora_experts", *inputs[3:5])
    if needs_plain_backward(dout):
        x, index, weight, up, down, *others = inputs
        up, down = (w.decoded(x.dtype).data for w in _weights(up, down, ctx.settings[2], *stored))
        given = x, index, weight, up, down, *others, *ctx.settings[:3], ctx.activation
        computed = plain.gradients(plain.experts, given, needed, dout)
    else:
        x, _, weight, up, down, _, down_bias, *adapters = inputs
        needs = [i in needed for i in _DIFFERENTIABLE]
        operands = x, weight, up, down, down_bias, *adapters
        op = torch.ops.lorafuse.lora_experts_backward
        every = op(dout, *operands, *ctx.settings, *saved, needs, ctx.backend, *(one or None for one in stored))
        computed = [grad for grad, need in zip(every, needs, strict=True) if need]
    for i, grad in zip(needed, computed, strict=True):
        grads[i] = grad
    return tuple(grads)


implement("lora_experts", _forward, _fake_forward)
implement("lora_experts_backward", _backward, _fake_backward)
torch.library.register_autograd("lorafuse::lora_experts", _differentiate, setup_context=_save, lib=LIBRARY)


def lora_experts(*args) -> Tensor:
    """out of the operator; see `lorafuse.functional.lora_experts` for the meaning."""
    x = args[0]
    if is_transformed(x):
        with outside_autocast(x):
            stored, act = args[17:], _activation(*args[14:16])
            weights = _weights(args[3], args[4], args[13], *stored)
            up, down = (w.decoded(x.dtype).data for w in weights)
            return plain.experts(*args[:3], up, down, *args[5:14], act)  # type: ignore[call-arg]
    return torch.ops.lorafuse.lora_experts(*args)[0]


def lora_experts_recomputed(*args, activation: Callable[[Tensor], Tensor], backend: str, stored: tuple = ()) -> Tensor:
    """The same with any activation; `args` are those of the operator up to `transposed`, `stored` those of formats."""
    # a compiler would compile again for every name; importing it for nobody takes seconds
    run = torch._dynamo.disable(_recomputed) if torch.compiler.is_compiling() else _recomputed
    return run(args, activation, backend, stored)


def _recomputed(args, activation, backend, stored):
    act = Recomputed(activation)
    if base.resolve(backend) == "auto":
        # backward runs where forward does
        x, index, _, up, down, _, _, up_a, _, down_a, *_, transposed = args
        up, down = _weights(up, down, transposed, *stored)
        backend = _choose("auto", x, index.shape[1], up, down, up_a, down_a, act, False)[0].name
    name = f"function {id(act)}"
    functions[name] = act
    return lora_experts(*args, name, GateLayout.CONCATENATED.value, backend, *stored)
