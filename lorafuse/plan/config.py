"""Kernel configurations: which exist, and what is legal. The compile-only tests build every one of them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lorafuse.plan.device import DeviceSpec
from lorafuse.plan.problem import Problem

__all__ = ["KernelConfig", "candidates", "illegal", "is_odd", "padded_rank", "shared_memory"]


@dataclass(frozen=True)
class KernelConfig:
    """How one kernel runs. Sizes the kernel does not have are 0.

    fwd and dx compute tiles of `block_m` rows and `block_n` columns in reduction steps of `block_k`; xa has no block_n;
    dyb_db and da own `block_n` columns and walk `1 / splits` of the rows in steps of `block_m`; reduce sums `block_n`
    numbers a program. `block_r` ranks are taken at a time. `form` is how fwd and dx read, and the main loops of ragged
    rows their weights: "tma" (persistent, tensor descriptors) or "pointer". `single`: fwd computes xa too.
    `max_registers` of a thread; 0 leaves it to the compiler. `beside`: blocks of dx that sum da and db meanwhile.
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
    single: bool = False
    max_registers: int = 0
    cluster: int = 1
    beside: int = 0


_MAIN_LOOPS = ("fwd", "dx", "ragged", "ragged_act", "ragged_act_backward")
# (block_m, block_n, block_k, stages, warps) of fwd and dx, best first where all fill the GPU. Those of sm_90 were
# measured on an H200 (docs/performance.md, 2026-11-26), the others chosen by what compiles without spills (Triton 3.6).
_TMA = {
    90: ((128, 256, 64, 4, 8), (128, 256, 64, 3, 8), (128, 128, 64, 4, 8), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)),
    100: ((128, 256, 64, 3, 8), (128, 128, 64, 3, 8), (64, 128, 64, 4, 8), (64, 64, 64, 4, 8)),
}
_POINTER = ((128, 128, 32, 4, 8), (64, 128, 32, 4, 4), (64, 64, 32, 4, 4))
# fp32 multiplies on the CUDA cores; rows off 16-byte boundaries are read element by element. Both need registers.
_FP32 = ((64, 64, 32, 3, 8), (32, 64, 32, 3, 8))
_ODD = ((64, 64, 32, 3, 8), (32, 64, 32, 3, 8))
_ODD_FP32 = ((32, 64, 32, 2, 8),)
# ranks that fwd and dx take at a time: at 64 the tiles of a and b no longer fit beside the pipeline's buffers
_MAX_BLOCK_R = 32
# a single kernel walks x for all ranks at once, in the registers of one tile
_MAX_SINGLE_R = 64
# fp32 accumulators in the registers of one thread, of 255: above this all shapes spilled
_MAX_ACCUMULATORS = 128
# the same beside an activation's backward; beside an activation too on sm_100, where accumulators come from tensor
# memory all at once, and after a loop over several rank tiles (Triton 3.6, 2026-11-25)
_MAX_ACTIVATED = 64


def padded_rank(R: int) -> int:
    """The power of two, at least 16, that holds R ranks: tensor cores multiply no less."""
    return max(16, 1 << (R - 1).bit_length())


def shared_memory(config: KernelConfig, itemsize: int) -> int:
    """Bytes of shared memory that a program needs, at most: the pipeline's buffers, and staging of stores and ranks."""
    c = config
    ranks = (c.block_m + c.block_n) * c.block_r * itemsize
    if c.kernel in _MAIN_LOOPS:
        # stores through a descriptor are staged in halves
        staging = c.block_m * c.block_n // 2 * itemsize if c.form == "tma" else 0
        if c.kernel == "ragged_act_backward" and c.form == "tma":
            # du of gate and up; pointers leave the pipeline's buffers to it
            staging = 2 * c.block_m * c.block_n * itemsize
        pipeline = c.stages * (c.block_m + c.block_n) * c.block_k * itemsize
        # tiles of the ranks take the place of the pipeline's buffers, or lie beside those that pointers fill
        tiles = (max(pipeline, 2 * ranks) if c.form == "tma" else pipeline + 2 * ranks) + staging + 1024
        return (
            max(tiles, shared_memory(replace(c, kernel="xa", block_r=_MAX_SINGLE_R), itemsize)) if c.single else tiles
        )
    if c.kernel in ("xa", "project"):
        # a may be fp32, and a masked x passes through shared memory once more
        return c.stages * (c.block_m * itemsize + c.block_r * 4) * c.block_k + c.block_m * c.block_k * 4
    if c.kernel in ("dyb_db", "da", "outer"):
        # dy is staged as it is and transposed, with the partial of dyb in fp32
        return (c.stages + 2) * c.block_m * c.block_n * itemsize + 2 * ranks + c.block_m * c.block_r * 4
    return 0


def illegal(config: KernelConfig, problem: Problem, device: DeviceSpec) -> str:
    """Why a configuration cannot run a problem on a device; "" when it can. The one statement of what is legal."""
    c = config
    sizes = [s for s in (c.block_m, c.block_n, c.block_k, c.block_r) if s]
    if any(size & (size - 1) for size in sizes) or (c.block_r and c.block_r < 16):
        return f"block sizes {sizes} must be powers of two, and of the rank at least 16"
    if c.form == "tma":
        if device.arch < 90:
            return f"TMA needs sm_90, {device.name} is sm_{device.arch}"
        if problem.itemsize != 2:
            return f"the TMA form is for 16-bit dtypes, not {problem.dtype}"
        if is_odd(problem):
            return "TMA needs rows that start on 16-byte boundaries"
    if c.single and (device.arch < 90 or problem.R > _MAX_SINGLE_R or problem.itemsize != 2 or is_odd(problem)):
        return f"the single kernel needs sm_90, R <= {_MAX_SINGLE_R}, a 16-bit dtype and rows on 16-byte boundaries"
    if c.single and problem.dropout:
        return "drawing the mask makes the xa items of a single kernel too long to fit beside its tiles"
    accumulators = c.block_m * c.block_n if c.kernel in _MAIN_LOOPS else max(c.block_m, c.block_n) * c.block_r
    if c.kernel == "dx" and problem.dropout:
        # the masked low-rank product has accumulators of its own
        accumulators *= 2
    tight = 100 <= device.arch < 120 or c.block_r < problem.R
    activated = c.kernel == "ragged_act_backward" or (c.kernel == "ragged_act" and tight)
    if accumulators > (_MAX_ACTIVATED if activated else _MAX_ACCUMULATORS) * 32 * c.warps:
        return f"{accumulators} accumulators do not fit the registers of {c.warps} warps"
    if c.kernel == "ragged_act_backward" and 100 <= device.arch < 120 and c.block_n > 128:
        return "on sm_100 the backward of interleaved gate and up leaves 16 bytes of 256 columns in local memory"
    needed = shared_memory(c, problem.itemsize)
    if needed > device.smem_per_block:
        return f"{needed} bytes of shared memory are more than the {device.smem_per_block} of {device.name}"
    return ""


def is_odd(problem: Problem) -> bool:
    """Whether some row of x, w or y starts off a 16-byte boundary."""
    return not problem.aligned or any(size * problem.itemsize % 16 for size in (problem.N, problem.K))


def _tiles(problem: Problem, device: DeviceSpec) -> Iterator[tuple[str, tuple[int, int, int, int, int]]]:
    if problem.itemsize == 4:
        yield from (("pointer", tile) for tile in (_ODD_FP32 if is_odd(problem) else _FP32))
    elif is_odd(problem):
        yield from (("pointer", tile) for tile in _ODD)
    elif device.arch in _TMA:
        yield from (("tma", tile) for tile in _TMA[device.arch])
    else:
        # sm_120 too: in every TMA kernel there Triton 3.6 leaves 8 bytes in local memory
        yield from (("pointer", tile) for tile in _POINTER)


def _skinny(kernel: str, problem: Problem, device: DeviceSpec) -> Iterator[KernelConfig]:
    """xa, dyb_db and da: memory-bound, so tiles are chosen for how many programs they give."""
    small = problem.itemsize == 4 or is_odd(problem)
    rank = padded_rank(problem.R)
    if kernel == "xa":
        # x is read once for each rank tile: all ranks in one where shared memory holds them
        ranks = {min(rank, 64 if small else 256), min(rank, 64)}
        if not small and rank <= 32:
            # 27 us where 64 rows in steps of 64 took 43 (8192 x 4096, R 16, H200, 2026-11-26)
            yield KernelConfig("xa", "pointer", 32, 0, 128, rank, 4, 4)
        for block_m, block_r in itertools.product((64, 32, 16), sorted(ranks)):
            if block_m == 16 and block_r > 32:
                continue
            block_k = 32 if small or block_r == 256 else 64
            yield KernelConfig("xa", "pointer", block_m, 0, block_k, block_r, 3, 8 if small or block_r > 64 else 4)
        return
    # products with an fp32 xa or dyb hold fp32 copies of their other operand
    small = small or problem.wide
    columns = problem.N if kernel == "dyb_db" else problem.K
    block_m, block_r = (32, min(rank, 16)) if small else (64, min(rank, 64))
    for block_n in (64,) if small else (64, 128, 256):
        programs = -(-columns // block_n) * -(-problem.R // block_r)
        # a wide program keeps an SM's loads in flight alone, narrow ones in pairs
        splits = max(1, min(device.sms * (2 if block_n < 256 else 1) // programs, -(-problem.M // block_m)))
        warps = 4 if block_n == 64 and not small else 8
        yield KernelConfig(kernel, "pointer", block_m, block_n, 0, block_r, 3, warps, splits=splits)


def candidates(kernel: str, problem: Problem, device: DeviceSpec) -> tuple[KernelConfig, ...]:
    """The legal configurations of a kernel ("xa", "fwd", "dyb_db", "reduce", "dx", "da") for a problem."""
    if kernel == "reduce":
        return (KernelConfig("reduce", "pointer", 0, 1024, 0, 0, 1, 4),)
    if kernel in ("fwd", "dx"):
        # fp32 rank tiles of 16 take the shared memory of 32 in 16 bits
        small = problem.itemsize == 4 or problem.wide or is_odd(problem)
        block_r = min(padded_rank(problem.R), 16 if small else _MAX_BLOCK_R)
        found = [KernelConfig(kernel, form, *tile[:3], block_r, *tile[3:]) for form, tile in _tiles(problem, device)]
        if kernel == "fwd":
            found += [replace(config, single=True) for config in found if not problem.wide]
    else:
        found = list(_skinny(kernel, problem, device))
    if 100 <= device.arch < 120:
        # left alone, ptxas 12.9 stops at 80 or 128 registers there and spills one or two (Triton 3.6)
        found = [replace(config, max_registers=255) for config in found]
    return tuple(config for config in found if not illegal(config, problem, device))
