"""The main loop of few dense rows over a quantized weight: each tile of w is decoded in registers before its product.

    y = x wᵀ + bias + drop(xa (scale · b)ᵀ)        w = value(code) · scale, as `decode` has it, bit for bit

Shapes: x `[M, K]` of 16 bits with contiguous rows; w `[N, K]`, codes in the order of memory; bias `[N]`, xa `[M, R]`
contiguous, b `[N, R]` with any strides, y `[M, N]`. The input gradient is the same product, `dx = dy w + drop(dyb a)`:
w is read as it is stored, and its rows are the reduction.

Fused: decoding, so that no dense w is written or read; the low-rank product and the bias as in `matmul`. A tile of w is
decoded once for each BLOCK_M rows of x. Codes and x of the next step are loaded to registers while a step computes: a
pipeline through shared memory would take the look-ups of a table with it. Nothing is saved for backward here.

Cost: 2MN(K + R) FLOPs; M / BLOCK_M passes over the codes and scales, N / BLOCK_N over x; about a dozen instructions for
an element of a tile (`lorafuse.plan.cost`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafuse.formats.weight import Weight
from lorafuse.kernels.common import drop_below, grouped, options, oriented, precision, rank_steps
from lorafuse.kernels.decode import TYPES, check, codebook_scale, codebook_values, grid_scale, grid_values
from lorafuse.kernels.product import low_rank_product, store_tile
from lorafuse.kernels.rows import source_rows
from lorafuse.plan import KernelConfig

__all__ = ["matmul"]

# columns of a block that holds whole rows, whatever their length
_ROW = 1 << 30


@triton.jit
def _load_codes(p_code, o_row, first, width, CODE: tl.constexpr, COLUMNS: tl.constexpr):
    """Bytes of COLUMNS columns of w, from `first` of `width` on, in rows that exist."""
    PER_BYTE: tl.constexpr = 2 if CODE == "codebook" or CODE == "e2m1" else 1
    o_byte = first // PER_BYTE + tl.arange(0, COLUMNS // PER_BYTE)
    p_row = p_code + o_row.to(tl.int64)[:, None] * (width // PER_BYTE)
    return tl.load(p_row + o_byte[None, :], mask=(o_byte < width // PER_BYTE)[None, :], other=0)


@triton.jit
def _decoded(
    code, p_scale, more, o_row, first, width, stride_row, CODE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    SCALE: tl.constexpr, ROUNDED: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """fp32 of a tile's codes. WHOLE: one scale holds for all COLUMNS of a row."""
    PER_BYTE: tl.constexpr = 2 if CODE == "codebook" or CODE == "e2m1" else 1
    o_column = first + PER_BYTE * tl.arange(0, COLUMNS // PER_BYTE)
    o_row = o_row.to(tl.int64)
    if CODE == "codebook":
        # both elements of a byte are in one block
        if WHOLE:
            i_block, exists = ((o_row * width + first) // BLOCK[1])[:, None], True
        else:
            i_block = (o_row[:, None] * width + o_column[None, :]) // BLOCK[1]
            exists = (o_column < width)[None, :]
        scale = codebook_scale(p_scale, more[1], more[2], more[3], i_block, exists)
        return codebook_values(code, more[0], scale).to(ROUNDED).to(tl.float32)
    else:
        p_row = p_scale + (o_row // BLOCK[0] * stride_row)[:, None]
        if WHOLE:
            scale = tl.load(p_row + first // BLOCK[1])
        else:
            o_scale = first + tl.arange(0, COLUMNS)
            scale = tl.load(p_row + (o_scale // BLOCK[1])[None, :], mask=(o_scale < width)[None, :], other=0)
        value = grid_values(code, CODE) * grid_scale(scale, more[0], SCALE, ROUNDED)
        if SCALE == "exponent":
            value *= 2.0
        if STEP is not None:
            value *= STEP
        return value


@triton.jit(do_not_specialize=["drop_below"])
def _lora_packed_kernel(
    p_x,
    p_code,
    p_scale,
    more,
    p_bias,
    p_xa,
    p_b,
    p_y,
    p_seed,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_row,
    stride_b,
    scale,
    drop_below,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    GROUPED: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    RANKS_LAST: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    SCALE: tl.constexpr,
    ROUNDED: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of y. w is stored `[N, K]`, or `[K, N]` when IS_TRANSPOSED.

    CODE is "codebook" or a kind of grid, BLOCK the (rows, columns) of a scale. `more` are pointers: table, outer table,
    outer scale and offset of a codebook; the divisor of a grid.
    """
    COLUMNS: tl.constexpr = BLOCK_N if IS_TRANSPOSED else BLOCK_K
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, inside = o_m < M, o_n < N
    o_k = tl.arange(0, BLOCK_K)
    width = N if IS_TRANSPOSED else K
    p_xk = p_x + source_rows(None, o_m, i_m * BLOCK_M, M)[:, None] * stride_xm + o_k[None, :]
    # rows of w that do not exist are row 0: x is zero there, or y is not stored
    o_row = tl.where(o_k < K, o_k, 0) if IS_TRANSPOSED else tl.where(inside, o_n, 0)
    first = i_n * BLOCK_N if IS_TRANSPOSED else 0
    next_code = _load_codes(p_code, o_row, first, width, CODE, COLUMNS)
    next_x = tl.load(p_xk, mask=(o_k < K)[None, :], other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_k in tl.range(0, K, BLOCK_K, num_stages=1):
        code, b_x, next_k = next_code, next_x, i_k + BLOCK_K
        b_w = _decoded(
            code, p_scale, more, o_row, first, width, stride_row, CODE, BLOCK, WHOLE, SCALE, ROUNDED, STEP, COLUMNS
        )  # fmt: skip
        if IS_TRANSPOSED:
            o_row = tl.where(o_k < K - next_k, next_k + o_k, 0)
        else:
            first = next_k
        next_code = _load_codes(p_code, o_row, first, width, CODE, COLUMNS)
        p_xk += BLOCK_K
        next_x = tl.load(p_xk, mask=(o_k < K - next_k)[None, :], other=0.0)
        b_w = b_w.to(p_x.dtype.element_ty)
        acc = tl.dot(b_x, b_w if IS_TRANSPOSED else b_w.T, acc)
    if p_xa is not None:
        acc = low_rank_product(
            acc, p_xa, p_b, p_seed, drop_below, scale, o_m, o_n, rows, inside, i_n, N, R, R, stride_b, BLOCK_R,
            RANK_STEPS, RANKS_LAST, GROUPED, LOW_PRECISION,
        )  # fmt: skip
    if p_bias is not None:
        acc += tl.load(p_bias + o_n, mask=inside, other=0.0).to(tl.float32)[None, :]
    store_tile(acc, None, p_y, i_m * BLOCK_M, i_n * BLOCK_N, o_m, o_n, rows, inside, N)


def matmul(
    x: Tensor, w: Weight, bias: Tensor | None, xa: Tensor | None, b: Tensor | None, scale: float | None,
    config: KernelConfig, *, seed: Tensor | None = None, p: float = 0.0,
) -> Tensor:  # fmt: skip
    """`y [M, N]` in x's dtype, as `lorafuse.kernels.matmul.matmul` of dense rows over the decoded weight, bit for bit.

    w `[N, K]` has a kernel of `lorafuse.kernels.decode`, and an even number of columns as stored if they are 4 bits.
    """
    c, M, (N, K), known = config, x.shape[0], w.sizes, w.kernel
    assert known is not None
    packed, y = _READERS[known[0]](w.stored, x.dtype, **known[1]), x.new_empty((M, N))
    stride_b, ranks_last = 0, True
    if b is not None:
        b, ranks_last, (_, stride_b) = oriented(b)
    _lora_packed_kernel[(triton.cdiv(M, c.block_m), triton.cdiv(N, c.block_n))](
        x,
        packed.code,
        packed.scale,
        packed.more,
        bias,
        xa,
        b,
        y,
        seed,
        M,
        N,
        K,
        0 if xa is None else xa.shape[1],
        x.stride(0),
        packed.stride_row,
        stride_b,
        scale,
        drop_below(p),
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        BLOCK_K=c.block_k,
        BLOCK_R=c.block_r,
        RANK_STEPS=0 if xa is None else rank_steps(xa.shape[1], c),
        GROUPED=grouped(N),
        LOW_PRECISION=precision(x.dtype, None if xa is None else xa.dtype),
        RANKS_LAST=ranks_last,
        IS_TRANSPOSED=w.is_transposed,
        WHOLE=packed.span % (c.block_n if w.is_transposed else c.block_k) == 0,
        **packed.constants,
        # a product and a sum of a nested scale are rounded apart
        enable_fp_fusion=False,
        **options(c),
    )
    return y


class _Packed(NamedTuple):
    """How the kernel reads a weight: `more` and the constants are those of `_lora_packed_kernel`.

    From multiples of `span` on so many columns of a row have one scale.
    """

    code: Tensor
    scale: Tensor
    more: tuple[Tensor | None, ...]
    stride_row: int
    span: int
    constants: dict[str, Any]


def _codebook(
    stored: tuple[int, int], dtype: torch.dtype, *, code: Tensor, table: Tensor, scale: Tensor, block: int, first: int,
    rounded: torch.dtype, outer: tuple[Tensor, Tensor, Tensor] | None = None,
) -> _Packed:  # fmt: skip
    """The operands of `lorafuse.kernels.decode.codebook`, whatever `dtype` w is decoded to."""
    assert first == 0
    outer_scale, outer_table, offset = outer or (None, None, None)
    check("scale", scale, triton.cdiv(stored[0] * stored[1], block))
    check("code", code, stored[0] * stored[1] // 2)
    constants = {"CODE": "codebook", "BLOCK": (1, block), "SCALE": "", "ROUNDED": TYPES[rounded], "STEP": None}
    return _Packed(code, scale, (table, outer_table, outer_scale, offset), 0, math.gcd(block, stored[1]), constants)


def _grid(
    stored: tuple[int, int], dtype: torch.dtype, *, code: Tensor, scale: Tensor, kind: str = "integer",
    block: tuple[int, int] | None = None, scale_kind: str = "", divisor: Tensor | None = None,
    is_scale_rounded: bool = False, step: float | None = None,
) -> _Packed:  # fmt: skip
    """The operands of `lorafuse.kernels.decode.grid`."""
    rows, columns = block or (1, stored[1])
    is_one, stride_row = scale.numel() == 1, triton.cdiv(stored[1], columns)
    check("code", code, stored[0] * stored[1] // (2 if kind == "e2m1" else 1))
    if not is_one:
        check("scale", scale, triton.cdiv(stored[0], rows) * stride_row)
    columns = _ROW if is_one or columns >= stored[1] else columns
    rounded = TYPES[dtype if is_scale_rounded else torch.float32]
    constants = {"CODE": kind, "BLOCK": (1 if is_one else rows, columns), "SCALE": scale_kind, "ROUNDED": rounded}
    return _Packed(code, scale, (divisor,), 0 if is_one else stride_row, columns, constants | {"STEP": step})


_READERS: dict[str, Callable[..., _Packed]] = {"codebook": _codebook, "grid": _grid}
