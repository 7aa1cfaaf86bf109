"""FP8 with scales of blocks, rows or matrices: transformers' `FP8Linear` and `FP8Experts`, torchao's `Float8Tensor`.

data is float8_e4m3fn (torchao: e5m2 too) `[N, K]` or `[G, N, K]`; the only statistic is the scale, `[…, ⌈N / rows⌉,
⌈K / columns⌉]` of the block `rows x columns`, or one number. Orders of rounding, bit for bit:

    transformers 5.23   `scale` (fp32 or ue8m0) is rounded to the target dtype, then `data · scale` in it
    torchao 0.18        `data · scale` in fp32, then rounded

Parameters: `block`; `scale=rounded` for the first order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorafuse.formats import cpu
from lorafuse.formats.codec import expanded_rows, held, is_of, parse, row_chunks, scale_blocks, spell, target
from lorafuse.formats.weight import Weight

__all__ = ["adopt", "codes", "decode", "kernel", "select", "shape"]

_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def shape(data: Tensor, statistics: tuple[Tensor, ...], parameters: str) -> tuple[int, ...]:
    """`(N, K)` or `(G, N, K)`."""
    return tuple(data.shape)


def decode(
    data: Tensor, statistics: tuple[Tensor, ...], parameters: str, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The dense weight in `dtype`; in chunks of rows, and in transformers' order without temporaries of its size."""
    out = target(out, tuple(data.shape), dtype, data.device)
    if cpu.reads(data) and cpu.decode(codes(data, statistics, parameters, dtype), out):
        return out
    scale, columns, is_rounded = _scale(data, statistics, parameters, dtype)
    stored, to = data.flatten(0, -2), out.flatten(0, -2)
    for start, stop in row_chunks(out):
        part = to[start:stop]
        if is_rounded:
            scale_blocks(part.copy_(stored[start:stop]), scale[start:stop], columns)
        else:
            part.copy_(scale_blocks(stored[start:stop].float(), scale[start:stop], columns))
    return out


def codes(
    data: Tensor, statistics: tuple[Tensor, ...], parameters: str, dtype: torch.dtype = torch.float32
) -> cpu.Codes | None:
    """What a CPU decodes for weights in `dtype`; None where the last block of a row is short, and in fp64."""
    scale, columns, _ = _scale(data, statistics, parameters, dtype)
    width = data.shape[-1]
    if (columns < width and width % columns) or scale.element_size() > 4:
        return None
    return cpu.Codes("bytes", data, max(1, min(columns, width)), scale.float().contiguous(), _table(data.dtype))


def _scale(
    data: Tensor, statistics: tuple[Tensor, ...], parameters: str, dtype: torch.dtype
) -> tuple[Tensor, int, bool]:
    """`([rows, blocks of a row], columns of a block, whether it is rounded to dtype)`."""
    _, fields = parse(parameters)
    rows, columns = map(int, fields["block"].split("x"))
    is_rounded, (scale,) = fields.get("scale") == "rounded", statistics
    scale = scale.to(dtype) if is_rounded else scale.float()
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(data.shape[:-1].numel(), 1), columns, is_rounded
    return expanded_rows(scale, data.shape[-2], rows), columns, is_rounded


@cache
def _table(dtype: torch.dtype) -> Tensor:
    """fp32 `[256]` on the CPU: what bytes stand for."""
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).float()


def select(
    data: Tensor, statistics: tuple[Tensor, ...], parameters: str, start: int, stop: int
) -> tuple[Tensor, tuple[Tensor, ...], str]:
    """The matrices start … stop - 1 of a stack: views."""
    (scale,) = statistics
    return data[start:stop], (scale if scale.numel() == 1 else scale[start:stop],), parameters


def kernel(data: Tensor, statistics: tuple[Tensor, ...], parameters: str) -> tuple[str, dict[str, Any]] | None:
    """The decode kernel, and what it reads; None for strided tensors."""
    (scale,), (_, fields) = statistics, parse(parameters)
    if not (data.is_contiguous() and scale.is_contiguous()):
        return None
    rows, columns = map(int, fields["block"].split("x"))
    is_exponent = scale.dtype is torch.float8_e8m0fnu
    return "grid", {
        "code": data.view(torch.uint8),
        "kind": "e4m3" if data.dtype is torch.float8_e4m3fn else "e5m2",
        "scale": scale.view(torch.uint8) if is_exponent else scale,
        "scale_kind": "e8m0" if is_exponent else "",
        "block": (rows, columns),
        "is_scale_rounded": fields.get("scale") == "rounded",
    }


def adopt(storage: object, name: str = "weight") -> Weight | None:
    """The weight of an `FP8Linear`, the stack `name` of an `FP8Experts`, or a weight-only `Float8Tensor`, by reference.

    None for anything else, and for what transformers left dense in such a layer. Raises ValueError where activations of
    a `Float8Tensor` are quantized too, for a scale of other sizes than the blocks, and for `FP8GroupedLinear`.
    """
    weight: Any = held(storage, name)
    if is_of(weight, "torchao", "Float8Tensor"):
        if weight.act_quant_kwargs is not None:
            raise ValueError(
                f"Float8Tensor {list(weight.shape)} has act_quant_kwargs, with which torchao has no gradient: quantize "
                "with Float8WeightOnlyConfig"
            )
        return _weight(weight.qdata, weight.scale, tuple(weight.block_size or ()) or None, None, "Float8Tensor")
    if not is_of(storage, "transformers", "FP8Linear", "FP8Experts") or getattr(weight, "dtype", None) not in _DTYPES:
        return None
    if is_of(storage, "transformers", "FP8GroupedLinear"):
        raise ValueError(
            f"FP8GroupedLinear {list(weight.shape)} multiplies {storage.n_groups} slices of its input with a matrix "  # type: ignore[attr-defined]
            "each: leave it out of target_modules"
        )
    scale, block = getattr(storage, f"{name}_scale_inv").detach(), storage.block_size  # type: ignore[attr-defined]
    return _weight(weight, scale, None if block is None else tuple(block), "rounded", type(storage).__name__)


def _weight(data: Tensor, scale: Tensor, block: tuple[int, ...] | None, order: str | None, owner: str) -> Weight:
    *_, rows, columns = data.shape
    if block is None:
        # as many blocks as there are scales
        counts = (1, 1) if scale.numel() == 1 else scale.shape[-2:]
        block = -(-rows // counts[0]), -(-columns // counts[1])
    if len(block) < 2 or not all(isinstance(size, int) and size > 0 for size in block):
        raise ValueError(
            f"{owner} {list(data.shape)} has blocks {block}; they are of rows and columns, each at least 1: load the "
            "checkpoint that belongs to its quantization_config"
        )
    *groups, block_rows, block_columns = block
    expected = *data.shape[:-2], -(-rows // block_rows), -(-columns // block_columns)
    if (
        (scale.numel() != 1 and tuple(scale.shape) != expected)
        or any(group not in (1, *data.shape[:-2]) for group in groups)
        or data.dtype not in _DTYPES or not (scale.is_floating_point() or scale.dtype is torch.uint8)
    ):  # fmt: skip
        raise ValueError(
            f"{owner} {data.dtype} {list(data.shape)} has a scale {scale.dtype} {list(scale.shape)}; blocks "
            f"{'x'.join(map(str, block))} make it floating, or exponents in uint8, {list(expected)}: load the "
            "checkpoint that belongs to its quantization_config"
        )
    # bytes of MXFP8 checkpoints are exponents
    scale = scale.view(torch.float8_e8m0fnu) if scale.dtype is torch.uint8 else scale
    return Weight(data, statistics=(scale,), format=f"fp8:{spell(block=(block_rows, block_columns), scale=order)}")
