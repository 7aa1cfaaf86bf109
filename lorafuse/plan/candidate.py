"""Candidates: the kernels that run an operator, how each runs, and their modelled seconds on the GPU and the host."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Candidate", "KernelConfig", "Part", "in_a_row", "padded_rank"]

# between kernels that depend on each other, on the device (assumed; hopper launches overlap at best 2 to 4 us)
_GAP = 2e-6
# of the host for one launch: an ATen operator or one of ours in CUDA, a Triton kernel with its Python launcher (beside
# an H200, 2026-11-26: forward and backward of a patched layer of 16 x 512 x 512)
_HOST = {"eager": 12e-6, "cuda": 12e-6, "triton": 60e-6}


@dataclass(frozen=True)
class KernelConfig:
    """How one kernel runs. Sizes that it does not have are 0.

    kernel          a step of an operator, "project", "matmul", "project_outer" or "outer", whose problem says in which
                    direction, over which rows and with which epilogue; "packed", a matmul that decodes the tiles of a
                    quantized weight itself; or "reduce", the sum of partial results
    form            how a main loop reads its operands: "tma" (Triton, tensor descriptors), "pointer", "wgmma" (CUDA,
                    TMA); of other kernels "pointer", or "mma" in CUDA
    block_m, block_n, block_k
                    matmul: tiles of block_m rows and block_n columns, in reduction steps of block_k. project: block_m
                    rows, in steps of block_k. project_outer, outer: block_n columns, over 1 / splits of the rows in
                    steps of block_m. reduce: block_n numbers of a program
    block_r         ranks at a time
    stages          buffers of the pipeline
    warps           warps of a program
    group_m         tiles of rows that are walked together, for the L2
    splits          parts of the rows whose sums are reduced afterwards; of a forward matmul in CUDA, parts of K
    xa_in_tiles     a forward matmul computes xa too, in its tiles of the first columns of y
    max_registers   of a thread; 0 leaves it to the compiler
    cluster         blocks that share the tiles of w
    sum_blocks      blocks of a backward matmul that sum da and db concurrently
    fused_backward  a backward matmul computes dyb, da and db too, by ticket, da and db in `splits` parts of the rows
    fused_forward   a forward matmul computes xa too, by ticket, and rounds the adapters
    tickets         programs of a "tma" matmul take the next tile when they are free, instead of tiles of their own
    """

    kernel: str
    form: str
    block_m: int
    block_n: int
    block_k: int
    block_r: int
    stages: int
    warps: int
    group_m: int = 8
    splits: int = 1
    max_registers: int = 0
    cluster: int = 1
    sum_blocks: int = 0
    tickets: bool = False
    xa_in_tiles: bool = False
    fused_backward: bool = False
    fused_forward: bool = False


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
    steps = tuple(parts)
    gaps = sum(part.launches for part in steps) - 1
    return (*steps, Part("launch gaps", gaps * _GAP, 0)) if gaps > 0 else steps


def padded_rank(R: int) -> int:
    """The power of two, at least 16, that holds R ranks: tensor cores multiply no less."""
    return max(16, 1 << (R - 1).bit_length())
