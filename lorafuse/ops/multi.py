"""`lorafuse::lora_linear_multi`: schema, fake kernels, autograd; one frozen layer whose rows are of many adapters.

    y[s] = x[s] Wᵀ + bias + scale[g] · xa[s] b[g]ᵀ       xa[s] = drop(x[s]) a[g]ᵀ       g the adapter of row s
    dx[s] = dy[s] W + drop(scale[g] · dyb[s] a[g])        dyb[s] = dy[s] b[g]
    da[g] = scale[g] · Σ dybᵀ drop(x)       db[g] = scale[g] · Σ dyᵀ xa       over the rows of g

Shapes: x `[…, K]`, its rows those of adapter 0, then of adapter 1, …, whose ends `offsets [L]` holds, int32; rows after
the last end have no adapter. W `[N, K]`; a `[ΣR, K]` and b `[N, ΣR]`, the adapters' factors next to each other. xa
`[S, max R]` is returned too, so that a compiled graph holds what backward needs. dyb is kept without its scale. W and
the bias have no gradient. An adapter's mask is drawn by its seed over its own rows.

With buffers, backward adds da and db to them and returns none: to the adapters with rows alone. Gradients of gradients,
and calls under a transform, are those of `plain`.
"""

import math

import torch
from torch import Tensor

from lorafuse.backends.base import candidates, resolve
from lorafuse.backends.multi import Multi, adapters_on, rows_by_adapter
from lorafuse.backends.problems import multi_problem
from lorafuse.backends.protocol import Backend
from lorafuse.operands import Weight, matrix, shaped_like
from lorafuse.ops import plain
from lorafuse.ops._define import LIBRARY, implement
from lorafuse.ops.autocast import outside_autocast
from lorafuse.ops.choose import ATEN, choose
from lorafuse.ops.transforms import is_transformed, needs_plain_backward
from lorafuse.plan import Plan

__all__ = ["lora_linear_multi"]

# what both directions are given of the adapters and of how to run
_GIVEN = (
    "Tensor? seeds, int[] ranks, float[] scales, float[]? dropout_p, bool batch_invariant, str backend, bool wide,"
    " str format, Tensor[]? statistics"
)
LIBRARY.define(
    "lora_linear_multi(Tensor x, Tensor offsets, Tensor weight, Tensor? bias, Tensor a, Tensor b,"
    f" {_GIVEN}) -> (Tensor y, Tensor xa)"
)
LIBRARY.define(
    "lora_linear_multi_backward(Tensor dy, Tensor? x, Tensor? xa, Tensor offsets, Tensor weight, Tensor a, Tensor b,"
    f" bool[] needs, {_GIVEN}) -> (Tensor dx, Tensor da, Tensor db)"
)
LIBRARY.define(
    "lora_linear_multi_accumulate(Tensor dy, Tensor? x, Tensor? xa, Tensor offsets, Tensor weight, Tensor a, Tensor b,"
    f" Tensor(a!)? da, Tensor(b!)? db, bool need_dx, {_GIVEN}) -> Tensor dx"
)


def _weight(weight: Tensor, format: str, statistics: list[Tensor] | None) -> Weight:
    return Weight(weight, False, tuple(statistics or ()), format)


def _run(
    backend: str, x: Tensor, w: Weight, a: Tensor, backward: bool, wide: bool
) -> tuple[Backend, Multi, Plan | None]:
    """The backend, its primitives over many adapters, and its plan. Raises ValueError where it has none."""
    backend = resolve(backend)
    if backend == "auto":
        # the one backend that reads nothing on the host
        runs = x.dtype is not torch.float64 and "triton" in candidates(x.device.type)
        backend = "triton" if runs else "eager"
    if backend not in ("eager", "triton"):
        raise ValueError(
            f"backend={backend!r} has no kernels for rows of many adapters; use 'triton', 'eager' or 'auto'"
        )
    run, plan = choose(backend, x, lambda: multi_problem(x, w, a, backward, wide), w.data)
    assert run.multi is not None
    return run, run.multi, plan if run is not ATEN else None


def _forward(
    x, offsets, weight, bias, a, b, seeds, ranks, scales, dropout_p, batch_invariant, backend, wide, format, statistics
):
    w, flat = _weight(weight, format, statistics), matrix(x)
    run, multi, plan = _run(backend, flat, w, a, False, wide)
    with outside_autocast(x), run.guard(x.device):
        flat = run.matrix(flat)
        rows = rows_by_adapter(offsets, flat.shape[0])
        adapters = adapters_on(x.device, tuple(ranks), tuple(scales), _tuple(dropout_p), seeds)
        low = torch.float32 if wide else x.dtype
        xa = multi.project(run, flat, a, rows, adapters, plan, True, low)
        y = multi.matmul(run, flat, w, xa, b.t(), rows, adapters, plan, bias, False, batch_invariant)
        return shaped_like(y, x), xa


def _fake_forward(
    x, offsets, weight, bias, a, b, seeds, ranks, scales, dropout_p, batch_invariant, backend, wide, format, statistics
):
    N, _ = _weight(weight, format, statistics).sizes
    xa = x.new_empty((math.prod(x.shape[:-1]), max(ranks)), dtype=torch.float32 if wide else x.dtype)
    return x.new_empty((*x.shape[:-1], N)), xa


def _gradients(
    dy, x, xa, offsets, weight, a, b, da, db, need_dx, is_sum, seeds, ranks, scales, dropout_p, batch_invariant,
    backend, wide, format, statistics,
):  # fmt: skip
    """dx, or None; da and db are written into the tensors of theirs, None where not needed."""
    w, flat = _weight(weight, format, statistics), matrix(dy)
    run, multi, plan = _run(backend, flat, w, a, True, wide)
    with outside_autocast(dy), run.guard(dy.device):
        flat, dx = run.matrix(flat), None
        rows = rows_by_adapter(offsets, flat.shape[0])
        adapters = adapters_on(dy.device, tuple(ranks), tuple(scales), _tuple(dropout_p), seeds)
        if need_dx or da is not None:
            dyb = multi.project(run, flat, b.t(), rows, adapters, plan, False, torch.float32 if wide else dy.dtype)
            if need_dx:
                product = multi.matmul(run, flat, w.t, dyb, a, rows, adapters, plan, None, True, batch_invariant)
                dx = shaped_like(product, dy)
            if da is not None:
                multi.outer(run, dyb, run.matrix(matrix(x)), da, rows, adapters, plan, True, is_sum)
        if db is not None:
            multi.outer(run, xa, flat, db.t(), rows, adapters, plan, False, is_sum)
        return dx


def _backward(dy, x, xa, offsets, weight, a, b, needs, *given):
    need_dx, need_da, need_db = needs
    da, db = (torch.empty_like(t) if need else None for t, need in ((a, need_da), (b, need_db)))
    dx = _gradients(dy, x, xa, offsets, weight, a, b, da, db, need_dx, False, *given)
    return tuple(dy.new_empty(0) if t is None else t for t in (dx, da, db))


def _fake_backward(dy, x, xa, offsets, weight, a, b, needs, *given):
    da, db = (torch.empty_like(t) if need else dy.new_empty(0) for t, need in zip((a, b), needs[1:], strict=True))
    return _fake_dx(dy, weight, needs[0], *given), da, db


def _accumulate(dy, x, xa, offsets, weight, a, b, da, db, need_dx, *given):
    dx = _gradients(dy, x, xa, offsets, weight, a, b, da, db, need_dx, True, *given)
    return dy.new_empty(0) if dx is None else dx


def _fake_accumulate(dy, x, xa, offsets, weight, a, b, da, db, need_dx, *given):
    return _fake_dx(dy, weight, need_dx, *given)


def _fake_dx(dy, weight, need_dx, *given):
    *_, format, statistics = given
    return dy.new_empty((*dy.shape[:-1], _weight(weight, format, statistics).sizes[1]) if need_dx else 0)


def _tuple(values):
    return None if values is None else tuple(values)


class _LoRALinearMulti(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, offsets, weight, bias, a, b, seeds, buffers, settings, *statistics):
        ctx.set_materialize_grads(False)
        y, xa = torch.ops.lorafuse.lora_linear_multi(
            x, offsets, weight, bias, a, b, seeds, *settings, list(statistics) or None
        )
        _, _, _, _, need_a, need_b, *_ = ctx.needs_input_grad
        ctx.leading, ctx.settings, ctx.buffers = x.shape[:-1], settings, buffers
        ctx.save_for_backward(
            x if need_a else None, xa if need_b else None, offsets, weight, bias, a, b, seeds, *statistics
        )
        return y

    @staticmethod
    def backward(ctx, dy):
        grads = [None] * len(ctx.needs_input_grad)
        if dy is None:
            return tuple(grads)
        needed = [i for i in (0, 4, 5) if ctx.needs_input_grad[i]]
        x, xa, offsets, weight, bias, a, b, seeds, *statistics = ctx.saved_tensors
        da, db = ctx.buffers or (None, None)
        # Dynamo traces this function, and knows no second derivatives of it
        if not torch.compiler.is_compiling() and needs_plain_backward(dy):
            if ctx.buffers is not None:
                raise NotImplementedError(
                    "lora_linear_multi adds gradients to buffers, which has no derivative and no batching rule; pass "
                    "grad_buffers=None"
                )
            plain_weight = _weight(weight, ctx.settings[-1], statistics).decoded(dy.dtype).data
            if x is None:
                x = dy.new_zeros((*ctx.leading, plain_weight.shape[1])).requires_grad_()
            ranks, scales, dropout_p, *_ = ctx.settings
            given = x, offsets, plain_weight, bias, a, b, seeds, ranks, scales, dropout_p
            computed = plain.gradients(plain.multi, given, needed, dy)
            for i, grad in zip(needed, computed, strict=True):
                grads[i] = grad
            return tuple(grads)
        given = seeds, *ctx.settings, list(statistics) or None
        operands = dy, x, xa, offsets, weight, a, b
        if ctx.buffers is None:
            every = torch.ops.lorafuse.lora_linear_multi_backward(*operands, [i in needed for i in (0, 4, 5)], *given)
            for i, grad in zip((0, 4, 5), every, strict=True):
                grads[i] = grad if i in needed else None
            return tuple(grads)
        da, db = (t if i in needed else None for i, t in ((4, da), (5, db)))
        dx = torch.ops.lorafuse.lora_linear_multi_accumulate(*operands, da, db, 0 in needed, *given)
        grads[0] = dx if 0 in needed else None
        return tuple(grads)


implement("lora_linear_multi", _forward, _fake_forward)
implement("lora_linear_multi_backward", _backward, _fake_backward)
implement("lora_linear_multi_accumulate", _accumulate, _fake_accumulate)


def lora_linear_multi(
    x, offsets, weight, bias, a, b, seeds, ranks, scales, dropout_p, batch_invariant, backend, wide, format="dense",
    statistics=None, buffers=None,
):  # fmt: skip
    """y of the operator; see `lorafuse.functional.lora_linear_multi` for the meaning."""
    if is_transformed(x):
        with outside_autocast(x):
            decoded = _weight(weight, format, statistics).decoded(x.dtype).data
            return plain.multi(x, offsets, decoded, bias, a, b, seeds, ranks, scales, dropout_p)
    settings = ranks, scales, dropout_p, batch_invariant, backend, wide, format
    return _LoRALinearMulti.apply(x, offsets, weight, bias, a, b, seeds, buffers, settings, *(statistics or ()))
