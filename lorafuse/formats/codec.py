"""What codecs share: parameters of a format as text, and where a decoded weight is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["chunks", "parse", "remembered", "row_chunks", "spell", "target"]

_T = TypeVar("_T")

# elements that are decoded at once, for temporaries of some bytes an element: what the caches of a CPU core hold
# (2 ** 18 fp32 values are 1 MiB), and on a GPU few launches (64 MiB of fp32)
_CHUNK = {"cpu": 2**18}
_CHUNK_ELSEWHERE = 2**24


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
    """The text that `parse` reads; fields that are None are left out."""
    given = [f"{key}={str(value).removeprefix('torch.')}" for key, value in fields.items() if value is not None]
    return ";".join([",".join(map(str, sizes)), *given] if sizes else given)


def target(out: Tensor | None, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`out`, or a new tensor. Raises ValueError for an `out` that is not contiguous, or of other sizes or dtype."""
    if out is None:
        return torch.empty(sizes, dtype=dtype, device=device)
    if tuple(out.shape) != sizes or out.dtype is not dtype or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} with strides {list(out.stride())}; the decoded weight is contiguous "
            f"{dtype} {list(sizes)}"
        )
    return out


def chunks(start: int, stop: int, multiple: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Parts of `start … stop` to decode one after another, whose bounds in between are multiples of `multiple`, as
    `start` is.
    """
    step = max(1, _CHUNK.get(device.type, _CHUNK_ELSEWHERE) // multiple) * multiple
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def row_chunks(data: Tensor, rows: int = 1) -> Iterator[tuple[int, int]]:
    """Parts of the rows of `[…, N, K]`, counted through all matrices, to decode in turn. Bounds in between are
    multiples of `rows`.
    """
    width = max(1, data.shape[-1])
    for start, stop in chunks(0, data.numel(), width * rows, data.device):
        yield start // width, stop // width
