"""`lorafuse::lora_linears`: schema, fake kernels, autograd; siblings, frozen linear layers of one x with LoRA.

    y_i = x w_iᵀ + bias_i + scale_i · xa_i b_iᵀ       xa_i = drop_i(x) a_iᵀ
    dx = Σ_i dy_i w_i + drop_i(dyb_i a_i)             dyb_i = scale_i · dy_i b_i
    da_i = dyb_iᵀ drop_i(x)       db_i = scale_i · dy_iᵀ xa_i       dbias_i = Σ dy_i

Every layer has its own out features, bias, adapter (or none), rank, scale, mask and weight format. Those without a mask
share one pass over x for their xa `[M, ΣR]`, and one for their da. dx is one sum over all reductions, where autograd
adds a full-size gradient per layer. Saved are x, if some da is needed, xa, if some db is, and parameters. A layer whose
y has no gradient costs nothing in backward. A backend with composites for one layer runs layer by layer where no plan
runs siblings together.

xa is a result to autograd, so that gradients of gradients reach x through it where x is not kept. They, and calls under
a transform, run in plain torch.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorafuse.backends.base import EMULATOR
from lorafuse.backends.protocol import NO_GUARD, Backend, side_by_side
from lorafuse.operands import LowRank, matrix, shaped_like
from lorafuse.ops import plain
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
    refuse_masks_of_nested,
)
from lorafuse.ops.linear import can_bypass_dispatcher
from lorafuse.ops.repeat import repeated
from lorafuse.ops.transforms import needs_plain_backward
from lorafuse.plan import Plan

__all__ = ["backward", "forward", "lora_linears", "low_rank", "plain_lora_linears"]

LIBRARY.define(f"lora_linears(Tensor x, {SCHEMA}, str backend, bool wide) -> (Tensor xa, Tensor[] ys)")
# needs and results are dx, every da, every db, every dbias
LIBRARY.define(
    f"lora_linears_backward(Tensor?[] dys, Tensor? x, Tensor? xa, {SCHEMA}, bool[] needs, str backend,"
    " bool wide) -> Tensor[]"
)


def forward(
    run: Backend, plan: Plan | None, x: Tensor, layers: Sequence[Layer], wide: bool
) -> tuple[Tensor, list[Tensor]]:
    """`(xa [M, ΣR], [y_i [M, N_i]])` of x `[M, K]`."""
    if not run.runs_siblings(plan):
        made, low = [layer_forward(run, x, layer, wide) for layer in layers], torch.float32 if wide else x.dtype
        return _side_by_side([xa for _, xa in made if xa is not None], x, low), [y for y, _ in made]
    xa, lows = low_rank(run, plan, x, layers, wide)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return xa, run.matmuls(x, weights, plan, lows=lows, biases=biases)


def low_rank(
    run: Backend, plan: Plan | None, x: Tensor, layers: Sequence[Layer], wide: bool
) -> tuple[Tensor, list[LowRank | None]]:
    """`(xa [M, ΣR], [what it adds to each y])` of x `[M, K]`."""
    low, adapters, has_mask = torch.float32 if wide else x.dtype, [], False
    for layer in layers:
        if layer.a is not None:
            adapters.append(layer.a)
            has_mask = has_mask or layer.seed is not None
    if has_mask:
        each = [run.project(x, g.a, None, plan, dropout=g.dropout, dtype=low) for g in layers if g.a is not None]
        xa = _side_by_side(each, x, low)
    elif adapters:
        xa = run.project(x, _stacked(adapters), None, plan, dropout=None, dtype=low)
    else:
        xa = _side_by_side([], x, low)
    lows: list[LowRank | None] = []
    for layer, mine in zip(layers, columns(xa, layers), strict=True):
        if mine is None or layer.b is None:
            lows.append(None)
        else:
            lows.append(LowRank(mine, layer.b, layer.scale if layer.seed is None else layer.factor))
    return xa, lows


def backward(
    run: Backend, plan: Plan | None, dys: Sequence[Tensor | None], x: Tensor | None, xa: Tensor | None,
    layers: Sequence[Layer], needs: Sequence[bool], wide: bool,
) -> list[Tensor | None]:  # fmt: skip
    """`[dx [M, K], *da, *db, *dbias]` for dy_i `[M, N_i]`, None where not needed; nothing is of a dy that is None."""
    G, need_dx, dx = len(layers), needs[0], None
    none: list[Tensor | None] = [None] * G
    da, db, dbias = none[:], none[:], none[:]
    need = list(zip(needs[1 : 1 + G], needs[1 + G : 1 + 2 * G], needs[1 + 2 * G :], strict=True))
    every = zip(range(G), dys, layers, columns(xa, layers), strict=True)
    given = [(i, dy, layer, mine) for i, dy, layer, mine in every if dy is not None]
    if not run.runs_siblings(plan):
        for i, dy, layer, mine in given:
            own, da[i], db[i], dbias[i] = layer_backward(run, dy, x, mine, layer, (need_dx, *need[i]), wide)
            dx = own if dx is None or own is None else dx.add_(own)
        return [dx, *da, *db, *dbias]
    # by the mask: dyb of layers without one are side by side in one low-rank product and one sum over rows
    by_mask: dict[int, list[int]] = {}
    adapted: list[tuple[int, Tensor, Tensor, Tensor | None]] = []
    for i, dy, layer, mine in given:
        need_da, need_db, need_dbias = need[i]
        if layer.b is None:
            dbias[i] = dy.sum(0) if need_dbias else None
            continue
        if need_dx or need_da:
            by_mask.setdefault(G if layer.seed is None else i, []).append(len(adapted))
        adapted.append((i, dy, layer.b, mine if need_db else None))
    places = [i for i, *_ in adapted]
    dybs, *of_columns = run.project_outers(
        [dy for _, dy, _, _ in adapted], [b for _, _, b, _ in adapted], [mine for *_, mine in adapted], plan,
        scales=[layers[i].factor for i in places], need_dbias=[need[i][2] for i in places],
        parts=list(by_mask.values()), dtype=torch.float32 if wide else None,
    )  # fmt: skip
    for i, *of_layer in zip(places, *of_columns, strict=True):
        db[i], dbias[i] = of_layer
    members = [[places[j] for j in part] for part in by_mask.values()]
    lows = []
    for dyb, part in zip(dybs, members, strict=True):
        a = _stacked([a for i in part if (a := layers[i].a) is not None])
        lows.append(LowRank(dyb, a, is_transposed=True, dropout=layers[part[0]].dropout))
    summed = [j for j, part in enumerate(members) if any(need[i][0] for i in part)]
    sums: list[Tensor] = []
    if need_dx:
        terms = [(dy, layer.weight.t) for _, dy, layer, _ in given]
        # the mask of a layer is drawn once for dx and da
        likes = [low.b for low in lows] if len(summed) == len(lows) else []
        dx, sums = run.matmul_sum(terms, lows, plan, wide=x, likes=likes)
    if not sums:
        sums = [run.outer(lows[j].xa, x, None, plan, like=lows[j].b, dropout=lows[j].dropout) for j in summed]
    for j, total in zip(summed, sums, strict=True):
        # results of an operator share no memory
        ranks = [layers[i].rank for i in members[j]]
        each = [total] if len(ranks) == 1 else torch.split_with_sizes_copy(total, ranks)
        for i, mine in zip(members[j], each, strict=True):
            a = layers[i].a
            if need[i][0] and a is not None:
                da[i] = mine if mine.dtype is a.dtype else mine.to(a.dtype)
    return [dx, *da, *db, *dbias]


def _stacked(adapters: list[Tensor]) -> Tensor:
    return adapters[0] if len(adapters) == 1 else torch.cat(adapters)


def _side_by_side(parts: list[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """`[M, ΣR]` of parts `[M, R]`; of none, with the rows of `like`."""
    if not parts:
        return like.new_empty((like.shape[0], 0), dtype=dtype)
    return side_by_side(parts)


def _forward(x, *arguments):
    settings, tensors = Settings.of(arguments[:10])
    run = _run_forward if x.is_cpu and arguments[10] != EMULATOR else _repeated_forward
    xa, *ys = run(x, settings.layers(tensors), settings, tensors, *arguments[10:])
    return xa, ys


def _repeated_forward(x, layers, settings, tensors, backend, wide):
    kind, arguments = (settings.key, wide), (x, layers, settings, tensors, backend, wide)
    return repeated(_run_forward, backend, kind, (x, *tensors), *arguments)


def _run_forward(x, layers, settings, tensors, backend, wide):
    """`[xa, *ys]`."""
    flat = matrix(x)
    run, plan = choose_for(backend, flat, layers, wide)
    with NO_GUARD if x.is_cpu else run.guard(x.device):
        xa, ys = forward(run, plan, run.matrix(flat), layers, wide)
    return [xa, *[shaped_like(y, x) for y in ys]]


def _fake_forward(x, *arguments):
    *of_layers, _, wide = arguments
    layers = layers_of(*of_layers)
    shape = math.prod(x.shape[:-1]), sum(layer.rank for layer in layers)
    xa = x.new_empty(shape, dtype=torch.float32 if wide else x.dtype)
    return xa, [x.new_empty((*x.shape[:-1], layer.weight.sizes[0])) for layer in layers]


def _gradients(dys, x, xa, *arguments):
    """`[dx, *da, *db, *dbias]`, None where not needed; some dy is there."""
    settings, tensors = Settings.of(arguments[:10])
    is_cpu = next(dy.is_cpu for dy in dys if dy is not None)
    run = _run_backward if is_cpu and arguments[11] != EMULATOR else _repeated_backward
    return run(dys, x, xa, settings, tensors, *arguments[10:])


def _repeated_backward(dys, x, xa, settings, tensors, needs, backend, wide):
    operands, kind = (*dys, x, xa, *tensors), (settings.key, tuple(needs), wide)
    return repeated(_run_backward, backend, kind, operands, dys, x, xa, settings, tensors, needs, backend, wide)


def _run_backward(dys, x, xa, settings, tensors, needs, backend, wide):
    layers = settings.layers(tensors)
    given = next(dy for dy in dys if dy is not None)
    run, plan = choose_for(backend, matrix(given), layers, wide, needs)
    if not any(needs):
        return [None] * len(needs)
    with NO_GUARD if given.is_cpu else run.guard(given.device):
        flat = [None if dy is None else run.matrix(matrix(dy)) for dy in dys]
        flat_x = None if x is None else run.matrix(matrix(x))
        dx, *rest = backward(run, plan, flat, flat_x, xa, layers, needs, wide)
    return [None if dx is None else shaped_like(dx, given), *rest]


def _backward(dys, *rest):
    given = next(dy for dy in dys if dy is not None)
    # None is no tensor, which the schema needs
    return [given.new_empty(0) if g is None else g for g in _gradients(dys, *rest)]


def _fake_backward(dys, x, xa, *arguments):
    *of_layers, needs, _, _ = arguments
    layers, given = layers_of(*of_layers), next(dy for dy in dys if dy is not None)
    dx = given.new_empty((*given.shape[:-1], layers[0].weight.sizes[1]))
    biases = (given.new_empty(layer.weight.sizes[0]) for layer in layers)
    likes = dx, *(layer.a for layer in layers), *(layer.b for layer in layers), *biases
    return [like.new_empty(like.shape) if need else given.new_empty(0) for like, need in zip(likes, needs, strict=True)]


def _plain(x, xa, layers, wide):
    """`[xa, y_0, y_1, …]`; with an `xa`, x is zero and stands for its gradient alone."""
    each = [None if layer.a is None else plain_xa(x, layer, wide) for layer in layers]
    kept = columns(xa, layers)
    each = [mine if old is None else mine + old.view(mine.shape) for mine, old in zip(each, kept, strict=True)]
    ys = [plain_layer(x, mine, layer) for mine, layer in zip(each, layers, strict=True)]
    flat = [matrix(mine) for mine in each if mine is not None]
    return [torch.cat(flat, 1) if flat else None, *ys]


def _plain_gradients(dys, dxa, x, xa, layers, needs, wide):
    """`_gradients` in plain torch, differentiable; `dxa` is the gradient of xa as a result, or None."""
    G, has_grad = len(layers), [dxa is not None, *(dy is not None for dy in dys)]
    # no gradient depends on the value of a bias
    biases = [
        x.new_zeros(g.weight.sizes[0]).requires_grad_(need) for g, need in zip(layers, needs[1 + 2 * G :], strict=True)
    ]
    inputs = x, *(g.a for g in layers), *(g.b for g in layers), *biases

    def formula(x, *parameters):
        a, b, bias = (parameters[first : first + G] for first in range(0, 3 * G, G))
        given = (replace(g, a=a[i], b=b[i], bias=bias[i]) for i, g in enumerate(layers))
        return [y for y, here in zip(_plain(x, xa, list(given), wide), has_grad, strict=True) if here]

    # an adapter is reached through its y, and a through xa too
    reached = [True, *(has_grad[0] or here for here in has_grad[1:]), *has_grad[1:], *has_grad[1:]]
    needed = [i for i, (need, here) in enumerate(zip(needs, reached, strict=True)) if need and here]
    douts = [g for g in (dxa, *dys) if g is not None]
    by_place = dict(zip(needed, plain.gradients(formula, inputs, needed, *douts), strict=True))
    return [by_place.get(i) for i in range(len(needs))]


_op = torch.ops.lorafuse.lora_linears.default
_op_backward = torch.ops.lorafuse.lora_linears_backward.default


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layers, settings, backend, wide, *tensors):
        if can_bypass_dispatcher(x, *tensors):
            run = _run_forward if x.is_cpu and backend != EMULATOR else _repeated_forward
            xa, *ys = run(x, layers, settings, tensors, backend, wide)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                xa, ys = _op(x, *settings.arguments(tensors), backend, wide)
        G, (need_dx, _, _, _, _, *of_tensors) = len(ys), ctx.needs_input_grad
        needs = [need_dx, *settings.needs(of_tensors)]
        ctx.set_materialize_grads(False)
        if not need_dx:
            # as if layers were apart: a y of nothing but frozen tensors requires no gradient
            ctx.mark_non_differentiable(*(y for i, y in enumerate(ys) if not any(needs[1 + i :: G])))
        ctx.settings, ctx.needs, ctx.backend, ctx.wide = settings, needs, backend, wide
        ctx.shape, ctx.dtype = x.shape, x.dtype
        kept = x if any(needs[1 : 1 + G]) else None, xa if any(needs[1 + G : 1 + 2 * G]) else None
        ctx.save_for_backward(*kept, *tensors[:G], *[None] * G, *tensors[2 * G :])
        return xa, *ys

    @staticmethod
    def backward(ctx, dxa, *dys):
        x, xa, *tensors = ctx.saved_tensors
        settings, wide, given = ctx.settings, ctx.wide, next((g for g in (*dys, dxa) if g is not None), None)
        if given is None:
            return (None,) * (5 + len(tensors))
        check_gathered("lora_linears", *tensors[: len(dys)])
        # the dtypes are those of forward, whatever autocast is on now
        with outside_autocast(given):
            if dxa is not None or needs_plain_backward(given):
                if x is None:
                    # of a saved tensor, which no vmap over dys batches
                    x = tensors[0].new_zeros(ctx.shape, dtype=ctx.dtype).requires_grad_()
                else:
                    xa = None
                grads = _plain_gradients(dys, dxa, x, xa, settings.layers(tensors), ctx.needs, wide)
            else:
                reached = [True, *[dy is not None for dy in dys] * 3]
                needs = [need and here for need, here in zip(ctx.needs, reached, strict=True)]
                if can_bypass_dispatcher(*dys, x, *tensors):
                    run = _run_backward if given.is_cpu and ctx.backend != EMULATOR else _repeated_backward
                    grads = run(dys, x, xa, settings, tensors, needs, ctx.backend, wide)
                else:
                    grads = _op_backward(list(dys), x, xa, *settings.arguments(tensors), needs, ctx.backend, wide)
                    grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return grads[0], None, None, None, None, *settings.gradients(grads[1:], len(tensors))


# without what only functorch needs, as `ops.linear` calls autograd
_apply = super(torch.autograd.Function, _LoRALinears).apply


def _run(x, layers, settings, tensors, backend, wide):
    if not torch.is_grad_enabled() and can_bypass_dispatcher(x, *tensors):
        # nothing is recorded
        run = _run_forward if x.is_cpu and backend != EMULATOR else _repeated_forward
        xa, *ys = run(x, layers, settings, tensors, backend, wide)
        return xa, ys
    xa, *ys = _apply(x, layers, settings, backend, wide, *tensors)
    return xa, ys


def _autograd(x, *arguments):
    settings, tensors = Settings.of(arguments[:10])
    return _run(x, settings.layers(tensors), settings, tensors, *arguments[10:])


implement("lora_linears", _forward, _fake_forward)
implement("lora_linears_backward", _backward, _fake_backward)
LIBRARY.impl("lora_linears", _autograd, "Autograd")


def lora_linears(x, layers, backend, wide):
    """`[y_0, y_1, …]` of the operator; see `lorafuse.functional.lora_linears` for the meaning."""
    settings, tensors = Settings.of_layers(layers)
    if torch.compiler.is_compiling():
        return _op(x, *settings.arguments(tensors), backend, wide)[1]
    return _run(x, layers, settings, tensors, backend, wide)[1]


def plain_lora_linears(x, layers, backend, wide):
    """`lora_linears` for a call that `is_transformed`: in plain torch, whatever the backend."""
    refuse_masks_of_nested("lora_linears", x, layers)
    return [plain_layer(x, None if layer.a is None else plain_xa(x, layer, wide), layer) for layer in layers]
