"""How frozen weights are stored: one file a format, one row here.

A format is a module with
    shape(data, statistics)          the sizes of the matrices as stored, `(N, K)` or `(G, N, K)`
    decode(data, statistics, dtype)  the same as a dense tensor, in a library's own order of rounding
    adopt(storage)                   the `lorafuse.operands.Weight` of a library's module or tensor; None for others
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafuse.formats.weight import Weight

__all__ = ["FORMATS", "adopt", "load"]

# name: module; dense weights are no row
FORMATS: dict[str, str] = {"int8": "lorafuse.formats.int8"}


def load(name: str) -> ModuleType:
    """The module of a format. Raises ValueError, with the known ones, for another name."""
    if name not in FORMATS:
        raise ValueError(f"weight format {name!r} is not one of {', '.join(('dense', *FORMATS))}")
    return importlib.import_module(FORMATS[name])


def adopt(storage: object) -> Weight | None:
    """The `Weight` of a library's quantized tensor or layer, by reference; None where no format knows it."""
    return next((w for name in FORMATS if (w := load(name).adopt(storage)) is not None), None)
