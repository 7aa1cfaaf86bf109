"""What a format costs: bytes of a weight as stored, instructions that decode it; the blocks that libraries fix.

Standard library only, for the planner and the advisor.
"""

import math

__all__ = [
    "DECODED_IN_LOOP",
    "LIBRARY_ROWS",
    "MXFP4_BLOCK",
    "NESTED_BLOCK",
    "NVFP4_BLOCK",
    "is_decoded_in_loop",
    "stored_bytes",
    "why_not_held",
]

# elements of a scale, which their formats fix
MXFP4_BLOCK, NVFP4_BLOCK = 32, 16
# scales of a nested scale in bitsandbytes, which has no other
NESTED_BLOCK = 256
# elements of a scale, where a library lets its user choose: what it takes unless told
_BLOCK_4BIT, _BLOCK_FP8 = 64, 128
# scales of a factor in torchao's NF4, unless told
_OUTER_TORCHAO = 256
# rows that bitsandbytes 0.50 multiplies by packed 4-bit weights on every GPU it has kernels for: up to 16 to 64 on
# sm_90, by the size of the weight, 32 on sm_100, 128 on sm_80
LIBRARY_ROWS = 16
# bytes of the code of an element, where that is not one
_CODES = {"nf4": 0.5, "fp4": 0.5, "nf4_torchao": 0.5, "mxfp4": 0.5, "nvfp4": 0.5}
# instructions that decode an element of a tile in the main loop, where blocks do not cross rows (counted in sm_90 code
# of Triton 3.6, 2026-11-29; across rows 26 of nf4)
DECODED_IN_LOOP = {"nf4": 13, "fp4": 13, "int8": 7, "fp8": 15, "mxfp4": 17}


def stored_bytes(format: str, N: int, K: int) -> float:
    """Bytes of a matrix `[N, K]` with its scales, in the blocks that the format's library takes by default (of
    bitsandbytes nested, of transformers' FP8 128 x 128); tables of 16 and 256 numbers are left out. A format without a
    row here counts as a byte an element.
    """
    elements = N * K
    scales = {
        # a byte, and one number of fp32 (bitsandbytes) or of 16 bits (torchao) for 256 of these
        "nf4": elements / _BLOCK_4BIT * (1 + 4 / NESTED_BLOCK),
        "nf4_torchao": elements / _BLOCK_4BIT * (1 + 2 / NESTED_BLOCK),
        "mxfp4": elements / MXFP4_BLOCK,
        "nvfp4": elements / NVFP4_BLOCK,
        "fp8": 4 * math.ceil(N / _BLOCK_FP8) * math.ceil(K / _BLOCK_FP8),
        # a row: fp32, or bf16 and a zero point
        "int8": 4 * N,
        "intx": 3 * N,
    }
    return elements * _CODES.get(format, 1) + scales.get("nf4" if format == "fp4" else format, 0)


def is_decoded_in_loop(format: str, K: int) -> bool:
    """Whether a main loop can decode tiles of a contiguous weight of K columns: each of its rows begins with a byte."""
    return format in DECODED_IN_LOOP and (_CODES.get(format, 1) == 1 or K % 2 == 0)


def why_not_held(format: str, N: int, K: int, is_stack: bool = False) -> str:
    """Why no library stores a matrix `[N, K]`, or a stack of them, in a format; "" where one does."""
    if is_stack and format in ("nf4_torchao", "nvfp4"):
        return "it is of single matrices; no library stores stacks of experts so"
    blocks = {"mxfp4": MXFP4_BLOCK, "nvfp4": NVFP4_BLOCK}
    if K % blocks.get(format, 1):
        return f"its scales are of {blocks[format]} elements of a row, and K is {K}"
    if format == "nf4_torchao" and N * K % (_BLOCK_4BIT * _OUTER_TORCHAO):
        return f"to_nf4 takes multiples of {_BLOCK_4BIT * _OUTER_TORCHAO} elements, and N · K is {N * K}"
    return ""
