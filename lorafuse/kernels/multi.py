"""Layers whose rows are of many adapters, with ranks that differ: xa and dyb; y and dx; da and db.

    project    xa[s] = drop(x[s]) f[e, g]ᵀ                          g the adapter of row s, e its expert
    matmul     y[s] = x[s] wᵀ[e] + bias[e] + drop(xa[s] (scale[g] · f[e, g]))
    outer      df[e, g] += scale[g] · Σ_s xa[s]ᵀ drop(x[s])         over the rows s of e and g

Shapes: x [S, K] with any row stride, row s of it the s-th or `source[s]`; rows are in the order of their groups, group
e (L + 1) + g those of expert e and adapter g, of which number L is none: rank 0. A dense layer is one expert. The L
factors f [R[g], C] are stacked in one [E, ΣR, C] with any strides, a as it is and b transposed; an expert stride of 0
shares them. w [E, N, K] with any strides, bias [E, N]; xa [S, max R] contiguous, zero beyond the rank. Rows of no group
are not written. The mask of drop() is over the rows of one group: its adapter's seed, row among the group's, column.

Fused: one base product over all rows, each tile of which ends with its own adapter's ranks: nothing is padded to the
widest rank, whose extra tiles are skipped. The product of one layer can be added to that of another.

An adapter's results are bit for bit what it gets alone: tiles and sums of rows start where a group's rows start, and
configurations depend on neither rows nor ranks (`lorafuse.backends.problems.multi_problem`).

Cost: 2SKN + 2 Σ_g S[g] R[g] (K + N) FLOPs; one pass over x, w and y; project and outer read x once for each tile of
ranks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafuse.kernels.common import grouped, launch_with_scratch, options, precision, tile_of
from lorafuse.kernels.matmul import fits_descriptor
from lorafuse.kernels.philox import keep_tile
from lorafuse.kernels.product import base_products, weight_descriptor
from lorafuse.kernels.rows import Tiles, source_rows, tile_count, tile_rows
from lorafuse.plan import KernelConfig

__all__ = ["matmul", "outer", "project"]


@triton.jit
def _first_of(p_ends, i):
    """Where the i-th of consecutive ranges starts."""
    return tl.load(p_ends + i - 1, mask=i > 0, other=0)


@triton.jit
def _ranks_of(p_rank_ends, adapter, L):
    """`(first, R)`: the rows of a stack that are the adapter's; none for number L."""
    first = _first_of(p_rank_ends, adapter)
    return first, tl.load(p_rank_ends + adapter, mask=adapter < L, other=first) - first


@triton.jit
def _keep(p_seeds, p_below, adapter, L, o_m, i_c, C, BLOCK_C: tl.constexpr, GROUPED: tl.constexpr):
    """Which elements survive the adapter's dropout; all where it has none."""
    below = tl.load(p_below + adapter, mask=adapter < L, other=0)
    seed = p_seeds + tl.minimum(adapter, L - 1)
    return keep_tile(seed, below, o_m, i_c, C, BLOCK_C, GROUPED) | (below == 0)


@triton.jit
def _project_kernel(
    p_x,
    p_f,
    p_xa,
    p_source,
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
    adapter = group % (L + 1)
    first, R = _ranks_of(p_rank_ends, adapter, L)
    i_r = tl.program_id(1) * BLOCK_R
    if i_r >= R:
        return
    o_m = row + tl.arange(0, BLOCK_M)
    o_r = i_r + tl.arange(0, BLOCK_R)
    start = _first_of(p_row_ends, group)
    # ranks outside are computed from rank 0 and not stored
    p_xm = p_x + source_rows(p_source, o_m, row, end)[:, None] * stride_xm
    p_fr = p_f + (group // (L + 1)).to(tl.int64) * stride_f[0]
    p_fr += (first + tl.where(o_r < R, o_r, 0)).to(tl.int64)[None, :] * stride_f[1]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_xm + o_k[None, :], mask=(o_k < K)[None, :], other=0.0)
        b_f = tl.load(p_fr + o_k.to(tl.int64)[:, None] * stride_f[2], mask=(o_k < K)[:, None], other=0.0).to(dtype)
        if p_seeds is not None:
            b_x = tl.where(_keep(p_seeds, p_below, adapter, L, o_m - start, i_k, K, BLOCK_K, GROUPED), b_x, 0.0)
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
    p_source,
    p_tiles,
    p_row_ends,
    p_rank_ends,
    p_scales,
    p_seeds,
    p_below,
    M,
    N,
    K,
    E,
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
    TMA_X: tl.constexpr,
    TMA_W: tl.constexpr,
    ROWS: tl.constexpr,
    IS_MASKABLE: tl.constexpr,
    IS_SUM: tl.constexpr,
):
    """ROWS is "nk" where K is the contiguous dimension of w, "kn" where N is; E is None for a dense layer.

    IS_MASKABLE gives the low-rank product an accumulator of its own, with a mask or without one: bits must not depend
    on the dropout of other adapters. IS_SUM adds what y holds.
    """
    low_dtype: tl.constexpr = p_xa.dtype.element_ty
    tiles_m = tile_count(p_tiles, M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    d_x = None
    if TMA_X:
        d_x = tl.make_tensor_descriptor(p_x, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    d_w = ()  # type: tuple
    if TMA_W:
        d_w = (weight_descriptor(p_w, E, N, K, stride_w, ROWS, False, BLOCK_N, BLOCK_K),)

    for t in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        i_m, i_n = tile_of(t, tiles_m, tiles_n, GROUP_M)
        group, row, end = tile_rows(p_tiles, i_m, M, BLOCK_M)
        adapter, expert = group, tl.cast(0, tl.int32)
        if E is not None:
            adapter, expert = group % (L + 1), group // (L + 1)
        o_m = row + tl.arange(0, BLOCK_M)
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = o_n < N

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        (acc,) = base_products(
            (acc,), p_x, d_x, (p_w,), d_w, p_source, expert, row, end, o_m, o_n, inside, i_n * BLOCK_N, K, stride_xm,
            (stride_w,), BLOCK_N, BLOCK_K, PRECISION, ROWS, False,
        )  # fmt: skip
        first, R = _ranks_of(p_rank_ends, adapter, L)
        scale = tl.load(p_scales + adapter, mask=adapter < L, other=0.0)
        rows = o_m < end
        p_fe = p_f + expert.to(tl.int64) * stride_f[0]
        low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if IS_MASKABLE else acc
        for i_r in tl.range(0, R, BLOCK_R, num_stages=1):
            o_r = i_r + tl.arange(0, BLOCK_R)
            mask = rows[:, None] & (o_r < R)[None, :]
            b_xa = tl.load(p_xa + o_m.to(tl.int64)[:, None] * widest + o_r[None, :], mask=mask, other=0.0)
            p_fr = p_fe + (first + o_r).to(tl.int64)[:, None] * stride_f[1]
            mask = (o_r < R)[:, None] & inside[None, :]
            b_f = tl.load(p_fr + o_n.to(tl.int64)[None, :] * stride_f[2], mask=mask, other=0.0)
            b_f = (b_f.to(tl.float32) * scale).to(low_dtype)
            low = tl.dot(b_xa, b_f, low, input_precision=LOW_PRECISION)
        if IS_MASKABLE:
            if p_seeds is not None:
                o_s = o_m - _first_of(p_row_ends, group)
                keep = _keep(p_seeds, p_below, adapter, L, o_s, i_n * BLOCK_N, N, BLOCK_N, GROUPED)
                low = tl.where(keep, low, 0.0)
            acc += low
        else:
            acc = low
        if p_bias is not None:
            p_be = p_bias + expert.to(tl.int64) * N
            acc += tl.load(p_be + o_n, mask=inside, other=0.0).to(tl.float32)[None, :]
        p_out = p_y + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
        mask = rows[:, None] & inside[None, :]
        if IS_SUM:
            acc += tl.load(p_out, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_out, acc.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def _outer_kernel(
    p_xa,
    p_x,
    p_out,
    p_source,
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
):
    """Add BLOCK_R ranks and BLOCK_N columns of one expert's and adapter's gradient to what out holds."""
    # the dimension of a grid that has room for all adapters
    p_block, i_n = p_blocks + tl.program_id(0) * 2, tl.program_id(1)
    adapter, i_r = tl.load(p_block), tl.load(p_block + 1)
    expert = tl.program_id(2)
    group = expert * (L + 1) + adapter
    start = _first_of(p_row_ends, group)
    end = tl.load(p_row_ends + group)
    if start >= end:
        return
    first, R = _ranks_of(p_rank_ends, adapter, L)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = i_r + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for m in range(start, end, BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        mask = (o_m < end)[:, None] & (o_n < C)[None, :]
        o_x = source_rows(p_source, o_m, start, end)
        b_x = tl.load(p_x + o_x[:, None] * stride_xm + o_n[None, :], mask=mask, other=0.0)
        if p_seeds is not None:
            keep = _keep(p_seeds, p_below, adapter, L, o_m - start, i_n * BLOCK_N, C, BLOCK_N, GROUPED)
            b_x = tl.where(keep, b_x, 0.0)
        mask = (o_m < end)[:, None] & (o_r < R)[None, :]
        b_xa = tl.load(p_xa + o_m.to(tl.int64)[:, None] * widest + o_r[None, :], mask=mask, other=0.0)
        acc = tl.dot(b_x.to(b_xa.dtype).T, b_xa, acc, input_precision=PRECISION)
    acc *= tl.load(p_scales + adapter)
    p_o = p_out + expert.to(tl.int64) * stride_out[0]
    p_o += (first + o_r).to(tl.int64)[None, :] * stride_out[1] + o_n.to(tl.int64)[:, None] * stride_out[2]
    mask = (o_n < C)[:, None] & (o_r < R)[None, :]
    acc += tl.load(p_o, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_o, acc.to(p_out.dtype.element_ty), mask=mask)


def project(
    x: Tensor, f: Tensor, tiles: Tiles, rank_ends: Tensor, widest: int, dtype: torch.dtype, config: KernelConfig, *,
    source: Tensor | None = None, seeds: Tensor | None = None, below: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`drop(x) fᵀ`, `[S, widest]` in `dtype`, zero beyond an adapter's rank; f `[E, ΣR, K]`.

    x has contiguous rows; `widest`, the largest rank, is at least 1. `seeds` and `below` are there for a dropout mask.
    """
    c, K = config, x.shape[1]
    table = tiles.of(c.block_m)
    xa = x.new_zeros((tiles.rows, widest), dtype=dtype)
    _project_kernel[(table.shape[0] - 1, triton.cdiv(widest, c.block_r))](
        x,
        f,
        xa,
        source,
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
    is_maskable: bool, programs: int, config: KernelConfig, *, source: Tensor | None = None,
    seeds: Tensor | None = None, below: Tensor | None = None, out: Tensor | None = None, is_sum: bool = False,
) -> Tensor:  # fmt: skip
    """`y [S, N]` in x's dtype: x wᵀ + bias + drop(xa (scale · f)); w `[(E,) N, K]`, f `[E, ΣR, N]`.

    x has contiguous rows, w rows or columns, with 16-byte alignment in a "tma" configuration. Only what `is_maskable`
    is masked. `programs` is the number of SMs. Tiles of some experts write theirs of `out`, which is y then; with
    `is_sum` they add to it.
    """
    c, (N, K) = config, w.shape[-2:]
    table, tma = tiles.of(c.block_m), c.form == "tma"
    y = x.new_empty((tiles.rows, N)) if out is None else out
    count = (table.shape[0] - 1) * triton.cdiv(N, c.block_n)

    def launch() -> None:
        _matmul_kernel[(min(programs, count) if tma else count,)](
            x,
            w,
            bias,
            xa,
            f,
            y,
            source,
            table,
            tiles.ends,
            rank_ends,
            scales,
            seeds if is_maskable else None,
            below if is_maskable else None,
            x.shape[0],
            N,
            K,
            w.shape[0] if w.dim() == 3 else None,
            rank_ends.shape[0],
            xa.shape[1],
            x.stride(0),
            w.stride() if w.dim() == 3 else (max(w.stride()), *w.stride()),
            f.stride(),
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            BLOCK_R=c.block_r,
            GROUP_M=c.group_m,
            GROUPED=grouped(N),
            PRECISION=precision(x.dtype),
            LOW_PRECISION=precision(x.dtype, xa.dtype),
            TMA_X=tma and source is None and fits_descriptor(x),
            TMA_W=tma,
            ROWS="nk" if w.stride(-1) == 1 else "kn",
            IS_MASKABLE=is_maskable,
            IS_SUM=is_sum,
            **options(c),
        )

    if tma:
        launch_with_scratch(launch, x.device)
    else:
        launch()
    return y


def outer(
    xa: Tensor, x: Tensor, out: Tensor, blocks: Tensor, tiles: Tiles, rank_ends: Tensor, scales: Tensor,
    config: KernelConfig, *, source: Tensor | None = None, seeds: Tensor | None = None, below: Tensor | None = None,
) -> None:  # fmt: skip
    """`out[e, g] += scale[g] · xaᵀ drop(x)` over each group's rows; out `[E, ΣR, C]`.

    x has contiguous rows. `blocks [P, 2]`, int32, are the pairs of an adapter and every `config.block_r`-th of its
    ranks.
    """
    c, C = config, x.shape[1]
    _outer_kernel[(blocks.shape[0], triton.cdiv(C, c.block_n), out.shape[0])](
        xa,
        x,
        out,
        source,
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
        **options(c),
    )
