"""`lorafuse::lora_linears_multi` and `lora_gated_mlp_multi`: layers whose rows are of many adapters.

    y_i = the layer i of x, each as `multi_layers` has it                            siblings, or one layer
    y = down(h)       h = act(gate(x)) · up(x)                                         a gated MLP
    dx = Σ over the layers that read x, one product added to the other

Shapes: x `[…, K]`, its rows those of adapter 0, then of adapter 1, …, whose ends `offsets [L]` holds, int32; rows after
the last end have no adapter. Every layer has factors of all adapters, of any rank, 0 for one that it does not adapt.
Returned besides are each layer's xa and, of the MLP, gate and up, so that a compiled graph holds what backward needs; h
is computed again.

Backward adds da and db to tensors that it is given, for the adapters with rows. It is one function for all forms, that
of `multi_experts` too: `_Multi`. Gradients of gradients, and calls under a transform, are those of
`plain`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafuse.activation import gate_differentiable
from lorafuse.backends.multi import rows_by_adapter
from lorafuse.operands import Rows, matrix, shaped_like
from lorafuse.ops import plain
from lorafuse.ops._define import LIBRARY, implement
from lorafuse.ops.autocast import outside_autocast
from lorafuse.ops.checks import check_gathered
from lorafuse.ops.multi_layers import SCHEMA, MultiLayer, MultiSettings, entries, layers_of, low_dtype, running, widest
from lorafuse.ops.transforms import is_transformed, needs_plain_backward

__all__ = ["FORMS", "GRADIENTS", "Form", "apply", "plain_layer", "siblings_backward"]

# what backward is given besides; needs are dx, every da, every db
GRADIENTS = "Tensor(a!)[] da, Tensor(b!)[] db, bool[] needs"
LIBRARY.define(f"lora_linears_multi(Tensor x, Tensor offsets, {SCHEMA}) -> (Tensor[] ys, Tensor[] xas)")
LIBRARY.define(
    f"lora_linears_multi_backward(Tensor?[] dys, Tensor? x, Tensor?[] xas, Tensor offsets, {SCHEMA}, {GRADIENTS})"
    " -> Tensor dx"
)
LIBRARY.define(
    f"lora_gated_mlp_multi(Tensor x, Tensor offsets, {SCHEMA}, str activation)"
    " -> (Tensor y, Tensor gate, Tensor up, Tensor[] xas)"
)
LIBRARY.define(
    "lora_gated_mlp_multi_backward(Tensor dy, Tensor x, Tensor gate, Tensor up, Tensor[] xas, Tensor offsets,"
    f" {SCHEMA}, {GRADIENTS}, str activation) -> Tensor dx"
)


def siblings_backward(
    layers: Sequence[MultiLayer], dys: Sequence[Tensor | None], x: Tensor | None, xas: Sequence[Tensor | None],
    rows: Rows, da: Sequence[Tensor], db: Sequence[Tensor], needs: Sequence[bool],
) -> Tensor | None:  # fmt: skip
    """dx of layers that read one x, None where not needed; nothing is of a dy that is None."""
    G, need_dx, dx = len(layers), needs[0], None
    for i, (layer, dy) in enumerate(zip(layers, dys, strict=True)):
        if dy is None:
            continue
        need_da, need_db = needs[1 + i], needs[1 + G + i]
        if need_dx or need_da:
            dyb = layer.dyb(dy, rows)
            if need_dx:
                dx = layer.dx(dy, dyb, rows, dx)
            if need_da:
                assert x is not None
                layer.add_da(dyb, x, rows, da[i])
        xa = xas[i]
        if need_db and xa is not None:
            layer.add_db(xa, dy, rows, db[i])
    return dx


def _linears(x, offsets, *arguments):
    flat = matrix(x)
    layers = layers_of(flat, False, arguments)
    with running(layers, x) as run:
        flat = run.matrix(flat)
        rows = rows_by_adapter(offsets, flat.shape[0])
        xas = [layer.xa(flat, rows) for layer in layers]
        ys = [layer.y(flat, xa, rows) for layer, xa in zip(layers, xas, strict=True)]
        return [shaped_like(y, x) for y in ys], xas


def _fake_xas(x, arguments):
    rows, dtype = math.prod(x.shape[:-1]), low_dtype(x, arguments[14])
    return [x.new_empty((rows, rank), dtype=dtype) for _, rank in widest(arguments)]


def _fake_linears(x, offsets, *arguments):
    ys = [x.new_empty((*x.shape[:-1], weight.sizes[0])) for weight, _ in widest(arguments)]
    return ys, _fake_xas(x, arguments)


def _linears_backward(dys, x, xas, offsets, *arguments):
    *_, da, db, needs = arguments
    given = next(dy for dy in dys if dy is not None)
    layers = layers_of(matrix(given), True, arguments)
    with running(layers, given) as run:
        flat = [None if dy is None else run.matrix(matrix(dy)) for dy in dys]
        rows = rows_by_adapter(offsets, matrix(given).shape[0])
        x = None if x is None else run.matrix(matrix(x))
        dx = siblings_backward(layers, flat, x, xas, rows, da, db, needs)
        return given.new_empty(0) if dx is None else shaped_like(dx, given)


def _fake_linears_backward(dys, x, xas, offsets, *arguments):
    given = next(dy for dy in dys if dy is not None)
    K = widest(arguments)[0][0].sizes[1]
    return given.new_empty((*given.shape[:-1], K) if arguments[-1][0] else 0)


def _gated(x, offsets, *arguments):
    *of_layers, activation = arguments
    flat = matrix(x)
    layers = layers_of(flat, False, of_layers)
    *siblings, down = layers
    with running(layers, x) as run:
        flat = run.matrix(flat)
        rows = rows_by_adapter(offsets, flat.shape[0])
        xas = [layer.xa(flat, rows) for layer in siblings]
        gate, up = (layer.y(flat, xa, rows) for layer, xa in zip(siblings, xas, strict=True))
        h = down.multi.activate(activation, gate, up, rows, down.adapters)
        xas.append(down.xa(h, rows))
        return shaped_like(down.y(h, xas[2], rows), x), gate, up, xas


def _fake_gated(x, offsets, *arguments):
    rows, sizes = math.prod(x.shape[:-1]), [weight.sizes[0] for weight, _ in widest(arguments)]
    gate, up = (x.new_empty((rows, N)) for N in sizes[:2])
    return x.new_empty((*x.shape[:-1], sizes[2])), gate, up, _fake_xas(x, arguments)


def _gated_backward(dy, x, gate, up, xas, offsets, *arguments):
    *of_layers, da, db, needs, activation = arguments
    flat = matrix(dy)
    layers = layers_of(flat, True, of_layers)
    *siblings, down = layers
    need_da, need_db = needs[3], needs[6]
    of_siblings = [*needs[:3], *needs[4:6]]
    with running(layers, dy) as run:
        flat, du, h = run.matrix(flat), None, None
        rows = rows_by_adapter(offsets, flat.shape[0])
        dyb = down.dyb(flat, rows) if any(of_siblings) or need_da else None
        if any(of_siblings):
            du = torch.empty_like(gate), torch.empty_like(up)
            dh = down.dx(flat, dyb, rows)
            h, _ = down.multi.activate_backward(activation, dh, gate, up, *du, rows, down.adapters)
        elif need_da:
            h = down.multi.activate(activation, gate, up, rows, down.adapters)
        if need_da:
            down.add_da(dyb, h, rows, da[2])
        if need_db:
            down.add_db(xas[2], flat, rows, db[2])
        if du is None:
            return dy.new_empty(0)
        x = run.matrix(matrix(x))
        dx = siblings_backward(siblings, du, x, xas[:2], rows, da[:2], db[:2], of_siblings)
        return dy.new_empty(0) if dx is None else shaped_like(dx, dy)


def _fake_gated_backward(dy, x, gate, up, xas, offsets, *arguments):
    return x.new_empty(x.shape if arguments[-2][0] else 0)


implement("lora_linears_multi", _linears, _fake_linears)
implement("lora_linears_multi_backward", _linears_backward, _fake_linears_backward)
implement("lora_gated_mlp_multi", _gated, _fake_gated)
implement("lora_gated_mlp_multi_backward", _gated_backward, _fake_gated_backward)


@dataclass(frozen=True)
class Form:
    """How `_Multi` runs one form of the operator. `others` are its tensors besides x, offsets and layers, `options`
    what follows the layers in its schema.

    forward: `(x, offsets, others, arguments, options)` → `(results, what backward needs)`
    backward: `(douts, x, saved, offsets, others, arguments, gradients, options)` → the gradients of x and others
    plain: `(x, offsets, others, layers, options)` → results; a layer is `(w, bias, a, b, seeds, ranks, scales, p)`
    """

    forward: Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]]
    backward: Callable[..., Sequence[Tensor]]
    plain: Callable[..., Sequence[Tensor]]


def plain_layer(x, offsets, layer):
    """y of a dense layer in plain torch."""
    return plain.multi(x, offsets, *layer)


def _run_linears_backward(douts, x, saved, offsets, others, arguments, gradients, options):
    return [torch.ops.lorafuse.lora_linears_multi_backward(list(douts), x, saved, offsets, *arguments, *gradients)]


def _run_gated(x, offsets, others, arguments, options):
    y, gate, up, xas = torch.ops.lorafuse.lora_gated_mlp_multi(x, offsets, *arguments, *options)
    return [y], [gate, up, *xas]


def _run_gated_backward(douts, x, saved, offsets, others, arguments, gradients, options):
    gate, up, *xas = saved
    op = torch.ops.lorafuse.lora_gated_mlp_multi_backward
    return [op(douts[0], x, gate, up, xas, offsets, *arguments, *gradients, *options)]


def _plain_gated(x, offsets, others, layers, options):
    gate, up = (plain_layer(x, offsets, layer) for layer in layers[:2])
    return [plain_layer(gate_differentiable(options[0], gate, up), offsets, layers[2])]


FORMS = {
    "linears": Form(
        lambda x, offsets, _, arguments, __: torch.ops.lorafuse.lora_linears_multi(x, offsets, *arguments),
        _run_linears_backward,
        lambda x, offsets, _, layers, __: [plain_layer(x, offsets, layer) for layer in layers],
    ),
    "gated_mlp": Form(_run_gated, _run_gated_backward, _plain_gated),
}


class _Multi(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, options, settings, buffers, x, offsets, index, weight, *tensors):
        ctx.set_materialize_grads(False)
        results, saved = FORMS[form].forward(x, offsets, (index, weight), settings.arguments(tensors), options)
        G = len(settings.formats)
        *_, need_weight = ctx.needs_input_grad[:8]
        of_a, of_b = (ctx.needs_input_grad[8 + i * G : 8 + (i + 1) * G] for i in (2, 3))
        if form == "linears":
            # the gradient of x depends on neither
            saved = [xa if need else None for xa, need in zip(saved, of_b, strict=True)]
        ctx.given, ctx.shape, ctx.dtype = (form, options, settings, buffers), x.shape, x.dtype
        kept = x if form != "linears" or any(of_a) else None
        ctx.save_for_backward(kept, offsets, index, weight, *tensors, *saved)
        ctx.count = len(tensors)
        # the inputs have edges of the graph in this order
        ctx.edges = [i for i, t in enumerate((x, offsets, index, weight, *tensors), 4) if t is not None]
        return tuple(results)

    @staticmethod
    def backward(ctx, *douts):
        grads = [None] * len(ctx.needs_input_grad)
        given = next((dout for dout in douts if dout is not None), None)
        if given is None:
            return tuple(grads)
        form, options, settings, buffers = ctx.given
        x, offsets, index, weight, *rest = ctx.saved_tensors
        tensors, saved, G = rest[: ctx.count], rest[ctx.count :], len(settings.formats)
        check_gathered(f"lora_{form}_multi", *tensors[:G])
        # of a layer whose y has no gradient nothing has
        reached = [len(douts) < G or douts[i] is not None for i in range(G)] * 2
        of_factors = ctx.needs_input_grad[8 + 2 * G : 8 + 4 * G]
        needs = [ctx.needs_input_grad[4], *(need and here for need, here in zip(of_factors, reached, strict=True))]
        need_weight, places = ctx.needs_input_grad[7], [4, *range(8 + 2 * G, 8 + 4 * G)]
        # Dynamo traces this function, and knows no second derivatives of it
        if not torch.compiler.is_compiling() and needs_plain_backward(given):
            if buffers is not None:
                raise NotImplementedError(
                    f"lora_{form}_multi adds gradients to buffers, which has no derivative and no batching rule; pass "
                    "grad_buffers=None"
                )
            if x is None:
                x = given.new_zeros(ctx.shape, dtype=ctx.dtype).requires_grad_()
            computed = _plain_gradients(form, options, settings, douts, x, offsets, index, weight, tensors, needs,
                                        need_weight)  # fmt: skip
            for place, grad in zip((*places, 7), computed, strict=True):
                grads[place] = grad
            return tuple(grads)
        factors = tensors[2 * G : 4 * G]
        if buffers is not None and not torch.compiler.is_compiling():
            needs[1:] = [need and _is_executed(ctx, i) for i, need in zip(places[1:], needs[1:], strict=True)]
        held = [None] * 2 * G if buffers is None else [*(one[0] for one in buffers), *(one[1] for one in buffers)]
        # what nobody needs is no tensor, which the schema needs
        outs = [
            given.new_empty(0) if not need else torch.zeros_like(t) if out is None else out
            for t, out, need in zip(factors, held, needs[1:], strict=True)
        ]
        gradients = outs[:G], outs[G:], [*needs, need_weight] if weight is not None else needs
        made = FORMS[form].backward(
            douts, x, saved, offsets, (index, weight), settings.arguments(tensors), gradients, options
        )  # fmt: skip
        grads[4] = made[0] if needs[0] else None
        grads[7] = made[1] if need_weight else None
        if buffers is None:
            for place, out, need in zip(places[1:], outs, needs[1:], strict=True):
                grads[place] = out if need else None
        return tuple(grads)


def _is_executed(ctx: Any, place: int) -> bool:
    """Whether the running backward computes the gradient of an input, which may be that of others alone
    (`torch.autograd.grad`): a buffer must not have it then.
    """
    node, _ = ctx.next_functions[ctx.edges.index(place)]
    try:
        # nothing public says it, and needs_input_grad does not know for which inputs `torch.autograd.grad` was called;
        # torch's own `register_multi_grad_hook` asks here too
        return torch._C._will_engine_execute_node(node)
    except RuntimeError as error:
        # of a leaf it says nothing under `torch.autograd.grad`, which got here for that leaf's own gradient
        if "leaf" not in str(error):
            raise
        return True


def _plain_layers(settings, tensors, a, b, dtype):
    """The layers as `Form.plain` takes them."""
    return [
        (
            one.weight.decoded(dtype).left(), one.bias, of_a, of_b, one.seeds, one.ranks, one.scales,
            None if one.seeds is None else one.dropout_ps,
        )
        for one, of_a, of_b in zip(entries(settings.arguments(tensors)), a, b, strict=True)
    ]  # fmt: skip


def _plain_gradients(form, options, settings, douts, x, offsets, index, weight, tensors, needs, need_weight):
    """Those of x, every a and b, and of weight, in plain torch, differentiable."""
    G = len(settings.formats)
    inputs = [x, *tensors[2 * G : 4 * G], weight]
    needed = [i for i, need in enumerate((*needs, need_weight)) if need]

    def formula(x, *others):
        *factors, weight = others
        layers = _plain_layers(settings, tensors, factors[:G], factors[G:], x.dtype)
        results = FORMS[form].plain(x, offsets, (index, weight), layers, options)
        return [y for y, dout in zip(results, douts, strict=True) if dout is not None]

    given = [dout for dout in douts if dout is not None]
    by_place = dict(zip(needed, plain.gradients(formula, inputs, needed, *given), strict=True))
    return [by_place.get(i) for i in range(len(inputs))]


def apply(
    form: str, options: tuple, x: Tensor, offsets: Tensor, settings: MultiSettings, tensors: Sequence[Tensor | None],
    buffers: Sequence[tuple[Tensor, Tensor]] | None = None, index: Tensor | None = None, weight: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The results of a form; `tensors` and `settings` are those of `MultiSettings.arguments`, `buffers` of each layer
    where its da and db are added.
    """
    if buffers is not None and torch.is_grad_enabled() and not hasattr(torch._C, "_will_engine_execute_node"):
        raise NotImplementedError(
            f"torch {torch.__version__} has no torch._C._will_engine_execute_node (2.11 to 2.13 have), without which "
            "gradients that nobody asked for would be added to buffers: pass grad_buffers=None, or install one of them "
            "to train an AdapterPool"
        )
    if is_transformed(x):
        with outside_autocast(x):
            G = len(settings.formats)
            layers = _plain_layers(settings, tensors, tensors[2 * G : 3 * G], tensors[3 * G : 4 * G], x.dtype)
            return tuple(FORMS[form].plain(x, offsets, (index, weight), layers, options))
    return _Multi.apply(form, options, settings, buffers, x, offsets, index, weight, *tensors)
