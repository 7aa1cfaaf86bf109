"""What codecs share: parameters of a format as text, where a decoded weight is written, and steps of decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

__all__ = [
    "chunks",
    "decode_flat",
    "decode_in_rows",
    "e2m1",
    "expanded_rows",
    "held",
    "is_of",
    "parse",
    "remembered",
    "row_chunks",
    "scale_blocks",
    "spell",
    "target",
    "unpacked",
]

_T = TypeVar("_T")

# elements that are decoded at once, for temporaries of some bytes an element: what the caches of a CPU core hold
# (2 ** 18 fp32 values are 1 MiB), and on a GPU few launches (64 MiB of fp32)
CHUNK = {"cpu": 2**18}
_CHUNK_ELSEWHERE = 2**24
# values of fp32 that are rounded at a time: 256 KiB
_ROUNDED = 2**16
# integers that hold two values of a code, by the bytes of one
_TWICE = {2: torch.int32, 4: torch.int64}


def remembered(function: Callable[[str], _T]) -> Callable[[str], _T]:
    """`function`, computed once for each of the few texts there are; Dynamo warns of `functools.lru_cache`."""
    results: dict[str, _T] = {}

    def look_up(parameters: str) -> _T:
        if parameters not in results:
            results[parameters] = function(parameters)
        return results[parameters]

    return look_up


@remembered
def parse(parameters: str) -> tuple[tuple[int, ...], dict[str, str]]:
    """Sizes and fields of `"4096,14336;block=64"`: `((4096, 14336), {"block": "64"})`."""
    sizes: tuple[int, ...] = ()
    fields = {}
    for item in filter(None, parameters.split(";")):
        key, equals, value = item.partition("=")
        if equals:
            fields[key] = value
        else:
            sizes = tuple(int(size) for size in item.split(","))
    return sizes, fields


def spell(sizes: tuple[int, ...] = (), **fields: object) -> str:
    """The text that `parse` reads; fields that are None are left out, a tuple is `128x128`."""
    items = [",".join(map(str, sizes))] if sizes else []
    for key, value in fields.items():
        if value is not None:
            text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")
            items.append(f"{key}={text}")
    return ";".join(items)


def target(out: Tensor | None, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`out`, or a new tensor. Raises ValueError for an `out` that is not contiguous, or of other sizes or dtype."""
    if out is None:
        return torch.empty(sizes, dtype=dtype, device=device)
    if tuple(out.shape) != tuple(sizes) or out.dtype is not dtype or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} with strides {list(out.stride())}; the decoded weight is contiguous "
            f"{dtype} {list(sizes)}"
        )
    return out


def chunks(start: int, stop: int, multiple: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Parts of `start … stop` to decode one after another, whose bounds in between are multiples of `multiple`, as
    `start` is.
    """
    step = max(1, CHUNK.get(device.type, _CHUNK_ELSEWHERE) // multiple) * multiple
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def row_chunks(out: Tensor) -> Iterator[tuple[int, int]]:
    """Parts of the rows of `[…, N, K]`, counted through all matrices, to decode in turn."""
    width = max(1, out.shape[-1])
    for start, stop in chunks(0, out.numel(), width, out.device):
        yield start // width, stop // width


def unpacked(data: Tensor, code: Tensor, low_first: bool) -> Tensor:
    """The values `[2 · bytes]` of two nibbles a byte, by a table `[16]` and in its dtype."""
    # one look-up a byte: as scalars of twice the size, pairs take 0.3 ms where rows of two take 3 (2 ** 19 bytes, one
    # core of a Xeon, 2026-11-29)
    high, low = code.repeat_interleave(16), code.repeat(16)
    pairs = torch.stack((low, high) if low_first else (high, low), dim=-1).view(_TWICE[code.itemsize]).view(-1)
    return pairs.index_select(0, data.reshape(-1).int()).view(code.dtype)


def decode_flat(
    data: Tensor, code: Tensor, scales: Callable[[int, int], Tensor], block: int, rounded: torch.dtype, first: int,
    out: Tensor,
) -> Tensor:  # fmt: skip
    """`code[nibble] · scales(…)[element // block]` of bytes `[n]` with the high nibble first, from element `first` on.

    The product is in the dtype of `code` and of the scales, then rounded to `rounded`, then to that of `out`.
    `scales(start, stop)` gives those of the blocks start … stop - 1.
    """
    flat, stop = out.view(-1), first + out.numel()
    for begin, end in chunks(first // block * block, stop, block, data.device):
        values = unpacked(data[begin // 2 : (end + 1) // 2], code, low_first=False)[: end - begin]
        scale = scales(begin // block, -(-end // block))
        scale_blocks(values[None], scale[None], block)
        # the first block may begin before the first element
        skipped = max(first - begin, 0)
        values = values[skipped:]
        flat[begin + skipped - first : end - first] = values if rounded is out.dtype else values.to(rounded)
    return out


def decode_in_rows(run: Callable[[int, Tensor], object], rounded: torch.dtype, first: int, out: Tensor) -> Tensor:
    """`out`, whose rows in fp32 `run(flat index, rows)` writes, a few at a time where they are to be rounded: to
    `rounded`, then to the dtype of `out`.
    """
    rows, is_wide = out.view(-1, max(1, out.shape[-1])), out.dtype is torch.float32
    width = rows.shape[1]
    step = rows.shape[0] if rounded is torch.float32 and is_wide else max(1, min(_ROUNDED, CHUNK["cpu"]) // width)
    wide = rows if is_wide else torch.empty((min(step, rows.shape[0]), width))
    for start in range(0, rows.shape[0], max(1, step)):
        stop = min(start + step, rows.shape[0])
        part, values = rows[start:stop], wide[start:stop] if is_wide else wide[: stop - start]
        run(first + start * width, values)
        # torch rounds as libraries do, to the weight's own dtype first
        if rounded not in (torch.float32, out.dtype):
            part.copy_(values.to(rounded))
        elif not is_wide:
            part.copy_(values)
    return out


def scale_blocks(values: Tensor, scale: Tensor, block: int) -> Tensor:
    """`values [rows, K]` times `scale [rows, ⌈K / block⌉]`, in place."""
    full = values.shape[1] // block
    values[:, : full * block].unflatten(1, (full, block)).mul_(scale[:, :full, None])
    if full * block < values.shape[1]:
        values[:, full * block :].mul_(scale[:, full:])
    return values


def expanded_rows(scale: Tensor, rows: int, block: int) -> Tensor:
    """`[G · rows, columns]` of a scale `[G, ⌈rows / block⌉, columns]` or `[⌈rows / block⌉, columns]` of row blocks."""
    if block > 1:
        scale = scale.repeat_interleave(block, dim=-2)[..., :rows, :]
    return scale.flatten(0, -2)


def e2m1(device: torch.device) -> Tensor:
    """fp32 `[16]`: what the nibbles of FP4 (sign, 2 exponent bits, 1 of mantissa) hold; 0 … 6, then negated."""
    # computed on the device: a copy from the host would end the capture of a CUDA graph
    nibble = torch.arange(16, device=device)
    exponent, mantissa = (nibble & 7) >> 1, (nibble & 1).float()
    magnitude = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * torch.exp2(exponent - 1.0))
    return torch.where(nibble < 8, magnitude, -magnitude)


def held(storage: object, name: str) -> object:
    """The parameter `name` of a module, which may be None, or anything else itself."""
    return storage._parameters.get(name) if isinstance(storage, torch.nn.Module) else storage


def is_of(value: object, library: str, *names: str) -> bool:
    """Whether a value is of a library's class of one of these names, or derived from it, without an import."""
    return any(kind.__name__ in names and kind.__module__.partition(".")[0] == library for kind in type(value).__mro__)
