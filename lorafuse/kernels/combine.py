"""The weighted sum of each token's rows: `out[t] = Σ_j weight[t, j] · y[place[t, j]]`.

Shapes: y [S, H] in the order of the groups, weight [T, k], out [T, H], S = T·k. A program sums BLOCK columns of one
token in the order of its choices, so that two runs are bitwise equal.

Cost: one read of y, one write of out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["combine"]


@triton.jit
def _combine_kernel(p_y, p_place, p_ends, p_weight, p_out, H, G, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over the rows that belong to a group."""
    t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(p_ends + G - 1)
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in range(CHOICES):
        row = tl.load(p_place + t * CHOICES + j)
        y = tl.load(p_y + row * H + o_h, mask=o_h < tl.where(row < rows, H, 0), other=0.0).to(tl.float32)
        if p_weight is not None:
            # the weight of a row of no group may be anything
            y *= tl.load(p_weight + t * CHOICES + j, mask=row < rows, other=0.0).to(tl.float32)
        acc += y
    tl.store(p_out + t * H + o_h, acc.to(p_out.dtype.element_ty), mask=o_h < H)


def combine(y: Tensor, order: Tensor, ends: Tensor, weight: Tensor | None, tokens: int) -> Tensor:
    """`out [T, H]`: the sum of each token's rows of y `[S, H]`, times weight `[T, k]`, contiguous, if given.

    Row s of y is choice `order[s]` of all T·k; rows of no group are not read.
    """
    S, H = y.shape
    place = torch.empty_like(order).scatter_(0, order, torch.arange(S, device=order.device))
    out = y.new_empty((tokens, H))
    block = min(1024, triton.next_power_of_2(H))
    _combine_kernel[(tokens, triton.cdiv(H, block))](
        y, place, ends, weight, out, H, ends.shape[0], CHOICES=S // tokens, BLOCK=block, num_warps=4
    )
    return out
