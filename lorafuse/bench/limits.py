"""A bound on memory, so that a case that does not fit raises and does not end the process; how that is recognized."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["available_bytes", "first_line", "is_out_of_memory", "out_of_memory", "within_memory"]

_CGROUP = Path("/sys/fs/cgroup")
# torch raises a plain RuntimeError for these on CPUs: no memory, and a size that no memory has
_NO_MEMORY = "can't allocate memory", "Storage size calculation overflowed", "integer multiplication overflow"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports that memory ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """The message of an error, without the allocator's state and advice that follow."""
    return str(error).partition("\n")[0]


def out_of_memory(error: BaseException) -> str:
    """The reason of a case or a variant that did not fit."""
    return f"out of memory: {first_line(error)}"


def available_bytes() -> int:
    """Bytes that this process may still allocate: of the machine, or of its control group where that has less."""
    # not at the top: it comes with PEFT, which other commands do not need
    import psutil

    free: int = psutil.virtual_memory().available
    try:
        limit, used = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return free
    if limit == "max":
        return free
    # the page cache counts as used, and is released on demand
    stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    return min(free, int(limit) - int(used) + int(stat.get("inactive_file", 0)))


@contextmanager
def within_memory(fraction: float = 0.95) -> Iterator[None]:
    """Limit this process to `fraction` of the memory that is free on entry; allocations beyond it raise."""
    import psutil

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = psutil.Process().memory_info().data + int(available_bytes() * fraction)
    resource.setrlimit(resource.RLIMIT_DATA, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
