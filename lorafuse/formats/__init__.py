"""How frozen weights are stored. One file a format, one row here.

A weight is stored as `data`, a tensor, and `statistics`, tensors besides (scales, codebooks). A format's module has

    shape(data, statistics) -> torch.Size           of the matrices that they hold
    decode(data, statistics, dtype) -> Tensor       those matrices
    adopt(weight) -> (data, statistics) or None     of a library's tensor that is stored so; by reference, no copy
"""

import importlib
from types import ModuleType

__all__ = ["FORMATS", "load"]

FORMATS: dict[str, str] = {}


def load(name: str) -> ModuleType:
    """The module of a format. Raises ValueError that lists the known ones."""
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is not one of {', '.join(('dense', *FORMATS))}")
    return importlib.import_module(FORMATS[name])
