"""Timing that survives a noisy machine: variants interleaved, medians with the spread of the middle 60 %."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

__all__ = ["WARM", "Clock", "Samples", "Timed", "captured", "measure", "measure_calls", "percentile", "timing"]

# the state of caches when nothing overwrites them
WARM = "interleaved, caches hold what the other variants left"


def timing(device: torch.device) -> str:
    """How `Clock` times calls, for the conditions of a run."""
    return "interleaved, L2 filled by a read before every call" if device.type == "cuda" else WARM


def percentile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the sorted values; `fraction` in [0, 1]."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass
class Samples:
    """Seconds of every call of one variant."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    @property
    def total(self) -> list[float]:
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]


class Clock:
    """Seconds of a call: wall clock on a CPU; on a GPU events, after a read of twice its L2.

    A read leaves no lines whose write-back would run into the call, and lasts longer than the host needs to enqueue
    events and call, or the interval would hold idle time of the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        if self.cuda:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.zeros(size, dtype=torch.int8, device=device)
            # a new event is created at its first record, which the host would do inside the interval
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def time(self, run: Callable[[], object], warm: Sequence[torch.Tensor] = ()) -> tuple[float, object]:
        """Seconds and result of `run()`; `warm` are written just before, with their own values, as in training."""
        if self.cuda:
            self._flush.sum()
        for tensor in warm:
            tensor.detach().mul_(1)
        if not self.cuda:
            start = time.perf_counter()
            result = run()
            return time.perf_counter() - start, result
        first, last = self._events
        first.record()
        result = run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3, result


def captured(call: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], object]:
    """`call` as a CUDA graph, whose time is the GPU's and not the host's.

    It first runs a few times on `stream`, which must be the stream of its kernels: a backward runs on its forward's.
    Raises RuntimeError for a call that cannot be captured.
    """
    # cuBLAS handles, workspaces and compiled kernels must exist before a capture
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


class Timed(Protocol):
    """An argument of `measure`: `once()` runs forward and backward and returns the seconds of each."""

    @property
    def name(self) -> str: ...

    def once(self) -> tuple[float, float]: ...


def measure(
    variants: Sequence[Timed],
    rounds: int,
    warm_up: int,
    seconds: float = float("inf"),
    drop: Callable[[str, Exception], None] | None = None,
) -> Iterator[dict[str, Samples]]:
    """Time forward and backward of every variant once a round, in a new order each round; yields after each round.

    After `seconds` it stops early, but not before ten rounds, the fewest that are published. An exception of a variant
    goes to `drop` with its name: unless `drop` raises, its samples are removed and the others continue. Without `drop`
    it ends the measurement.
    """
    order, end = random.Random(0), time.monotonic() + seconds
    samples = {variant.name: Samples() for variant in variants}
    running = list(variants)
    for index in range(warm_up + rounds):
        if index >= warm_up + min(10, rounds) and time.monotonic() > end:
            return
        for variant in order.sample(running, len(running)):
            try:
                forward, backward = variant.once()
            except Exception as error:
                if drop is None:
                    raise
                drop(variant.name, error)
                running.remove(variant)
                del samples[variant.name]
                continue
            if index >= warm_up:
                samples[variant.name].forward.append(forward)
                samples[variant.name].backward.append(backward)
        yield samples


def measure_calls(
    calls: dict[str, Callable[[], object]], rounds: int, warm_up: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every call by name, each made once a round, in a new order each round."""
    clock, order = Clock(device), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(warm_up + rounds):
        for name in order.sample(list(calls), len(calls)):
            one, _ = clock.time(calls[name])
            if index >= warm_up:
                seconds[name].append(one)
    return seconds
