"""How frozen weights are stored: one file a format, one row here.

A weight's format is its name, or `"name:parameters"`: what the tensors themselves do not say (packed sizes, block size,
the dtype in which the library rounds) stands in that string, which is a constant of the operators' schemas. Data is the
stored tensor, statistics are the plain tensors that scale it. A format is a module with

    shape(data, statistics, parameters)            the sizes of the matrices as stored, `(N, K)` or `(G, N, K)`
    decode(data, statistics, parameters, dtype, out=None)
                                                   the same as a dense tensor, bit for bit as the library decodes it;
                                                   written into `out` (contiguous) where given
    select(data, statistics, parameters, start, stop)
                                                   the same three of the matrices start … stop - 1 of a stack, by
                                                   reference
    adopt(storage, name="weight")                  the `lorafuse.operands.Weight` of a library's tensor, or of the
                                                   parameter or stack `name` of its module, by reference; None for what
                                                   is not this format's. Raises ValueError for what is, and cannot be
                                                   held.
    kernel(data, statistics, parameters)           optional: the name of a kernel of `lorafuse.kernels.decode` that
                                                   gives the same bits, and its operands; None where none does
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafuse.formats.weight import Weight

__all__ = ["FORMATS", "adopt", "adopt_as", "load"]

# name: module; dense weights are no row
FORMATS: dict[str, str] = {
    "int8": "lorafuse.formats.int8",
    "intx": "lorafuse.formats.intx",
    "nf4": "lorafuse.formats.bnb_4bit",
    "fp4": "lorafuse.formats.bnb_4bit",
    "nf4_torchao": "lorafuse.formats.nf4_torchao",
    "fp8": "lorafuse.formats.fp8",
    "mxfp4": "lorafuse.formats.mxfp4",
    "nvfp4": "lorafuse.formats.nvfp4",
}

_LOADED: dict[str, ModuleType] = {}
# what comes of a library's field that is missing, None, or no tensor or number as it should be
_BROKEN = (AttributeError, TypeError, ArithmeticError)


def load(format: str) -> ModuleType:
    """The module of a format, with or without its parameters. Raises ValueError, with the known ones, for another."""
    name = format.partition(":")[0]
    if name not in FORMATS:
        raise ValueError(f"weight format {name!r} is not one of {', '.join(('dense', *FORMATS))}")
    path = FORMATS[name]
    # Dynamo traces a look-up, and no import
    if path not in _LOADED:
        _LOADED[path] = importlib.import_module(path)
    return _LOADED[path]


def adopt(storage: object, name: str = "weight") -> Weight | None:
    """The `Weight` of a library's quantized tensor, or of the parameter or stack `name` of its module, by reference;
    None where no format knows it. Raises ValueError, with the reason and the fix, for what a library is known to store
    so and no format can hold.
    """
    from lorafuse.formats.refused import refuse

    # one format a module
    for format in {path: format for format, path in FORMATS.items()}.values():
        weight = adopt_as(format, storage, name)
        if weight is not None:
            return weight
    refuse(storage, name)
    return None


def adopt_as(format: str, storage: object, name: str = "weight") -> Weight | None:
    """The same of one format's module alone."""
    try:
        return load(format).adopt(storage, name)  # type: ignore[no-any-return]
    except _BROKEN as error:
        from lorafuse.formats.codec import held

        given = held(storage, name)
        owner = type(storage if given is None else given).__name__
        raise ValueError(
            f"a {owner} has fields that are missing or not what its library stores "
            f"({type(error).__name__}: {error}): quantize the weight anew, or load its checkpoint again"
        ) from error
