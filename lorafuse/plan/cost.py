"""A model of what each way to run a LoRA linear costs. It ranks; it does not measure, and its users print "model".

Products take waves of tiles at the rate that large products sustain, or the time of their bytes where that is longer;
everything else is passes over x, y, dy or dx at the bandwidth that copies sustain, and 2 us between dependent kernels.
At M 8192, K = N 4096, R 16, bf16 on an H200 it gives the rows that docs/performance.md compares with measurements.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorafuse.plan.config import KernelConfig, padded_rank
from lorafuse.plan.device import DeviceSpec
from lorafuse.plan.problem import Problem

__all__ = [
    "BASELINES",
    "SKINNY",
    "Part",
    "eager",
    "frozen",
    "full",
    "in_a_row",
    "kernel_seconds",
    "sum_seconds",
    "total",
    "triton_linear",
]


@dataclass(frozen=True)
class Part:
    """Modelled seconds of one step, and how many kernels it launches one after the other."""

    name: str
    seconds: float
    launches: int = 1


# between kernels that depend on each other, on the device (assumed; hopper launches overlap at best 2 to 4 us)
_GAP = 2e-6
# of the host for one launch: an ATen operator or one of ours in CUDA, a Triton kernel with its Python launcher (beside
# an H200, 2026-11-26: forward and backward of a patched layer of 16 x 512 x 512)
_HOST = {"aten": 12e-6, "triton": 60e-6}
# what a tile reaches of the sustained rate, by its area (assumed, after published ablations of Hopper kernels)
_TILE = {128 * 256: 1.0, 128 * 128: 0.92, 64 * 128: 0.8, 64 * 64: 0.65, 32 * 64: 0.45, 16 * 64: 0.25}
# the same where a warp multiplies by itself (mma.sync), which needs less from shared memory (assumed)
_WARP_TILE = {128 * 256: 1.0, 128 * 128: 0.97, 64 * 128: 0.85, 64 * 64: 0.7, 32 * 64: 0.5, 16 * 64: 0.3}
_CUBLAS_TILES = ((128, 256), (128, 128), (64, 128), (64, 64), (32, 64))
# what a main loop reaches of cuBLAS: Triton's with descriptors and ours in CUDA (H200, 2026-11-26); pointers feed
# Hopper's tensor cores through cp.async and keep up on older GPUs (assumed)
_FORM = {"tma": 0.94, "wgmma": 1.0, "pointer": 0.97}
_POINTER_ON_HOPPER = 0.85
# of a copy's bandwidth: products with the rank, whoever runs them, read or write at 2.7 to 3.2 of 4.3 TB/s (H200)
SKINNY = 0.7
# bytes/s that one SM streams: 64 B a clock at 1.7 GHz
_SM_BANDWIDTH = 110e9
# Philox 4x32-10: 100 integer operations give four words; an SM does 64 a clock at 1.7 GHz
_MASK_PER_ELEMENT, _SM_INTEGERS = 25, 64 * 1.7e9
# in torch's integer operations a mask is about 40 operators that read and write int64 (counted in lorafuse.philox)
_MASK_PASSES, _MASK_BYTES = 40, 16


def _product(
    M: int, N: int, K: int, tile: tuple[int, int], share: float, problem: Problem, device: DeviceSpec
) -> float:
    """Seconds of an `[M, K] x [K, N]` product in tiles, at `share` of what such tiles reach."""
    reached = _TILE if _has_wgmma(device) else _WARP_TILE
    rate = device.sustained_flops / device.sms * share * reached[tile[0] * tile[1]]
    if problem.itemsize == 4:
        # fp32 without tf32 runs on the CUDA cores
        rate *= device.fp32_flops / device.bf16_flops
    waves = math.ceil(math.ceil(M / tile[0]) * math.ceil(N / tile[1]) / device.sms)
    moved = (M * K + N * K + M * N) * problem.itemsize
    return max(waves * 2 * tile[0] * tile[1] * K / rate, moved / device.sustained_bandwidth)


def _cublas(M: int, N: int, K: int, problem: Problem, device: DeviceSpec) -> float:
    return min(_product(M, N, K, tile, 1.0, problem, device) for tile in _CUBLAS_TILES)


def _has_wgmma(device: DeviceSpec) -> bool:
    return 90 <= device.arch < 120


def _pass(elements: int, problem: Problem, device: DeviceSpec, programs: int = 1 << 30) -> float:
    """Seconds to read or write so many elements, by so many programs."""
    return elements * problem.itemsize / min(device.sustained_bandwidth, programs * _SM_BANDWIDTH)


def _mask(problem: Problem, device: DeviceSpec) -> float:
    """Seconds of one dropout mask in registers; four neighbours share the work where K is a multiple of 4."""
    if not problem.dropout:
        return 0.0
    operations = problem.M * problem.K * _MASK_PER_ELEMENT * (1 if problem.K % 4 == 0 else 4)
    return operations / (device.sms * _SM_INTEGERS)


def _aten_mask(problem: Problem, device: DeviceSpec) -> list[Part]:
    if not problem.dropout:
        return []
    moved = problem.M * problem.K * _MASK_BYTES * _MASK_PASSES
    return [Part("dropout mask in torch operators", moved / device.sustained_bandwidth)]


def total(parts: Sequence[Part]) -> float:
    """Seconds of all parts."""
    return math.fsum(part.seconds for part in parts)


def in_a_row(parts: list[Part], host: str) -> tuple[Part, ...]:
    """`parts` with the gaps between them, and the wait for a host that launches more slowly than they run."""
    launches = sum(part.launches for part in parts)
    waiting = launches * _HOST[host] - total(parts)
    if launches > 1:
        parts = [*parts, Part("launch gaps", (launches - 1) * _GAP)]
    return (*parts, Part("waiting for the host", waiting)) if waiting > 0 else tuple(parts)


def frozen(problem: Problem, device: DeviceSpec) -> tuple[Part, ...]:
    """The layer without an adapter: y forward, dx backward."""
    M, N, K = problem.M, problem.N, problem.K
    if problem.gradients:
        return in_a_row([Part("dx = dy w", _cublas(M, K, N, problem, device))], "aten")
    return in_a_row([Part("y = x wᵀ", _cublas(M, N, K, problem, device))], "aten")


def full(problem: Problem, device: DeviceSpec) -> tuple[Part, ...]:
    """The layer without an adapter, its weight trained: y forward, dx and dw backward."""
    if not problem.gradients:
        return frozen(problem, device)
    dw = Part("dw = dyᵀ x", _cublas(problem.N, problem.K, problem.M, problem, device))
    return in_a_row([Part("dx = dy w", _cublas(problem.M, problem.K, problem.N, problem, device)), dw], "aten")


def _passes(problem: Problem, device: DeviceSpec) -> tuple[float, float]:
    """Seconds of one pass over an [M, K] and over an [M, N] matrix."""
    return _pass(problem.M * problem.K, problem, device), _pass(problem.M * problem.N, problem, device)


def _products(problem: Problem, device: DeviceSpec) -> tuple[float, float]:
    """Seconds of a product with the rank that reads or writes an [M, K], or an [M, N] matrix."""
    over_k, over_n = _passes(problem, device)
    return over_k / SKINNY, over_n / SKINNY


def _cast(problem: Problem, device: DeviceSpec, launches: int) -> Part:
    """The factors in the base's dtype: a kernel for each, and one for the scale."""
    moved = (problem.N + problem.K) * problem.R * (4 + problem.itemsize)
    return Part("factors cast", moved / device.sustained_bandwidth, launches)


def eager(problem: Problem, device: DeviceSpec) -> tuple[Part, ...]:
    """Our eager backend: low-rank product first, base GEMM accumulated onto it, so that its read of y is hidden."""
    over_k, over_n = _products(problem, device)
    base = frozen(problem, device)[0].seconds
    mask = _aten_mask(problem, device)
    wanted = problem.gradients
    if not wanted:
        parts = [
            _cast(problem, device, 3),
            *mask,
            Part("xa = x aᵀ", over_k),
            Part("y = xa bᵀ", over_n),
            Part("y += x wᵀ", base),
        ]
        return in_a_row(parts, "aten")
    parts = [_cast(problem, device, 3)]
    parts += [Part("dyb = dy b", over_n), *mask] if "dx" in wanted or "da" in wanted else []
    if "dx" in wanted:
        parts += [Part("dx = dyb a", over_k), Part("dx += dy w", base)]
    if "da" in wanted:
        parts.append(Part("da = dybᵀ x", over_k))
    if "db" in wanted:
        parts.append(Part("db = dyᵀ xa", over_n))
    if "dbias" in wanted:
        parts.append(Part("dbias = Σ dy", over_n))
    return in_a_row(parts, "aten")


def _addmm(problem: Problem, device: DeviceSpec) -> tuple[Part, ...]:
    """GEMM and `addmm_` as Unsloth and others do: xa is not saved, and dy b is computed for da and for dx."""
    over_k, over_n = _products(problem, device)
    base = frozen(problem, device)[0]
    if not problem.gradients:
        return in_a_row([base, Part("xa = x aᵀ", over_k), Part("y.addmm_(xa, bᵀ)", 2 * over_n)], "aten")
    adapters = [Part("dy b", over_n), Part("da", over_k), Part("xa again", over_k), Part("db", over_n)]
    return in_a_row([*adapters, base, Part("dy b again", over_n), Part("dx.addmm_(dyb, a)", 2 * over_k)], "aten")


def _peft(problem: Problem, device: DeviceSpec) -> tuple[Part, ...]:
    """PEFT with adapters in the base's dtype, run by autograd; as shipped, with fp32 adapters, it moves more."""
    over_k, over_n = _passes(problem, device)
    skinny_k, skinny_n = _products(problem, device)
    base = frozen(problem, device)[0]
    if not problem.gradients:
        low = [Part("xa", skinny_k), Part("xa bᵀ", skinny_n), Part("times scale", 2 * over_n)]
        return in_a_row([base, *low, Part("sum", 3 * over_n)], "aten")
    low = [Part("dy times scale", 2 * over_n), Part("dyb", skinny_n), Part("db", skinny_n)]
    low += [Part("da", skinny_k), Part("dyb a", skinny_k)]
    return in_a_row([*low, base, Part("sum", 3 * over_k)], "aten")


BASELINES = {"frozen": frozen, "addmm_": _addmm, "PEFT, bf16 adapters": _peft}


def kernel_seconds(config: KernelConfig, problem: Problem, device: DeviceSpec) -> float:
    """Seconds of one Triton kernel of the plan."""
    c, (M, N, K, R) = config, (problem.M, problem.N, problem.K, problem.R)
    if c.kernel in ("fwd", "dx"):
        share = _FORM[c.form]
        if c.form == "pointer" and _has_wgmma(device) and problem.itemsize == 2:
            share *= _POINTER_ON_HOPPER
        columns, reduction = (N, K) if c.kernel == "fwd" else (K, N)
        tile = c.block_m, c.block_n
        seconds = _product(M, columns, reduction + padded_rank(R), tile, share, problem, device)
        if c.single:
            return seconds + _xa_beside(c, problem, device)
        return seconds + (_mask(problem, device) if c.kernel == "dx" else 0.0)
    if c.kernel == "reduce":
        return 0.0
    rank_tiles = math.ceil(R / c.block_r)
    columns = N if c.kernel in ("dyb", "dyb_db") else K
    programs = math.ceil(M / c.block_m) if c.kernel in ("dyb", "xa") else math.ceil(columns / c.block_n) * c.splits
    mask = 0.0 if c.kernel in ("dyb", "dyb_db") else rank_tiles * _mask(problem, device)
    return (
        _pass(M * columns * rank_tiles, problem, device, programs * rank_tiles) / SKINNY
        + mask
        + sum_seconds(c, problem, device)
    )


def sum_seconds(config: KernelConfig, problem: Problem, device: DeviceSpec) -> float:
    """Seconds to write the fp32 partials of dyb_db or da, and as many to read them; 0 for other kernels."""
    c, (M, N, K, R) = config, (problem.M, problem.N, problem.K, problem.R)
    if c.kernel == "dyb_db":
        return 4 * R * (c.splits * N + math.ceil(N / c.block_n) * M) / device.sustained_bandwidth
    return 4 * R * c.splits * K / device.sustained_bandwidth if c.kernel == "da" else 0.0


def _xa_beside(config: KernelConfig, problem: Problem, device: DeviceSpec) -> float:
    """What the xa items of a single kernel add, on the SMs that the last wave leaves free, before the first tiles.

    At half of what an SM streams: 38 us for two items each (H200, 2026-11-26). That the others compute meanwhile does
    not help, since every tile waits for its rows of xa.
    """
    items = math.ceil(problem.M / config.block_m)
    tiles = items * math.ceil(problem.N / config.block_n)
    programs = min(device.sms, tiles)
    item = config.block_m * problem.K * problem.itemsize / (_SM_BANDWIDTH / 2)
    return math.ceil(items / (-tiles % programs or programs)) * item


_WHAT = {
    "xa": "xa = x aᵀ",
    "fwd": "y = x wᵀ + xa bᵀ",
    "dyb_db": "dyb, db from one read of dy",
    "dx": "dx = dy w + dyb a",
    "da": "da = dybᵀ x",
}


def triton_linear(configs: Sequence[KernelConfig], problem: Problem, device: DeviceSpec) -> tuple[Part, ...]:
    """The Triton kernels of a plan, in the order in which they run."""
    parts = []
    for config in configs:
        if config.kernel != "reduce":
            parts.append(Part(_WHAT[config.kernel], kernel_seconds(config, problem, device)))
        if config.kernel in ("dyb_db", "da"):
            parts.append(Part("sum of partials", sum_seconds(config, problem, device)))
    return in_a_row(parts, "triton")
