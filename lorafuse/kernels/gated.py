"""Gate and up of a gated MLP in one launch, with their activation.

    gate = x w_gᵀ + bias_g + xa_g (scale_g · b_g)ᵀ        up the same        h = act(gate) · up, or a function of both

Shapes: as `siblings` has them, of two layers with N columns each; gate, up and h `[M, N]`.

Fused: a tile has the same columns of gate and of up in two accumulators, and x is read once for both. h is computed
from what was rounded and stored, so that backward computes from the numbers that forward used. The backward is an
epilogue of the product that gives dh: `matmul.gated_backward`.

Cost: that of two products, one pass over x for both, and one write of gate, up and h, which are not read.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lorafuse.kernels.common import launch_with_scratch, options, precision, tile_of
from lorafuse.kernels.epilogues import activate_apart
from lorafuse.kernels.matmul import fits_descriptor, parts_of
from lorafuse.kernels.product import base_products, low_rank_product, weight_descriptor
from lorafuse.kernels.rows import tile_rows
from lorafuse.kernels.siblings import Low, low_arguments
from lorafuse.plan import KernelConfig

__all__ = ["gated"]


@triton.jit
def _lora_gated_kernel(
    p_x,
    p_w,
    p_bias,
    p_xa,
    p_b,
    p_gate,
    p_up,
    p_h,
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
    ACT: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Tuples are of gate and of up; BLOCK_N columns are half of each."""
    HALF: tl.constexpr = BLOCK_N // 2
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, HALF)
    d_x, d_w = None, ()  # type: object, tuple
    if TMA_X:
        d_x = tl.make_tensor_descriptor(p_x, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    if TMA:
        d_gate = weight_descriptor(p_w[0], None, N, K, stride_w[0], ROWS, False, HALF, BLOCK_K)
        d_w = (d_gate, weight_descriptor(p_w[1], None, N, K, stride_w[1], ROWS, False, HALF, BLOCK_K))

    for t in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        i_m, i_n = tile_of(t, tiles_m, tiles_n, GROUP_M)
        group, row, end = tile_rows(None, i_m, M, BLOCK_M)
        o_m = row + tl.arange(0, BLOCK_M)
        o_n = i_n * HALF + tl.arange(0, HALF)
        rows = o_m < end
        inside = o_n < N
        zeros = tl.zeros((BLOCK_M, HALF), tl.float32)
        accs = base_products(
            (zeros, zeros), p_x, d_x, p_w, d_w, None, group, row, end, o_m, o_n, inside, i_n * HALF, K, stride_xm,
            stride_w, HALF, BLOCK_K, PRECISION, ROWS, False,
        )  # fmt: skip
        sums = ()  # type: tuple
        for i in tl.static_range(2):
            acc = accs[i]
            if p_xa[i] is not None:
                acc = low_rank_product(
                    acc, p_xa[i], p_b[i], None, 0, scale[i], o_m, o_n, rows, inside, i_n, N, R[i], stride_xa[i],
                    stride_b[i], BLOCK_R, RANK_STEPS[i], RANKS_LAST[i], False, LOW_PRECISION,
                )  # fmt: skip
            if p_bias[i] is not None:
                acc += tl.load(p_bias[i] + o_n, mask=inside, other=0.0).to(tl.float32)[None, :]
            sums = sums + (acc,)
        o_s = o_m.to(tl.int64)[:, None]
        activate_apart(sums[0], sums[1], i_n * HALF, o_s, rows[:, None], p_gate, p_up, p_h, N, ACT, PARTS)


def gated(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], lows: Sequence[Low | None], activation: str,
    programs: int, config: KernelConfig,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`(gate, up, h)`, `[M, N]` each in x's dtype; arguments as of `siblings.matmuls`, of gate and up.

    Both weights have the same contiguous dimension.
    """
    c, (M, K), N = config, x.shape, weights[0].shape[0]
    gate, up, h = (x.new_empty((M, N)) for _ in range(3))
    tma = c.form == "tma"
    count = triton.cdiv(M, c.block_m) * triton.cdiv(N, c.block_n // 2)
    of_low = low_arguments(lows, c, len(lows))
    low_dtype = next((low.xa.dtype for low in lows if low is not None), None)

    def launch() -> None:
        _lora_gated_kernel[(min(programs, count) if tma else count,)](
            x,
            tuple(weights),
            tuple(biases),
            of_low.xa,
            of_low.b,
            gate,
            up,
            h,
            M,
            N,
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
            ROWS="nk" if weights[0].stride(1) == 1 else "kn",
            RANKS_LAST=of_low.ranks_last,
            ACT=activation,
            PARTS=parts_of(c),
            **options(c),
        )

    if tma:
        launch_with_scratch(launch, x.device)
    else:
        launch()
    return gate, up, h
