"""Decoding of quantized weights: `out = value(code) · scale`, bit for bit what the codecs of `lorafuse.formats` give.

    codebook   4 bits an element in the order of memory, one scale a block of it: value = table[code]. A nested scale
               is `table₂[byte] · scale₂ + offset`
    grid       rows of int8, one scale a row

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

__all__ = ["KERNELS", "codebook", "grid"]

# codes of a thread: 16 bytes of them are one load
_BYTES, _WARPS = 2048, 4
# blocks of the scales of a nested codebook
_OUTER = tl.constexpr(256)
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _decode_codebook_kernel(
    p_code, p_table, p_scale, p_outer_table, p_outer_scale, p_offset, p_out, start, size, count, SKIPPED: tl.constexpr,
    BLOCK: tl.constexpr, ROUNDED: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Elements `SKIPPED … SKIPPED + count` behind byte `start`, two a byte, the high nibble first."""
    first = tl.program_id(0).to(tl.int64) * BYTES
    o_byte = first + tl.arange(0, BYTES)
    inside = o_byte < size
    code = tl.load(p_code + start + o_byte, mask=inside, other=0, eviction_policy="evict_first").to(tl.int32)
    # blocks are of an even number of elements, so that both of a byte have one scale
    i_block = (start + o_byte) // (BLOCK // 2)
    scale = tl.load(p_scale + i_block, mask=inside, other=0)
    if p_outer_table is not None:
        outer = tl.load(p_outer_scale + i_block // _OUTER, mask=inside, other=0.0)
        scale = tl.load(p_outer_table + scale.to(tl.int32)) * outer + tl.load(p_offset)
    scale = scale.to(tl.float32)
    value = tl.interleave(tl.load(p_table + (code >> 4)) * scale, tl.load(p_table + (code & 15)) * scale)
    o_out = 2 * first - SKIPPED + tl.arange(0, 2 * BYTES)
    tl.store(p_out + o_out, value.to(ROUNDED).to(p_out.dtype.element_ty), mask=(o_out >= 0) & (o_out < count))


@triton.jit
def _decode_grid_kernel(p_code, p_scale, p_out, K, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of one row, whose scale is `p_scale[row]`, times STEP afterwards."""
    row = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(p_code + row * K + o_k, mask=o_k < K, other=0, eviction_policy="evict_first")
    value = code.to(tl.float32) * tl.load(p_scale + row).to(tl.float32)
    if STEP is not None:
        value *= STEP
    tl.store(p_out + row * K + o_k, value.to(p_out.dtype.element_ty), mask=o_k < K)


def codebook(
    code: Tensor, out: Tensor, *, table: Tensor, scale: Tensor, block: int, first: int, rounded: torch.dtype,
    outer: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write elements `first …` of `code`, uint8, into out: `table[code] · scale[element // block]`, `rounded` once.

    `outer` is (scale₂, table₂, offset) of a scale that is quantized itself, in blocks of 256.
    """
    outer_scale, outer_table, offset = outer or (None, None, None)
    count, skipped = out.numel(), first % 2
    size = triton.cdiv(count + skipped, 2)
    _decode_codebook_kernel[(triton.cdiv(size, _BYTES),)](
        code, table, scale, outer_table, outer_scale, offset, out, first // 2, size, count, SKIPPED=skipped,
        BLOCK=block, ROUNDED=_TYPES[rounded], BYTES=_BYTES, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def grid(code: Tensor, out: Tensor, *, scale: Tensor, step: float | None = None) -> None:
    """Write `code · scale`, and that times `step`, into out: code int8 `[…, K]`, a scale for each row."""
    K = code.shape[-1]
    block = min(_BYTES, triton.next_power_of_2(K))
    _decode_grid_kernel[(code.numel() // K, triton.cdiv(K, block))](
        code, scale, out, K, STEP=step, BLOCK=block, num_warps=_WARPS, enable_fp_fusion=False
    )


# by the names that formats give
KERNELS: dict[str, Callable[..., None]] = {"codebook": codebook, "grid": grid}
