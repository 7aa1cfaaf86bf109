"""DoRA's passes: norms of the rows of w + s · b a, and the backward of a factor for each column.

    norm[n]² = ‖w[n]‖² + ⟨2 w[n] aᵀ + c[n], b[n]⟩             c = b (a aᵀ), s being part of b
    dz = dy ⊙ factor        dfactor = Σ_m dy[m] ⊙ z[m]

Shapes: w [N, K] with any strides, a [R, K] and b, c [N, R] contiguous fp32; dy and z [M, N] contiguous, factor [N].

Fused: w is read once for its sum of squares and its products with a, in fp32; dy is read once for both gradients. Sums
over rows run in a fixed order, in `SPLITS` parts.

Cost: 2NKR FLOPs and one read of w; one read of dy and z, one write of dz.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["columns_backward", "row_norms"]

# rows of w, or columns of dy, of a program; columns of w at a time; rows of dy at a time
_ROWS, _BLOCK_K, _BLOCK_M = 16, 32, 16
_COLUMNS = 128
# programs share the rows of dy where there are more than this
_SPLIT_ROWS = 256


@triton.jit
def _row_norms_kernel(
    p_w,
    p_a,
    p_b,
    p_c,
    p_norms,
    N,
    K,
    R,
    stride_w,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_N norms. w is read again for each BLOCK_R ranks."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = o_n < N
    p_wn = p_w + o_n.to(tl.int64)[:, None] * stride_w[0]
    total = tl.zeros((BLOCK_N,), tl.float32)
    for i_r in range(0, R, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        squares = tl.zeros((BLOCK_N,), tl.float32)
        for i_k in range(0, K, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            mask = inside[:, None] & (o_k < K)[None, :]
            b_w = tl.load(p_wn + o_k.to(tl.int64)[None, :] * stride_w[1], mask=mask, other=0.0).to(tl.float32)
            mask = (o_k < K)[:, None] & (o_r < R)[None, :]
            b_a = tl.load(p_a + o_r.to(tl.int64)[None, :] * K + o_k[:, None], mask=mask, other=0.0)
            acc = tl.dot(b_w, b_a, acc, input_precision="ieee")
            squares += tl.sum(b_w * b_w, 1)
        mask = inside[:, None] & (o_r < R)[None, :]
        o_b = o_n.to(tl.int64)[:, None] * R + o_r[None, :]
        b_b = tl.load(p_b + o_b, mask=mask, other=0.0)
        b_c = tl.load(p_c + o_b, mask=mask, other=0.0)
        total += tl.sum((2 * acc + b_c) * b_b, 1)
        if i_r == 0:
            total += squares
    tl.store(p_norms + o_n, tl.sqrt(tl.maximum(total, 0.0)), mask=inside)


@triton.jit
def _columns_backward_kernel(
    p_dy,
    p_z,
    p_factor,
    p_dz,
    p_parts,
    M,
    N,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N columns of `rows` rows of dz, and the part of their sums that these rows have."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = o_n < N
    first = tl.program_id(1) * rows
    factor = tl.load(p_factor + o_n, mask=inside, other=0.0)[None, :]
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for m in range(first, tl.minimum(first + rows, M), BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        mask = (o_m < M)[:, None] & inside[None, :]
        o = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
        dy = tl.load(p_dy + o, mask=mask, other=0.0).to(tl.float32)
        if p_dz is not None:
            tl.store(p_dz + o, (dy * factor).to(p_dz.dtype.element_ty), mask=mask)
        if p_z is not None:
            acc += tl.sum(dy * tl.load(p_z + o, mask=mask, other=0.0).to(tl.float32), 0)
    if p_z is not None:
        tl.store(p_parts + tl.program_id(1).to(tl.int64) * N + o_n, acc, mask=inside)


def row_norms(w: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`‖w[n] + b[n] a‖`, `[N]`; a, b and c are contiguous fp32."""
    (N, K), R = w.shape, a.shape[0]
    norms = a.new_empty(N)
    # a wider tile of ranks spills in fp32
    block_r = min(32, max(16, triton.next_power_of_2(R)))
    _row_norms_kernel[(triton.cdiv(N, _ROWS),)](
        w,
        a,
        b,
        c,
        norms,
        N,
        K,
        R,
        w.stride(),
        BLOCK_N=_ROWS,
        BLOCK_K=_BLOCK_K,
        BLOCK_R=block_r,
        num_warps=4,
        num_stages=2,
    )
    return norms


def columns_backward(
    dy: Tensor, z: Tensor | None, factor: Tensor, need_dz: bool
) -> tuple[Tensor | None, Tensor | None]:
    """`(dz, dfactor)` of contiguous dy and z `[M, N]`, factor fp32; dz None unless needed, dfactor without z."""
    M, N = dy.shape
    splits = max(1, triton.cdiv(M, _SPLIT_ROWS))
    dz = torch.empty_like(dy) if need_dz else None
    parts = None if z is None else factor.new_empty((splits, N))
    _columns_backward_kernel[(triton.cdiv(N, _COLUMNS), splits)](
        dy, z, factor, dz, parts, M, N, triton.cdiv(triton.cdiv(M, splits), _BLOCK_M) * _BLOCK_M, BLOCK_M=_BLOCK_M,
        BLOCK_N=_COLUMNS, num_warps=8,
    )  # fmt: skip
    return dz, None if parts is None else parts.sum(0)
