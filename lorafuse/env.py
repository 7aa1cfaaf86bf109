"""Every environment variable lorafuse reads: name, default, meaning. Nothing else calls `os.environ`."""

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["VARIABLES", "Variable", "cache_dir", "get"]


@dataclass(frozen=True)
class Variable:
    name: str
    default: str
    doc: str


VARIABLES: dict[str, Variable] = {
    v.name: v
    for v in (
        Variable("LORAFUSE_BACKEND", "auto", "backend for calls that do not name one: auto, eager, triton or cuda"),
        Variable(
            "LORAFUSE_CACHE_DIR",
            "~/.cache/lorafuse",
            "where `lorafuse tune` keeps its measurements and `lorafuse study` its bases; "
            "`$XDG_CACHE_HOME/lorafuse` where that variable is set",
        ),
        Variable(
            "LORAFUSE_WORKSPACE_MIB",
            "512",
            "MiB of quantized experts that are decoded at a time; a single matrix may be larger",
        ),
        # of an installation; setup.py reads them
        Variable("LORAFUSE_SKIP_CUDA_BUILD", "0", "1: `pip install` leaves the CUDA kernels out, though nvcc is there"),
        Variable("LORAFUSE_BUILD_EMULATOR", "0", "1: `pip install` builds the emulator of the CUDA kernels too"),
    )
}


def get(name: str) -> str:
    """Value of a variable listed in `VARIABLES`, or its default. Raises KeyError for any other name."""
    default = VARIABLES[name].default
    if name == "LORAFUSE_CACHE_DIR" and (home := os.environ.get("XDG_CACHE_HOME")):
        default = f"{home}/lorafuse"
    return os.environ.get(name, default)


def cache_dir() -> Path:
    """The folder of `LORAFUSE_CACHE_DIR`, which need not exist; "~" stays where the user's home is not known."""
    # Path.expanduser would raise there, and plans are made by users without a home too
    return Path(os.path.expanduser(get("LORAFUSE_CACHE_DIR")))
