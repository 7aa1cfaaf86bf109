"""Decoding of quantized weights: `out = value(code) · scale`, bit for bit what the codecs of `lorafuse.formats` give.

    codebook   4 bits an element in the order of memory, one scale a block of it: value = table[code]. A nested scale
               is `table₂[byte] · scale₂ + offset`
    grid       int8, float8 or e2m1 (FP4) in rows, one scale a row or a block of rows and columns: value = code, and
               a scale may be an exponent, or float8 over one divisor

Shapes: out `[(G,) N, K]`, contiguous. Products are in fp32 and rounded in the library's order, to the dtype that the
weight had and then to out's; no product and sum are contracted.

Cost: one read of the codes and one write of out, 2.5 bytes an element of 4 bits in a 16-bit out. The scales and tables
lie in the caches.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafuse.formats.sizes import NESTED_BLOCK

__all__ = [
    "KERNELS",
    "TYPES",
    "check",
    "codebook",
    "codebook_scale",
    "codebook_values",
    "grid",
    "grid_scale",
    "grid_values",
]

# codes of a thread: 16 bytes of them are one load
_BYTES, _WARPS = 2048, 4
# blocks of a scale of scales
_NESTED_BLOCK = tl.constexpr(NESTED_BLOCK)
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def codebook_scale(p_scale, p_outer_table, p_outer_scale, p_offset, i_block, exists):
    """fp32 scales of blocks; of those that are nested, from the table and the scales of their own blocks."""
    scale = tl.load(p_scale + i_block, mask=exists, other=0)
    if p_outer_table is not None:
        outer = tl.load(p_outer_scale + i_block // _NESTED_BLOCK, mask=exists, other=0.0)
        scale = tl.load(p_outer_table + scale.to(tl.int32)) * outer + tl.load(p_offset)
    return scale.to(tl.float32)


@triton.jit
def codebook_values(code, p_table, scale):
    """`table[nibble] · scale`, twice as many columns as bytes."""
    code = code.to(tl.int32)
    return tl.interleave(tl.load(p_table + (code >> 4)) * scale, tl.load(p_table + (code & 15)) * scale)


@triton.jit
def _decode_codebook_kernel(
    p_code, p_table, p_scale, p_outer_table, p_outer_scale, p_offset, p_out, first_block, first, count,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Elements `first … first + count`, two a byte, the high nibble first: BLOCKS of BLOCK from `first_block` on."""
    HALF: tl.constexpr = BLOCK // 2
    i_block = first_block + tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    end = first + count
    # one scale for a block and not for an element: of two that are neighbours in a thread, ptxas contracts product and
    # sum of Blackwell's packed instructions, whatever their rounding (CUDA 12.9, 2026-11-29)
    scale = codebook_scale(p_scale, p_outer_table, p_outer_scale, p_offset, i_block, i_block * BLOCK < end)
    o_byte = i_block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    inside = (o_byte >= first // 2) & (o_byte < (end + 1) // 2)
    code = tl.load(p_code + o_byte, mask=inside, other=0, eviction_policy="evict_first")
    value = codebook_values(code, p_table, scale[:, None])
    o_out = i_block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :] - first
    tl.store(p_out + o_out, value.to(ROUNDED).to(p_out.dtype.element_ty), mask=(o_out >= 0) & (o_out < count))


@triton.jit
def _float8(code, MANTISSA: tl.constexpr):
    """fp32 of float8_e4m3fn (3 bits of mantissa) or float8_e5m2 (2), by fp16, which holds all of both."""
    code = code.to(tl.int32)
    half = ((code & 128) << 8) | ((code & 127) << (10 - MANTISSA))
    value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    if MANTISSA == 3:
        # of exponents with a bias of 7, not 15; it has no infinities
        value = tl.where((code & 127) == 127, float("nan"), value * 256.0)
    return value


@triton.jit
def _float4(code):
    """fp32 of e2m1, by fp16, whose bias is 15, not 1."""
    return (((code & 8) << 12) | ((code & 7) << 9)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def _exponent(code, BIAS: tl.constexpr):
    """fp32 of 2 ** (code - BIAS), for a bias of 127 or 128."""
    code = code.to(tl.int32) - (BIAS - 127)
    # 2 ** -127 and 2 ** -128 are subnormal
    return tl.where(code > 0, code << 23, 1 << (22 + code)).to(tl.float32, bitcast=True)


@triton.jit
def grid_values(code, CODE: tl.constexpr):
    """fp32 of codes; of e2m1 twice as many columns as bytes, the low nibble first."""
    if CODE == "e2m1":
        code = code.to(tl.int32)
        return tl.interleave(_float4(code & 15), _float4(code >> 4))
    elif CODE == "integer":
        return code.to(tl.float32)
    else:
        return _float8(code, 3 if CODE == "e4m3" else 2)


@triton.jit
def grid_scale(scale, p_divisor, SCALE: tl.constexpr, ROUNDED: tl.constexpr):
    """fp32 of scales as they are stored."""
    if SCALE == "float8":
        scale = _float8(scale, 3)
    elif SCALE == "exponent":
        # 2 ** 128 is none that fp32 holds: half of it, and the product twice
        scale = _exponent(scale, 128)
    elif SCALE == "e8m0":
        scale = tl.where(scale == 255, float("nan"), _exponent(scale, 127))
    else:
        scale = scale.to(tl.float32)
    if p_divisor is not None:
        scale = tl.div_rn(scale, tl.load(p_divisor))
    return scale.to(ROUNDED).to(tl.float32)


@triton.jit
def _decode_grid_kernel(
    p_code, p_scale, p_divisor, p_out, N, K, stride_group, stride_row, CODE: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROUNDED: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row. One scale holds for ROWS rows of a matrix and COLUMNS columns, or for whole rows.

    The scale is ROUNDED before the product, and STEP is a factor after it.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    o_k = first + tl.arange(0, BLOCK)
    inside = o_k < K
    if CODE == "e2m1":
        # two a byte; K is even
        o_byte = first // 2 + tl.arange(0, BLOCK // 2)
        code = tl.load(p_code + row * (K // 2) + o_byte, mask=o_byte < K // 2, other=0, eviction_policy="evict_first")
    else:
        code = tl.load(p_code + row * K + o_k, mask=inside, other=0, eviction_policy="evict_first")
    p_row = p_scale + row // N * stride_group + row % N // ROWS * stride_row
    scale = tl.load(p_row) if COLUMNS is None else tl.load(p_row + o_k // COLUMNS, mask=inside, other=0)
    value = grid_values(code, CODE) * grid_scale(scale, p_divisor, SCALE, ROUNDED)
    if SCALE == "exponent":
        value *= 2.0
    if STEP is not None:
        value *= STEP
    tl.store(p_out + row * K + o_k, value.to(p_out.dtype.element_ty), mask=inside)


def codebook(
    code: Tensor, out: Tensor, *, table: Tensor, scale: Tensor, block: int, first: int, rounded: torch.dtype,
    outer: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write elements `first …` of `code`, uint8, into out: `table[code] · scale[element // block]`, `rounded` once.

    `outer` is (scale₂, table₂, offset) of a scale that is quantized itself, in blocks of 256.
    """
    outer_scale, outer_table, offset = outer or (None, None, None)
    end, blocks = first + out.numel(), max(1, 2 * _BYTES // block)
    first_block, last_block = first // block, triton.cdiv(end, block)
    check("scale", scale, last_block)
    check("code", code, triton.cdiv(end, 2))
    _decode_codebook_kernel[(triton.cdiv(last_block - first_block, blocks),)](
        code, table, scale, outer_table, outer_scale, offset, out, first_block, first, out.numel(), BLOCK=block,
        BLOCKS=blocks, ROUNDED=TYPES[rounded], num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def grid(
    code: Tensor, out: Tensor, *, scale: Tensor, kind: str = "integer", block: tuple[int, int] | None = None,
    scale_kind: str = "", divisor: Tensor | None = None, is_scale_rounded: bool = False, step: float | None = None,
) -> None:  # fmt: skip
    """Write `code · (scale / divisor) · step` into out: codes of a `kind`, one scale for a block of rows and columns.

    code is `[…, N, K]` int8 of kind "integer", uint8 of "e4m3" and "e5m2", or `[…, N, K / 2]` of "e2m1"; scale is
    `[…, ⌈N / rows⌉, ⌈K / columns⌉]`, of one number, or for a `block` of None `[…, N]`. It holds numbers, or uint8 of a
    `scale_kind`: "e8m0", "exponent", whose 255 is 2 ** 128 where e8m0's is NaN, or "float8" (e4m3).
    `is_scale_rounded` to out's dtype first.
    """
    *_, N, K = out.shape
    rows, columns = block or (1, K)
    stride_row = -(-K // columns)
    strides = (0, 0) if scale.numel() == 1 else (-(-N // rows) * stride_row, stride_row)
    if scale.numel() != 1:
        check("scale", scale, out.numel() // (N * K) * -(-N // rows) * stride_row)
    check("code", code, out.numel() // (2 if kind == "e2m1" else 1))
    size = min(_BYTES, triton.next_power_of_2(K))
    _decode_grid_kernel[(out.numel() // K, triton.cdiv(K, size))](
        code, scale, divisor, out, N, K, *strides, CODE=kind, SCALE=scale_kind, ROWS=rows,
        COLUMNS=None if columns >= K or scale.numel() == 1 else columns,
        ROUNDED=TYPES[out.dtype if is_scale_rounded else torch.float32], STEP=step, BLOCK=max(2, size),
        num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def check(name: str, t: Tensor, needed: int) -> None:
    """Raises ValueError for an operand that a kernel would read beyond."""
    if t.numel() < needed:
        raise ValueError(
            f"a quantized weight's {name} has {t.numel()} elements, its sizes and blocks make it {needed}: adopt it "
            "from its library's tensor"
        )


# by the names that formats give
KERNELS: dict[str, Callable[..., None]] = {"codebook": codebook, "grid": grid}
