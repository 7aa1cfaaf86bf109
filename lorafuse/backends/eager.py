"""The LoRA linear in plain torch: the ground truth, the CPU implementation, and cuBLAS used well on a GPU.

    y = x wᵀ + bias + scale' · xa bᵀ          xa = drop(x) aᵀ         scale' = scale / (1 - p)
    dx = dy w + drop(dyb a)                   dyb = scale' · dy b
    da = dybᵀ drop(x)     db = scale' · dyᵀ xa     dbias = Σ dy

Shapes: x [..., K], w [N, K], bias [N], a [R, K], b [N, R], y [..., N], xa and dyb [M, R] with M the product of x's
leading sizes; drop() masks without rescaling. Fused: nothing full-size is scaled, cast or added outside a GEMM: of
each pair of products the second accumulates onto the first (beta = 1). Saved for backward: x, xa. Dropout works in
row chunks, so that neither a mask nor drop(x) exists at full size. Sums over tokens run in a fixed order.

Cost forward: 2MNK + 2MR(N + K) FLOPs; beyond the base product one read of x, and of y a write and a read.
Cost backward: 2MNK + 4MR(N + K) FLOPs; beyond the base product two reads of dy, one of x, and of dx a write and a read.
"""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorafuse.backends import base, low_rank_fp32
from lorafuse.backends.eager_experts import experts_backward, experts_forward, grouped_backward, grouped_forward
from lorafuse.backends.probe import device_spec, linear_problem
from lorafuse.backends.rows import matrix, shaped_like
from lorafuse.philox import keep_mask, rescaled, row_chunks
from lorafuse.plan import select

__all__ = [
    "experts_backward",
    "experts_forward",
    "grouped_backward",
    "grouped_forward",
    "linear_backward",
    "linear_forward",
]


def _low_rank(flat: Tensor, a: Tensor, seed: Tensor | None, scale: float, p: float) -> tuple[Tensor, float]:
    """`(xa, scale')`; `a` is of x's dtype."""
    if seed is None:
        return linear(flat, a), scale
    xa = flat.new_empty((flat.shape[0], a.shape[0]))
    for rows in row_chunks(flat.shape[0], flat.shape[1], flat.device):
        torch.mm(flat[rows] * keep_mask(seed, p, rows, flat.shape[1]), a.t(), out=xa[rows])
    return xa, rescaled(scale, p)


def _base_first(t: Tensor, w: Tensor, a: Tensor, bias: bool, dropout: bool, needs: tuple[bool, ...] = ()) -> bool:
    """Whether the low-rank product accumulates onto the base product ("aten_addmm"), and not the other way round.

    `needs` are those of dx, da, db and dbias in backward. On GPUs the plan decides; without Triton nothing is known of
    the GPU.
    """
    if not t.is_cuda:
        return not needs
    if not base.availability("triton").ok:
        return False
    gradients = tuple(itertools.compress(("dx", "da", "db", "dbias"), needs))
    problem = linear_problem(t, w, a, bias, dropout, gradients)
    return select(problem, device_spec(t.device), (("eager", ""),)).kernel == "aten_addmm"


def _takes_transposed(t: Tensor) -> bool:
    """Whether products read `tᵀ` as fast as a contiguous copy: cuBLAS does and MKL, but not oneDNN's of 16 bits."""
    return t.is_cuda or t.dtype.itemsize >= 4


def _transposed(t: Tensor) -> Tensor:
    """`tᵀ` of an `[M, R]` tensor as a left operand."""
    return t.t() if _takes_transposed(t) else t.t().contiguous()


def linear_forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    scale: float,
    p: float,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """`(y [..., N], xa [M, R])`, both in x's dtype; dropout is applied when a seed (int64 [1]) is given.

    `wide` keeps the low-rank path of an fp16 base in fp32, and xa too.
    """
    if wide:
        return low_rank_fp32.linear_forward(x, w, bias, a, b, seed, scale, p)
    dtype = x.dtype
    if a.dtype is not dtype:
        a = a.to(dtype)
    if b.dtype is not dtype:
        b = b.to(dtype)
    flat = matrix(x)
    if _base_first(x, w, a, bias is not None, seed is not None):
        # on a CPU this order adds 0.62 ms to a base of 4.1 ms, the other 0.70 ms (M 1024, K = N 2048, R 16, bf16, Xeon
        # with AMX, 2 threads, 2026-11-24), and at M = 1 it is one operator less
        y = linear(flat, w, bias)
        xa, scale = _low_rank(flat, a, seed, scale, p)
        y.addmm_(xa, b.t(), alpha=scale)
    else:
        # accumulating the base product onto the low-rank one hides the read of y behind the large GEMM
        xa, scale = _low_rank(flat, a, seed, scale, p)
        y = linear(xa if scale == 1.0 else xa * scale, b, bias).addmm_(flat, w.t())
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
    wide: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`(dx, da, db, dbias)`, None where not needed; da and db in their parameters' dtypes.

    `x` may be None when da is not needed, `xa` when db is not; `wide` is that of `linear_forward`.
    """
    if wide:
        needs = need_dx, need_da, need_db, need_dbias
        return low_rank_fp32.linear_backward(dy, x, xa, w, a, b, seed, scale, p, *needs)
    dtype = dy.dtype
    flat = matrix(dy)
    dx = da = db = dbias = None
    effective = scale if seed is None else rescaled(scale, p)
    # next to dyb, which reads dy too
    if need_db:
        assert xa is not None
        db = _db(flat, xa, b, effective)
    if need_dx or need_da:
        dyb = torch.mm(flat, b if b.dtype is dtype else b.to(dtype))
        if effective != 1.0:
            dyb.mul_(effective)
        base_first = False
        if need_dx:
            needs = need_dx, need_da, need_db, need_dbias
            base_first = _base_first(dy, w, a, False, seed is not None, needs)
            low = a if a.dtype is dtype else a.to(dtype)
            dx = torch.mm(flat, w).addmm_(dyb, low) if base_first else torch.mm(dyb, low)
        if seed is not None:
            da = _dropout_backward(dx, x if need_da else None, dyb, a, seed, p)
        elif need_da:
            assert x is not None
            da = torch.mm(_transposed(dyb), matrix(x)).to(a.dtype)
        if dx is not None:
            dx = shaped_like(dx if base_first else dx.addmm_(flat, w), dy)
    if need_dbias:
        dbias = flat.sum(0)
    return dx, da, db, dbias


def _db(dy: Tensor, xa: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale · dyᵀ xa` in b's dtype."""
    if not dy.is_cuda and _takes_transposed(dy):
        return torch.mm(dy.t(), xa).mul_(scale).to(b.dtype)
    # (xaᵀ dy)ᵀ: with the long side last it took 0.26 ms where dyᵀ xa took 0.34 ms (bf16, conditions as above)
    return b.new_empty(b.shape).copy_(torch.mm(_transposed(xa), dy).mul_(scale).t())


def _dropout_backward(
    dx: Tensor | None, x: Tensor | None, dyb: Tensor, a: Tensor, seed: Tensor, p: float
) -> Tensor | None:
    """Mask `dx` in place and return `da`, from one mask per row chunk; either of dx and x may be absent."""
    flat = None if x is None else matrix(x)
    wide = torch.promote_types(a.dtype, torch.float32)
    da = None if flat is None else torch.zeros(a.shape, dtype=wide, device=a.device)
    for rows in row_chunks(dyb.shape[0], a.shape[1], dyb.device):
        keep = keep_mask(seed, p, rows, a.shape[1])
        if dx is not None:
            dx[rows] *= keep
        if da is not None and flat is not None:
            da += torch.mm(dyb[rows].t(), flat[rows] * keep)
    return None if da is None else da.to(a.dtype)
