"""How frozen weights are stored: one file a format, one row here.

A format is a module with
    shape(data, statistics)          the sizes of the matrices as stored, `(N, K)` or `(G, N, K)`
    decode(data, statistics, dtype)  the same as a dense tensor, in a library's own order of rounding
    adopt(storage)                   the `lorafuse.operands.Weight` of a library's module or tensor; None for others
"""

import importlib
from types import ModuleType

__all__ = ["FORMATS", "load"]

# name: module; dense weights are no row
FORMATS: dict[str, str] = {}


def load(name: str) -> ModuleType:
    """The module of a format. Raises ValueError, with the known ones, for another name."""
    if name not in FORMATS:
        raise ValueError(f"weight format {name!r} is not one of {', '.join(('dense', *FORMATS))}")
    return importlib.import_module(FORMATS[name])
