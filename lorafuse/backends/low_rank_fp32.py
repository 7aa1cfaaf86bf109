"""The LoRA linear over an fp16 base whose adapters have a larger range: the low-rank path in fp32, as PEFT computes it.

Formula, shapes and results as in `lorafuse.backends.eager`; xa and dyb are fp32, since at a loss scale of 65536 their
fp16 values overflow. Rows go in chunks, so that no fp32 copy of x, y, dy or dx exists at full size. Sums over tokens
run in a fixed order.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorafuse.backends.rows import matrix, shaped_like
from lorafuse.philox import keep_mask, rescaled, row_chunks

__all__ = ["linear_backward", "linear_forward"]


def linear_forward(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, seed: Tensor | None, scale: float, p: float
) -> tuple[Tensor, Tensor]:
    """`(y [..., N] in x's dtype, xa [M, R] in fp32)`."""
    flat = matrix(x)
    y = linear(flat, w, bias)
    xa = flat.new_empty((flat.shape[0], a.shape[0]), dtype=torch.float32)
    a, b = a.float(), b.float() * (scale if seed is None else rescaled(scale, p))
    for rows in row_chunks(flat.shape[0], max(w.shape), flat.device):
        low = flat[rows].float()
        if seed is not None:
            low *= keep_mask(seed, p, rows, flat.shape[1])
        torch.mm(low, a.t(), out=xa[rows])
        y[rows] = torch.addmm(y[rows].float(), xa[rows], b.t())
    return shaped_like(y, x), xa


def linear_backward(
    dy: Tensor,
    x: Tensor | None,
    xa: Tensor | None,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    scale: float,
    p: float,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`(dx, da, db, dbias)`, None where not needed; da and db in their parameters' dtypes."""
    flat, flat_x = matrix(dy), None if x is None else matrix(x)
    dx = torch.mm(flat, w) if need_dx else None
    da, db = (t.new_zeros(t.shape, dtype=torch.float32) if need else None for t, need in ((a, need_da), (b, need_db)))
    scale = scale if seed is None else rescaled(scale, p)
    wide_a, wide_b = a.float(), b.float()
    for rows in row_chunks(flat.shape[0], max(w.shape), flat.device):
        wide = flat[rows].float()
        if db is not None:
            assert xa is not None
            db.addmm_(wide.t(), xa[rows], alpha=scale)
        if dx is None and da is None:
            continue
        dyb = torch.mm(wide, wide_b).mul_(scale)
        keep = None if seed is None else keep_mask(seed, p, rows, w.shape[1])
        if da is not None:
            assert flat_x is not None
            low = flat_x[rows].float()
            da.addmm_(dyb.t(), low if keep is None else low * keep)
        if dx is not None:
            low = torch.mm(dyb, wide_a)
            dx[rows] = dx[rows] + (low if keep is None else low * keep)
    return (
        None if dx is None else shaped_like(dx, dy),
        None if da is None else da.to(a.dtype),
        None if db is None else db.to(b.dtype),
        flat.sum(0) if need_dbias else None,
    )
