"""Products over 16-bit weights in fp32, for CPUs without instructions for 16 bits."""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafuse.operands import Weight

__all__ = ["has_products", "product"]


def product(x: Tensor, w: Weight, bias: Tensor | None, low: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> Tensor:
    """`x wᵀ + bias + low[0] low[1]` of 16-bit x and w, computed in fp32 and rounded once; by parts of w."""
    (M, K), N, left, wide = x.shape, w.sizes[0], w.left(), x.float()
    y = x.new_empty((M, N), dtype=dtype)
    # 256 KiB of w in fp32
    step = max(64, 2**16 // max(K, 1))
    for first in range(0, N, step):
        columns = slice(first, first + step)
        part = F.linear(wide, left[columns].float(), None if bias is None else bias[columns].float())
        if low is not None:
            part.addmm_(low[0], low[1][:, columns])
        y[:, columns] = part
    return y


@cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of 16 bits, as torch decides to leave them to oneDNN.

    Without, torch's own loop takes 27 to 30 ms for y and 130 for dx, where fp32 takes 5 (M 128, K 576, N 1536, bf16,
    EPYC with AVX2, one thread, 2026-11-29).
    """
    if not torch.backends.mkldnn.is_available():
        return False
    asked = torch.ops.mkldnn
    is_supported = asked._is_mkldnn_fp16_supported if dtype is torch.float16 else asked._is_mkldnn_bf16_supported
    return bool(is_supported())
