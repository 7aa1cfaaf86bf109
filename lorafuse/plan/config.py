"""How one kernel runs."""

from dataclasses import dataclass

__all__ = ["KERNELS", "KernelConfig", "padded_rank"]

# the steps of every operator, forward and backward, and the sum of partial results
KERNELS = ("project", "matmul", "project_outer", "outer", "reduce")


@dataclass(frozen=True)
class KernelConfig:
    """How one kernel runs. Sizes that it does not have are 0.

    kernel          one of `KERNELS`; the problem says in which direction, over which rows, with which epilogue
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
    splits          parts of the rows whose sums are reduced afterwards
    fused_xa        matmul computes xa too
    max_registers   of a thread; 0 leaves it to the compiler
    cluster         blocks that share the tiles of w
    sum_blocks      blocks of a backward matmul that sum da and db concurrently
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
    fused_xa: bool = False
    max_registers: int = 0
    cluster: int = 1
    sum_blocks: int = 0


def padded_rank(R: int) -> int:
    """The power of two, at least 16, that holds R ranks: tensor cores multiply no less."""
    return max(16, 1 << (R - 1).bit_length())
