"""NVFP4: 4-bit floats with one FP8 scale for 16 of them, and one divisor for all of those; decoded, not computed with.

data is uint8 `[N, K / 2]`, the even element in the low nibble. Statistics are

    scale float8_e4m3fn `[N, K / 16]`, global_scale fp32 `[1]`

and a weight is `e2m1 · (scale / global_scale)` in fp32, then rounded (compressed-tensors 0.20, bit for bit).
transformers' `NVFP4Linear` holds the same numbers and has no decoder: its kernel divides what it has summed.

Parameters: none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafuse.formats.codec import e2m1, is_of, row_chunks, scale_blocks, target, unpacked
from lorafuse.formats.sizes import NVFP4_BLOCK
from lorafuse.formats.weight import Weight

__all__ = ["adopt", "decode", "kernel", "select", "shape"]


def shape(data: Tensor, statistics: tuple[Tensor, ...], parameters: str) -> tuple[int, ...]:
    """`(N, K)`; neither library has stacks."""
    return *data.shape[:-1], 2 * data.shape[-1]


def decode(
    data: Tensor, statistics: tuple[Tensor, ...], parameters: str, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The dense weight in `dtype`, in chunks of rows."""
    out, code = target(out, shape(data, statistics, parameters), dtype, data.device), e2m1(data.device)
    scale, divisor = statistics
    for start, stop in row_chunks(out):
        values = unpacked(data[start:stop], code, low_first=True).view(stop - start, out.shape[-1])
        out[start:stop] = scale_blocks(values, scale[start:stop].float() / divisor, NVFP4_BLOCK)
    return out


def kernel(data: Tensor, statistics: tuple[Tensor, ...], parameters: str) -> tuple[str, dict[str, Any]] | None:
    """The decode kernel, and what it reads; None for strided tensors."""
    scale, divisor = statistics
    if not (data.is_contiguous() and scale.is_contiguous()):
        return None
    given = {"scale": scale.view(torch.uint8), "scale_kind": "float8", "divisor": divisor, "block": (1, NVFP4_BLOCK)}
    return "grid", {"code": data, "kind": "e2m1", **given}


def select(
    data: Tensor, statistics: tuple[Tensor, ...], parameters: str, start: int, stop: int
) -> tuple[Tensor, tuple[Tensor, ...], str]:
    """Raises ValueError: neither library has stacks."""
    raise ValueError(f"an NVFP4 weight {list(shape(data, statistics, parameters))} is one matrix; select is for stacks")


def adopt(storage: object, name: str = "weight") -> Weight | None:
    """The weight of transformers' `NVFP4Linear`, or of a layer that compressed-tensors packed (`nvfp4-pack-quantized`),
    by reference; None for anything else. Raises ValueError for one that is not loaded yet, or of other sizes.
    """
    if not isinstance(storage, torch.nn.Module):
        return None
    layer: Any = storage
    packed = layer._parameters.get(f"{name}_packed")
    if is_of(layer, "transformers", "NVFP4Linear"):
        data, scale = layer.weight, layer.weight_sf_rowmajor
    elif packed is not None and packed.dtype is torch.uint8 and hasattr(layer, f"{name}_global_scale"):
        data, scale = packed, getattr(layer, f"{name}_scale")
    else:
        return None
    divisor = getattr(layer, f"{name}_global_scale")
    fits = data.dim() == 2 and scale.shape == (data.shape[0], 2 * data.shape[1] // NVFP4_BLOCK) and divisor.numel() == 1
    if data.dtype is not torch.uint8 or scale.dtype not in (torch.uint8, torch.float8_e4m3fn) or not fits:
        raise ValueError(
            f"{type(layer).__name__} holds {data.dtype} {list(data.shape)} and scales {scale.dtype} "
            f"{list(scale.shape)}; NVFP4 is uint8 [N, K / 2] and e4m3 [N, K / 16]: load its quantized checkpoint first"
        )
    scale = scale.view(torch.float8_e4m3fn) if scale.dtype is torch.uint8 else scale
    return Weight(data.detach(), statistics=(scale.detach(), divisor.detach()), format="nvfp4")
