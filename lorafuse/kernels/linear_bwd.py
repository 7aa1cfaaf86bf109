"""Backward of the LoRA linear.

    dx = dy w + mask ⊙ (dyb a)        dyb = scale · dy b
    da = dybᵀ drop(x)                 db = scale · dyᵀ xa        dbias = Σ dy

Shapes: dy [M, N] and x [M, K] with any row stride, w [N, K] likewise, a [R, K], b [N, R], xa and dyb [M, R] contiguous;
dx [M, K], da [R, K], db [N, R], dbias [N]. There is no dw. `mask` is that of dropout, drawn again from its seed.
Where xa and dyb are fp32 over fp16 operands, they are multiplied in tf32.

Fused: dyb, db and dbias come from one read of dy. dx starts from the low-rank product in the fp32 accumulator of the
base product, masked there, so that dx is written once and no mask is stored. Sums over many programs are deterministic:
each writes an fp32 partial, and a second kernel adds them in a fixed order.

Cost: 2MNK + 4MR(N + K) FLOPs. Beyond the base product: one read of dy, one of x, and the partials,
4R(MN/BLOCK_N + splits·(N + K)) bytes written and read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafuse.kernels.common import (
    drop_below,
    grouped,
    launch_with_scratch,
    load_rank_tile,
    options,
    precision,
    rank_steps,
    store_halves,
    tile_of,
)
from lorafuse.kernels.philox import keep_tile
from lorafuse.plan import KernelConfig

__all__ = ["lora_da_partials", "lora_dyb_db_partials", "lora_linear_dx", "sum_partials"]


@triton.jit
def _lora_dyb_db_kernel(
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
    """Partials of dyb over a column block, of db and dbias over `rows` rows; None for those that are not wanted."""
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


@triton.jit(do_not_specialize=["drop_below"])
def _lora_da_kernel(
    p_x,
    p_dyb,
    p_seed,
    p_da,
    M,
    K,
    R,
    stride_xm,
    rows,
    drop_below,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUPED: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
):
    """Partials of da over `rows` rows, for the BLOCK_N columns of x that this program owns."""
    i_n = tl.program_id(0)
    i_s = tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    # daᵀ, so that the long side of the tile is the one that tensor cores want long
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for m in range(i_s * rows, tl.minimum(i_s * rows + rows, M), BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        mask = (o_m < M)[:, None] & (o_n < K)[None, :]
        b_x = tl.load(p_x + o_m.to(tl.int64)[:, None] * stride_xm + o_n[None, :], mask=mask, other=0.0)
        if p_seed is not None:
            b_x = tl.where(keep_tile(p_seed, drop_below, o_m, i_n * BLOCK_N, K, BLOCK_N, GROUPED), b_x, 0.0)
        mask_r = (o_m < M)[:, None] & (o_r < R)[None, :]
        b_dyb = tl.load(p_dyb + o_m.to(tl.int64)[:, None] * R + o_r[None, :], mask=mask_r, other=0.0)
        acc = tl.dot(b_x.to(b_dyb.dtype).T, b_dyb, acc, input_precision=LOW_PRECISION)
    o_da = (i_s.to(tl.int64) * R + o_r)[None, :] * K + o_n[:, None]
    tl.store(p_da + o_da, acc, mask=(o_n < K)[:, None] & (o_r < R)[None, :])


@triton.jit
def _add_low_rank(acc, p_dyb, p_a, o_m, o_n, i_r, M, K, R, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):
    """`acc + dyb a` for BLOCK_R ranks from `i_r`."""
    dtype: tl.constexpr = p_dyb.dtype.element_ty
    o_r = i_r + tl.arange(0, BLOCK_R)
    b_dyb = load_rank_tile(p_dyb, o_m, M, o_r, R, 1.0, dtype)
    mask = (o_r < R)[:, None] & (o_n < K)[None, :]
    b_a = tl.load(p_a + o_r.to(tl.int64)[:, None] * K + o_n[None, :], mask=mask, other=0.0)
    return tl.dot(b_dyb, b_a.to(dtype), acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["drop_below"])
def _lora_linear_dx_kernel(
    p_dy,
    p_w,
    p_a,
    p_dyb,
    p_seed,
    p_dx,
    M,
    N,
    K,
    R,
    stride_dm,
    stride_wn,
    drop_below,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Tiles of BLOCK_M rows and BLOCK_N columns of dx; the reduction over N goes in steps of BLOCK_K."""
    dtype: tl.constexpr = p_dy.dtype.element_ty
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(K, BLOCK_N)
    if TMA:
        d_dy = tl.make_tensor_descriptor(p_dy, [M, N], [stride_dm, 1], [BLOCK_M, BLOCK_K])
        d_w = tl.make_tensor_descriptor(p_w, [N, K], [stride_wn, 1], [BLOCK_K, BLOCK_N])
        d_dx = tl.make_tensor_descriptor(p_dx, [M, K], [K, 1], [BLOCK_M, BLOCK_N // 2])

    for t in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        i_m, i_n = tile_of(t, tiles_m, tiles_n, GROUP_M)
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if TMA:
            for i_k in range(0, N, BLOCK_K):
                b_dy = d_dy.load([i_m * BLOCK_M, i_k])
                b_w = d_w.load([i_k, i_n * BLOCK_N])
                acc = tl.dot(b_dy, b_w, acc)
        else:
            # rows outside are computed from row 0 and not stored
            o_k = tl.arange(0, BLOCK_K)
            p_dyk = p_dy + tl.where(o_m < M, o_m, 0).to(tl.int64)[:, None] * stride_dm + o_k[None, :]
            p_wk = p_w + o_k.to(tl.int64)[:, None] * stride_wn + o_n[None, :]
            step_w = tl.cast(stride_wn, tl.int64) * BLOCK_K
            for i_k in range(0, N, BLOCK_K):
                b_dy = tl.load(p_dyk, mask=(o_k < N - i_k)[None, :], other=0.0)
                b_w = tl.load(p_wk, mask=(o_k < N - i_k)[:, None] & (o_n < K)[None, :], other=0.0)
                acc = tl.dot(b_dy, b_w, acc, input_precision=PRECISION)
                p_dyk += BLOCK_K
                p_wk += step_w

        # with dropout the low-rank product is masked on its way, in an accumulator of its own
        low = acc if p_seed is None else tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if RANK_STEPS == 1:
            low = _add_low_rank(low, p_dyb, p_a, o_m, o_n, 0, M, K, R, BLOCK_R, LOW_PRECISION)
        else:
            # a loop and not unrolled, or the tiles of all ranks are in registers at once
            for i_r in tl.range(0, R, BLOCK_R, num_stages=1):
                low = _add_low_rank(low, p_dyb, p_a, o_m, o_n, i_r, M, K, R, BLOCK_R, LOW_PRECISION)
        if p_seed is None:
            acc = low
        else:
            acc += tl.where(keep_tile(p_seed, drop_below, o_m, i_n * BLOCK_N, K, BLOCK_N, GROUPED), low, 0.0)

        if TMA:
            store_halves(d_dx, i_m * BLOCK_M, i_n * BLOCK_N, acc, dtype)
        else:
            mask = (o_m < M)[:, None] & (o_n < K)[None, :]
            tl.store(p_dx + o_m.to(tl.int64)[:, None] * K + o_n[None, :], acc.to(dtype), mask=mask)


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


def _split(M: int, config: KernelConfig) -> tuple[int, int]:
    """`(splits, rows of each)` of M rows; every split but the last is full, and none is empty."""
    steps = triton.cdiv(M, config.block_m)
    rows = triton.cdiv(steps, min(config.splits, steps)) * config.block_m
    return triton.cdiv(M, rows), rows


def lora_dyb_db_partials(
    dy: Tensor, b: Tensor, xa: Tensor | None, dyb: bool, dbias: bool, config: KernelConfig
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """fp32 partials of dyb `[N/BLOCK_N, M, R]`, of db `[splits, N, R]` when xa is given, of dbias `[splits, N]`.

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
    _lora_dyb_db_kernel[(columns, splits, rank_steps(R, config))](
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


def lora_da_partials(x: Tensor, dyb: Tensor, seed: Tensor | None, p: float, config: KernelConfig) -> Tensor:
    """fp32 partials of `da = dybᵀ drop(x)`, `[splits, R, K]`. M > 0.

    x `[M, K]` has contiguous rows; dyb is contiguous.
    """
    (M, K), R = x.shape, dyb.shape[1]
    splits, rows = _split(M, config)
    parts = torch.empty((splits, R, K), dtype=torch.float32, device=x.device)
    _lora_da_kernel[(triton.cdiv(K, config.block_n), splits, rank_steps(R, config))](
        x,
        dyb,
        seed,
        parts,
        M,
        K,
        R,
        x.stride(0),
        rows,
        drop_below(p),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        GROUPED=grouped(K),
        LOW_PRECISION=precision(x.dtype, dyb.dtype),
        **options(config),
    )
    return parts


def lora_linear_dx(
    dy: Tensor, w: Tensor, a: Tensor, dyb: Tensor, seed: Tensor | None, p: float, programs: int, config: KernelConfig
) -> Tensor:
    """`dx = dy w + mask ⊙ (dyb a)`, `[M, K]` in dy's dtype.

    dy and w have contiguous rows, a and dyb are contiguous; `programs` is how many run at a time, the number of SMs.
    """
    (M, N), (R, K) = dy.shape, a.shape
    dx = dy.new_empty((M, K))
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(K, config.block_n)
    tma = config.form == "tma"

    def launch() -> None:
        _lora_linear_dx_kernel[(min(programs, tiles) if tma else tiles,)](
            dy,
            w,
            a,
            dyb,
            seed,
            dx,
            M,
            N,
            K,
            R,
            dy.stride(0),
            w.stride(0),
            drop_below(p),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_R=config.block_r,
            RANK_STEPS=rank_steps(R, config),
            GROUP_M=config.group_m,
            GROUPED=grouped(K),
            PRECISION=precision(dy.dtype),
            LOW_PRECISION=precision(dy.dtype, dyb.dtype),
            TMA=tma,
            **options(config),
        )

    if tma:
        launch_with_scratch(launch, dy.device)
    else:
        launch()
    return dx


def sum_partials(segments: list[tuple[Tensor, Tensor, float]], config: KernelConfig) -> None:
    """For each `(part, out, scale)`, at most three: `out = scale · part.sum(0)`, in fp32 and in a fixed order."""
    part, out, scale = zip(*segments, *[(None, None, 0.0)] * (3 - len(segments)), strict=True)
    sizes = [0 if o is None else o.numel() for o in out]
    counts = [0 if q is None else q.shape[0] for q in part]
    blocks = sum(triton.cdiv(size, config.block_n) for size in sizes)
    _sum_partials_kernel[(blocks,)](*part, *out, *sizes, *counts, *scale, BLOCK=config.block_n, **options(config))
