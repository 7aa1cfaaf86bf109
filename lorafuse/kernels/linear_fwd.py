"""Forward of the LoRA linear.

    y = x wᵀ + bias + scale · xa bᵀ        xa = drop(x) aᵀ

Shapes: x [M, K] with any row stride, w [N, K] likewise, bias [N], a [R, K] and b [N, R] contiguous, xa [M, R],
y [M, N]. drop() masks and does not rescale; a and b may be fp32 and are rounded to x's dtype in registers, b after its
scale. An fp32 xa over fp16 operands (the range of fp16 being too small) is multiplied with an fp32 b, in tf32.

Fused: the low-rank product is accumulated in the fp32 accumulator of the base product, as R more columns of K; bias and
rounding follow in the same registers. y is written once and never read. `xa` comes from a kernel of its own (two
kernels, x read twice) or, without dropout, from the first programs of the same one (`fused_xa`, `p_flags`).
Saved for backward: x, xa.

Cost: 2MNK + 2MR(N + K) FLOPs. Beyond the base product: one read of x (two kernels), one write
and N/BLOCK_N reads of xa.
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

__all__ = ["lora_linear_fwd", "lora_xa"]


@triton.jit
def _xa_tile(
    p_x,
    p_a,
    p_seed,
    p_xa,
    i_m,
    i_r,
    M,
    K,
    R,
    stride_xm,
    drop_below,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows `i_m` and ranks `i_r` of xa, from one walk along K."""
    dtype: tl.constexpr = p_x.dtype.element_ty
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    # rows and ranks outside are computed from row 0 and not stored
    p_xm = p_x + tl.where(o_m < M, o_m, 0).to(tl.int64)[:, None] * stride_xm
    p_ar = p_a + tl.where(o_r < R, o_r, 0).to(tl.int64)[None, :] * K
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_xm + o_k[None, :], mask=(o_k < K)[None, :], other=0.0)
        b_a = tl.load(p_ar + o_k[:, None], mask=(o_k < K)[:, None], other=0.0).to(dtype)
        if p_seed is not None:
            b_x = tl.where(keep_tile(p_seed, drop_below, o_m, i_k, K, BLOCK_K, GROUPED), b_x, 0.0)
        acc = tl.dot(b_x, b_a, acc, input_precision=PRECISION)
    mask = (o_m < M)[:, None] & (o_r < R)[None, :]
    p_xa_tile = p_xa + o_m.to(tl.int64)[:, None] * R + o_r[None, :]
    tl.store(p_xa_tile, acc.to(p_xa.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["drop_below"])
def _lora_xa_kernel(
    p_x,
    p_a,
    p_seed,
    p_xa,
    M,
    K,
    R,
    stride_xm,
    drop_below,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    _xa_tile(
        p_x,
        p_a,
        p_seed,
        p_xa,
        tl.program_id(0),
        tl.program_id(1),
        M,
        K,
        R,
        stride_xm,
        drop_below,
        BLOCK_M,
        BLOCK_K,
        BLOCK_R,
        GROUPED,
        PRECISION,
    )


@triton.jit
def _add_low_rank(
    acc,
    p_xa,
    p_b,
    o_m,
    o_n,
    i_r,
    M,
    N,
    R,
    scale,
    BLOCK_R: tl.constexpr,
    AROUND_L1: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`acc + scale · xa bᵀ` for BLOCK_R ranks from `i_r`; AROUND_L1 where other programs of this kernel wrote xa."""
    o_r = i_r + tl.arange(0, BLOCK_R)
    mask = (o_m < M)[:, None] & (o_r < R)[None, :]
    p_xar = p_xa + o_m.to(tl.int64)[:, None] * R + o_r[None, :]
    b_xa = tl.load(p_xar, mask=mask, other=0.0, cache_modifier=".cg" if AROUND_L1 else "")
    b_b = load_rank_tile(p_b, o_n, N, o_r, R, scale, p_xa.dtype.element_ty)
    return tl.dot(b_xa, b_b.T, acc, input_precision=PRECISION)


@triton.jit
def _lora_linear_fwd_kernel(
    p_x,
    p_w,
    p_bias,
    p_a,
    p_b,
    p_xa,
    p_y,
    p_flags,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_wn,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    dtype: tl.constexpr = p_x.dtype.element_ty
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    programs = tl.num_programs(0)
    program = tl.program_id(0)
    if TMA:
        d_x = tl.make_tensor_descriptor(p_x, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
        d_w = tl.make_tensor_descriptor(p_w, [N, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])
        d_y = tl.make_tensor_descriptor(p_y, [M, N], [N, 1], [BLOCK_M, BLOCK_N // 2])

    if p_flags is not None:
        # Programs are numbered as they arrive, and the first take the xa items from a queue: whatever a program waits
        # for below is held by one that runs, so that nothing deadlocks beside other kernels. The last wave leaves
        # `slack` programs one tile short; where these are too few, all help.
        arrival = tl.atomic_add(p_flags, 1, sem="relaxed")
        program = programs - 1 - arrival
        slack = programs - (tiles_m * tiles_n) % programs
        if (arrival < slack) | (4 * slack < tiles_m):
            i_m = tl.atomic_add(p_flags + 1, 1, sem="relaxed")
            while i_m < tiles_m:
                _xa_tile(
                    p_x,
                    p_a,
                    None,
                    p_xa,
                    i_m,
                    0,
                    M,
                    K,
                    R,
                    stride_xm,
                    0,
                    BLOCK_M,
                    BLOCK_K,
                    BLOCK_R * RANK_STEPS,
                    False,
                    PRECISION,
                )
                # every thread has stored before one of them publishes
                tl.debug_barrier()
                tl.atomic_xchg(p_flags + 2 + i_m, 1, sem="release", scope="gpu")
                i_m = tl.atomic_add(p_flags + 1, 1, sem="relaxed")

    for t in range(program, tiles_m * tiles_n, programs):
        i_m, i_n = tile_of(t, tiles_m, tiles_n, GROUP_M)
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if TMA:
            for i_k in range(0, K, BLOCK_K):
                b_x = d_x.load([i_m * BLOCK_M, i_k])
                b_w = d_w.load([i_n * BLOCK_N, i_k])
                acc = tl.dot(b_x, b_w.T, acc)
        else:
            # rows outside are computed from row 0 and not stored
            o_k = tl.arange(0, BLOCK_K)
            p_xk = p_x + tl.where(o_m < M, o_m, 0).to(tl.int64)[:, None] * stride_xm + o_k[None, :]
            p_wk = p_w + tl.where(o_n < N, o_n, 0).to(tl.int64)[None, :] * stride_wn + o_k[:, None]
            for i_k in range(0, K, BLOCK_K):
                b_x = tl.load(p_xk, mask=(o_k < K - i_k)[None, :], other=0.0)
                b_w = tl.load(p_wk, mask=(o_k < K - i_k)[:, None], other=0.0)
                acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
                p_xk += BLOCK_K
                p_wk += BLOCK_K

        if p_flags is not None:
            while tl.atomic_add(p_flags + 2 + i_m, 0, sem="acquire", scope="gpu") == 0:
                pass
        if RANK_STEPS == 1:
            acc = _add_low_rank(
                acc, p_xa, p_b, o_m, o_n, 0, M, N, R, scale, BLOCK_R, p_flags is not None, LOW_PRECISION
            )
        else:
            # a loop and not unrolled, or the tiles of all ranks are in registers at once
            for i_r in tl.range(0, R, BLOCK_R, num_stages=1):
                acc = _add_low_rank(
                    acc, p_xa, p_b, o_m, o_n, i_r, M, N, R, scale, BLOCK_R, p_flags is not None, LOW_PRECISION
                )

        if p_bias is not None:
            acc += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
        if TMA:
            store_halves(d_y, i_m * BLOCK_M, i_n * BLOCK_N, acc, dtype)
        else:
            mask = (o_m < M)[:, None] & (o_n < N)[None, :]
            tl.store(p_y + o_m.to(tl.int64)[:, None] * N + o_n[None, :], acc.to(dtype), mask=mask)


def lora_xa(x: Tensor, a: Tensor, seed: Tensor | None, p: float, config: KernelConfig, wide: bool = False) -> Tensor:
    """`xa = drop(x) aᵀ`, `[M, R]` in x's dtype, in fp32 when `wide`.

    x `[M, K]` has contiguous rows, a `[R, K]` is contiguous.
    """
    (M, K), R = x.shape, a.shape[0]
    xa = x.new_empty((M, R), dtype=torch.float32 if wide else x.dtype)
    grid = (triton.cdiv(M, config.block_m), rank_steps(R, config))
    _lora_xa_kernel[grid](
        x,
        a,
        seed,
        xa,
        M,
        K,
        R,
        x.stride(0),
        drop_below(p),
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        GROUPED=grouped(K),
        PRECISION=precision(x.dtype),
        **options(config),
    )
    return xa


def lora_linear_fwd(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    xa: Tensor | None,
    programs: int,
    config: KernelConfig,
) -> tuple[Tensor, Tensor]:
    """`(y [M, N] in x's dtype, xa [M, R])`; `scale` is that of the masked low-rank path, dropout's rescaling included.

    `xa` comes from `lora_xa`, or is None and computed inside when `config.fused_xa`. x and w have contiguous rows,
    bias, a and b are contiguous; `programs` is how many run at a time, the number of SMs.
    """
    (M, K), N, R = x.shape, w.shape[0], a.shape[0]
    y = x.new_empty((M, N))
    tiles_m, tiles_n = triton.cdiv(M, config.block_m), triton.cdiv(N, config.block_n)
    flags = None
    if config.fused_xa:
        xa = x.new_empty((M, R))
        # arrivals, the queue of xa items, and one flag for each; zeroed by each call, so that a CUDA graph replays it
        flags = torch.zeros(2 + tiles_m, dtype=torch.int32, device=x.device)
    assert xa is not None
    tma = config.form == "tma"

    def launch() -> None:
        _lora_linear_fwd_kernel[(min(programs, tiles_m * tiles_n) if tma or config.fused_xa else tiles_m * tiles_n,)](
            x,
            w,
            bias,
            a,
            b,
            xa,
            y,
            flags,
            M,
            N,
            K,
            R,
            x.stride(0),
            w.stride(0),
            scale,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_R=config.block_r,
            RANK_STEPS=rank_steps(R, config),
            GROUP_M=config.group_m,
            PRECISION=precision(x.dtype),
            LOW_PRECISION=precision(x.dtype, xa.dtype),
            TMA=tma,
            **options(config),
        )

    if tma:
        launch_with_scratch(launch, x.device)
    else:
        launch()
    return y, xa
