"""A layer with one adapter in the roundings of servers' LoRA kernels, so that a policy trains on what it samples from.

    xa = round(x round(a)ᵀ)                             what stands between the shrink and the expand kernel
    delta = round(xa round(s round(b))ᵀ)                "vllm": the scale is multiplied into b when it is loaded
    delta = round(s (xa round(b)ᵀ))                     "sglang": the scale is multiplied into the sum of the kernel
    y = round(round(x wᵀ + bias) + delta)               each round() is to x's dtype, each product has an fp32 sum

Backward is that of `lorafuse::lora_linear`: no rounding has a gradient of its own.

Cost over `lora_linear`: the low-rank product and the sum are passes of their own, two writes and three reads of y more.

Read in the sources of vLLM (`lora/punica_wrapper/punica_gpu.py`, `lora/ops/triton_ops/`, `lora/lora_weights.py`) and
SGLang (`srt/lora/triton_ops/sgemm_lora_a.py`, `sgemm_lora_b.py`, `chunked_sgmv_expand.py`), 2026-11. Theirs adds in an
order of its own inside a product: what is equal is where values are rounded.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorafuse.operands import Weight, matrix
from lorafuse.ops.choose import ATEN
from lorafuse.ops.linear import check_shapes, run_backward
from lorafuse.ops.transforms import is_transformed

__all__ = ["NUMERICS", "check_numerics", "served_lora_linear"]

NUMERICS = ("fused", "vllm", "sglang")


def check_numerics(numerics: str) -> None:
    """Raises ValueError for a mode that is none."""
    if numerics not in NUMERICS:
        raise ValueError(f"numerics={numerics!r} is unknown; it is one of {', '.join(map(repr, NUMERICS))}")


def _forward(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, numerics: str
) -> tuple[Tensor, Tensor]:
    """`(y, xa [M, R])`."""
    xa, b = linear(matrix(x), a.to(x.dtype)), b.to(x.dtype)
    if numerics == "vllm":
        delta = linear(xa, b * scale)
    else:
        delta = torch.addmm(xa.new_zeros(()), xa, b.t(), beta=0, alpha=scale)
    return linear(x, w, bias) + delta.view(*x.shape[:-1], -1), xa


class _Served(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, b, seed, settings, numerics, *statistics):
        scale, _, _, wide, format = settings
        with ATEN.dense(Weight(weight, False, statistics, format), x.dtype) as dense:
            y, xa = _forward(x, dense.left(), bias, a, b, scale, numerics)
        needs = ctx.needs_input_grad
        rows = xa.float() if wide else xa
        ctx.save_for_backward(x if needs[3] else None, rows if needs[4] else None, weight, a, b, seed, *statistics)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx, dy):
        return run_backward(ctx, dy, None, None if dy is None else dy.shape[:-1])


def served_lora_linear(x, weight, bias, a, b, scale, backend, wide, numerics, format="dense", statistics=None):
    """y of a layer in the roundings of a server; see `lorafuse.functional.lora_linear`."""
    w = Weight(weight, False, tuple(statistics or ()), format)
    check_shapes(x, w, bias, a, b)
    if torch.compiler.is_compiling() or is_transformed(x):
        return _forward(x, w.decoded(x.dtype).data, bias, a, b, scale, numerics)[0]
    return _Served.apply(x, weight, bias, a, b, None, (scale, 0.0, backend, wide, format), numerics, *w.statistics)
