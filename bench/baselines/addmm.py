"""The base product, then the low-rank one added into its result by `addmm_`: how most fused LoRA layers work.

One autograd.Function, adapters in the base's dtype; only x is saved, so backward computes xa again.
"""

import torch

from lorafuse.bench.problem import SCALE

LABEL = "GEMM + addmm_"


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


def linear(given):
    a, b = (t.to(given.w.dtype).requires_grad_() for t in (given.a.clone(), given.b.clone()))
    return (lambda x: _Addmm.apply(x, given.w, a, b)), {"da": a, "db": b}
