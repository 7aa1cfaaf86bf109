"""torchao's integers with scales of blocks: `IntxUnpackedToInt8Tensor`, and `Int8Tensor` with zero points or blocks
that are no rows (torchao 0.18).

data is int8 `[N, K]` or `[G, N, K]`; statistics are `(scale,)` or `(scale, zero_point)`, of the sizes of data divided
by the block. A weight is `(data - zero_point) · scale`: the difference in `dtype`, the product in the wider of `dtype`
and the scale's, then rounded to `dtype`, which is the tensor's own (torchao's order, bit for bit).

Parameters: `block`, of each dimension; `dtype`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafuse.formats.codec import expanded_rows, held, is_of, parse, row_chunks, scale_blocks, spell, target
from lorafuse.formats.weight import Weight

__all__ = ["adopt", "decode", "select", "shape"]


def shape(data: Tensor, statistics: tuple[Tensor, ...], parameters: str) -> tuple[int, ...]:
    """`(N, K)` or `(G, N, K)`."""
    return tuple(data.shape)


def decode(
    data: Tensor, statistics: tuple[Tensor, ...], parameters: str, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The dense weight in `dtype`, in chunks of rows."""
    _, fields = parse(parameters)
    rounded = getattr(torch, fields["dtype"])
    *groups, rows, columns = map(int, fields["block"].split("x"))
    out = target(out, tuple(data.shape), dtype, data.device)
    # one block may hold several matrices
    repeated = [t.repeat_interleave(groups[0], 0) if groups and groups[0] > 1 else t for t in statistics]
    scale, *zero = (expanded_rows(t, data.shape[-2], rows) for t in repeated)
    stored, to = data.flatten(0, -2), out.flatten(0, -2)
    for start, stop in row_chunks(out):
        values = stored[start:stop].to(rounded)
        if zero:
            point = zero[0][start:stop].to(rounded)
            values.unflatten(1, (point.shape[1], columns)).sub_(point[:, :, None])
        to[start:stop] = scale_blocks(values, scale[start:stop], columns)
    return out


def select(
    data: Tensor, statistics: tuple[Tensor, ...], parameters: str, start: int, stop: int
) -> tuple[Tensor, tuple[Tensor, ...], str]:
    """The matrices start … stop - 1 of a stack: views. Raises ValueError where one block holds several matrices."""
    block = parse(parameters)[1]["block"]
    if not block.startswith("1x"):
        raise ValueError(f"a stack {list(data.shape)} has blocks {block} of several matrices; select needs 1x…: decode")
    return data[start:stop], tuple(t[start:stop] for t in statistics), parameters


def adopt(storage: object, name: str = "weight") -> Weight | None:
    """The weight of one of these tensors, or of a layer that holds one as parameter `name`, by reference; None for
    anything else. Raises ValueError where activations are quantized too, since torchao has no gradient there, and for
    other sizes or dtypes than those of its blocks.
    """
    weight: Any = held(storage, name)
    if not is_of(weight, "torchao", "IntxUnpackedToInt8Tensor", "Int8Tensor"):
        return None
    for key in ("activation_quantization", "act_quant_kwargs", "act_pre_scale"):
        if getattr(weight, key, None) is not None:
            raise ValueError(
                f"{type(weight).__name__} {list(weight.shape)} has {key}, with which torchao has no gradient: quantize "
                "with Int8WeightOnlyConfig or IntxWeightOnlyConfig"
            )
    data, scale, zero, block = weight.qdata, weight.scale, weight.zero_point, tuple(weight.block_size)
    statistics = (scale,) if zero is None else (scale, zero)
    sizes = tuple(weight.shape)
    # what has other sizes would be broadcast
    blocks = tuple(size // of for size, of in zip(sizes, block, strict=False) if size % of == 0)
    if (
        data.dtype is not torch.int8 or tuple(data.shape) != sizes or len(blocks) != len(sizes)
        or not scale.is_floating_point() or any(tuple(t.shape) != blocks for t in statistics)
    ):  # fmt: skip
        given = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (data, *statistics))
        raise ValueError(
            f"{type(weight).__name__} {list(sizes)} in blocks {list(block)} holds data, scale and zero point {given}; "
            "data is int8 of its sizes, the others have one number a block: quantize the weight anew"
        )
    return Weight(data, statistics=statistics, format=f"intx:{spell(block=block, dtype=weight.dtype)}")
