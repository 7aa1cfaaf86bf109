"""The main loop on the device: what the kernels of `matmul` and `siblings` are made of.

    accs[i] += x wᵀ[i]        one walk along K for all weights that read the same x
    acc += drop(xa (scale · b)ᵀ)        as so many more columns of K

A tile is BLOCK_M rows `o_m` and BLOCK_N columns `o_n` of y, in fp32 registers; `inside` says which columns exist,
`rows` which rows.
"""

import triton
import triton.language as tl

from lorafuse.kernels.common import store_halves
from lorafuse.kernels.philox import keep_tile
from lorafuse.kernels.rows import source_rows

__all__ = ["base_products", "low_rank_product", "store_tile", "weight_descriptor"]


@triton.jit
def weight_descriptor(
    p_w, G, N, K, stride_w, ROWS: tl.constexpr, PAIRED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Boxes of BLOCK_N rows and BLOCK_K columns of one group; PAIRED: half of the rows from gate, half from up.

    G is None for dense rows.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    if PAIRED:
        half = (N // 2).to(tl.int64)
        if ROWS == "nk":
            return tl.make_tensor_descriptor(
                p_w, [G, 2, N // 2, K], [stride_w[0], half * stride_w[1], stride_w[1], 1], [1, 2, HALF, BLOCK_K]
            )
        else:
            return tl.make_tensor_descriptor(
                p_w, [G, K, 2, N // 2], [stride_w[0], stride_w[2], half, 1], [1, BLOCK_K, 2, HALF]
            )
    elif G is None:
        if ROWS == "nk":
            return tl.make_tensor_descriptor(p_w, [N, K], [stride_w[1], 1], [BLOCK_N, BLOCK_K])
        else:
            return tl.make_tensor_descriptor(p_w, [K, N], [stride_w[2], 1], [BLOCK_K, BLOCK_N])
    elif ROWS == "nk":
        return tl.make_tensor_descriptor(p_w, [G, N, K], [stride_w[0], stride_w[1], 1], [1, BLOCK_N, BLOCK_K])
    else:
        return tl.make_tensor_descriptor(p_w, [G, K, N], [stride_w[0], stride_w[2], 1], [1, BLOCK_K, BLOCK_N])


@triton.jit
def _load_weight(d_w, group, i_n, i_k, ROWS: tl.constexpr, PAIRED: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """`wᵀ [K, N]` of one box, `i_n` its first row of w, or of gate and of up."""
    if len(d_w.shape) == 2:
        return d_w.load([i_n, i_k]).T if ROWS == "nk" else d_w.load([i_k, i_n])
    elif ROWS == "nk":
        box = d_w.load([group, 0, i_n, i_k]) if PAIRED else d_w.load([group, i_n, i_k])
        return box.reshape((N, K)).T
    else:
        box = d_w.load([group, i_k, 0, i_n]) if PAIRED else d_w.load([group, i_k, i_n])
        return box.reshape((K, N))


@triton.jit
def _add_low_rank(
    acc, p_xa, p_b, o_m, o_n, rows, columns, i_r, R, stride_xa, stride_b, scale, BLOCK_R: tl.constexpr,
    RANKS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc + xa (scale · b)ᵀ` for BLOCK_R ranks from `i_r`; RANKS_LAST where they are b's contiguous dimension."""
    o_r = i_r + tl.arange(0, BLOCK_R)
    # each load expands its own rows and columns, mask first: the layouts of two loads are not tied to each other then,
    # which takes up to 20 registers less (Triton 3.6, 2026-11-29)
    mask = rows[:, None] & (o_r < R)[None, :]
    b_xa = tl.load(p_xa + o_m.to(tl.int64)[:, None] * stride_xa + o_r[None, :], mask=mask, other=0.0)
    if RANKS_LAST:
        mask = columns[:, None] & (o_r < R)[None, :]
        b_b = tl.load(p_b + o_n.to(tl.int64)[:, None] * stride_b + o_r[None, :], mask=mask, other=0.0)
    else:
        mask = (o_r < R)[:, None] & columns[None, :]
        b_b = tl.load(p_b + o_r.to(tl.int64)[:, None] * stride_b + o_n[None, :], mask=mask, other=0.0)
    if scale is not None:
        b_b = b_b.to(tl.float32) * scale
    b_b = b_b.to(p_xa.dtype.element_ty)
    return tl.dot(b_xa, b_b.T if RANKS_LAST else b_b, acc, input_precision=PRECISION)


@triton.jit
def base_products(
    accs, p_x, d_x, p_w, d_w, p_source, group, row, end, o_m, o_n, inside, i_n, K, stride_xm, stride_w,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """`accs[i] + x wᵀ[i]`: p_w, stride_w and d_w are one for each weight, `i_n` is the first column in each.

    Operands are read through d_x and d_w, or through pointers where d_x is None or d_w empty.
    """
    o_k = tl.arange(0, BLOCK_K)
    p_xk = p_x
    p_wk, step_w = (), ()  # type: tuple, tuple
    if d_x is None:
        p_xk = p_x + source_rows(p_source, o_m, row, end)[:, None] * stride_xm + o_k[None, :]
    if len(d_w) == 0:
        for i in tl.static_range(len(p_w)):
            # rows of w outside are computed from row 0 and not stored, which takes no mask; not so where columns of y
            # are contiguous, because there it would hide that they are
            p_wg = p_w[i] + group.to(tl.int64) * stride_w[i][0]
            if ROWS == "nk":
                p_wi = p_wg + tl.where(inside, o_n, 0).to(tl.int64)[None, :] * stride_w[i][1] + o_k[:, None]
            else:
                p_wi = p_wg + o_k.to(tl.int64)[:, None] * stride_w[i][2] + o_n.to(tl.int64)[None, :] * stride_w[i][1]
            p_wk = p_wk + (p_wi,)
            step_w = step_w + (tl.cast(stride_w[i][2], tl.int64) * BLOCK_K,)
    for i_k in range(0, K, BLOCK_K):
        if d_x is None:
            b_x = tl.load(p_xk, mask=(o_k < K - i_k)[None, :], other=0.0)
            p_xk += BLOCK_K
        else:
            b_x = d_x.load([row, i_k])
        sums, ahead = (), ()  # type: tuple, tuple
        for i in tl.static_range(len(p_w)):
            if len(d_w) == 0:
                mask_k = (o_k < K - i_k)[:, None]
                b_w = tl.load(p_wk[i], mask=mask_k if ROWS == "nk" else mask_k & inside[None, :], other=0.0)
                ahead = ahead + (p_wk[i] + step_w[i],)
            else:
                b_w = _load_weight(d_w[i], group, i_n, i_k, ROWS, PAIRED, BLOCK_N, BLOCK_K)
            sums = sums + (tl.dot(b_x, b_w, accs[i], input_precision=PRECISION),)
        accs, p_wk = sums, ahead
    return accs


@triton.jit
def low_rank_product(
    acc, p_xa, p_b, p_seed, drop_below, scale, o_m, o_n, rows, inside, i_n, N, R, stride_xa, stride_b,
    BLOCK_R: tl.constexpr, RANK_STEPS: tl.constexpr, RANKS_LAST: tl.constexpr, GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc + drop(xa (scale · b)ᵀ)` of column block `i_n`, with a mask over `[…, N]`."""
    # with dropout the low-rank product is masked on its way, in an accumulator of its own
    low = acc if p_seed is None else tl.zeros(acc.shape, tl.float32)
    if RANK_STEPS == 1:
        low = _add_low_rank(
            low, p_xa, p_b, o_m, o_n, rows, inside, 0, R, stride_xa, stride_b, scale, BLOCK_R, RANKS_LAST, PRECISION
        )  # fmt: skip
    else:
        # a loop and not unrolled, or the tiles of all ranks are in registers at once
        for i_r in tl.range(0, R, BLOCK_R, num_stages=1):
            low = _add_low_rank(
                low, p_xa, p_b, o_m, o_n, rows, inside, i_r, R, stride_xa, stride_b, scale,
                BLOCK_R, RANKS_LAST, PRECISION,
            )  # fmt: skip
    if p_seed is None:
        return low
    else:
        return acc + tl.where(
            keep_tile(p_seed, drop_below, o_m, i_n * acc.shape[1], N, acc.shape[1], GROUPED), low, 0.0
        )


@triton.jit
def store_tile(acc, d_y, p_y, row, column, o_m, o_n, rows, inside, N):
    """Store a tile from `row` and `column` on through d_y, or where that is None through pointers."""
    dtype: tl.constexpr = p_y.dtype.element_ty
    if d_y is not None:
        store_halves(d_y, row, column, acc, dtype)
    else:
        mask = rows[:, None] & inside[None, :]
        tl.store(p_y + o_m.to(tl.int64)[:, None] * N + o_n[None, :], acc.to(dtype), mask=mask)
