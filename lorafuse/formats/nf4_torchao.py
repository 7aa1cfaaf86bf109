"""torchao's `NF4Tensor`: 4 bits an element, one int8 scale a block and one factor for some of those (torchao 0.18).

data is uint8 `[N·K / 2]` in row-major order, the even element in the high nibble. Statistics are

    scalers int8 `[blocks]`, factor `[blocks / scaler block]`, mean `[]`, code `[16]`

of which all but the first are of the weight's dtype, and so is each step: the scale of a block is
`scalers / factor` rounded, `+ mean` rounded; a weight is `code[nibble] · scale` rounded (bit for bit). This is not
bitsandbytes' NF4, which is decoded in fp32.

Parameters: sizes; `block`; `outer`, the scaler block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lorafuse.formats.codec import decode_flat, held, is_of, parse, spell, target
from lorafuse.formats.weight import Weight

__all__ = ["adopt", "decode", "kernel", "select", "shape"]


def shape(data: Tensor, statistics: tuple[Tensor, ...], parameters: str) -> tuple[int, ...]:
    """`(N, K)`; torchao has no stacks."""
    return parse(parameters)[0]


def decode(
    data: Tensor, statistics: tuple[Tensor, ...], parameters: str, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The dense weight in `dtype`, in chunks."""
    sizes, fields = parse(parameters)
    block, code = int(fields["block"]), statistics[3]
    out = target(out, sizes, dtype, data.device)
    return decode_flat(data, code, lambda *blocks: _scales(statistics, parameters, *blocks), block, code.dtype, 0, out)


def _scales(statistics: tuple[Tensor, ...], parameters: str, start: int, stop: int) -> Tensor:
    """`[stop - start]`, of the weight's dtype: the scales of these blocks."""
    scalers, factor, mean, code = statistics
    outer = int(parse(parameters)[1]["outer"])
    first = start // outer
    factors = factor[first : -(-stop // outer)].repeat_interleave(outer)[start - first * outer :][: stop - start]
    return (scalers[start:stop] / factors).to(code.dtype) + mean


def kernel(data: Tensor, statistics: tuple[Tensor, ...], parameters: str) -> tuple[str, dict[str, Any]] | None:
    """The decode kernel, and what it reads: scales are decoded before, for one element of a block. None for blocks that
    are no power of two, which no tile of a kernel is.
    """
    scalers, _, _, code = statistics
    block = int(parse(parameters)[1]["block"])
    if block & (block - 1) or not data.is_contiguous():
        return None
    scale = _scales(statistics, parameters, 0, scalers.numel())
    # products of two numbers of 16 bits are exact in fp32
    return "codebook", {"code": data, "table": code, "scale": scale, "block": block, "first": 0, "rounded": code.dtype}


def select(
    data: Tensor, statistics: tuple[Tensor, ...], parameters: str, start: int, stop: int
) -> tuple[Tensor, tuple[Tensor, ...], str]:
    """Raises ValueError: torchao has no stacks."""
    raise ValueError(f"torchao's NF4Tensor {list(parse(parameters)[0])} is one matrix; select is for stacks")


def adopt(storage: object, name: str = "weight") -> Weight | None:
    """The weight of an `NF4Tensor`, or of a layer that holds one as parameter `name`, by reference; None for anything
    else. Raises ValueError for one that is transposed, no matrix, or has other statistics than its blocks.
    """
    weight: Any = held(storage, name)
    if not is_of(weight, "torchao", "NF4Tensor"):
        return None
    sizes, held_bytes = tuple(weight.shape), weight.quantized_data.numel()
    if len(sizes) != 2 or tuple(weight.stride()) != (sizes[1], 1) or 2 * held_bytes != math.prod(sizes):
        raise ValueError(
            f"NF4Tensor {list(sizes)} with strides {list(weight.stride())} and {held_bytes} bytes is no whole matrix "
            "[N, K] as nn.Linear stores it: quantize that with torchao's to_nf4"
        )
    statistics = weight.quantized_scalers, weight.quantization_factor, weight.scaler_mean, weight.nf4
    blocks = math.prod(sizes) // weight.block_size
    counts = blocks, blocks // weight.scaler_block_size, 1, 16
    if any(t.numel() != count for t, count in zip(statistics, counts, strict=True)):
        raise ValueError(
            f"NF4Tensor {list(sizes)} has scalers, factors, mean and table of {[t.numel() for t in statistics]} "
            f"elements; blocks of {weight.block_size} and {weight.scaler_block_size} make them {list(counts)}: "
            "quantize the weight with torchao's to_nf4"
        )
    dtypes = [t.dtype for t in (weight.quantized_data, *statistics)]
    if dtypes[:2] != [torch.uint8, torch.int8] or len(set(dtypes[2:])) > 1 or not dtypes[2].is_floating_point:
        raise ValueError(
            f"NF4Tensor {list(sizes)} has data, scalers, factors, mean and table of {', '.join(map(str, dtypes))}; "
            "they are uint8, int8, and three of the weight's dtype: quantize the weight with torchao's to_nf4"
        )
    parameters = spell(sizes, block=weight.block_size, outer=weight.scaler_block_size)
    return Weight(weight.quantized_data, statistics=statistics, format=f"nf4_torchao:{parameters}")
