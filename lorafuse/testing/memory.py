"""Peak memory of one call, the same way for every variant that is compared."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Held", "held_bytes", "peak_bytes"]


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most tensor bytes that `run()` holds at once beyond those alive before it.

    On CUDA from the caching allocator's own counter; elsewhere from the allocations and releases that torch's profiler
    records, added up in the order of their times. Memory of libraries outside torch's allocator is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    held = most = 0
    for change in _changes(run):
        held += change
        most = max(most, held)
    return most


@dataclass(frozen=True)
class Held:
    """Tensor bytes: the most at once, and what is alive between forward and backward, results included."""

    peak: int
    between: int


def held_bytes(forward: Callable[[], Any], backward: Callable[[Any], object], device: torch.device) -> Held:
    """What one forward and backward hold beyond what was alive before."""
    peak = peak_bytes(lambda: backward(forward()), device)
    kept: list[Any] = []
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        kept.append(forward())
        return Held(peak, torch.cuda.memory_allocated(device) - before)
    return Held(peak, sum(_changes(lambda: kept.append(forward()))))


def _changes(run: Callable[[], object]) -> list[int]:
    """Bytes that every allocation of `run()` adds and every release takes away, in the order of their times."""
    recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet():
        recorded.start()
    try:
        run()
    finally:
        with _quiet():
            recorded.stop()
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's library writes to standard error whenever it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
