"""A bound on memory, so that a case that does not fit raises and does not end the process; how that is recognized."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["available_bytes", "first_line", "is_out_of_memory", "out_of_memory", "within_memory"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out: torch raises a plain RuntimeError for that on CPUs, and for a size that no
    memory has."""
    said = "can't allocate memory", "Storage size calculation overflowed", "integer multiplication overflow"
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in said)


def first_line(error: BaseException) -> str:
    """What an error says, without the state of an allocator and the advice that follow."""
    return str(error).partition("\n")[0]


def out_of_memory(error: BaseException) -> str:
    """The reason of a case or a variant that did not fit."""
    return f"out of memory: {first_line(error)}"


def available_bytes() -> int | None:
    """What this process may still take of the machine's memory and its control group's; None where neither is known."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        limit = used = "max"
    if limit != "max":
        # the page cache counts as used and is given up when memory is asked for
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(int(limit) - int(used) + int(stat.get("inactive_file", 0)))
    return min(found, default=None)


@contextmanager
def within_memory(share: float = 0.95) -> Iterator[None]:
    """Within it, this process may take `share` of the memory that is free when it begins; more raises."""
    free = available_bytes()
    if free is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text()
    (taken,) = (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData:"))
    bound = taken + int(free * share)
    resource.setrlimit(resource.RLIMIT_DATA, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
