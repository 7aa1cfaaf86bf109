"""Layers of one weight whose rows are of many adapters, with ranks that differ: xa and dyb; y and dx; da and db.

    project    xa[s] = drop(x[s]) f[g]ᵀ                             g the adapter of row s
    matmul     y[s] = x[s] wᵀ + bias + drop(xa[s] (scale[g] · f[g]))
    outer      df[g] = scale[g] · Σ_s xa[s]ᵀ drop(x[s])             over the rows s of g, or added to df[g]

Shapes: x [S, K] with any row stride, in the order of its adapters (`rows`); the L factors f [R[g], C] are stacked in
one [ΣR, C] with any strides, a as it is and b transposed; xa [S, max R] contiguous, zero beyond the rank. The last
group of rows, number L, has no adapter: rank 0. The mask of drop() is over the rows of one adapter: its seed, row among
that adapter's, column.

Fused: one base product over all rows, each tile of which ends with its own adapter's ranks: nothing is padded to the
widest rank, whose extra tiles are skipped. Sums over rows run within one adapter.

An adapter's results are bit for bit what it gets alone: tiles of rows start where its rows start, configurations depend
on neither rows nor ranks (`lorafuse.backends.problems.multi_problem`), and sums over its rows have their own order.

Cost: 2SKN + 2 Σ_g S[g] R[g] (K + N) FLOPs; one pass over x, w and y; project and outer read x once for each tile of
ranks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafuse.kernels.common import grouped, launch_with_scratch, options, precision, tile_of
from lorafuse.kernels.philox import keep_tile
from lorafuse.kernels.rows import Tiles, source_rows, tile_count, tile_rows
from lorafuse.plan import KernelConfig

__all__ = ["matmul", "outer", "project"]


@triton.jit
def _first_of(p_ends, i):
    """Where the i-th of consecutive ranges starts."""
    return tl.load(p_ends + i - 1, mask=i > 0, other=0)


@triton.jit
def _ranks_of(p_rank_ends, group, L):
    """`(first, R)`: the rows of the stacks that are the adapter's; none for the group without one."""
    first = _first_of(p_rank_ends, group)
    return first, tl.load(p_rank_ends + group, mask=group < L, other=first) - first


@triton.jit
def _keep(p_seeds, p_below, group, L, o_m, i_c, C, BLOCK_C: tl.constexpr, GROUPED: tl.constexpr):
    """Which elements survive the adapter's dropout; all where it has none."""
    below = tl.load(p_below + group, mask=group < L, other=0)
    seed = p_seeds + tl.minimum(group, L - 1)
    return keep_tile(seed, below, o_m, i_c, C, BLOCK_C, GROUPED) | (below == 0)


@triton.jit
def _project_kernel(
    p_x,
    p_f,
    p_xa,
    p_tiles,
    p_row_ends,
    p_rank_ends,
    p_seeds,
    p_below,
    M,
    K,
    L,
    widest,
    stride_xm,
    stride_f,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows and BLOCK_R ranks of xa, from one walk along K."""
    dtype: tl.constexpr = p_x.dtype.element_ty
    i_m = tl.program_id(0)
    if i_m >= tile_count(p_tiles, M, BLOCK_M):
        return
    group, row, end = tile_rows(p_tiles, i_m, M, BLOCK_M)
    first, R = _ranks_of(p_rank_ends, group, L)
    i_r = tl.program_id(1) * BLOCK_R
    if i_r >= R:
        return
    o_m = row + tl.arange(0, BLOCK_M)
    o_r = i_r + tl.arange(0, BLOCK_R)
    start = _first_of(p_row_ends, group)
    # ranks outside are computed from rank 0 and not stored
    p_xm = p_x + source_rows(None, o_m, row, end)[:, None] * stride_xm
    p_fr = p_f + (first + tl.where(o_r < R, o_r, 0)).to(tl.int64)[None, :] * stride_f[0]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_xm + o_k[None, :], mask=(o_k < K)[None, :], other=0.0)
        b_f = tl.load(p_fr + o_k.to(tl.int64)[:, None] * stride_f[1], mask=(o_k < K)[:, None], other=0.0).to(dtype)
        if p_seeds is not None:
            b_x = tl.where(_keep(p_seeds, p_below, group, L, o_m - start, i_k, K, BLOCK_K, GROUPED), b_x, 0.0)
        acc = tl.dot(b_x, b_f, acc, input_precision=PRECISION)
    mask = (o_m < end)[:, None] & (o_r < R)[None, :]
    tl.store(p_xa + o_m.to(tl.int64)[:, None] * widest + o_r[None, :], acc.to(p_xa.dtype.element_ty), mask=mask)


@triton.jit
def _matmul_kernel(
    p_x,
    p_w,
    p_bias,
    p_xa,
    p_f,
    p_y,
    p_tiles,
    p_row_ends,
    p_rank_ends,
    p_scales,
    p_seeds,
    p_below,
    M,
    N,
    K,
    L,
    widest,
    stride_xm,
    stride_w,
    stride_f,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    IS_MASKABLE: tl.constexpr,
):
    """ROWS is "nk" where K is the contiguous dimension of w, "kn" where N is.

    IS_MASKABLE gives the low-rank product an accumulator of its own, with a mask or without one: bits must not depend
    on the dropout of other adapters.
    """
    dtype: tl.constexpr = p_x.dtype.element_ty
    low_dtype: tl.constexpr = p_xa.dtype.element_ty
    tiles_m = tile_count(p_tiles, M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    if TMA:
        d_x = tl.make_tensor_descriptor(p_x, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
        if ROWS == "nk":
            d_w = tl.make_tensor_descriptor(p_w, [N, K], [stride_w[0], 1], [BLOCK_N, BLOCK_K])
        else:
            d_w = tl.make_tensor_descriptor(p_w, [K, N], [stride_w[1], 1], [BLOCK_K, BLOCK_N])

    for t in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        i_m, i_n = tile_of(t, tiles_m, tiles_n, GROUP_M)
        group, row, end = tile_rows(p_tiles, i_m, M, BLOCK_M)
        o_m = row + tl.arange(0, BLOCK_M)
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = o_n < N

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        o_k = tl.arange(0, BLOCK_K)
        if not TMA:
            p_xk = p_x + source_rows(None, o_m, row, end)[:, None] * stride_xm + o_k[None, :]
            p_wk = p_w + o_k.to(tl.int64)[:, None] * stride_w[1] + o_n.to(tl.int64)[None, :] * stride_w[0]
            step_w = tl.cast(stride_w[1], tl.int64) * BLOCK_K
        for i_k in range(0, K, BLOCK_K):
            if TMA:
                b_x = d_x.load([row, i_k])
                b_w = d_w.load([i_n * BLOCK_N, i_k]).T if ROWS == "nk" else d_w.load([i_k, i_n * BLOCK_N])
            else:
                b_x = tl.load(p_xk, mask=(o_k < K - i_k)[None, :], other=0.0)
                b_w = tl.load(p_wk, mask=(o_k < K - i_k)[:, None] & inside[None, :], other=0.0)
                p_xk += BLOCK_K
                p_wk += step_w
            acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)

        first, R = _ranks_of(p_rank_ends, group, L)
        scale = tl.load(p_scales + group, mask=group < L, other=0.0)
        rows = o_m < end
        low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if IS_MASKABLE else acc
        for i_r in tl.range(0, R, BLOCK_R, num_stages=1):
            o_r = i_r + tl.arange(0, BLOCK_R)
            mask = rows[:, None] & (o_r < R)[None, :]
            b_xa = tl.load(p_xa + o_m.to(tl.int64)[:, None] * widest + o_r[None, :], mask=mask, other=0.0)
            p_fr = p_f + (first + o_r).to(tl.int64)[:, None] * stride_f[0]
            mask = (o_r < R)[:, None] & inside[None, :]
            b_f = tl.load(p_fr + o_n.to(tl.int64)[None, :] * stride_f[1], mask=mask, other=0.0)
            b_f = (b_f.to(tl.float32) * scale).to(low_dtype)
            low = tl.dot(b_xa, b_f, low, input_precision=LOW_PRECISION)
        if IS_MASKABLE:
            if p_seeds is not None:
                o_s = o_m - _first_of(p_row_ends, group)
                low = tl.where(
                    _keep(p_seeds, p_below, group, L, o_s, i_n * BLOCK_N, N, BLOCK_N, GROUPED), low, 0.0
                )  # fmt: skip
            acc += low
        else:
            acc = low
        if p_bias is not None:
            acc += tl.load(p_bias + o_n, mask=inside, other=0.0).to(tl.float32)[None, :]
        mask = rows[:, None] & inside[None, :]
        tl.store(p_y + o_m.to(tl.int64)[:, None] * N + o_n[None, :], acc.to(dtype), mask=mask)


@triton.jit
def _outer_kernel(
    p_xa,
    p_x,
    p_out,
    p_blocks,
    p_row_ends,
    p_rank_ends,
    p_scales,
    p_seeds,
    p_below,
    C,
    L,
    widest,
    stride_xm,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_SUM: tl.constexpr,
):
    """BLOCK_R ranks and BLOCK_N columns of one adapter's gradient; IS_SUM adds it to what out holds."""
    i_n = tl.program_id(0)
    group = tl.load(p_blocks + tl.program_id(1) * 2)
    i_r = tl.load(p_blocks + tl.program_id(1) * 2 + 1)
    start = _first_of(p_row_ends, group)
    end = tl.load(p_row_ends + group)
    # an adapter without rows has what the launcher put there
    if start >= end:
        return
    first, R = _ranks_of(p_rank_ends, group, L)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = i_r + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for m in range(start, end, BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        mask = (o_m < end)[:, None] & (o_n < C)[None, :]
        b_x = tl.load(p_x + o_m.to(tl.int64)[:, None] * stride_xm + o_n[None, :], mask=mask, other=0.0)
        if p_seeds is not None:
            keep = _keep(p_seeds, p_below, group, L, o_m - start, i_n * BLOCK_N, C, BLOCK_N, GROUPED)
            b_x = tl.where(keep, b_x, 0.0)
        mask = (o_m < end)[:, None] & (o_r < R)[None, :]
        b_xa = tl.load(p_xa + o_m.to(tl.int64)[:, None] * widest + o_r[None, :], mask=mask, other=0.0)
        acc = tl.dot(b_x.to(b_xa.dtype).T, b_xa, acc, input_precision=PRECISION)
    acc *= tl.load(p_scales + group)
    p_o = p_out + (first + o_r).to(tl.int64)[None, :] * stride_out[0] + o_n.to(tl.int64)[:, None] * stride_out[1]
    mask = (o_n < C)[:, None] & (o_r < R)[None, :]
    if IS_SUM:
        acc += tl.load(p_o, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_o, acc.to(p_out.dtype.element_ty), mask=mask)


def project(
    x: Tensor, f: Tensor, tiles: Tiles, rank_ends: Tensor, widest: int, dtype: torch.dtype, config: KernelConfig, *,
    seeds: Tensor | None = None, below: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`drop(x) fᵀ`, `[S, widest]` in `dtype`, zero beyond an adapter's rank.

    x has contiguous rows; `widest`, the largest rank, is at least 1. `seeds` and `below` are there for a dropout mask.
    """
    c, K = config, x.shape[1]
    table = tiles.of(c.block_m)
    xa = x.new_zeros((tiles.rows, widest), dtype=dtype)
    _project_kernel[(table.shape[0] - 1, triton.cdiv(widest, c.block_r))](
        x,
        f,
        xa,
        table,
        tiles.ends,
        rank_ends,
        seeds,
        below,
        tiles.rows,
        K,
        rank_ends.shape[0],
        widest,
        x.stride(0),
        f.stride(),
        BLOCK_M=c.block_m,
        BLOCK_K=c.block_k,
        BLOCK_R=c.block_r,
        GROUPED=grouped(K),
        PRECISION=precision(x.dtype),
        **options(c),
    )
    return xa


def matmul(
    x: Tensor, w: Tensor, bias: Tensor | None, xa: Tensor, f: Tensor, scales: Tensor, tiles: Tiles, rank_ends: Tensor,
    is_maskable: bool, programs: int, config: KernelConfig, *, seeds: Tensor | None = None,
    below: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`y [S, N]` in x's dtype: x wᵀ + bias + drop(xa (scale · f)), of every row; w `[N, K]`, f `[ΣR, N]`.

    x has contiguous rows, w rows or columns, with 16-byte alignment in a "tma" configuration. Only what `is_maskable`
    is masked. `programs` is how many run at a time, the number of SMs.
    """
    c, (N, K) = config, w.shape
    table, tma = tiles.of(c.block_m), c.form == "tma"
    y = x.new_empty((tiles.rows, N))
    count = (table.shape[0] - 1) * triton.cdiv(N, c.block_n)

    def launch() -> None:
        _matmul_kernel[(min(programs, count) if tma else count,)](
            x,
            w,
            bias,
            xa,
            f,
            y,
            table,
            tiles.ends,
            rank_ends,
            scales,
            seeds if is_maskable else None,
            below if is_maskable else None,
            tiles.rows,
            N,
            K,
            rank_ends.shape[0],
            xa.shape[1],
            x.stride(0),
            w.stride(),
            f.stride(),
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            BLOCK_R=c.block_r,
            GROUP_M=c.group_m,
            GROUPED=grouped(N),
            PRECISION=precision(x.dtype),
            LOW_PRECISION=precision(x.dtype, xa.dtype),
            TMA=tma,
            ROWS="nk" if w.stride(1) == 1 else "kn",
            IS_MASKABLE=is_maskable,
            **options(c),
        )

    if tma:
        launch_with_scratch(launch, x.device)
    else:
        launch()
    return y


def outer(
    xa: Tensor, x: Tensor, out: Tensor, blocks: Tensor, tiles: Tiles, rank_ends: Tensor, scales: Tensor, is_sum: bool,
    config: KernelConfig, *, seeds: Tensor | None = None, below: Tensor | None = None,
) -> None:  # fmt: skip
    """`out[g] = scale[g] · xaᵀ drop(x)` over each adapter's rows, or added to it where `is_sum`; out `[ΣR, C]`.

    Zero, or as it was, for an adapter without rows. x has contiguous rows. `blocks [P, 2]`, int32, are the pairs of an
    adapter and every `config.block_r`-th of its ranks.
    """
    c, C = config, x.shape[1]
    if not is_sum:
        out.zero_()
    _outer_kernel[(triton.cdiv(C, c.block_n), blocks.shape[0])](
        xa,
        x,
        out,
        blocks,
        tiles.ends,
        rank_ends,
        scales,
        seeds,
        below,
        C,
        rank_ends.shape[0],
        xa.shape[1],
        x.stride(0),
        out.stride(),
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        BLOCK_R=c.block_r,
        GROUPED=grouped(C),
        PRECISION=precision(x.dtype, xa.dtype),
        IS_SUM=is_sum,
        **options(c),
    )
