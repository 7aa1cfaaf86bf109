"""`lorafuse._cpu`: decoding on a CPU in one pass, compiled from csrc/cpu where g++ is when lorafuse is installed.

ctypes calls it by address, without the interpreter's lock. Where it is absent bitsandbytes' kernel or torch decodes.
"""

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorafuse.formats.sizes import NESTED_BLOCK

__all__ = ["decode_4bit", "fits_4bit", "has_addresses", "library", "opened", "why_not"]

# of the functions in csrc/cpu/decode.cpp
_VERSION = 1
_ARGUMENTS: Any = [*[ctypes.c_void_p] * 7, *[ctypes.c_longlong] * 3, ctypes.c_int, ctypes.c_void_p]


def opened(file: str | None) -> tuple[Any, str]:
    """The library of that file, or None and the reason why there is none."""
    if file is None:
        return None, "it was not built when lorafuse was installed"
    try:
        loaded = ctypes.CDLL(file)
    except OSError as error:
        return None, f"it does not load here: {error}"
    if loaded.lorafuse_cpu_version() != _VERSION:
        return None, f"{file} was built from other sources"
    loaded.lorafuse_decode_4bit.argtypes = _ARGUMENTS
    loaded.lorafuse_decode_4bit.restype = None
    return loaded, ""


@cache
def _loaded() -> tuple[Any, str]:
    spec = importlib.util.find_spec("lorafuse._cpu")
    return opened(None if spec is None else spec.origin)


def library() -> Any:
    """The loaded module, or None."""
    return _loaded()[0]


def why_not() -> str:
    """Why it is not used here; "" where it is."""
    return _loaded()[1]


def has_addresses() -> bool:
    """Whether tensors lie in memory: those that Dynamo traces, or that torch's transforms wrap, do not."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def fits_4bit(data: Tensor, statistics: tuple[Tensor, ...], block: int, stop: int, out: Tensor) -> bool:
    """Whether elements up to `stop` can be read: addresses are not checked there."""
    if not data.is_cpu or not has_addresses() or library() is None:
        return False
    # nor has a subclass of tensors
    tensors = data, out, *statistics
    if not all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu and t.is_contiguous() for t in tensors):
        return False
    blocks = -(-stop // block)
    counts = blocks, 16, -(-blocks // NESTED_BLOCK), 256, 1
    is_nested = len(statistics) > 2
    dtypes = (torch.uint8 if is_nested else torch.float32, *(torch.float32,) * 4)
    return (
        data.dtype is torch.uint8
        and 2 * data.numel() >= stop
        and all(t.dtype is d and t.numel() >= n for t, d, n in zip(statistics, dtypes, counts, strict=False))
    )


def decode_4bit(data: Tensor, statistics: tuple[Tensor, ...], block: int) -> Callable[[int, Tensor], object]:
    """`run(first, out)`: decode elements of the flat weight, from `first` on, into the fp32 tensor `out`."""
    absmax, table, *nested = (t.data_ptr() for t in statistics)
    scales = (None, absmax, *nested) if nested else (absmax, None, None, None, None)
    call, code, threads = library().lorafuse_decode_4bit, data.data_ptr(), torch.get_num_threads()

    def run(first: int, out: Tensor) -> None:
        call(code, table, *scales, block, first, out.numel(), threads, out.data_ptr())

    return run
