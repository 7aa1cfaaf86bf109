"""The low-rank products: everything with R columns on one side. Dense and ragged rows.

    project         xa = drop(x) aᵀ[g], and dyb = dy b[g]
    outer           da = Σ_s drop(x[s])ᵀ dyb[s], db = Σ_s dy[s]ᵀ xa[s], over the rows s of a group
    project_outer   dyb, db and dbias = Σ dy, from one read of dy, of dense rows

Shapes: x [rows, K] with any row stride, row s of it the s-th or `source[s]`; a [G, R, K] with any strides, xa [M, R]
contiguous. Dense rows are one group: a [R, K]. Ragged rows are in the order of their groups (`rows`). drop() masks and
does not rescale. a and b may be fp32 and are rounded to x's dtype in registers. Where xa and dyb are fp32 over 16-bit
operands, they are multiplied in tf32.

Sums over rows are deterministic, without atomics. A program owns columns of one ragged group and walks all its rows; of
dense rows, which would keep few programs busy, each walks a split and writes an fp32 partial, and `sum_partials` adds
these in a fixed order.

Cost: 2MKR FLOPs and one pass over x or dy each. Dense sums write and read partials, 4R(MN/BLOCK_N + splits·(N + K))
bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafuse.kernels.common import drop_below, grouped, load_rank_tile, options, precision, rank_steps
from lorafuse.kernels.philox import keep_tile
from lorafuse.kernels.rows import Tiles, source_rows, tile_count, tile_rows
from lorafuse.plan import KernelConfig

__all__ = ["outer", "outer_partials", "project", "project_outer", "sum_partials"]


@triton.jit(do_not_specialize=["drop_below"])
def _project_kernel(
    p_x,
    p_a,
    p_xa,
    p_source,
    p_tiles,
    p_seed,
    M,
    K,
    R,
    stride_xm,
    stride_a,
    drop_below,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows and BLOCK_R ranks of xa, from one walk along K."""
    dtype: tl.constexpr = p_x.dtype.element_ty
    i_m = tl.program_id(0)
    if p_tiles is not None and i_m >= tile_count(p_tiles, M, BLOCK_M):
        return
    group, row, end = tile_rows(p_tiles, i_m, M, BLOCK_M)
    o_m = row + tl.arange(0, BLOCK_M)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    # ranks outside are computed from rank 0 and not stored
    p_xm = p_x + source_rows(p_source, o_m, row, end)[:, None] * stride_xm
    p_ar = p_a + group.to(tl.int64) * stride_a[0] + tl.where(o_r < R, o_r, 0).to(tl.int64)[None, :] * stride_a[1]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_xm + o_k[None, :], mask=(o_k < K)[None, :], other=0.0)
        b_a = tl.load(p_ar + o_k.to(tl.int64)[:, None] * stride_a[2], mask=(o_k < K)[:, None], other=0.0).to(dtype)
        if p_seed is not None:
            b_x = tl.where(keep_tile(p_seed, drop_below, o_m, i_k, K, BLOCK_K, GROUPED), b_x, 0.0)
        acc = tl.dot(b_x, b_a, acc, input_precision=PRECISION)
    mask = (o_m < end)[:, None] & (o_r < R)[None, :]
    tl.store(p_xa + o_m.to(tl.int64)[:, None] * R + o_r[None, :], acc.to(p_xa.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["drop_below"])
def _outer_kernel(
    p_left,
    p_right,
    p_out,
    p_source,
    p_row_scale,
    p_ends,
    p_seed,
    M,
    C,
    R,
    stride_lm,
    stride_out,
    split_rows,
    scale,
    drop_below,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out[i] = scale · drop(left)ᵀ (row_scale ⊙ right)` for BLOCK_N of C columns; i is a group or a split."""
    i_n = tl.program_id(0)
    i_g = tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    if p_ends is None:
        first = i_g * split_rows
        end = tl.minimum(first + split_rows, M)
    else:
        end = tl.load(p_ends + i_g).to(tl.int32)
        first = tl.load(p_ends + i_g - 1, mask=i_g > 0, other=0).to(tl.int32)
    # transposed where out is da, so that the long side of the tile is the one that tensor cores want long
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for m in range(first, end, BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        o_l = o_m.to(tl.int64) if p_source is None else source_rows(p_source, o_m, m, end)
        mask = (o_m < end)[:, None] & (o_n < C)[None, :]
        b_left = tl.load(p_left + o_l[:, None] * stride_lm + o_n[None, :], mask=mask, other=0.0)
        if p_seed is not None:
            b_left = tl.where(keep_tile(p_seed, drop_below, o_m, i_n * BLOCK_N, C, BLOCK_N, GROUPED), b_left, 0.0)
        mask_r = (o_m < end)[:, None] & (o_r < R)[None, :]
        b_right = tl.load(p_right + o_m.to(tl.int64)[:, None] * R + o_r[None, :], mask=mask_r, other=0.0)
        if p_row_scale is not None:
            row_scale = tl.load(p_row_scale + o_m, mask=o_m < end, other=0.0).to(tl.float32)
            b_right = (b_right.to(tl.float32) * row_scale[:, None]).to(b_right.dtype)
        acc = tl.dot(b_left.to(b_right.dtype).T, b_right, acc, input_precision=PRECISION)
    p_o = p_out + i_g.to(tl.int64) * stride_out[0] + o_n.to(tl.int64)[:, None] * stride_out[1]
    p_o += o_r.to(tl.int64)[None, :] * stride_out[2]
    mask = (o_n < C)[:, None] & (o_r < R)[None, :]
    tl.store(p_o, (acc * scale).to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def _project_outer_kernel(
    p_dy,
    p_b,
    p_xa,
    p_dyb,
    p_db,
    p_dbias,
    M,
    N,
    R,
    stride_dm,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
):
    """Partials of dyb over a column block, of db and dbias over `rows` rows; None for those that are not needed."""
    dtype: tl.constexpr = p_dy.dtype.element_ty
    i_n = tl.program_id(0)
    i_s = tl.program_id(1)
    i_r = tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    if p_dyb is not None:
        b_b = load_rank_tile(p_b, o_n, N, o_r, R, 1.0, dtype)
    acc_db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    acc_dbias = tl.zeros((BLOCK_N,), tl.float32)
    for m in range(i_s * rows, tl.minimum(i_s * rows + rows, M), BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        mask = (o_m < M)[:, None] & (o_n < N)[None, :]
        b_dy = tl.load(p_dy + o_m.to(tl.int64)[:, None] * stride_dm + o_n[None, :], mask=mask, other=0.0)
        mask_r = (o_m < M)[:, None] & (o_r < R)[None, :]
        if p_dyb is not None:
            b_dyb = tl.dot(b_dy, b_b, input_precision=PRECISION)
            o_dyb = (i_n.to(tl.int64) * M + o_m)[:, None] * R + o_r[None, :]
            tl.store(p_dyb + o_dyb, b_dyb, mask=mask_r)
        if p_db is not None:
            b_xa = tl.load(p_xa + o_m.to(tl.int64)[:, None] * R + o_r[None, :], mask=mask_r, other=0.0)
            acc_db = tl.dot(b_dy.to(b_xa.dtype).T, b_xa, acc_db, input_precision=LOW_PRECISION)
        if p_dbias is not None:
            acc_dbias += tl.sum(b_dy.to(tl.float32), 0)
    if p_db is not None:
        o_db = (i_s.to(tl.int64) * N + o_n)[:, None] * R + o_r[None, :]
        tl.store(p_db + o_db, acc_db, mask=(o_n < N)[:, None] & (o_r < R)[None, :])
    if p_dbias is not None:
        # by the programs of the first ranks only
        first = i_r.broadcast_to((BLOCK_N,)) == 0
        tl.store(p_dbias + i_s.to(tl.int64) * N + o_n, acc_dbias, mask=(o_n < N) & first)


@triton.jit
def _sum_segment(i, p_part, p_out, size, count, scale, BLOCK: tl.constexpr):
    """Block `i` of one segment, if it has one; returns the index in the next segment."""
    blocks = tl.cdiv(size, BLOCK)
    if (i >= 0) & (i < blocks):
        o = i.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        acc = tl.zeros((BLOCK,), tl.float32)
        p = p_part + o
        for _ in range(count):
            acc += tl.load(p, mask=o < size, other=0.0)
            p += size
        tl.store(p_out + o, (acc * scale).to(p_out.dtype.element_ty), mask=o < size)
    return i - blocks


@triton.jit
def _sum_partials_kernel(
    p_part_0,
    p_part_1,
    p_part_2,
    p_out_0,
    p_out_1,
    p_out_2,
    size_0,
    size_1,
    size_2,
    count_0,
    count_1,
    count_2,
    scale_0,
    scale_1,
    scale_2,
    BLOCK: tl.constexpr,
):
    """`out = scale · Σ part` over the first axis of up to three arrays of partials, each in the order of its index."""
    i = _sum_segment(tl.program_id(0), p_part_0, p_out_0, size_0, count_0, scale_0, BLOCK)
    if p_part_1 is not None:
        i = _sum_segment(i, p_part_1, p_out_1, size_1, count_1, scale_1, BLOCK)
    if p_part_2 is not None:
        i = _sum_segment(i, p_part_2, p_out_2, size_2, count_2, scale_2, BLOCK)


def project(
    x: Tensor,
    a: Tensor,
    config: KernelConfig,
    *,
    tiles: Tiles | None = None,
    source: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
    wide: bool = False,
) -> Tensor:
    """`drop(x) aᵀ`, `[M, R]` in x's dtype, in fp32 when `wide`; rows of no group are not written.

    x has contiguous rows. Dense without `tiles`: a `[R, K]`; ragged with them: a `[G, R, K]`; both with any strides.
    The mask of `seed` and `p` is over `[M, K]`, and nothing is rescaled.
    """
    K, R = x.shape[1], a.shape[-2]
    M = x.shape[0] if tiles is None else tiles.rows
    table = None if tiles is None else tiles.of(config.block_m)
    xa = x.new_empty((M, R), dtype=torch.float32 if wide else x.dtype)
    grid = (triton.cdiv(M, config.block_m) if table is None else table.shape[0] - 1, rank_steps(R, config))
    _project_kernel[grid](
        x,
        a,
        xa,
        source,
        table,
        seed,
        M,
        K,
        R,
        x.stride(0),
        a.stride() if a.dim() == 3 else (0, *a.stride()),
        drop_below(p),
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        GROUPED=grouped(K),
        PRECISION=precision(x.dtype),
        **options(config),
    )
    return xa


def outer(
    left: Tensor,
    right: Tensor,
    scale: float,
    out: Tensor,
    config: KernelConfig,
    *,
    tiles: Tiles,
    source: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> None:
    """`out[g] = scale · leftᵀ (row_scale ⊙ right)` over each group's rows, zero for a group without any.

    out `[G, C, R]` with any strides; left `[…, C]` is read at rows `source`, right `[S, R]` in order.
    """
    _launch_outer(left, right, out, scale, config, out.shape[0], tiles.rows, 0, tiles.ends, source, row_scale)


def outer_partials(
    left: Tensor, right: Tensor, config: KernelConfig, *, seed: Tensor | None = None, p: float = 0.0
) -> Tensor:
    """fp32 partial sums of `rightᵀ drop(left)` over dense rows, `[splits, R, C]`. M > 0.

    left `[M, C]` has contiguous rows; right `[M, R]` is contiguous. The mask is over `[M, C]`.
    """
    (M, C), R = left.shape, right.shape[1]
    splits, rows = _split(M, config)
    parts = torch.empty((splits, R, C), dtype=torch.float32, device=left.device)
    _launch_outer(left, right, parts.transpose(1, 2), 1.0, config, splits, M, rows, None, None, None, seed, p)
    return parts


def _launch_outer(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    scale: float,
    config: KernelConfig,
    parts: int,
    M: int,
    split_rows: int,
    ends: Tensor | None,
    source: Tensor | None,
    row_scale: Tensor | None,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> None:
    C, R = left.shape[1], right.shape[1]
    _outer_kernel[(triton.cdiv(C, config.block_n), parts, rank_steps(R, config))](
        left,
        right,
        out,
        source,
        row_scale,
        ends,
        seed,
        M,
        C,
        R,
        left.stride(0),
        out.stride(),
        split_rows,
        scale,
        drop_below(p),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        GROUPED=grouped(C),
        PRECISION=precision(left.dtype, right.dtype),
        **options(config),
    )


def _split(M: int, config: KernelConfig) -> tuple[int, int]:
    """`(splits, rows of each)` of M rows; every split but the last is full, and none is empty."""
    steps = triton.cdiv(M, config.block_m)
    rows = triton.cdiv(steps, min(config.splits, steps)) * config.block_m
    return triton.cdiv(M, rows), rows


def project_outer(
    dy: Tensor, b: Tensor, xa: Tensor | None, dyb: bool, dbias: bool, config: KernelConfig
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """fp32 partial sums of dyb `[N/BLOCK_N, M, R]`, of db `[splits, N, R]` when xa is given, of dbias `[splits, N]`.

    All unscaled, None for those not asked for. dy `[M, N]` has contiguous rows; b and xa are contiguous; M > 0.
    """
    (M, N), R = dy.shape, b.shape[1]
    splits, rows = _split(M, config)
    columns = triton.cdiv(N, config.block_n)

    def partials(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=dy.device)

    dyb_parts = partials(columns, M, R) if dyb else None
    db_parts = partials(splits, N, R) if xa is not None else None
    dbias_parts = partials(splits, N) if dbias else None
    _project_outer_kernel[(columns, splits, rank_steps(R, config))](
        dy,
        b,
        xa,
        dyb_parts,
        db_parts,
        dbias_parts,
        M,
        N,
        R,
        dy.stride(0),
        rows,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        PRECISION=precision(dy.dtype),
        LOW_PRECISION=precision(dy.dtype, dy.dtype if xa is None else xa.dtype),
        **options(config),
    )
    return dyb_parts, db_parts, dbias_parts


def sum_partials(segments: list[tuple[Tensor, Tensor, float]], config: KernelConfig) -> None:
    """For each `(part, out, scale)`, at most three: `out = scale · part.sum(0)`, in fp32 and in a fixed order."""
    part, out, scale = zip(*segments, *[(None, None, 0.0)] * (3 - len(segments)), strict=True)
    sizes = [0 if o is None else o.numel() for o in out]
    counts = [0 if q is None else q.shape[0] for q in part]
    blocks = sum(triton.cdiv(size, config.block_n) for size in sizes)
    _sum_partials_kernel[(blocks,)](*part, *out, *sizes, *counts, *scale, BLOCK=config.block_n, **options(config))
