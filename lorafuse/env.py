"""Every environment variable lorafuse reads: name, default, meaning. Nothing else calls `os.environ`."""

import os
from dataclasses import dataclass

__all__ = ["VARIABLES", "Variable", "get"]


@dataclass(frozen=True)
class Variable:
    name: str
    default: str
    doc: str


VARIABLES: dict[str, Variable] = {
    v.name: v
    for v in (
        Variable("LORAFUSE_BACKEND", "auto", "backend for calls that do not name one: auto, eager, triton or cuda"),
        # of an installation; setup.py reads them
        Variable("LORAFUSE_SKIP_CUDA_BUILD", "0", "1: `pip install` leaves the CUDA kernels out, though nvcc is there"),
        Variable("LORAFUSE_BUILD_EMULATOR", "0", "1: `pip install` builds the emulator of the CUDA kernels too"),
    )
}


def get(name: str) -> str:
    """Value of a variable listed in `VARIABLES`, or its default. Raises KeyError for any other name."""
    return os.environ.get(name, VARIABLES[name].default)
