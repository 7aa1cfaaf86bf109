"""Layers of one x in one autograd.Function of torch's products, as peers fuse groups: dx summed by `addmm_`.

xa is saved, and the MLP keeps gate and up. Adapters in the base's dtype; "fp32" has PEFT's, which it casts in every
call.
"""

import torch
from torch.nn import functional as F

from lorafuse.bench.problem import SCALE, numbered

LABEL = "GEMM + addmm_, in groups"
FORMS = {"": {}, "fp32": {"fp32": True}}


def _project(x, w, a, b):
    """y and xa."""
    xa = torch.mm(x, a.t())
    return torch.mm(x, w.t()).addmm_(xa, b.t(), alpha=SCALE), xa


def _backward(x, xa, w, a, b, dy, dx=None):
    """dx, da and db; dx is added into the given one."""
    dyb = torch.mm(dy, b)
    dx = torch.mm(dy, w) if dx is None else dx.addmm_(dy, w)
    return dx.addmm_(dyb, a, alpha=SCALE), torch.mm(dyb.t(), x).mul_(SCALE), torch.mm(dy.t(), xa).mul_(SCALE)


def _cast(factors, dtype):
    """`(a, b)` of each layer, from a, b, a, b, ..., in that dtype."""
    cast = [one.to(dtype) for one in factors]
    return list(zip(cast[::2], cast[1::2], strict=True))


class _Siblings(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, *factors):
        pairs = _cast(factors, x.dtype)
        ys, lows = zip(*(_project(x, w, a, b) for w, (a, b) in zip(weights, pairs, strict=True)), strict=True)
        ctx.weights, ctx.dtype = weights, factors[0].dtype
        ctx.save_for_backward(x, *lows, *(one for pair in pairs for one in pair))
        return ys

    @staticmethod
    def backward(ctx, *dys):
        x, *saved = ctx.saved_tensors
        lows, factors = saved[: len(dys)], saved[len(dys) :]
        dx, grads = None, []
        for i, (w, dy) in enumerate(zip(ctx.weights, dys, strict=True)):
            dx, da, db = _backward(x, lows[i], w, *factors[2 * i : 2 * i + 2], dy, dx)
            grads += [da.to(ctx.dtype), db.to(ctx.dtype)]
        return dx, None, *grads


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, *factors):
        pairs = _cast(factors, x.dtype)
        (gate, gate_low), (up, up_low) = (_project(x, w, *pair) for w, pair in zip(weights[:2], pairs[:2], strict=True))
        y, down_low = _project(F.silu(gate).mul_(up), weights[2], *pairs[2])
        ctx.weights, ctx.dtype = weights, factors[0].dtype
        ctx.save_for_backward(x, gate, up, gate_low, up_low, down_low, *(one for pair in pairs for one in pair))
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gate, up, *saved = ctx.saved_tensors
        lows, (gate_w, up_w, down_w) = saved[:3], ctx.weights
        gate_ab, up_ab, down_ab = saved[3:5], saved[5:7], saved[7:9]
        act = F.silu(gate)
        dh, *down = _backward(act * up, lows[2], down_w, *down_ab, dy)
        dgate = torch.ops.aten.silu_backward(dh * up, gate)
        dx, *of_gate = _backward(x, lows[0], gate_w, *gate_ab, dgate)
        dx, *of_up = _backward(x, lows[1], up_w, *up_ab, dh.mul_(act), dx)
        return dx, None, *(one.to(ctx.dtype) for one in (*of_gate, *of_up, *down))


def _built(function, given, fp32):
    weights = [one.w for one in given]
    factors = [
        t.clone().to(torch.float32 if fp32 else one.w.dtype).requires_grad_() for one in given for t in (one.a, one.b)
    ]
    trained = numbered([{"da": a, "db": b} for a, b in zip(factors[::2], factors[1::2], strict=True)])
    return (lambda x: function.apply(x, weights, *factors)), trained


def group(given, fp32=False):
    return _built(_Siblings, given, fp32)


def mlp(given, fp32=False):
    return _built(_GatedMlp, given, fp32)
