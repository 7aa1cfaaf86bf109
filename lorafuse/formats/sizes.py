"""What a format costs: bytes of a weight as stored, instructions that decode it; the blocks that libraries fix.

Standard library only, for the planner and the advisor.
"""

import math

__all__ = ["DECODED_IN_LOOP", "MXFP4_BLOCK", "NESTED_BLOCK", "NVFP4_BLOCK", "stored_bytes"]

# elements of a scale, which their formats fix
MXFP4_BLOCK, NVFP4_BLOCK = 32, 16
# scales of a nested scale in bitsandbytes, which has no other
NESTED_BLOCK = 256
# elements of a scale, where a library lets its user choose: what it takes unless told
_BLOCK_4BIT, _BLOCK_FP8 = 64, 128
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
