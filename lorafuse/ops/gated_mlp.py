"""`lorafuse::lora_gated_mlp`: schema, fake kernels, autograd; the gated MLP of a transformer with LoRA.

    gate = gate(x)       up = up(x)       h = act(gate) · up       y = down(h)
    dh = dy w + dyb a of down             dgate, dup = the activation's gradients at dh
    dx = Σ over gate and up of dy_i w_i + dyb_i a_i, one sum

Each of the three layers is one of `lora_linears`: its own bias, adapter (or none), rank, scale, mask, weight format.
Gate and up are siblings of x (`ops.group`). Saved are x, gate, up, xa `[M, ΣR]` of both and xa of down, where a
gradient needs them; h is computed again, and up too with `recompute_up`. Gradients of gradients, and calls under a
transform, run in plain torch.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorafuse.activation import gate_backward, gate_differentiable, gate_forward
from lorafuse.backends.base import EMULATOR
from lorafuse.backends.protocol import NO_GUARD, Backend
from lorafuse.operands import LowRank, matrix, shaped_like
from lorafuse.ops import group, plain
from lorafuse.ops._define import LIBRARY, implement
from lorafuse.ops.autocast import outside_autocast
from lorafuse.ops.checks import check_gathered
from lorafuse.ops.layers import (
    SCHEMA,
    Layer,
    Settings,
    choose_for,
    columns,
    layer_backward,
    layer_forward,
    layers_of,
    plain_layer,
    plain_xa,
    plan_of,
    problem_of,
    refuse_masks_of_nested,
)
from lorafuse.ops.linear import can_bypass_dispatcher
from lorafuse.ops.repeat import repeated
from lorafuse.ops.transforms import needs_plain_backward
from lorafuse.plan import Plan

__all__ = ["backward", "forward", "lora_gated_mlp", "plain_lora_gated_mlp"]

_SETTINGS = "str backend, bool wide, str activation, bool recompute_up"
LIBRARY.define(
    f"lora_gated_mlp(Tensor x, {SCHEMA}, {_SETTINGS}) -> (Tensor y, Tensor gate, Tensor up, Tensor xa, Tensor ha)"
)
# needs and results are dx, every da, every db, every dbias, in the order gate, up, down
LIBRARY.define(
    "lora_gated_mlp_backward(Tensor dy, Tensor x, Tensor? gate, Tensor? up, Tensor? xa, Tensor? ha,"
    f" {SCHEMA}, bool[] needs, {_SETTINGS}) -> Tensor[]"
)


def forward(
    run: Backend, plan: Plan | None, x: Tensor, layers: Sequence[Layer], activation: str, wide: bool,
    need_up: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """`(y [M, N], gate [M, I], up [M, I], xa [M, ΣR] of both, ha [M, R])` of x `[M, H]`; layers gate, up and down.

    Unless `need_up`, up may be None.
    """
    *siblings, down = layers
    low = None
    if run.runs_siblings(plan):
        xa, lows = group.low_rank(run, plan, x, siblings, wide)
        weights, biases = [layer.weight for layer in siblings], [layer.bias for layer in siblings]
        has_xa = down.a is not None and down.b is not None and down.seed is None
        gate, up, h, low = run.matmul_gated(
            x, weights, plan, lows=lows, biases=biases, activation=activation, need_up=need_up,
            down=(down.a, down.b, down.scale) if has_xa else None,
        )  # fmt: skip
    else:
        xa, (gate, up) = group.forward(run, plan, x, siblings, wide)
        h = gate_forward(activation, gate, up)
    y, ha = layer_forward(run, h, down, wide, low)
    return y, gate, up, xa, ha


def backward(
    run: Backend, plan: Plan | None, dy: Tensor, x: Tensor, gate: Tensor | None, up: Tensor | None, xa: Tensor | None,
    ha: Tensor | None, layers: Sequence[Layer], needs: Sequence[bool], activation: str, wide: bool,
) -> list[Tensor | None]:  # fmt: skip
    """`[dx, *da, *db, *dbias]` for dy `[M, N]`, None where not needed; up is computed again where it is None."""
    *siblings, down = layers
    need_dx, of_da, of_db, of_dbias = needs[0], needs[1:4], needs[4:7], needs[7:]
    of_siblings = [need_dx, *of_da[:2], *of_db[:2], *of_dbias[:2]]
    need_dh = any(of_siblings)
    if up is None and (need_dh or of_da[2]):
        up = up_again(run, x, xa, siblings, wide)
    needs_of_down = need_dh, of_da[2], of_db[2], of_dbias[2]
    # a backend that draws a mask once for dx and da reads h beforehand
    fuses, planned = need_dh and of_da[2] and (down.seed is None or run.matmul_outer is None), None
    if fuses:
        planned = plan_of(run, dy, down, needs_of_down, wide, "gated")
        fuses = run.runs_siblings(planned)
    if fuses:
        du: tuple[Tensor, Tensor] | None
        du, *of_down = _down_backward(run, planned, dy, gate, up, ha, down, needs_of_down, activation, wide)
    else:
        # a backend's own backward of a layer reads h beforehand too
        h = gate_forward(activation, gate, up) if of_da[2] else None
        dh, *of_down = layer_backward(run, dy, h, ha, down, needs_of_down, wide)
        del h
        du = gate_backward(activation, dh, gate, up) if need_dh else None
        del dh
    of_inputs: list[Tensor | None] = [None] * 7
    if du is not None:
        of_inputs = group.backward(run, plan, [run.matrix(t) for t in du], x, xa, siblings, of_siblings, wide)
    dx, *rest = of_inputs
    da, db, dbias = ([*rest[2 * i : 2 * i + 2], of_down[i]] for i in range(3))
    return [dx, *da, *db, *dbias]


def _down_backward(run, plan, dy, gate, up, ha, down, needs, activation, wide):
    """`((dgate, dup), da, db, dbias of down)`: the activation is computed once for both."""
    dyb, db, dbias = run.project_outer(
        dy, down.b, ha if needs[2] else None, plan, scale=down.factor, need_dyb=True, need_dbias=needs[3],
        dtype=torch.float32 if wide else dy.dtype,
    )  # fmt: skip
    low = LowRank(dyb, down.a, is_transposed=True, dropout=down.dropout)
    *du, h = run.gated_backward(dy, down.weight.t, plan, low=low, gate=gate, up=up, activation=activation)
    return du, run.outer(dyb, h, None, plan, like=down.a, dropout=down.dropout), db, dbias


def up_again(run: Backend, x: Tensor, xa: Tensor | None, siblings: Sequence[Layer], wide: bool) -> Tensor:
    """up of x and its xa, as forward computed it."""
    layer, mine = siblings[1], columns(xa, siblings)[1]
    if run.linear_forward is not None:
        return layer_forward(run, x, layer, wide)[0]
    plan = run.plan(lambda: problem_of(x, [layer], wide), x.device)
    low = None if mine is None or layer.b is None else LowRank(mine, layer.b, layer.factor)
    return run.matmul(x, layer.weight, None, plan, low=low, bias=layer.bias)


def _forward(x, *arguments):
    settings, tensors = Settings.of(arguments[:10])
    run = _run_forward if x.is_cpu and arguments[10] != EMULATOR else _repeated_forward
    return tuple(run(x, settings.layers(tensors), settings, tensors, *arguments[10:]))


def _repeated_forward(x, layers, settings, tensors, *others):
    kind = settings.key, others[1:]
    return repeated(_run_forward, others[0], kind, (x, *tensors), x, layers, settings, tensors, *others)


def _run_forward(x, layers, settings, tensors, backend, wide, activation, recompute_up):
    """`(y, gate, up, xa, ha)`."""
    flat = matrix(x)
    run, plan = choose_for(backend, flat, layers[:2], wide, also=layers[2:])
    with NO_GUARD if x.is_cpu else run.guard(x.device):
        y, gate, up, xa, ha = forward(run, plan, run.matrix(flat), layers, activation, wide, not recompute_up)
    if ha is None:
        ha = xa.new_empty((xa.shape[0], 0))
    return shaped_like(y, x), gate, x.new_empty(0) if recompute_up else up, xa, ha


def _fake_forward(x, *arguments):
    *of_layers, _, wide, _, recompute_up = arguments
    layers, rows = layers_of(*of_layers), math.prod(x.shape[:-1])
    gate, up, down = (layer.weight.sizes[0] for layer in layers)
    low = torch.float32 if wide else x.dtype
    xa, ha = (x.new_empty((rows, sum(g.rank for g in some)), dtype=low) for some in (layers[:2], layers[2:]))
    up = x.new_empty(0 if recompute_up else (rows, up))
    return x.new_empty((*x.shape[:-1], down)), x.new_empty((rows, gate)), up, xa, ha


def _gradients(dy, x, gate, up, xa, ha, *arguments):
    """`[dx, *da, *db, *dbias]`, None where not needed."""
    settings, tensors = Settings.of(arguments[:10])
    run = _run_backward if dy.is_cpu and arguments[11] != EMULATOR else _repeated_backward
    return run((dy, x, gate, up, xa, ha), settings, tensors, *arguments[10:-1])


def _repeated_backward(saved, settings, tensors, needs, *others):
    kind = settings.key, tuple(needs), others[1:]
    return repeated(_run_backward, others[0], kind, (*saved, *tensors), saved, settings, tensors, needs, *others)


def _run_backward(saved, settings, tensors, needs, backend, wide, activation):
    """`saved` are dy, x, gate, up, xa and ha."""
    (dy, x, gate, up, xa, ha), layers = saved, settings.layers(tensors)
    flat = matrix(x)
    # du has gate's shape and strides
    planned = flat if gate is None else gate
    of_siblings = [needs[0], *(need for i, need in enumerate(needs[1:]) if i % 3 < 2)]
    run, plan = choose_for(backend, planned, layers[:2], wide, of_siblings, also=layers[2:])
    with NO_GUARD if dy.is_cpu else run.guard(dy.device):
        operands = run.matrix(matrix(dy)), run.matrix(flat), gate, up, xa, ha
        dx, *rest = backward(run, plan, *operands, layers, needs, activation, wide)
    return [None if dx is None else shaped_like(dx, dy), *rest]


def _backward(dy, *rest):
    # None is no tensor, which the schema needs
    return [dy.new_empty(0) if g is None else g for g in _gradients(dy, *rest)]


def _fake_backward(dy, x, gate, up, xa, ha, *arguments):
    *of_layers, needs, _, _, _, _ = arguments
    layers = layers_of(*of_layers)
    biases = (dy.new_empty(layer.weight.sizes[0]) for layer in layers)
    likes = x, *(layer.a for layer in layers), *(layer.b for layer in layers), *biases
    return [like.new_empty(like.shape) if need else dy.new_empty(0) for like, need in zip(likes, needs, strict=True)]


def _plain(x, layers, activation, wide):
    """y in plain torch, which every transform and every order of differentiation knows."""

    def run(x, layer):
        return plain_layer(x, None if layer.a is None else plain_xa(x, layer, wide), layer)

    gate, up, down = layers
    return run(gate_differentiable(activation, run(x, gate), run(x, up)), down)


_op = torch.ops.lorafuse.lora_gated_mlp.default
_op_backward = torch.ops.lorafuse.lora_gated_mlp_backward.default


class _LoRAGatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layers, settings, others, *tensors):
        if can_bypass_dispatcher(x, *tensors):
            run = _run_forward if x.is_cpu and others[0] != EMULATOR else _repeated_forward
            y, *made = run(x, layers, settings, tensors, *others)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                y, *made = _op(x, *settings.arguments(tensors), *others)
        need_dx, _, _, _, *of_tensors = ctx.needs_input_grad
        needs = [need_dx, *settings.needs(of_tensors)]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*made)
        ctx.settings, ctx.others, ctx.needs = settings, others, needs
        gate, up, xa, ha = made
        recompute_up, of_down, of_siblings = others[-1], needs[3], any(needs[i] for i in (0, 1, 2, 4, 5, 7, 8))
        gate, up = (gate, None if recompute_up else up) if of_siblings or of_down else (None, None)
        kept = gate, up, xa if needs[4] or needs[5] or (gate is not None and recompute_up) else None
        ctx.save_for_backward(x, *kept, ha if needs[6] else None, *tensors)
        return y, *made

    @staticmethod
    def backward(ctx, dy, *_):
        x, gate, up, xa, ha, *tensors = ctx.saved_tensors
        settings, others, needs = ctx.settings, ctx.others, ctx.needs
        if dy is None:
            return (None,) * (4 + len(tensors))
        check_gathered("lora_gated_mlp", *tensors[:3])
        # the dtypes are those of forward, whatever autocast is on now
        with outside_autocast(dy):
            if needs_plain_backward(dy):
                grads = _plain_gradients(dy, x, settings.layers(tensors), needs, others)
            else:
                saved = dy, x, gate, up, xa, ha
                if can_bypass_dispatcher(dy, x, *tensors):
                    run = _run_backward if dy.is_cpu and others[0] != EMULATOR else _repeated_backward
                    grads = run(saved, settings, tensors, needs, *others[:-1])
                else:
                    grads = _op_backward(*saved, *settings.arguments(tensors), needs, *others)
                    grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return grads[0], None, None, None, *settings.gradients(grads[1:], len(tensors))


def _plain_gradients(dy, x, layers, needs, others):
    """`_gradients` in plain torch, differentiable."""
    _, wide, activation, _ = others
    inputs = x, *(g.a for g in layers), *(g.b for g in layers), *(g.bias for g in layers)

    def formula(x, *parameters):
        a, b, bias = (parameters[first : first + 3] for first in (0, 3, 6))
        given = [replace(g, a=a[i], b=b[i], bias=bias[i]) for i, g in enumerate(layers)]
        return _plain(x, given, activation, wide)

    needed = [i for i, need in enumerate(needs) if need]
    by_place = dict(zip(needed, plain.gradients(formula, inputs, needed, dy), strict=True))
    return [by_place.get(i) for i in range(len(needs))]


# without what only functorch needs, as `ops.linear` calls autograd
_apply = super(torch.autograd.Function, _LoRAGatedMLP).apply


def _run(x, layers, settings, tensors, *others):
    if not torch.is_grad_enabled() and can_bypass_dispatcher(x, *tensors):
        # nothing is recorded
        run = _run_forward if x.is_cpu and others[0] != EMULATOR else _repeated_forward
        return run(x, layers, settings, tensors, *others)
    return _apply(x, layers, settings, others, *tensors)


def _autograd(x, *arguments):
    settings, tensors = Settings.of(arguments[:10])
    return _run(x, settings.layers(tensors), settings, tensors, *arguments[10:])


implement("lora_gated_mlp", _forward, _fake_forward)
implement("lora_gated_mlp_backward", _backward, _fake_backward)
LIBRARY.impl("lora_gated_mlp", _autograd, "Autograd")


def lora_gated_mlp(x, layers, *others):
    """y of the operator; see `lorafuse.functional.lora_gated_mlp` for the meaning. `others` end its schema."""
    settings, tensors = Settings.of_layers(layers)
    if torch.compiler.is_compiling():
        return _op(x, *settings.arguments(tensors), *others)[0]
    return _run(x, layers, settings, tensors, *others)[0]


def plain_lora_gated_mlp(x, layers, backend, wide, activation, recompute_up):
    """`lora_gated_mlp` for a call that `is_transformed`: in plain torch, whatever the backend."""
    refuse_masks_of_nested("lora_gated_mlp", x, layers)
    return _plain(x, layers, activation, wide)
