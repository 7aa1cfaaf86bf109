"""A candidate: one way to run an operator, step by step, and its modelled seconds on the GPU and on the host."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lorafuse.plan.config import KernelConfig

__all__ = ["Candidate", "Part", "in_a_row"]

# between kernels that depend on each other, on the device (assumed; hopper launches overlap at best 2 to 4 us)
_GAP = 2e-6
# of the host for one launch: an ATen operator or one of ours in CUDA, a Triton kernel with its Python launcher (beside
# an H200, 2026-11-26: forward and backward of a patched layer of 16 x 512 x 512)
_HOST = {"eager": 12e-6, "cuda": 12e-6, "triton": 60e-6}


@dataclass(frozen=True)
class Part:
    """Modelled seconds of one step on the GPU, and how many kernels it launches one after the other."""

    name: str
    seconds: float
    launches: int = 1


@dataclass(frozen=True)
class Candidate:
    """The kernels of a backend that run an operator, with the configurations of each projection."""

    backend: str
    kernel: str
    configs: tuple[tuple[KernelConfig, ...], ...]
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """Its name in `tuned.KERNELS`."""
        return f"cuda {self.kernel}" if self.backend == "cuda" else self.kernel

    @property
    def seconds(self) -> float:
        """Modelled seconds on the GPU, as in a CUDA graph."""
        return math.fsum(part.seconds for part in self.parts)

    @property
    def launch_seconds(self) -> float:
        """Modelled seconds of the host, which launches while the GPU runs."""
        return _HOST[self.backend] * sum(part.launches for part in self.parts)

    @property
    def step_seconds(self) -> float:
        """What a training step waits for: the GPU or the host."""
        return max(self.seconds, self.launch_seconds)


def in_a_row(parts: Iterable[Part]) -> tuple[Part, ...]:
    """`parts` with the gaps between their kernels."""
    found = tuple(parts)
    gaps = sum(part.launches for part in found) - 1
    return (*found, Part("launch gaps", gaps * _GAP, 0)) if gaps > 0 else found
