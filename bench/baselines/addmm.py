"""The base product, then the low-rank one added into its result by `addmm_`: how most fused LoRA layers work.

One autograd.Function. Without a suffix adapters are in the base's dtype and only x is saved, so backward computes xa
again. "saved" is the least that torch's products alone need: xa is saved, and the scale is addmm's alpha, so that no
pass is spent on it; "saved-fp32" with PEFT's fp32 adapters, which it casts in every call.
"""

import torch

from lorafuse.bench.problem import SCALE

LABEL = "GEMM + addmm_"
FORMS = {"": {"saved": False}, "saved": {}, "saved-fp32": {"fp32": True}}


class _Addmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, a, b):
        ctx.save_for_backward(x, w, a, b)
        return torch.mm(x, w.t()).addmm_(torch.mm(x, a.t()), b.t(), alpha=SCALE)

    @staticmethod
    def backward(ctx, dy):
        x, w, a, b = ctx.saved_tensors
        dyb = torch.mm(dy, b)
        da = torch.mm(dyb.t(), x).mul_(SCALE)
        db = torch.mm(dy.t(), torch.mm(x, a.t())).mul_(SCALE)
        dx = torch.mm(dy, w).addmm_(dyb, a, alpha=SCALE)
        return dx, None, da, db


class _Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, a, b):
        ctx.dtype = a.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        xa = torch.mm(x, a.t())
        ctx.save_for_backward(x, xa, w, a, b)
        return torch.mm(x, w.t()).addmm_(xa, b.t(), alpha=SCALE)

    @staticmethod
    def backward(ctx, dy):
        x, xa, w, a, b = ctx.saved_tensors
        dyb = torch.mm(dy, b)
        da, db = _scaled(dyb.t(), x), _scaled(dy.t(), xa)
        dx = torch.mm(dy, w).addmm_(dyb, a, alpha=SCALE)
        return dx, None, da.to(ctx.dtype), db.to(ctx.dtype)


def _scaled(left, right):
    """`SCALE · left · right`; with beta 0 addmm reads nothing of its input."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(out, left, right, beta=0, alpha=SCALE, out=out)


def linear(given, saved=True, fp32=False):
    dtype = torch.float32 if fp32 else given.w.dtype
    a, b = (t.clone().to(dtype).requires_grad_() for t in (given.a, given.b))
    function = _Saved if saved else _Addmm
    return (lambda x: function.apply(x, given.w, a, b)), {"da": a, "db": b}


def _forward(layer, function):
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def forward(x):
        return function.apply(x.flatten(0, -2), layer.base_layer.weight, a, b).unflatten(0, x.shape[:-1])

    return forward


def model(given, saved=True, fp32=False):
    """Every adapted linear layer without bias; experts stay PEFT's."""
    from peft.tuners.lora import Linear

    whole, function = given.adapted(half=not fp32), _Saved if saved else _Addmm
    replaced = [layer for layer in whole.modules() if isinstance(layer, Linear) and layer.base_layer.bias is None]
    for layer in replaced:
        assert layer.scaling["default"] == SCALE
        layer.forward = _forward(layer, function)
    return whole, {"patched": len(replaced)}
