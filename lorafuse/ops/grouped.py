"""`lorafuse::lora_grouped_linear`: schema, fake kernels, autograd; linear layers with LoRA over groups of rows.

    y = x W[g]ᵀ + bias[g] + scale · xa b[g]ᵀ       xa = x a[g]ᵀ
    dx = dy W[g] + scale · dyb a[g]                dyb = dy b[g]
    da[g] = scale · Σ dybᵀ x       db[g] = scale · Σ dyᵀ xa

Shapes: x `[S, K]`, rows of group 0, then of group 1, …, whose ends `offsets [G]` holds; W `[G, N, K]`, or `[G, K, N]`
when transposed; bias `[G, N]`, a `[G, R, K]`, b `[G, N, R]`. Rows after the last offset are zero. xa is returned too,
so that a compiled graph holds what backward needs. dyb is kept without its scale, which may lead out of fp16's range.
There is no gradient of W or of the bias. Gradients of gradients, and calls under a transform, are those of `plain`.
"""

import torch
from torch import Tensor

from lorafuse.backends import problems
from lorafuse.backends.protocol import Backend
from lorafuse.operands import LowRank, Rows, Weight
from lorafuse.ops import plain
from lorafuse.ops._define import LIBRARY, implement, no_gradients
from lorafuse.ops.autocast import outside_autocast
from lorafuse.ops.checks import check_gathered
from lorafuse.ops.choose import choose
from lorafuse.ops.transforms import is_transformed, needs_plain_backward
from lorafuse.plan import Plan

__all__ = ["kept", "lora_grouped_linear", "low_rank", "rank"]

LIBRARY.define(
    "lora_grouped_linear(Tensor x, Tensor offsets, Tensor w, Tensor? bias, Tensor? a, Tensor? b, float scale,"
    " bool transposed, str backend, str format='dense', Tensor[]? statistics=None) -> (Tensor y, Tensor xa)"
)
LIBRARY.define(
    "lora_grouped_linear_backward(Tensor dy, Tensor? x, Tensor? xa, Tensor offsets, Tensor w, Tensor? a, Tensor? b,"
    " float scale, bool transposed, bool[] needs, str backend, str format='dense', Tensor[]? statistics=None)"
    " -> (Tensor dx, Tensor da, Tensor db)"
)


def rank(a: Tensor | None) -> int:
    """That of a stack of adapters `[G, R, K]`; 0 without one."""
    return 0 if a is None else a.shape[1]


def kept(grads: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Empty tensors for None, which no schema returns."""
    return tuple(like.new_empty(0) if g is None else g for g in grads)


def low_rank(
    run: Backend, plan: Plan | None, x: Tensor, a: Tensor | None, b: Tensor | None, scale: float, rows: Rows
) -> LowRank | None:
    """What the adapter of a projection adds to its product; None without one."""
    return None if a is None or b is None else LowRank(run.project(x, a, rows, plan), b, scale)


def _forward(x, offsets, w, bias, a, b, scale, transposed, backend, format="dense", statistics=None):
    weight, rows = Weight(w, transposed, tuple(statistics or ()), format), Rows(x.shape[0], offsets)
    run, plan = choose(backend, x, lambda: problems.grouped_problem(x, weight, a, False), w)
    if x.is_cpu:
        _check_offsets(offsets, x.shape[0])
    with outside_autocast(x), run.guard(x.device):
        x = run.matrix(x)
        low = low_rank(run, plan, x, a, b, scale, rows)
        y = rows.zero_rest(run.matmul(x, weight, rows, plan, low=low, bias=bias))
        return y, x.new_empty((x.shape[0], 0)) if low is None else rows.zero_rest(low.xa)


def _check_offsets(offsets: Tensor, rows: int) -> None:
    """Raises ValueError for offsets that descend or lead outside x."""
    bounds = [0, *offsets.tolist(), rows]
    if bounds != sorted(bounds):
        raise ValueError(f"offsets are {bounds[1:-1]}; they must ascend from 0 to at most {rows}, the rows of x")


def _fake_forward(x, offsets, w, bias, a, b, scale, transposed, backend, format="dense", statistics=None):
    N, _ = Weight(w, transposed, tuple(statistics or ()), format).sizes
    return x.new_empty((x.shape[0], N)), x.new_empty((x.shape[0], rank(a)))


def _backward(dy, x, xa, offsets, w, a, b, scale, transposed, needs, backend, format="dense", statistics=None):
    weight, rows = Weight(w, transposed, tuple(statistics or ()), format), Rows(dy.shape[0], offsets)
    need_dx, need_da, need_db = needs
    run, plan = choose(backend, dy, lambda: problems.grouped_problem(dy, weight, a, True), w)
    with outside_autocast(dy), run.guard(dy.device):
        dy, dx = run.matrix(dy), None
        dyb = da = db = None
        if b is not None and (need_dx or need_da):
            dyb, db = run.project_outer_rows(dy, b, xa if need_db else None, rows, plan, scale=scale)
        elif need_db:
            db = run.outer(xa, dy, rows, plan, like=b, is_transposed=True, scale=scale)
        if need_dx:
            low = None if dyb is None else LowRank(dyb, a, scale, is_transposed=True)
            dx = rows.zero_rest(run.matmul(dy, weight.t, rows, plan, low=low))
        if need_da:
            da = run.outer(dyb, run.matrix(x), rows, plan, like=a, scale=scale)
        return kept((dx, da, db), dy)


def _fake_backward(dy, x, xa, offsets, w, a, b, scale, transposed, needs, backend, format="dense", statistics=None):
    _, K = Weight(w, transposed, tuple(statistics or ()), format).sizes
    dx = dy.new_empty((dy.shape[0], K) if needs[0] else 0)
    return dx, *(t.new_empty(t.shape) if need else dy.new_empty(0) for t, need in zip((a, b), needs[1:], strict=True))


def _save(ctx, inputs, output):
    x, offsets, w, bias, a, b, *ctx.settings, format, statistics = inputs
    ctx.set_materialize_grads(False)
    ctx.no_gradients = no_gradients(inputs, ("dense", None))
    ctx.format, statistics = format, statistics or ()
    # bias for second derivatives alone; dx does not depend on x
    low = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
    ctx.save_for_backward(x if low else None, offsets, w, bias, a, b, output[1], *statistics)


def _differentiate(ctx, dy, _):
    grads = [*ctx.no_gradients]
    needed = [i for i in (0, 4, 5) if ctx.needs_input_grad[i]]
    if dy is None:
        return tuple(grads)
    x, offsets, w, bias, a, b, xa, *statistics = ctx.saved_tensors
    scale, transposed, backend = ctx.settings
    check_gathered("lora_grouped_linear", w)
    if needs_plain_backward(dy):
        weight = Weight(w, transposed, tuple(statistics), ctx.format).decoded(dy.dtype)
        if x is None:
            x = dy.new_zeros((dy.shape[0], weight.sizes[1])).requires_grad_()
        given = x, offsets, weight.data, bias, a, b, scale, transposed
        computed = plain.gradients(plain.grouped, given, needed, dy)
    else:
        needs = [i in needed for i in (0, 4, 5)]
        op = torch.ops.lorafuse.lora_grouped_linear_backward
        every = op(dy, x, xa, offsets, w, a, b, scale, transposed, needs, backend, ctx.format, statistics or None)
        computed = [grad for grad, need in zip(every, needs, strict=True) if need]
    for i, grad in zip(needed, computed, strict=True):
        grads[i] = grad
    return tuple(grads)


implement("lora_grouped_linear", _forward, _fake_forward)
implement("lora_grouped_linear_backward", _backward, _fake_backward)
torch.library.register_autograd("lorafuse::lora_grouped_linear", _differentiate, setup_context=_save, lib=LIBRARY)


def lora_grouped_linear(x, offsets, w, bias, a, b, scale, transposed, backend, format="dense", statistics=None):
    """y of the operator; see `lorafuse.functional.lora_grouped_linear` for the meaning."""
    if is_transformed(x):
        with outside_autocast(x):
            weight = Weight(w, transposed, tuple(statistics or ()), format).decoded(x.dtype)
            return plain.grouped(x, offsets, weight.data, bias, a, b, scale, transposed)
    args = x, offsets, w, bias, a, b, scale, transposed, backend, format, statistics
    return torch.ops.lorafuse.lora_grouped_linear(*args)[0]
