"""Peak memory of a call, and memory between forward and backward."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler import profile

__all__ = ["Held", "changes", "held_bytes", "peak_bytes"]


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most tensor bytes that `run()` holds at once beyond those alive before it.

    On CUDA this is the caching allocator's counter; elsewhere the sum of allocations and releases that torch's profiler
    records, in the order of their times. Memory of libraries outside torch's allocator is not counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    held = most = 0
    for change in changes(run):
        held += change
        most = max(most, held)
    return most


@dataclass(frozen=True)
class Held:
    """Tensor bytes: the peak, and those alive between forward and backward, results included."""

    peak: int
    between: int


def held_bytes(forward: Callable[[], Any], backward: Callable[[Any], object], device: torch.device) -> Held:
    """The memory of one forward and backward beyond that alive before."""
    peak = peak_bytes(lambda: backward(forward()), device)
    kept: list[Any] = []
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        kept.append(forward())
        return Held(peak, torch.cuda.memory_allocated(device) - before)
    return Held(peak, sum(changes(lambda: kept.append(forward()))))


def changes(run: Callable[[], object]) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) of `run()`, in the order of their times."""
    # torch.profiler's imports Inductor when it starts
    recorded = profile(profile_memory=True, use_kineto=True)
    with _quiet():
        recorded.__enter__()
    try:
        run()
    finally:
        with _quiet():
            recorded.__exit__(None, None, None)
    assert recorded.kineto_results is not None
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the messages of the profiler's library on standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
