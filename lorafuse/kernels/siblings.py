"""Sibling layers, those of one x, in one launch each way: every y, and dx as one sum.

    matmuls       y_i = x w_iᵀ + bias_i + xa_i (scale_i · b_i)ᵀ
    matmul_sum    y = Σ_i x_i w_iᵀ + Σ_j drop_j(xa_j (scale_j · b_j)ᵀ)

Shapes: as `matmul` has them for dense rows, with N_i columns of each y, and K_i of each x that is summed over. An xa
may be columns of a wider matrix. Weights lie where they are: nothing concatenates them, and neither the x of a sum.

Fused: the tiles of all y are one walk, in which a program that has none left of one y continues with the next, so that
there is one last wave instead of one for each layer. A sum has one accumulator, which takes one main loop after the
other; dx is written once and never read, where autograd adds a full-size gradient for each layer.

Cost: that of `matmul` for each layer, less launches, last waves, and passes over dx: two reads and a write for each
layer but the first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafuse.kernels.common import (
    drop_below,
    grouped,
    launch_with_scratch,
    options,
    precision,
    rank_steps,
    tile_of,
)
from lorafuse.kernels.matmul import fits_descriptor
from lorafuse.kernels.product import base_products, low_rank_product, store_tile, weight_descriptor
from lorafuse.kernels.rows import tile_rows
from lorafuse.plan import KernelConfig
from lorafuse.plan.configs_triton import MOST_SIBLINGS

__all__ = ["Low", "low_arguments", "matmul_sum", "matmuls"]


class Low(NamedTuple):
    """`drop(xa (scale · b)ᵀ)`: xa `[M, R]` with contiguous rows, b `[N, R]` with any strides; a scale of None is 1."""

    xa: Tensor
    b: Tensor
    scale: float | None = None
    seed: Tensor | None = None
    p: float = 0.0


@triton.jit
def _lora_matmuls_kernel(
    p_x,
    p_w,
    p_bias,
    p_xa,
    p_b,
    p_y,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_w,
    stride_xa,
    stride_b,
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
    TMA_X: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS_LAST: tl.constexpr,
):
    """Arguments are tuples, one entry for each layer, but x and what is of it."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    d_x, d_w, d_y = None, (), ()  # type: object, tuple, tuple
    if TMA_X:
        d_x = tl.make_tensor_descriptor(p_x, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    if TMA:
        for i in tl.static_range(len(p_w)):
            d_wi = weight_descriptor(
                p_w[i], None, N[i], K, stride_w[i], tl.constexpr(ROWS[i]), False, BLOCK_N, BLOCK_K
            )  # fmt: skip
            d_w = d_w + (d_wi,)
            d_y = d_y + (tl.make_tensor_descriptor(p_y[i], [M, N[i]], [N[i], 1], [BLOCK_M, BLOCK_N // 2]),)

    programs = tl.num_programs(0)
    # this program's first tile of a layer
    first = tl.program_id(0)
    for i in tl.static_range(len(p_w)):
        tiles_n = tl.cdiv(N[i], BLOCK_N)
        for t in range(first, tiles_m * tiles_n, programs):
            i_m, i_n = tile_of(t, tiles_m, tiles_n, GROUP_M)
            group, row, end = tile_rows(None, i_m, M, BLOCK_M)
            o_m = row + tl.arange(0, BLOCK_M)
            o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
            rows = o_m < end
            inside = o_n < N[i]
            accs = base_products(
                (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),), p_x, d_x, p_w[i : i + 1], d_w[i : i + 1], None, group, row,
                end, o_m, o_n, inside, i_n * BLOCK_N, K, stride_xm, stride_w[i : i + 1], BLOCK_N, BLOCK_K, PRECISION,
                tl.constexpr(ROWS[i]), False,
            )  # fmt: skip
            acc = accs[0]
            if p_xa[i] is not None:
                acc = low_rank_product(
                    acc, p_xa[i], p_b[i], None, 0, scale[i], o_m, o_n, rows, inside, i_n, N[i], R[i],
                    stride_xa[i], stride_b[i], BLOCK_R, RANK_STEPS[i], RANKS_LAST[i], False, LOW_PRECISION,
                )  # fmt: skip
            if p_bias[i] is not None:
                acc += tl.load(p_bias[i] + o_n, mask=inside, other=0.0).to(tl.float32)[None, :]
            d_yi = None  # type: object
            if TMA:
                d_yi = d_y[i]
            store_tile(acc, d_yi, p_y[i], row, i_n * BLOCK_N, o_m, o_n, rows, inside, N[i])
        first = (first + programs - tiles_m * tiles_n % programs) % programs


def matmuls(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], lows: Sequence[Low | None], programs: int,
    config: KernelConfig,
) -> list[Tensor]:  # fmt: skip
    """`[y_i [M, N_i]]` of x `[M, K]` and weights `[N_i, K]`, at most MOST_SIBLINGS, in x's dtype.

    x has contiguous rows, biases are contiguous; in a "tma" configuration the rows of weights start on 16-byte
    boundaries. Low-rank products are without masks. `programs` is how many run at a time.
    """
    assert 0 < len(weights) <= MOST_SIBLINGS
    c, (M, K), N = config, x.shape, [w.shape[0] for w in weights]
    y = [x.new_empty((M, n)) for n in N]
    tma = c.form == "tma"
    count = triton.cdiv(M, c.block_m) * sum(triton.cdiv(n, c.block_n) for n in N)
    of_low = low_arguments(lows, c, len(lows))
    low_dtype = next((low.xa.dtype for low in lows if low is not None), None)

    def launch() -> None:
        _lora_matmuls_kernel[(min(programs, count) if tma else count,)](
            x,
            tuple(weights),
            tuple(biases),
            of_low.xa,
            of_low.b,
            tuple(y),
            M,
            tuple(N),
            K,
            of_low.R,
            x.stride(0),
            tuple((max(w.stride()), *w.stride()) for w in weights),
            of_low.stride_xa,
            of_low.stride_b,
            of_low.scale,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            BLOCK_R=c.block_r,
            RANK_STEPS=of_low.rank_steps,
            GROUP_M=c.group_m,
            PRECISION=precision(x.dtype),
            LOW_PRECISION=precision(x.dtype, low_dtype),
            TMA=tma,
            TMA_X=tma and fits_descriptor(x),
            ROWS=tuple("nk" if w.stride(1) == 1 else "kn" for w in weights),
            RANKS_LAST=of_low.ranks_last,
            **options(c),
        )

    if tma:
        launch_with_scratch(launch, x.device)
    else:
        launch()
    return y


@triton.jit
def _pick(values, j):
    """`values[j]`, j known on the device only."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(j == i, values[i], value)
    return value


@triton.jit(do_not_specialize=["drop_below"])
def _lora_matmul_sum_kernel(
    p_x,
    p_w,
    p_xa,
    p_b,
    p_seed,
    p_y,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_w,
    stride_xa,
    stride_b,
    scale,
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
    TMA_X: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS_LAST: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Arguments are tuples, one entry for each term, or for each low-rank product, the first PLAIN of which are without
    a mask. The others have one constant each of RANK_STEPS and RANKS_LAST, the last.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    d_x, d_w, d_y = (), (), None  # type: tuple, tuple, object
    if TMA:
        for i in tl.static_range(len(p_w)):
            if TMA_X[i]:
                d_x = d_x + (tl.make_tensor_descriptor(p_x[i], [M, K[i]], [stride_xm[i], 1], [BLOCK_M, BLOCK_K]),)
            else:
                d_x = d_x + (0,)
            d_wi = weight_descriptor(
                p_w[i], None, N, K[i], stride_w[i], tl.constexpr(ROWS[i]), False, BLOCK_N, BLOCK_K
            )  # fmt: skip
            d_w = d_w + (d_wi,)
        d_y = tl.make_tensor_descriptor(p_y, [M, N], [N, 1], [BLOCK_M, BLOCK_N // 2])

    for t in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        i_m, i_n = tile_of(t, tiles_m, tiles_n, GROUP_M)
        group, row, end = tile_rows(None, i_m, M, BLOCK_M)
        o_m = row + tl.arange(0, BLOCK_M)
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = o_m < end
        inside = o_n < N
        accs = (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
        for i in tl.static_range(len(p_w)):
            d_xi = None  # type: object
            if TMA_X[i]:
                d_xi = d_x[i]
            accs = base_products(
                accs, p_x[i], d_xi, p_w[i : i + 1], d_w[i : i + 1], None, group, row, end, o_m, o_n, inside,
                i_n * BLOCK_N, K[i], stride_xm[i], stride_w[i : i + 1], BLOCK_N, BLOCK_K, PRECISION,
                tl.constexpr(ROWS[i]), False,
            )  # fmt: skip
        acc = accs[0]
        for j in tl.static_range(PLAIN):
            acc = low_rank_product(
                acc, p_xa[j], p_b[j], None, 0, scale[j], o_m, o_n, rows, inside, i_n, N, R[j], stride_xa[j],
                stride_b[j], BLOCK_R, RANK_STEPS[j], RANKS_LAST[j], GROUPED, LOW_PRECISION,
            )  # fmt: skip
        if len(p_xa) > PLAIN:
            # a loop and not unrolled, or the words of all masks are in registers at once
            for j in tl.range(0, len(p_xa) - PLAIN, num_stages=1):
                acc = low_rank_product(
                    acc, _pick(p_xa[PLAIN:], j), _pick(p_b[PLAIN:], j), _pick(p_seed[PLAIN:], j),
                    _pick(drop_below[PLAIN:], j), _pick(scale[PLAIN:], j), o_m, o_n, rows, inside, i_n, N,
                    _pick(R[PLAIN:], j), _pick(stride_xa[PLAIN:], j), _pick(stride_b[PLAIN:], j),
                    BLOCK_R, RANK_STEPS[-1], RANKS_LAST[-1], GROUPED, LOW_PRECISION,
                )  # fmt: skip
        store_tile(acc, d_y, p_y, row, i_n * BLOCK_N, o_m, o_n, rows, inside, N)


def matmul_sum(
    terms: Sequence[tuple[Tensor, Tensor]], lows: Sequence[Low], programs: int, config: KernelConfig
) -> Tensor:
    """`y [M, N]`, the sum over terms `(x [M, K_i], w [N, K_i])` and low-rank products, at most MOST_SIBLINGS of each.

    Every x has contiguous rows; in a "tma" configuration the rows of x and w start on 16-byte boundaries. The masks of
    low-rank products are over `[M, N]`, and nothing is rescaled. `programs` is how many run at a time.
    """
    assert 0 < len(terms) <= MOST_SIBLINGS
    assert len(lows) <= MOST_SIBLINGS
    c, (x, w) = config, zip(*terms, strict=True)
    M, N = x[0].shape[0], w[0].shape[0]
    y = x[0].new_empty((M, N))
    tma = c.form == "tma"
    count = triton.cdiv(M, c.block_m) * triton.cdiv(N, c.block_n)
    lows = sorted(lows, key=lambda low: low.seed is not None)
    plain = sum(low.seed is None for low in lows)
    of_low = low_arguments(lows, c, plain)

    def launch() -> None:
        _lora_matmul_sum_kernel[(min(programs, count) if tma else count,)](
            x,
            w,
            of_low.xa,
            of_low.b,
            of_low.seed,
            y,
            M,
            N,
            tuple(t.shape[1] for t in x),
            of_low.R,
            tuple(t.stride(0) for t in x),
            tuple((max(t.stride()), *t.stride()) for t in w),
            of_low.stride_xa,
            of_low.stride_b,
            of_low.scale,
            of_low.drop_below,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            BLOCK_R=c.block_r,
            RANK_STEPS=of_low.rank_steps,
            GROUP_M=c.group_m,
            GROUPED=grouped(N),
            PRECISION=precision(x[0].dtype),
            LOW_PRECISION=precision(x[0].dtype, lows[0].xa.dtype if lows else None),
            TMA=tma,
            TMA_X=tuple(tma and fits_descriptor(t) for t in x),
            ROWS=tuple("nk" if t.stride(1) == 1 else "kn" for t in w),
            RANKS_LAST=of_low.ranks_last,
            PLAIN=plain,
            **options(c),
        )

    if tma:
        launch_with_scratch(launch, y.device)
    else:
        launch()
    return y


class _LowArguments(NamedTuple):
    """What kernels take of low-rank products, one entry for each; of one that is None xa and b are None."""

    xa: tuple[Tensor | None, ...]
    b: tuple[Tensor | None, ...]
    seed: tuple[Tensor | None, ...]
    drop_below: tuple[int, ...]
    scale: tuple[float | None, ...]
    R: tuple[int, ...]
    stride_xa: tuple[int, ...]
    stride_b: tuple[int, ...]
    rank_steps: tuple[int, ...]
    ranks_last: tuple[bool, ...]


def low_arguments(lows: Sequence[Low | None], config: KernelConfig, plain: int) -> _LowArguments:
    """All of them; from `plain` on they have one dtype of b, and the same constants, that of the most ranks."""
    masked = [low for low in lows[plain:] if low is not None]
    dtype = masked[0].b.dtype if len({low.b.dtype for low in masked}) == 1 else torch.float32
    steps = max((rank_steps(low.xa.shape[1], config) for low in masked), default=0)
    are_last = all(low.b.stride(1) == 1 for low in masked)
    each: list[tuple] = []
    for j, low in enumerate(lows):
        if low is None:
            each.append((None, None, None, 0, None, 0, 0, 0, 0, True))
            continue
        (xa, b, scale, seed, p), R = low, low.xa.shape[1]
        if j < plain:
            b = b if 1 in b.stride() else b.contiguous()
            ranks_last, of_one = b.stride(1) == 1, rank_steps(R, config)
        else:
            b, scale, ranks_last, of_one = b.to(dtype), 1.0 if scale is None else scale, are_last, steps
            b = b if b.stride(1 if are_last else 0) == 1 else b.t().contiguous().t()
        strides = xa.stride(0), b.stride(0 if ranks_last else 1)
        each.append((xa, b, seed, drop_below(p), scale, R, *strides, of_one, ranks_last))
    return _LowArguments(*(tuple(column) for column in zip(*each, strict=True))) if each else _LowArguments(*[()] * 10)
