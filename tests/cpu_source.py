"""One source of csrc/cpu compiled alone, and torch's threads, for tests of its functions."""

import contextlib
import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from lorafuse.formats import cpu

__all__ = ["SOURCES", "compiled", "torch_threads"]

SOURCES = Path(__file__).parents[1] / "csrc" / "cpu"


def compiled(folder, name, source, *flags):
    """The module of a source in place of csrc/cpu's `name`, its functions declared. Skips where there is no g++."""
    file, module = folder / name, folder / f"{name}.so"
    file.write_text(source)
    command = ["g++", "-std=c++17", *flags, "-fPIC", "-shared", "-I", SOURCES, file, "-o", module]
    try:
        subprocess.run(command, check=True, timeout=300)
    except FileNotFoundError:
        pytest.skip("g++ is not here")
    library = ctypes.CDLL(str(module))
    for function, arguments in cpu.ARGUMENTS.items():
        if hasattr(library, function):
            getattr(library, function).argtypes, getattr(library, function).restype = arguments, None
    return library


@contextlib.contextmanager
def torch_threads(count):
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(former)
