"""The memory into which quantized weights are decoded: one buffer, which every layer uses in turn.

A decoded weight lives for the product that reads it, so a step needs the largest weight once, however many layers have
one. A buffer belongs to one user at a time: threads, and a product within another's activation, get one each. It grows
to the largest weight that was decoded; a stack of experts larger than `LORAFUSE_WORKSPACE_MIB` is decoded in parts.

On a CPU buffers are kept, since fresh memory costs a page fault for every 4 KiB. On other devices torch's caching
allocator keeps them: a block that is freed goes to the next allocation of its stream, and a CUDA graph, or a pool that
a compiler records into, has blocks of its own, which one that is kept here would tie to whoever came first.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from lorafuse import env

__all__ = ["FREE", "budget", "buffer", "clear_workspace"]

# buffers of the CPU that nobody uses; append and pop are atomic
FREE: list[Tensor] = []


@contextmanager
def buffer(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """An uninitialized contiguous tensor, whose memory is somebody else's afterwards."""
    if device.type != "cpu":
        yield torch.empty(sizes, dtype=dtype, device=device)
        return
    needed = math.prod(sizes) * dtype.itemsize
    try:
        memory = FREE.pop()
    except IndexError:
        memory = None
    if memory is None or memory.numel() < needed:
        # a tensor of inference mode could not be written outside of it; the smaller one is freed first
        del memory
        with torch.inference_mode(False):
            memory = torch.empty(needed, dtype=torch.uint8, device=device)
    try:
        yield memory[:needed].view(dtype).view(sizes)
    finally:
        FREE.append(memory)


def budget() -> int:
    """Bytes of a decoded part of a stack, but for a single matrix that is larger. Raises ValueError for no number."""
    return _parsed(env.get("LORAFUSE_WORKSPACE_MIB"))


@lru_cache(maxsize=8)
def _parsed(mib: str) -> int:
    if not mib.isdecimal() or not int(mib):
        raise ValueError(f"LORAFUSE_WORKSPACE_MIB={mib!r} is no positive integer; it is how many MiB a workspace takes")
    return int(mib) << 20


def clear_workspace() -> None:
    """Free the memory that quantized weights were decoded into; the next one allocates it again.

    On GPUs torch's caching allocator holds it: `torch.cuda.empty_cache()` frees it there.
    """
    FREE.clear()
