"""The skinny products of LoRA over ragged rows: `project` to the rank (xa, and dyb = dy b) and `outer` (da, db).

    xa[s] = scale · x[s] aᵀ[g]                out[g] = scale · Σ_s wide[s]ᵀ (factor[s] · narrow[s])

Shapes as in `ragged`. A program of `outer` owns columns of one group and walks all its rows, so that its sums have a
fixed order and need no partials; the gradient of a group without rows is written as zero.

Cost: 2SKR FLOPs and one pass over x, or over wide.
"""

import triton
import triton.language as tl
from torch import Tensor

from lorafuse.kernels.common import options, precision
from lorafuse.kernels.routing import Tiles, source_rows
from lorafuse.plan import KernelConfig

__all__ = ["outer", "project"]


@triton.jit
def _project_kernel(
    p_x,
    p_a,
    p_xa,
    p_source,
    p_tiles,
    G,
    K,
    R,
    stride_xm,
    stride_ag,
    stride_ar,
    stride_ak,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`xa = scale · x aᵀ[g]` of one tile of rows and BLOCK_R ranks."""
    dtype: tl.constexpr = p_x.dtype.element_ty
    i_m = tl.program_id(0)
    group = tl.load(p_tiles + i_m * 3).to(tl.int64)
    if group == G:
        return
    row = tl.load(p_tiles + i_m * 3 + 1)
    end = tl.load(p_tiles + i_m * 3 + 2)
    o_m = row + tl.arange(0, BLOCK_M)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    p_xm = p_x + source_rows(p_source, o_m, row, end)[:, None] * stride_xm
    p_ar = p_a + group * stride_ag + tl.where(o_r < R, o_r, 0).to(tl.int64)[None, :] * stride_ar
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_xm + o_k[None, :], mask=(o_k < K)[None, :], other=0.0)
        b_a = tl.load(p_ar + o_k.to(tl.int64)[:, None] * stride_ak, mask=(o_k < K)[:, None], other=0.0).to(dtype)
        acc = tl.dot(b_x, b_a, acc, input_precision=PRECISION)
    mask = (o_m < end)[:, None] & (o_r < R)[None, :]
    tl.store(p_xa + o_m.to(tl.int64)[:, None] * R + o_r[None, :], (acc * scale).to(dtype), mask=mask)


@triton.jit
def _outer_kernel(
    p_wide,
    p_narrow,
    p_out,
    p_source,
    p_factor,
    p_ends,
    C,
    R,
    stride_wm,
    stride_og,
    stride_oc,
    stride_or,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out[g] = scale · wideᵀ (factor ⊙ narrow)` over the rows of group g, for BLOCK_N columns of wide."""
    dtype: tl.constexpr = p_wide.dtype.element_ty
    group = tl.program_id(1)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    end = tl.load(p_ends + group).to(tl.int32)
    first = tl.load(p_ends + group - 1, mask=group > 0, other=0).to(tl.int32)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for m in range(first, end, BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        o_w = source_rows(p_source, o_m, m, end)
        mask = (o_m < end)[:, None] & (o_n < C)[None, :]
        b_wide = tl.load(p_wide + o_w[:, None] * stride_wm + o_n[None, :], mask=mask, other=0.0)
        mask_r = (o_m < end)[:, None] & (o_r < R)[None, :]
        b_narrow = tl.load(p_narrow + o_m.to(tl.int64)[:, None] * R + o_r[None, :], mask=mask_r, other=0.0)
        if p_factor is not None:
            factor = tl.load(p_factor + o_m, mask=o_m < end, other=0.0).to(tl.float32)
            b_narrow = (b_narrow.to(tl.float32) * factor[:, None]).to(dtype)
        acc = tl.dot(b_wide.T, b_narrow, acc, input_precision=PRECISION)
    p_o = p_out + group.to(tl.int64) * stride_og + o_n.to(tl.int64)[:, None] * stride_oc
    p_o += o_r.to(tl.int64)[None, :] * stride_or
    mask = (o_n < C)[:, None] & (o_r < R)[None, :]
    tl.store(p_o, (acc * scale).to(p_out.dtype.element_ty), mask=mask)


def project(tiles: Tiles, x: Tensor, a: Tensor, scale: float, config: KernelConfig, *, source: Tensor | None) -> Tensor:
    """`scale · x aᵀ[g]`, `[S, R]`, of x's rows `source`; a `[G, R, K]` with any strides."""
    R = a.shape[1]
    xa = x.new_empty((tiles.rows, R))
    table = tiles.of(config.block_m)
    _project_kernel[(table.shape[0] - 1, triton.cdiv(R, config.block_r))](
        x,
        a,
        xa,
        source,
        table,
        tiles.groups,
        x.shape[1],
        R,
        x.stride(0),
        *a.stride(),
        scale,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        PRECISION=precision(x.dtype),
        **options(config),
    )
    return xa


def outer(
    tiles: Tiles,
    wide: Tensor,
    narrow: Tensor,
    scale: float,
    out: Tensor,
    config: KernelConfig,
    *,
    source: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """`out[g] = scale · wideᵀ (factor ⊙ narrow)` over each group's rows, zero for a group without any.

    out `[G, C, R]` with any strides; wide `[…, C]` is read at rows `source`, narrow `[S, R]` in order.
    """
    G, C, R = out.shape
    _outer_kernel[(triton.cdiv(C, config.block_n), G, triton.cdiv(R, config.block_r))](
        wide,
        narrow,
        out,
        source,
        factor,
        tiles.ends,
        C,
        R,
        wide.stride(0),
        *out.stride(),
        scale,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        PRECISION=precision(wide.dtype),
        **options(config),
    )
