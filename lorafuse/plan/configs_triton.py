"""Configurations of the Triton kernels: which exist, what is legal, which to take. Compile tests build every one.

How many rows a group has is known on the device only, so that the choice assumes that they are spread evenly. Tiles do
not cross groups: one that is higher than a group's rows computes some for nothing.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from lorafuse.formats.sizes import DECODED_IN_LOOP
from lorafuse.plan import cost
from lorafuse.plan.candidate import Candidate, KernelConfig, in_a_row, padded_rank
from lorafuse.plan.devices import DeviceSpec
from lorafuse.plan.problem import Problem

__all__ = ["MOST_PACKED_ROWS", "MOST_SIBLINGS", "best", "candidates", "illegal", "operator_candidates", "shared_memory"]

# a kernel, its problem and the GPU: its configuration, None where it has none
Pick = Callable[[str, Problem, DeviceSpec], KernelConfig | None]
# block_m, block_n, block_k, stages, warps
_Tile = tuple[int, int, int, int, int]
# how operands are read: TMA with accumulators in registers (sm_90) or tensor memory (sm_100), pointers on older GPUs;
# element by element where rows are misaligned. That and fp32, which multiplies on the CUDA cores, need registers
_TMA, _TMA_TENSOR_MEMORY, _POINTER, _MISALIGNED, _FP32, _MISALIGNED_FP32 = range(6)
# tiles of dense matmuls, best first where all fill the GPU. Those of sm_90 were measured on an H200
# (docs/performance.md, 2026-11-26), the others chosen by what compiles without spills (Triton 3.6)
_DENSE: dict[int, tuple[_Tile, ...]] = {
    _TMA: ((128, 256, 64, 4, 8), (128, 256, 64, 3, 8), (128, 128, 64, 4, 8), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)),
    _TMA_TENSOR_MEMORY: ((128, 256, 64, 3, 8), (128, 128, 64, 3, 8), (64, 128, 64, 4, 8), (64, 64, 64, 4, 8)),
    _POINTER: ((128, 128, 32, 4, 8), (64, 128, 32, 4, 4), (64, 64, 32, 4, 4)),
    _MISALIGNED: ((64, 64, 32, 3, 8), (32, 64, 32, 3, 8)),
    _FP32: ((64, 64, 32, 3, 8), (32, 64, 32, 3, 8)),
    _MISALIGNED_FP32: ((32, 64, 32, 2, 8),),
}
# the same of ragged matmuls, by what compiles without spills (Triton 3.6, 2026-11-25); no speed was measured
_RAGGED: dict[int, tuple[_Tile, ...]] = {
    _TMA: ((128, 256, 64, 3, 8), (128, 128, 64, 4, 8), (64, 256, 64, 3, 8), (64, 128, 64, 4, 8)),
    _TMA_TENSOR_MEMORY: ((128, 256, 64, 3, 8), (128, 128, 64, 3, 8), (64, 256, 64, 3, 8), (64, 128, 64, 4, 8)),
    # only sm_80 has the shared memory for the first
    _POINTER: ((128, 128, 64, 3, 8), (128, 128, 32, 4, 8), (64, 128, 64, 3, 8)),
    _MISALIGNED: ((32, 64, 32, 3, 8), (16, 64, 32, 3, 4)),
    _FP32: ((32, 64, 32, 2, 8), (16, 64, 32, 2, 8)),
    _MISALIGNED_FP32: ((32, 64, 32, 2, 8), (16, 64, 32, 2, 8)),
}
# for groups of a few rows, which wait for their weights whatever the tile
_RAGGED_SHORT: tuple[_Tile, ...] = ((32, 64, 64, 3, 4), (16, 64, 64, 3, 4))
# of a sum with several masks, which is not to have fewer rows (Triton 3.6, 2026-11-29; no speed was measured)
_MASKED_SUM: dict[int, _Tile] = {_TMA: (64, 128, 64, 4, 8), _POINTER: (64, 128, 32, 4, 8)}
# of a main loop that decodes w: tiles of few rows, narrow ones for more programs; no speed was measured
_PACKED: tuple[_Tile, ...] = tuple((m, n, 64, 1, 4) for n in (64, 32) for m in (16, 32, 64))
# rows up to which it is a candidate. bitsandbytes 0.50 leaves its own such kernel from 16 to 64 rows on sm_90 on
MOST_PACKED_ROWS = 64
# ranks that a matmul takes at a time: at 64 the tiles of a and b no longer fit next to the pipeline's buffers
_MAX_BLOCK_R = 32
# fp32 accumulators in the registers of one thread, of 255: above this all shapes spilled
_MAX_ACCUMULATORS = 128
# the same with an activation's backward; with an activation too on sm_100, where accumulators come from tensor memory
# all at once, and after a loop over several rank tiles (Triton 3.6, 2026-11-25); and in a sum with several masks, where
# twice as many left 16 bytes in local memory (2026-11-29)
_MAX_ACTIVATED = 64
# layers of one launch, each of which has a main loop of its own in the kernel; quantized weights are decoded one at a
# time, and have a launch each
MOST_SIBLINGS = 4
# left alone, ptxas 12.9 stops at 64, 80 or 128 registers and spills one or two (Triton 3.6): kernels of ragged rows
# and with an activation, and all where accumulators come from tensor memory; and aligned dx in fp32, where two blocks
# of 8 warps have 128 each
_MAX_REGISTERS, _MAX_REGISTERS_DX = 255, 128


def shared_memory(config: KernelConfig, problem: Problem) -> int:
    """Bytes of shared memory that a program needs, at most: the pipeline's buffers, and staging of stores and ranks."""
    c, itemsize = config, problem.itemsize
    ranks = (c.block_m + c.block_n) * c.block_r * itemsize
    if c.kernel == "matmul":
        # stores through a descriptor are staged in halves
        staging = c.block_m * c.block_n // 2 * itemsize if c.form == "tma" else 0
        if problem.epilogue and problem.gradients and c.form == "tma":
            # du of gate and up; pointers leave the pipeline's buffers to it
            staging = 2 * c.block_m * c.block_n * itemsize
        pipeline = c.stages * (c.block_m + c.block_n) * c.block_k * itemsize
        # tiles of the ranks take the place of the pipeline's buffers, or lie next to those that pointers fill
        return (max(pipeline, 2 * ranks) if c.form == "tma" else pipeline + 2 * ranks) + staging + 1024
    if c.kernel == "packed":
        # a tile of x and one of w, or of xa and b, which may be fp32
        return (c.block_m + c.block_n) * max(c.block_k * itemsize, c.block_r * 4) + 1024
    if c.kernel == "project":
        # a may be fp32, and a masked x passes through shared memory once more
        return c.stages * (c.block_m * itemsize + c.block_r * 4) * c.block_k + c.block_m * c.block_k * 4
    if c.kernel in ("project_outer", "outer"):
        # dy is staged as it is and transposed, with the partial of dyb in fp32
        return (c.stages + 2) * c.block_m * c.block_n * itemsize + 2 * ranks + c.block_m * c.block_r * 4
    return 0


def illegal(config: KernelConfig, problem: Problem, device: DeviceSpec) -> str:
    """Why a configuration cannot run a problem on a device; "" when it can. The one statement of what is legal."""
    c, tensor_memory = config, device.features.has_tensor_memory
    sizes = [s for s in (c.block_m, c.block_n, c.block_k, c.block_r) if s]
    if any(size & (size - 1) for size in sizes) or (c.block_r and c.block_r < 16):
        return f"block sizes {sizes} must be powers of two, and of the rank at least 16"
    if c.form == "tma":
        if device.arch < 90:
            return f"TMA needs sm_90, {device.name} is sm_{device.arch}"
        if problem.itemsize != 2:
            return f"the TMA form is for 16-bit dtypes, not {problem.dtype}"
        if problem.is_misaligned:
            return "TMA needs rows that start on 16-byte boundaries"
    is_matmul = c.kernel in ("matmul", "packed")
    if c.kernel == "packed":
        if problem.itemsize != 2:
            return f"a main loop that decodes is for 16-bit dtypes, not {problem.dtype}"
        if problem.is_misaligned and c.block_m * c.block_n > 32 * 32:
            # Triton 3.6, sm_80 and sm_90, 2026-11-29
            return "tiles of more than 32 x 32 over misaligned rows leave 16 to 64 bytes of a thread in local memory"
    accumulators = c.block_m * c.block_n if is_matmul else max(c.block_m, c.block_n) * c.block_r
    if is_matmul and problem.gradients and problem.dropout:
        # the masked low-rank product has accumulators of its own
        accumulators *= 2
    activates = is_matmul and bool(problem.epilogue)
    tight = activates and (bool(problem.gradients) or tensor_memory or c.block_r < problem.R)
    tight = tight or (is_matmul and _sums_masked(problem))
    if accumulators > (_MAX_ACTIVATED if tight else _MAX_ACCUMULATORS) * 32 * c.warps:
        return f"{accumulators} accumulators do not fit the registers of {c.warps} warps"
    if is_matmul and _sums_masked(problem) and problem.itemsize == 4:
        return "a sum with several masks leaves 32 bytes of a thread in local memory in fp32"
    if tensor_memory and problem.is_misaligned and is_matmul and problem.gradients and problem.siblings > 1:
        return "on sm_100 a sum over misaligned rows leaves 24 to 200 bytes of a thread in local memory"
    # sums over rows with masks are those of many adapters
    is_masked_sum = c.kernel == "outer" and problem.is_ragged and problem.dropout
    if tensor_memory and problem.is_misaligned and is_masked_sum and c.block_n > 64:
        return "on sm_100 a masked sum over misaligned rows leaves 176 bytes of 128 columns in local memory"
    if activates and problem.gradients and tensor_memory and c.block_n > 128:
        return "on sm_100 the backward of interleaved gate and up leaves 16 bytes of 256 columns in local memory"
    needed = shared_memory(c, problem)
    if needed > device.smem_per_block:
        return f"{needed} bytes of shared memory are more than the {device.smem_per_block} of {device.name}"
    return ""


def candidates(kernel: str, problem: Problem, device: DeviceSpec) -> tuple[KernelConfig, ...]:
    """The legal configurations of a kernel for a problem, best first where all fill the GPU."""
    if kernel == "reduce":
        return (KernelConfig("reduce", "pointer", 0, 1024, 0, 0, 1, 4),)
    if kernel == "matmul":
        configs = _matmuls(problem, device)
    elif kernel == "packed":
        block_r = min(padded_rank(problem.R), 16 if problem.wide else _MAX_BLOCK_R)
        configs = (KernelConfig("packed", "pointer", *tile[:3], block_r, *tile[3:]) for tile in _PACKED)
    else:
        configs = (_ragged_skinny if problem.is_ragged else _skinny)(kernel, problem, device)
    registers = 0
    if problem.is_ragged or problem.epilogue or device.features.has_tensor_memory or kernel == "packed":
        registers = _MAX_REGISTERS
    elif kernel == "matmul" and problem.gradients and problem.itemsize == 4:
        registers = 0 if problem.dropout or problem.is_misaligned else _MAX_REGISTERS_DX
    limited = (replace(config, max_registers=registers) for config in configs)
    return tuple(config for config in limited if not illegal(config, problem, device))


def _matmuls(problem: Problem, device: DeviceSpec) -> Iterator[KernelConfig]:
    # fp32 rank tiles of 16 take the shared memory of 32 in 16 bits
    small = problem.itemsize == 4 or problem.wide or problem.is_misaligned
    block_r = min(padded_rank(problem.R), 16 if small else _MAX_BLOCK_R)
    if problem.itemsize == 4:
        read = _MISALIGNED_FP32 if problem.is_misaligned else _FP32
    elif problem.is_misaligned:
        read = _MISALIGNED
    elif device.features.has_tma:
        read = _TMA_TENSOR_MEMORY if device.features.has_tensor_memory else _TMA
    else:
        read = _POINTER
    form = "tma" if read in (_TMA, _TMA_TENSOR_MEMORY) else "pointer"
    tiles = [(form, tile) for tile in (_RAGGED if problem.is_ragged else _DENSE)[read]]
    if _sums_masked(problem) and read in _MASKED_SUM:
        tiles.insert(0, (form, _MASKED_SUM[read]))
    if problem.is_ragged and read in (_TMA, _TMA_TENSOR_MEMORY, _POINTER):
        tiles += [("pointer", tile) for tile in _RAGGED_SHORT]
    for form, tile in tiles:
        yield KernelConfig("matmul", form, *tile[:3], block_r, *tile[3:])


def _sums_masked(problem: Problem) -> bool:
    """Whether a matmul sums low-rank products of siblings, each with a mask of its own."""
    return problem.siblings > 1 and problem.dropout and bool(problem.gradients)


def _skinny(kernel: str, problem: Problem, device: DeviceSpec) -> Iterator[KernelConfig]:
    """Kernels of dense rows that are memory-bound, so that tiles are chosen for how many programs they give."""
    small = problem.itemsize == 4 or problem.is_misaligned
    rank = padded_rank(problem.R)
    if kernel == "project":
        # x is read once for each rank tile: all ranks in one where shared memory holds them
        ranks = {min(rank, 64 if small else 256), min(rank, 64)}
        if not small and rank <= 32:
            # 27 us where 64 rows in steps of 64 took 43 (8192 x 4096, R 16, H200, 2026-11-26)
            yield KernelConfig("project", "pointer", 32, 0, 128, rank, 4, 4)
        for block_m, block_r in itertools.product((64, 32, 16), sorted(ranks)):
            if block_m == 16 and block_r > 32:
                continue
            block_k = 32 if small or block_r == 256 else 64
            yield KernelConfig("project", "pointer", block_m, 0, block_k, block_r, 3, 8 if small or block_r > 64 else 4)
        return
    # products with an fp32 xa or dyb hold fp32 copies of their other operand
    small = small or problem.wide
    columns = problem.N if kernel == "project_outer" else problem.K
    block_m, block_r = (32, min(rank, 16)) if small else (64, min(rank, 64))
    for block_n in (64,) if small else (64, 128, 256):
        programs = -(-columns // block_n) * -(-problem.R // block_r)
        # a wide program keeps an SM's loads in flight alone, narrow ones in pairs
        splits = max(1, min(device.sms * (2 if block_n < 256 else 1) // programs, -(-problem.M // block_m)))
        warps = 4 if block_n == 64 and not small else 8
        yield KernelConfig(kernel, "pointer", block_m, block_n, 0, block_r, 3, warps, splits=splits)


def _ragged_skinny(kernel: str, problem: Problem, device: DeviceSpec) -> Iterator[KernelConfig]:
    """project and outer of ragged rows; they have no project_outer."""
    half, rank = problem.itemsize == 2, padded_rank(problem.R)
    if kernel == "project":
        block_k, warps = (64, 4) if half else (32, 8)
        for block_m in (64, 32, 16):
            if block_m > 16 or rank <= 32:
                yield KernelConfig("project", "pointer", block_m, 0, block_k, min(rank, 64), 3, warps)
    elif kernel == "outer":
        block_m, block_r = (64, min(rank, 64)) if half else (32, 16)
        for block_n in (128, 64) if half else (64,):
            yield KernelConfig("outer", "pointer", block_m, block_n, 0, block_r, 3, 8)


def best(kernel: str, problem: Problem, device: DeviceSpec) -> KernelConfig | None:
    """The candidate with the least modelled time, None where there is none."""

    def order(config: KernelConfig) -> tuple[float, ...]:
        if not problem.is_ragged or kernel == "matmul":
            seconds = cost.kernel_seconds(config, problem, device)
            # where reading the weights of many groups is the bound, the tiles that compute least
            return seconds, cost.tile_seconds(config, problem, device) if problem.is_ragged else 0.0
        if kernel == "project":
            return problem.padded_rows(config.block_m), config.block_m
        # wide blocks, unless they are too few to occupy the GPU
        idle = -(-problem.N // config.block_n) * problem.groups < device.sms
        return (config.block_n if idle else -config.block_n,)

    return min(candidates(kernel, problem, device), key=order, default=None)


def by_tickets(kernel: str, problem: Problem, device: DeviceSpec) -> KernelConfig | None:
    """The same, but tiles by ticket where a kernel does that: `override(triton_config=by_tickets)`.

    No plan takes them by itself: nothing was measured.
    """
    config = best(kernel, problem, device)
    if config is None or (config.kernel, config.form) != ("matmul", "tma"):
        return config
    return config if problem.siblings > 1 or problem.epilogue else replace(config, tickets=True)


def operator_candidates(operator: Sequence[Problem], device: DeviceSpec, pick: Pick = best) -> Iterator[Candidate]:
    """Every candidate for an operator whose dtype and format the kernels run; `pick` chooses configurations."""
    p = operator[0]
    if p.is_ragged:
        kernels = ["project", "matmul", "outer"] if p.gradients else ["project", "matmul"]
        configs = tuple(_picked(kernels, problem, device, pick) for problem in operator)
        matmuls = [config for each in configs for config in each if config.kernel == "matmul"]
        yield Candidate("triton", "ragged", configs, cost.ragged(operator, matmuls, device))
        return
    if p.gradients:
        sums = {"dx": "matmul", "da": "outer"}
        name, kernels = "one_pass_backward", ["project_outer", "reduce"]
        kernels += [sums[gradient] for gradient in sums if gradient in p.gradients]
    else:
        name, kernels = "two_kernel", ["project", "matmul"]
    # a launch for each layer, or one for all and for the activation that follows
    is_group = p.siblings > 1 or p.epilogue
    forms = [(name, replace(p, siblings=1, epilogue="") if is_group else p, kernels)]
    if is_group and p.siblings <= MOST_SIBLINGS and p.format == "dense":
        forms.append(("siblings", p, kernels))
    if p.packed and p.M <= MOST_PACKED_ROWS and p.format in DECODED_IN_LOOP and "matmul" in kernels:
        forms.append(("packed", p, ["packed" if kernel == "matmul" else kernel for kernel in kernels]))
    for name, problem, kernels in forms:
        picked = _picked(kernels, problem, device, pick)
        if len(picked) == len(kernels):
            steps = [cost.step(config, problem, device) for config in picked if config.kernel != "reduce"]
            yield Candidate("triton", name, (picked,), in_a_row(steps))


def _picked(kernels: Sequence[str], problem: Problem, device: DeviceSpec, pick: Pick) -> tuple[KernelConfig, ...]:
    configs = (pick(kernel, problem, device) for kernel in kernels)
    return tuple(config for config in configs if config is not None)
