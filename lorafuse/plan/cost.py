"""A roofline of what running a problem costs. It ranks candidates; it does not measure, and its users print "model".

A GEMM costs max(waves × tile time at sustained FLOP/s, bytes / bandwidth); everything else is passes over x, y, dy or
dx at the bandwidth that copies sustain. Rows of groups are spread evenly over those that can have any.
docs/performance.md compares the model with measurements on an H200.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from lorafuse.formats.sizes import DECODED_IN_LOOP, stored_bytes
from lorafuse.plan.candidate import Candidate, KernelConfig, Part, in_a_row, padded_rank
from lorafuse.plan.devices import DeviceSpec
from lorafuse.plan.problem import Problem

__all__ = [
    "aten",
    "decoding",
    "down_partials",
    "down_xa",
    "frozen",
    "kernel_seconds",
    "ragged",
    "step",
    "tile_seconds",
]


# what a tile reaches of the sustained rate, by its area (assumed, after published ablations of Hopper kernels)
_TILE = {128 * 256: 1.0, 128 * 128: 0.92, 64 * 128: 0.8, 64 * 64: 0.65, 32 * 64: 0.45, 16 * 64: 0.25, 16 * 32: 0.15}
# the same where a warp multiplies by itself (mma.sync), which needs less from shared memory (assumed)
_WARP_TILE = {
    128 * 256: 1.0, 128 * 128: 0.97, 64 * 128: 0.85, 64 * 64: 0.7, 32 * 64: 0.5, 16 * 64: 0.3, 16 * 32: 0.2,
}  # fmt: skip
_CUBLAS_TILES = ((128, 256), (128, 128), (64, 128), (64, 64), (32, 64))
# what a main loop reaches of cuBLAS: Triton's with descriptors and ours in CUDA (H200, 2026-11-26); pointers feed
# Hopper's tensor cores through cp.async and keep up on older GPUs (assumed)
_FORM = {"tma": 0.94, "wgmma": 1.0, "pointer": 0.97}
_POINTER_ON_HOPPER = 0.85
# what Triton's main loop reaches over gathered rows and many weights, of what it reaches over one matrix (an H200 at
# 128 experts, 2026-11-26)
_GATHERED = 0.78
# skinny (rank-R) GEMMs reach 2.7 to 3.2 of the 4.3 TB/s of a copy, in any implementation (H200)
_SKINNY = 0.7
# bytes/s that one SM streams: 64 B a clock at 1.7 GHz
_SM_BANDWIDTH = 110e9
# bytes that L2 gives in a clock, of all SMs together: those that 128x256 tiles without a cluster ask for, which lose
# nothing by it (H200, 2026-11-26; published models say 6154); and dense FLOPs of one SM
_L2_BYTES, _SM_FLOPS = 6336, 4096
# bytes/s of one SM's shared memory; where da or db is summed, x or dy passes through it twice, and so do dyb or xa, 64
# rows of 64 ranks at a time (model, csrc/kernels/adapter_grads_sm90.cuh; not measured)
_SHARED_BANDWIDTH, _RIGHT_BYTES = 128 * 1.7e9, 64 * 64 * 2
# bytes/s that one SM streams where others run tiles, and what uneven ends add to it (model: 50 to 90e9; not measured)
_SIDE_BANDWIDTH, _UNEVEN = 75e9, 1.15
# Philox 4x32-10: 100 integer operations give four words; an SM does 64 a clock at 1.7 GHz
_MASK_PER_ELEMENT, _SM_INTEGERS = 25, 64 * 1.7e9
# instructions of one SM in a clock of 1.7 GHz
_SM_INSTRUCTIONS = 128 * 1.7e9
# in torch's integer operations a mask is about 40 operators that read and write int64 (counted in lorafuse.philox)
_MASK_PASSES, _MASK_BYTES = 40, 16
# rows of a tile of torch's grouped_mm (CUTLASS; assumed)
_GROUPED_TILE = 128
# of a tile's time, sixteen more columns of B (0.0625 by FLOPs, 0.156 by what shared memory gives; between them, not
# measured), and seconds from the release of a flag to a box that TMA has loaded (assumed)
_MORE_COLUMNS, _FLAG = 0.1, 1.5e-6
# what waiting for products of h costs a tile's epilogue, and eight loads in flight of a thread (assumed)
_EPILOGUE, _LOAD = 0.2e-6, 0.7e-6
# seconds until the host has read where groups end and the GPU has work again (assumed)
_READ_ON_HOST = 20e-6


def _tiles(
    M: int, N: int, K: int, tile: tuple[int, int], efficiency: float, problem: Problem, device: DeviceSpec
) -> float:
    """Seconds of an `[M, K] x [K, N]` product in tiles, at `efficiency` of what such tiles reach."""
    reached = _TILE if device.features.has_warpgroup_mma else _WARP_TILE
    rate = device.sustained_flops / device.sms * efficiency * reached[tile[0] * tile[1]]
    if problem.itemsize == 4:
        # fp32 without tf32 runs on the CUDA cores
        rate *= device.fp32_flops / device.bf16_flops
    waves = math.ceil(math.ceil(M / tile[0]) * math.ceil(N / tile[1]) / device.sms)
    return waves * 2 * tile[0] * tile[1] * K / rate


def _bytes(problem: Problem, device: DeviceSpec, rank: int = 0) -> float:
    """Seconds to read operands, weights of groups that have rows and `rank` more columns, and to write the result."""
    read, written = problem.read + rank, problem.written
    moved = problem.M * (read + written) + problem.active * read * written
    return moved * problem.itemsize / device.sustained_bandwidth


def _base(problem: Problem, device: DeviceSpec) -> float:
    """Seconds of the base product in cuBLAS, or in torch's grouped_mm."""
    rows = problem.padded_rows(_GROUPED_TILE) if problem.is_ragged else problem.M
    sizes = rows, problem.written, problem.read
    return max(min(_tiles(*sizes, tile, 1.0, problem, device) for tile in _CUBLAS_TILES), _bytes(problem, device))


def _pass(elements: int, problem: Problem, device: DeviceSpec, programs: int = 1 << 30) -> float:
    """Seconds to read or write so many elements, by so many programs."""
    return elements * problem.itemsize / min(device.sustained_bandwidth, programs * _SM_BANDWIDTH)


def _mask(problem: Problem, device: DeviceSpec) -> float:
    """Seconds of one dropout mask in registers; four neighbours share the work where K is a multiple of 4."""
    if not problem.dropout:
        return 0.0
    operations = problem.M * problem.K * _MASK_PER_ELEMENT * (1 if problem.K % 4 == 0 else 4)
    return operations / (device.sms * _SM_INTEGERS)


def tile_seconds(config: KernelConfig, problem: Problem, device: DeviceSpec) -> float:
    """Seconds of the tiles of a matmul, whatever their bytes."""
    c, efficiency, rows = config, _FORM[config.form], problem.M
    if c.form == "pointer" and device.features.has_warpgroup_mma and problem.itemsize == 2:
        efficiency *= _POINTER_ON_HOPPER
    if problem.is_ragged:
        efficiency, rows = efficiency * _GATHERED, problem.padded_rows(c.block_m)
    if c.form == "wgmma":
        # a cluster computes whole row blocks
        height = c.block_m * c.cluster
        rows = -(-rows // height) * height
        # operands of one step of the reduction, against what L2 gives while the tensor cores work on it
        operands = (c.block_m + c.block_n // c.cluster) * c.block_k * 2 * device.sms
        clocks = 2 * c.block_m * c.block_n * c.block_k / _SM_FLOPS
        efficiency *= min(1.0, _L2_BYTES / (operands / clocks))
    if c.sum_blocks:
        left = device.sms - c.sum_blocks
        device = replace(device, sms=left, sustained_flops=device.sustained_flops * left / device.sms)
    sizes = rows, problem.written, problem.read + padded_rank(problem.R)
    return _tiles(*sizes, (c.block_m, c.block_n), efficiency, problem, device)


def kernel_seconds(config: KernelConfig, problem: Problem, device: DeviceSpec) -> float:
    """Seconds of one kernel, and of the launch that reads its partial sums."""
    c, (M, N, K, R) = config, (problem.M, problem.N, problem.K, problem.R)
    if c.kernel == "reduce":
        return 0.0
    if c.kernel == "matmul":
        seconds = max(tile_seconds(c, problem, device), _bytes(problem, device, padded_rank(R)))
        if c.splits > 1 and not problem.gradients:
            return _split(c, problem, device)
        if c.xa_in_tiles:
            return seconds + _xa_in_tiles(c, problem, device)
        if c.fused_forward or c.fused_backward:
            return seconds + _one_launch(c, seconds, problem, device)
        if c.sum_blocks:
            # column blocks of dy for db, of x for da: the busiest block sums several
            sums = [size for name, size in (("db", N), ("da", K)) if name in problem.gradients]
            blocks = -(-sum(-(-size // c.block_n) for size in sums) // c.sum_blocks)
            stage = 2 * (c.block_n * c.block_k * problem.itemsize + _RIGHT_BYTES) / _SHARED_BANDWIDTH
            return max(seconds, blocks * -(-M // c.block_k) * stage)
        return seconds + (_mask(problem, device) if problem.gradients else 0.0)
    if c.kernel == "packed":
        return _packed(c, problem, device) + (_mask(problem, device) if problem.gradients else 0.0)
    columns = K if c.kernel == "outer" else problem.read
    rank_tiles = math.ceil(R / c.block_r)
    programs = math.ceil(M / c.block_m) if c.kernel == "project" else math.ceil(columns / c.block_n) * c.splits
    masked = c.kernel == "outer" or not problem.gradients
    partials = 0 if c.kernel == "project" else c.splits * columns
    # of dyb, one for each block of columns
    partials += math.ceil(N / c.block_n) * M if c.kernel == "project_outer" else 0
    return (
        _pass(M * columns * rank_tiles, problem, device, programs * rank_tiles) / _SKINNY
        + (rank_tiles * _mask(problem, device) if masked else 0.0)
        # fp32 partials are written and read
        + 2 * 4 * R * partials / device.sustained_bandwidth
    )


def _packed(config: KernelConfig, problem: Problem, device: DeviceSpec) -> float:
    """Seconds of a main loop that decodes its tiles: of memory, of what an SM streams, or of its instructions."""
    c, p = config, problem
    stored = stored_bytes(p.format, p.N, p.K)
    moved = stored + p.M * (p.read + p.written + padded_rank(p.R)) * p.itemsize
    waves = math.ceil(math.ceil(p.M / c.block_m) * math.ceil(p.written / c.block_n) / device.sms)
    streamed = (c.block_m * p.itemsize + c.block_n * stored / (p.N * p.K)) * p.read / _SM_BANDWIDTH
    decoded = c.block_n * p.read * DECODED_IN_LOOP[p.format] / _SM_INSTRUCTIONS
    of_tiles = max(waves * streamed, waves * decoded + tile_seconds(c, p, device))
    return max(of_tiles, moved / device.sustained_bandwidth)


def _split(config: KernelConfig, problem: Problem, device: DeviceSpec) -> float:
    """Seconds of tiles whose K the blocks of a cluster divide, and of adding up their parts in shared memory."""
    part = replace(problem, K=math.ceil(problem.K / config.splits), R=0)
    tiles = tile_seconds(replace(config, splits=1), part, device)
    more = padded_rank(problem.R) / 16 * _MORE_COLUMNS * 256 / config.block_n
    # each reads its rows of all parts
    added = config.block_m * config.block_n * 4 / _SIDE_BANDWIDTH + _FLAG
    return max(tiles * (1 + more), _bytes(problem, device, padded_rank(problem.R))) + added


def _xa_in_tiles(config: KernelConfig, problem: Problem, device: DeviceSpec) -> float:
    """What xa adds to the tiles of the first columns of y, which come first: columns, and then a wait for its flag."""
    rows = math.ceil(problem.M / config.block_m)
    tiles = rows * math.ceil(problem.N / config.block_n)
    tile = tile_seconds(config, problem, device) / math.ceil(tiles / device.sms)
    return math.ceil(rows / device.sms) * (tile * _MORE_COLUMNS * padded_rank(problem.R) / 16 + _FLAG)


def down_partials(config: KernelConfig, M: int, R: int, inner: int) -> int:
    """Bytes of the partial sums of ha `[M, R]`, one for each column of tiles of h `[M, inner]`."""
    return 4 * math.ceil(inner / (config.block_n // 2)) * M * padded_rank(R)


def down_xa(config: KernelConfig, M: int, R: int, inner: int, device: DeviceSpec) -> Part:
    """ha in the tiles of h, whose operand passes shared memory once for 16 ranks, and its partial sums in a launch."""
    columns, ranks = config.block_n // 2, padded_rank(R)
    parts = math.ceil(inner / columns)
    waves = math.ceil(math.ceil(M / config.block_m) * parts / device.sms)
    of_tiles = waves * (config.block_m * columns * 2 * ranks / 16 / _SHARED_BANDWIDTH + _EPILOGUE)
    moved = down_partials(config, M, R, inner) / device.sustained_bandwidth
    return Part("ha of down", of_tiles + max(moved, math.ceil(parts / 8) * _LOAD))


def _one_launch(config: KernelConfig, seconds: float, problem: Problem, device: DeviceSpec) -> float:
    """What xa, or dyb, da and db add to the tiles: what SMs idle in the last wave have no time for, on all."""
    tiles = math.ceil(problem.M / config.block_m) * math.ceil(problem.written / config.block_n)
    waves = math.ceil(tiles / device.sms)
    free = (waves * device.sms - tiles) * seconds / waves
    passes = {"da": problem.K, "db": problem.N}
    read = problem.read + sum(size for name, size in passes.items() if name in problem.gradients)
    streamed = problem.M * read * problem.itemsize / _SIDE_BANDWIDTH
    return max(0.0, streamed - free) * _UNEVEN / device.sms + _FLAG


_ONE_LAUNCH = ("project", "matmul", "packed")
_FORWARD = {"project": "xa = x aᵀ", "matmul": "y = x wᵀ + xa bᵀ", "packed": "y = x wᵀ + xa bᵀ, w decoded"}
_BACKWARD = {
    "project": "dyb = dy b",
    "project_outer": "dyb, db from one read of dy",
    "matmul": "dx = dy w + dyb a",
    "packed": "dx = dy w + dyb a, w decoded",
    "outer": "da = dybᵀ x",
}


def step(config: KernelConfig, problem: Problem, device: DeviceSpec) -> Part:
    """A kernel of dense rows, with the launch that reads its partial sums."""
    name = (_BACKWARD if problem.gradients else _FORWARD)[config.kernel]
    return Part(name, kernel_seconds(config, problem, device), 1 if config.kernel in _ONE_LAUNCH else 2)


def _rows(
    name: str, elements: int, problem: Problem, device: DeviceSpec, launches: int = 1, efficiency: float = 1.0
) -> Part:
    """Elements of x's dtype read or written, at `efficiency` of a copy's rate."""
    return Part(name, _pass(elements, problem, device) / efficiency, launches)


def _cast(problem: Problem, device: DeviceSpec, launches: int, of: str = "") -> Part:
    """The factors of all groups in the base's dtype: a kernel for each, and one for the scale."""
    moved = problem.groups * (problem.N + problem.K) * problem.R * (4 + problem.itemsize)
    return Part(f"factors{of and ' of '}{of} cast", moved / device.sustained_bandwidth, launches)


def _aten_dense(problem: Problem, device: DeviceSpec, base_first: bool) -> list[Part]:
    """The eager backend: the low-rank product with the base product accumulated onto it, whose read of y is hidden; or
    the base product first, which needs no kernel for the scale but reads and writes y again.
    """
    over_k, over_n = problem.M * problem.K, problem.M * problem.N
    gradients, base = problem.gradients, _base(problem, device)
    parts = [_cast(problem, device, 2 if base_first else 3)]
    mask = []
    if problem.dropout:
        moved = over_k * _MASK_BYTES * _MASK_PASSES
        mask = [Part("dropout mask in torch operators", moved / device.sustained_bandwidth)]
    if not gradients:
        parts += [*mask, _rows("xa = x aᵀ", over_k, problem, device, efficiency=_SKINNY)]
        if base_first:
            added = _rows("y += xa bᵀ", 2 * over_n, problem, device, efficiency=_SKINNY)
            return [*parts, Part("y = x wᵀ", base), added]
        return [*parts, _rows("y = xa bᵀ", over_n, problem, device, efficiency=_SKINNY), Part("y += x wᵀ", base)]
    if "dx" in gradients or "da" in gradients:
        parts += [_rows("dyb = dy b", over_n, problem, device, efficiency=_SKINNY), *mask]
    if "dx" in gradients and base_first:
        parts += [Part("dx = dy w", base), _rows("dx += dyb a", 2 * over_k, problem, device, efficiency=_SKINNY)]
    elif "dx" in gradients:
        parts += [_rows("dx = dyb a", over_k, problem, device, efficiency=_SKINNY), Part("dx += dy w", base)]
    sums = ("da", "da = dybᵀ x", over_k), ("db", "db = dyᵀ xa", over_n), ("dbias", "dbias = Σ dy", over_n)
    return parts + [
        _rows(name, elements, problem, device, efficiency=_SKINNY) for of, name, elements in sums if of in gradients
    ]


def _around(problems: Sequence[Problem], device: DeviceSpec, has_adapters: bool = True) -> list[Part]:
    """What ATen runs between and after the projections of ragged rows: gathers, activation, weighted sums."""
    p = problems[0]
    if len(problems) == 1:
        return [_rows("rows of no group zeroed", 2 * p.M * p.written, p, device)]
    S, H, I, gated = p.M, p.K, problems[1].K, p.N != problems[1].K  # noqa: E741
    sum_of_choices = S * H + S // p.choices * H
    # (elements, launches) of act(gate), times up; of dh up, act's backward, dh act(gate) and both halves of du together
    activation, backward = ((5 * S * I, 2), (13 * S * I, 5)) if gated else ((2 * S * I, 1), (3 * S * I, 1))
    if not p.gradients:
        steps = [("gather x", 2 * S * H, 1), ("activation", *activation), ("weighted sum over k", sum_of_choices, 1)]
    else:
        steps = [("gather dout", 2 * S * H, 1), ("h again", *activation), ("router gradient", 4 * S * I, 2)]
        steps += [("dh times router weight", 2 * S * I, 1), ("activation's backward", *backward)]
        steps += [("gather x again", 2 * S * H, 1)] if has_adapters else []
        steps += [("sum over k of dx", sum_of_choices, 1)]
    return [_rows(name, elements, p, device, launches) for name, elements, launches in steps]


# of projections, by how many there are
_NAMES = {1: ("the layer",), 2: ("gate_up", "down")}


def _grouped(problem: Problem, of: str, device: DeviceSpec, loop: bool) -> Part:
    """The base product by torch's grouped_mm, or of one group that has rows after the other."""
    name = f"dx of {of}" if problem.gradients else of
    if not loop:
        return Part(name, _base(problem, device))
    groups = max(problem.active, 1)
    one = replace(problem, M=-(-problem.M // groups), groups=1, is_ragged=False)
    return Part(name, max(groups * _base(one, device), _bytes(problem, device)), groups)


def decoding(problems: Sequence[Problem], device: DeviceSpec) -> tuple[Part, ...]:
    """What any backend does to quantized weights before it multiplies: one read as they are stored, and one write in
    x's dtype. The same for all, and so without launches.
    """
    parts = []
    for p, of in zip(problems, _NAMES[len(problems)], strict=True):
        if p.format != "dense" and p.M and (not p.gradients or "dx" in p.gradients):
            moved = p.groups * (p.N * p.K * p.itemsize + stored_bytes(p.format, p.N, p.K))
            parts.append(Part(f"decode {p.format} of {of}", moved / device.sustained_bandwidth, 0))
    return tuple(parts)


def frozen(problems: Sequence[Problem], device: DeviceSpec) -> Candidate:
    """The operator without adapters, in cuBLAS and ATen, quantized weights decoded first: what LoRA tax is over."""
    p = problems[0]
    if not p.is_ragged:
        parts = [Part("dx = dy w" if p.gradients else "y = x wᵀ", _base(p, device))]
    else:
        loop = not device.features.has_grouped_mm
        parts = _around(problems, device, has_adapters=False)
        parts += [_grouped(p, of, device, loop) for p, of in zip(problems, _NAMES[len(problems)], strict=True)]
    return Candidate("eager", "frozen", (), decoding(problems, device) + in_a_row(parts))


def aten(problems: Sequence[Problem], kernel: str, device: DeviceSpec) -> tuple[Part, ...]:
    """The eager backend's "aten_beta1" and "aten_addmm", or over ragged rows "grouped_mm" and "loop"."""
    if not problems[0].is_ragged:
        return in_a_row(_aten_dense(problems[0], device, kernel == "aten_addmm"))
    loop = kernel == "loop"
    parts = [Part("waiting for where groups end", _READ_ON_HOST)] if loop else []
    parts += _around(problems, device)
    for p, of in zip(problems, _NAMES[len(problems)], strict=True):
        groups, (first, second) = p.active if loop else 1, ("dyb", "dyb a") if p.gradients else ("xa", "xa b")
        parts += [
            _cast(p, device, 2, of),
            _rows(f"{first} of {of}", p.M * p.read, p, device, groups),
            _grouped(p, of, device, loop),
            _rows(f"{second} of {of}", p.M * p.written, p, device, groups),
        ]
        # a loop accumulates the base product of a group onto its low-rank one
        parts += [] if loop else [_rows(f"sum of {of}", 3 * p.M * p.written, p, device)]
        parts += [_rows(f"da, db of {of}", p.M * (p.K + p.N), p, device, 2 * groups)] if p.gradients else []
    return in_a_row(parts)


def ragged(
    problems: Sequence[Problem], matmuls: Sequence[KernelConfig], device: DeviceSpec, gathered: bool = False
) -> tuple[Part, ...]:
    """Base and low-rank product in one kernel of ours for each projection.

    Triton's kernels gather and activate too. So do those of CUDA where `gathered`; they compute dyb and db together;
    around the others ATen runs the rest.
    """
    in_cuda = matmuls[0].form == "wgmma" and not gathered
    parts = _around(problems, device) if in_cuda or len(problems) == 1 else []
    for p, of, config in zip(problems, _NAMES[len(problems)], matmuls, strict=True):
        parts += [_cast(p, device, 2, of)] if in_cuda else []
        name = (f"dx of {of}" if p.gradients else of) + (", activation" if p.epilogue and not in_cuda else "")
        both = gathered and p.gradients
        narrow = ("dyb, db" if both else "dyb") if p.gradients else "xa"
        parts.append(_rows(f"{narrow} of {of}", p.M * p.read, p, device, efficiency=_SKINNY))
        parts.append(Part(name, kernel_seconds(config, p, device)))
        if both:
            parts.append(_rows(f"da of {of}", p.M * p.K, p, device, efficiency=_SKINNY))
        elif p.gradients:
            parts.append(_rows(f"da, db of {of}", p.M * (p.K + p.N), p, device, 2, _SKINNY))
    if len(problems) == 2 and not in_cuda:
        S, H, choices = problems[0].M, problems[0].K, problems[0].choices
        parts.append(_rows("sum over k", S * H + S // choices * H, problems[0], device))
    return in_a_row(parts)
