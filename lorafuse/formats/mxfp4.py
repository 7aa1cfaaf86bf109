"""MXFP4: 4-bit floats with one exponent for 32 of them, as gpt-oss and DeepSeek-V4 store their experts.

data is uint8 `[…, N, K / 2]`, the even element in the low nibble; the only statistic is the scale `[…, N, K / 32]`:
uint8, exponents of 2 with a bias of 127, or fp32 numbers (DeepSeek's `int8` layers of transformers with `scale_fmt`
"float"). A weight is `e2m1 · scale` in fp32, then rounded: of exponents exact, as transformers 5.23 and gpt-oss decode
them. gpt-oss's decoded stacks are `[E, K, N]`: those here are their transposes, `[E, N, K]`.

Parameters: none.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorafuse.formats import cpu
from lorafuse.formats.codec import e2m1, is_of, row_chunks, target, unpacked
from lorafuse.formats.sizes import MXFP4_BLOCK
from lorafuse.formats.weight import Weight

__all__ = ["adopt", "codes", "decode", "kernel", "select", "shape", "weight"]

_BIAS = 127


def shape(data: Tensor, statistics: tuple[Tensor, ...], parameters: str) -> tuple[int, ...]:
    """`(N, K)` or `(G, N, K)`."""
    return *data.shape[:-1], 2 * data.shape[-1]


def decode(
    data: Tensor, statistics: tuple[Tensor, ...], parameters: str, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The dense weight in `dtype`, in chunks of rows."""
    out = target(out, shape(data, statistics, parameters), dtype, data.device)
    if cpu.reads(data) and cpu.decode(codes(data, statistics, parameters), out):
        return out
    code = e2m1(data.device)
    stored, scale, to = data.flatten(0, -2), statistics[0].flatten(0, -2), out.flatten(0, -2)
    for start, stop in row_chunks(out):
        values = unpacked(stored[start:stop], code, low_first=True).view(*scale[start:stop].shape, MXFP4_BLOCK)
        part = scale[start:stop, :, None]
        values = values.mul_(part) if part.is_floating_point() else torch.ldexp(values, part.int() - _BIAS)
        to[start:stop] = values.flatten(1)
    return out


def codes(data: Tensor, statistics: tuple[Tensor, ...], parameters: str) -> cpu.Codes:
    """What a CPU decodes."""
    (factor,), (doubled, halves) = statistics, _tables()
    tables = (e2m1(data.device), None) if factor.is_floating_point() else (doubled, halves)
    return cpu.Codes("low nibbles", data, MXFP4_BLOCK, factor, *tables)


@cache
def _tables() -> tuple[Tensor, Tensor]:
    """On the CPU: twice what nibbles stand for, and half of what exponents do, which is finite."""
    exponent = torch.arange(256, device="cpu") - (_BIAS + 1)
    return 2 * e2m1(exponent.device), torch.ldexp(torch.ones(256, device="cpu"), exponent)


def select(
    data: Tensor, statistics: tuple[Tensor, ...], parameters: str, start: int, stop: int
) -> tuple[Tensor, tuple[Tensor, ...], str]:
    """The matrices start … stop - 1 of a stack: views."""
    return data[start:stop], (statistics[0][start:stop],), parameters


def kernel(data: Tensor, statistics: tuple[Tensor, ...], parameters: str) -> tuple[str, dict[str, Any]] | None:
    """The decode kernel, and what it reads; None for strided tensors."""
    (scale,) = statistics
    if not (data.is_contiguous() and scale.is_contiguous()):
        return None
    kind = "" if scale.is_floating_point() else "exponent"
    return "grid", {"code": data, "kind": "e2m1", "scale": scale, "scale_kind": kind, "block": (1, MXFP4_BLOCK)}


def weight(blocks: Tensor, scales: Tensor) -> Weight:
    """The weight of a checkpoint's tensors, by reference: uint8 blocks `[…, N, K / 32, 16]` or `[…, N, K / 2]`, and
    scales `[…, N, K / 32]`. Raises ValueError for other sizes or dtypes.
    """
    data = blocks.flatten(-2) if blocks.dim() == scales.dim() + 1 else blocks
    fits = data.dim() in (2, 3) and data.shape == (*scales.shape[:-1], scales.shape[-1] * MXFP4_BLOCK // 2)
    if not fits or data.element_size() != 1 or scales.dtype not in (torch.uint8, torch.float32, torch.float8_e8m0fnu):
        raise ValueError(
            f"MXFP4 blocks {blocks.dtype} {list(blocks.shape)} and scales {scales.dtype} {list(scales.shape)}; blocks "
            "are bytes […, N, K / 32, 16] or […, N, K / 2], scales uint8, e8m0 or fp32 […, N, K / 32]"
        )
    scales = scales.view(torch.uint8) if scales.element_size() == 1 else scales
    return Weight(data.view(torch.uint8), statistics=(scales,), format="mxfp4")


def adopt(storage: object, name: str = "weight") -> Weight | None:
    """The stack `name` of a module that holds it as a checkpoint does, in `{name}_blocks` and `{name}_scales`, or of
    transformers' `FP8Experts` and `FP8Linear` with FP4 weights, by reference; None for anything else. Raises ValueError
    for a loaded `Mxfp4GptOssExperts`, whose tensors are in the order of its kernels.
    """
    if not isinstance(storage, torch.nn.Module):
        return None
    if is_of(storage, "transformers", "Mxfp4GptOssExperts") and hasattr(storage, f"{name}_precision_config"):
        raise ValueError(
            f"Mxfp4GptOssExperts holds {name} in the order of its kernels: load with Mxfp4Config(dequantize=True), or "
            "give its checkpoint's blocks and scales to lorafuse.formats.mxfp4.weight"
        )
    blocks: Any = getattr(storage, f"{name}_blocks", None)
    if blocks is not None:
        return weight(blocks, getattr(storage, f"{name}_scales"))
    stored = storage._parameters.get(name)
    if is_of(storage, "transformers", "FP8Linear", "FP8Experts") and stored is not None and stored.dtype is torch.int8:
        return weight(stored, getattr(storage, f"{name}_scale_inv").detach())
    return None
