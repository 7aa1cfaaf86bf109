"""The base decoded once a pass by its library, then the dense products, the low-rank one added by `addmm_`.

The order in which most fused LoRA layers run a quantized base: one weight-sized tensor a pass, xa computed again in
backward, adapters in fp32 and cast in every call.
"""

import torch

from lorafuse.bench.problem import SCALE

LABEL = "decode + addmm_"


class _DecodeAddmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer, a, b):
        a, b = a.to(x.dtype), b.to(x.dtype)
        ctx.save_for_backward(x, a, b)
        ctx.layer = layer
        return torch.mm(x, _decoded(layer, x).t()).addmm_(torch.mm(x, a.t()), b.t(), alpha=SCALE)

    @staticmethod
    def backward(ctx, dy):
        x, a, b = ctx.saved_tensors
        dyb = torch.mm(dy, b)
        da = torch.mm(dyb.t(), x).mul_(SCALE)
        db = torch.mm(dy.t(), torch.mm(x, a.t())).mul_(SCALE)
        dx = torch.mm(dy, _decoded(ctx.layer, x)).addmm_(dyb, a, alpha=SCALE)
        return dx, None, da.float(), db.float()


def _decoded(layer, x):
    weight = layer.weight
    if type(layer) is torch.nn.Linear:
        return weight.dequantize().to(x.dtype)
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    if hasattr(weight, "quant_state"):
        return dequantize_4bit(weight.data, weight.quant_state).to(x.dtype)
    # the first forward of a layer moves both from its weight to its state
    codes = layer.state if weight.CB is None else weight
    return int8_vectorwise_dequant(codes.CB, codes.SCB).to(x.dtype)


def quantized(given):
    a, b = (t.clone().float().requires_grad_() for t in (given.a, given.b))
    return (lambda x: _DecodeAddmm.apply(x, given.layer, a, b)), {"da": a, "db": b}
