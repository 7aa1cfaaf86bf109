"""Kernel configurations for linear layers of many groups over ragged rows: the experts of a layer.

How many rows a group has is known on the device only, so that the choice assumes that they are spread evenly. Tiles do
not cross groups: one higher than a group's rows computes some that nobody wants.
"""

from dataclasses import replace
from functools import lru_cache

from lorafuse.plan import cost
from lorafuse.plan.config import KernelConfig, illegal, is_odd, padded_rank
from lorafuse.plan.device import DeviceSpec
from lorafuse.plan.problem import Problem

__all__ = ["RAGGED_KERNELS", "padded_rows", "ragged_candidates", "ragged_config"]

# a main loop that ends in y or dx, in an activation, in an activation's backward; the products with the rank
RAGGED_KERNELS = ("ragged", "ragged_act", "ragged_act_backward", "project", "outer")
# (block_m, block_n, block_k, stages, warps) of the main loop, by architecture: those that read weights through TMA, and
# pointers. Chosen by what compiles without spills (Triton 3.6, 2026-11-25); no speed was measured.
_TMA = {
    90: ((128, 256, 64, 3, 8), (128, 128, 64, 4, 8), (64, 256, 64, 3, 8), (64, 128, 64, 4, 8)),
    100: ((128, 256, 64, 3, 8), (128, 128, 64, 3, 8), (64, 256, 64, 3, 8), (64, 128, 64, 4, 8)),
}
# of these, only sm_80 has the shared memory for the first
_POINTER = ((128, 128, 64, 3, 8), (128, 128, 32, 4, 8), (64, 128, 64, 3, 8))
# for groups of a few rows, which wait for their weights whatever the tile
_SHORT = ((32, 64, 64, 3, 4), (16, 64, 64, 3, 4))
# rows off 16-byte boundaries are read element by element, fp32 multiplies on the CUDA cores: both need registers
_ODD = ((32, 64, 32, 3, 8), (16, 64, 32, 3, 4))
_FP32 = ((32, 64, 32, 2, 8), (16, 64, 32, 2, 8))
# left alone, ptxas stops at 64, 80 or 128 registers and spills one or two
_MAX_REGISTERS = 255
_MAX_BLOCK_R = 32


def _main_loops(kernel: str, problem: Problem, device: DeviceSpec) -> list[KernelConfig]:
    rank = padded_rank(problem.R)
    if problem.itemsize == 4 or is_odd(problem):
        tiles = _FP32 if problem.itemsize == 4 else _ODD
        return [KernelConfig(kernel, "pointer", *tile[:3], min(rank, 16), *tile[3:]) for tile in tiles]
    block_r = min(rank, _MAX_BLOCK_R)
    # sm_120 has no TMA form for the reason that `config` gives
    form = "tma" if device.arch in _TMA else "pointer"
    found = [KernelConfig(kernel, form, *tile[:3], block_r, *tile[3:]) for tile in _TMA.get(device.arch, _POINTER)]
    return found + [KernelConfig(kernel, "pointer", *tile[:3], block_r, *tile[3:]) for tile in _SHORT]


def ragged_candidates(kernel: str, problem: Problem, device: DeviceSpec) -> tuple[KernelConfig, ...]:
    """The legal configurations of a kernel of `RAGGED_KERNELS` for one projection; M is the rows of all groups."""
    half, rank = problem.itemsize == 2, padded_rank(problem.R)
    if kernel == "project":
        block_k, warps = (64, 4) if half else (32, 8)
        found = [
            KernelConfig("project", "pointer", m, 0, block_k, min(rank, 64), 3, warps)
            for m in (64, 32, 16)
            if m > 16 or rank <= 32
        ]
    elif kernel == "outer":
        block_m, block_r = (64, min(rank, 64)) if half else (32, 16)
        found = [KernelConfig("outer", "pointer", block_m, n, 0, block_r, 3, 8) for n in ((128, 64) if half else (64,))]
    else:
        found = _main_loops(kernel, problem, device)
    found = [replace(config, max_registers=_MAX_REGISTERS) for config in found]
    return tuple(config for config in found if not illegal(config, problem, device))


def padded_rows(rows: int, groups: int, height: int) -> int:
    """Rows of all tiles of that height when `rows` are spread evenly over `groups`."""
    return groups * -(-max(rows // groups, 1) // height) * height


@lru_cache(maxsize=4096)
def ragged_config(kernel: str, problem: Problem, groups: int, device: DeviceSpec) -> KernelConfig:
    """The configuration with the least modelled time when the rows are spread evenly over `groups`."""

    def seconds(config: KernelConfig) -> float:
        if kernel == "outer":
            # wide blocks, unless they are too few to occupy the GPU
            idle = -(-problem.N // config.block_n) * groups < device.sms
            return config.block_n if idle else 1 / config.block_n
        rows = padded_rows(problem.M, groups, config.block_m)
        if kernel == "project":
            return rows + config.block_m / 1e3
        return cost.kernel_seconds(replace(config, kernel="fwd"), replace(problem, M=rows), device)

    return min(ragged_candidates(kernel, problem, device), key=seconds)
