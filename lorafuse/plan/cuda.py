"""The CUDA kernels of csrc in the planner: what they can run, their configurations, and what the model expects.

The products run on sm_90a alone, in tiles of 128 rows. The memory-bound passes choose their own tiles. Steps forward:
xa with `b` rounded, y; or both adapters rounded, and xa and y in one launch. Backward: dyb with db, dbias and `a`
rounded, dx, da; or da in dx's launch; or `b` rounded, dyb with `a` rounded, and dx, da and db in one launch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lorafuse.plan import cost
from lorafuse.plan.config import KernelConfig, padded_rank
from lorafuse.plan.cost import Part
from lorafuse.plan.device import DeviceSpec
from lorafuse.plan.problem import Problem

__all__ = ["CONFIGS", "illegal", "refusal", "tunable", "ways"]

ARCH = 90
_BLOCK_M, _BLOCK_K = 128, 64
# a producer's warpgroup and two that multiply
_WARPS = 12
_MAX_SINGLE_R = 64
# shared memory beside the ring and the tile that is stored: barriers, and what alignment to 1024 bytes may cost
_SHARED_REST = 2048
# (block_n, stages, cluster); two stages of 256 columns would fit twice, three are what hides the loads (published
# ablations of Hopper kernels; not measured here)
CONFIGS = tuple((block_n, stages, cluster) for block_n, stages in ((256, 3), (128, 4)) for cluster in (2, 1))
# row blocks that are walked together (assumed)
_GROUP_M = 16
# bytes that L2 gives in a clock, of all SMs together: those that 128x256 tiles without a cluster ask for, which lose
# nothing by it (H200, 2026-11-26; published models say 6154); and dense FLOPs of one SM
_L2_BYTES, _SM_FLOPS = 6336, 4096
# columns of a block of the reductions, and rows of one of project_x
_REDUCE_N, _PASS_M = 256, 64
# the pass before dx, and what is summed in dx's launch then
_ONE_LAUNCH = (("dyb", ("da", "db")), ("dyb_db", ("da",)))
# bytes/s of one SM's shared memory; where da or db is summed, x or dy passes through it twice, and so do dyb or xa, 64
# rows of 64 ranks at a time (model, csrc/kernels/adapter_grads_sm90.cuh; not measured)
_SHARED_BANDWIDTH, _RIGHT_BYTES = 128 * 1.7e9, 64 * 64 * 2


def refusal(problem: Problem, device: DeviceSpec) -> str:
    """Why no CUDA kernel runs a problem on a device; "" when some do."""
    if device.arch != ARCH:
        return f"its kernels are for sm_{ARCH}, {device.name} is sm_{device.arch}"
    if problem.dtype not in ("bfloat16", "float16"):
        return f"its kernels run bfloat16 and float16, not {problem.dtype}"
    if problem.wide:
        return "its kernels round xa and dyb to float16, whose range is too small for adapters of another dtype"
    if problem.N % 8 or problem.K % 8:
        return f"TMA needs N {problem.N} and K {problem.K} to be multiples of 8"
    if not problem.aligned:
        return "TMA needs rows of x, dy and w that start on 16-byte boundaries"
    for name, size in (("M", problem.M), ("N", problem.N), ("K", problem.K), ("R", problem.R)):
        if size >= 2**31:
            return f"{name} {size} is not below 2^31"
    return ""


def illegal(config: KernelConfig, problem: Problem, device: DeviceSpec) -> str:
    """Why a configuration of fwd or dx cannot run a problem on a device; "" when it can. The one statement of it."""
    c = config
    if reason := refusal(problem, device):
        return reason
    if (c.block_m, c.block_k, c.warps) != (_BLOCK_M, _BLOCK_K, _WARPS) or c.block_n not in (128, 256):
        return f"tiles are 128 x 128 or 128 x 256, in steps of {_BLOCK_K} by {_WARPS} warps"
    if c.cluster not in (1, 2):
        return f"a cluster of {c.cluster} blocks: they have 1 or 2"
    if c.single and (c.kernel != "fwd" or problem.R > _MAX_SINGLE_R):
        return f"one launch computes xa and y of up to {_MAX_SINGLE_R} ranks"
    if c.single and problem.dropout:
        return "a launch that computes xa and y draws no mask"
    if c.beside and (c.kernel != "dx" or c.cluster != 1 or problem.R > _MAX_SINGLE_R):
        return f"da and db beside dx are of up to {_MAX_SINGLE_R} ranks, in clusters of 1"
    if c.beside and problem.dropout:
        return "blocks that sum da draw no mask"
    tiles = c.stages * (_BLOCK_M + c.block_n) * _BLOCK_K * 2 + _BLOCK_M * c.block_n * 2
    needed = tiles + _SHARED_REST
    if c.stages < 2 or needed > device.smem_per_block:
        return f"{c.stages} stages need {needed} bytes of shared memory of {device.smem_per_block}, and are 2 or more"
    return ""


def tunable(
    kernel: str, problem: Problem, device: DeviceSpec, single: bool = False, beside: int = 0
) -> tuple[KernelConfig, ...]:
    """The legal configurations of "fwd" or "dx"."""
    found = (
        KernelConfig(
            kernel, "wgmma", _BLOCK_M, block_n, _BLOCK_K, _BLOCK_K, stages, _WARPS, group_m=_GROUP_M, single=single,
            cluster=cluster, beside=beside,
        )
        for block_n, stages, cluster in CONFIGS
        # one row block leaves a neighbour without rows
        if cluster == 1 or problem.M > _BLOCK_M
    )  # fmt: skip
    return tuple(config for config in found if not illegal(config, problem, device))


def ways(problem: Problem, device: DeviceSpec) -> Iterator[tuple[str, tuple[KernelConfig, ...], tuple[Part, ...]]]:
    """`(kernel, configurations, modelled parts)` of every way to run a problem that `refusal` lets pass."""
    wanted = problem.gradients
    if not wanted:
        two, one = (_best("fwd", problem, device, single) for single in (False, True))
        assert two is not None
        xa = _passes("xa", problem, device)
        first = _beside(_part(xa, problem, device), _rounded("b", problem.N, problem, device))
        parts = [first, _part(two, problem, device)]
        yield "two_kernel", (xa, two), cost.in_a_row(parts, "aten")
        if one is not None:
            both = (_rounded("a", problem.K, problem, device), _rounded("b", problem.N, problem, device))
            yield "single_kernel", (one,), cost.in_a_row([*both, _part(one, problem, device)], "aten")
        return
    configs = [_passes("dyb_db", problem, device)]
    parts = [_part(configs[0], problem, device)]
    if "dx" in wanted:
        dx = _best("dx", problem, device, False)
        assert dx is not None
        configs.append(dx)
        parts = [_beside(parts[0], _rounded("a", problem.K, problem, device)), _part(dx, problem, device)]
    if "da" in wanted:
        configs.append(_passes("da", problem, device))
        parts.append(_part(configs[-1], problem, device))
    yield "one_pass_backward", tuple(configs), cost.in_a_row(parts, "aten")
    beside = min(_one_launch(problem, device), key=lambda way: cost.total(way[1]), default=None)
    if beside is not None:
        yield "one_launch_backward", *beside


def _one_launch(problem: Problem, device: DeviceSpec) -> Iterator[tuple[tuple[KernelConfig, ...], tuple[Part, ...]]]:
    """`(configurations, modelled parts)` of the ways to sum da, or da and db, in dx's launch."""
    for first, sums in _ONE_LAUNCH:
        beside = tuple(name for name in sums if name in problem.gradients)
        # dbias takes a pass over dy, and db comes with it
        if not beside or "dx" not in problem.gradients or (first == "dyb" and "dbias" in problem.gradients):
            continue
        alone = replace(problem, gradients=("dx", *beside))
        dx = _best("dx", alone, device, False, _besides(problem, device))
        if dx is not None:
            before = _passes(first, problem, device)
            rounded = [_rounded("b", problem.N, problem, device)] if first == "dyb" else []
            second = _beside(_part(before, problem, device), _rounded("a", problem.K, problem, device))
            yield (before, dx), cost.in_a_row([*rounded, second, _part(dx, alone, device)], "aten")


def _items(config: KernelConfig, problem: Problem) -> int:
    """Column blocks of what is summed beside dx: of dy for db, of x for da."""
    columns = [size for name, size in (("db", problem.N), ("da", problem.K)) if name in problem.gradients]
    return sum(-(-size // config.block_n) for size in columns)


def _besides(problem: Problem, device: DeviceSpec) -> list[int]:
    """Numbers of blocks beside dx: the fewest for each number of column blocks that the busiest of them sums."""
    items = -(-problem.N // _REDUCE_N) + -(-problem.K // _REDUCE_N)
    return sorted({-(-items // rounds) for rounds in range(-(-items // (device.sms // 2)), items + 1)})


def _best(
    kernel: str, problem: Problem, device: DeviceSpec, single: bool, besides: Sequence[int] = (0,)
) -> KernelConfig | None:
    found = [config for blocks in besides for config in tunable(kernel, problem, device, single, blocks)]
    return min(found, key=lambda config: _seconds(config, problem, device), default=None)


def _seconds(config: KernelConfig, problem: Problem, device: DeviceSpec) -> float:
    """A persistent main loop as fast as cuBLAS (measured on an H200); a cluster computes whole row blocks."""
    c, rows = config, config.block_m * config.cluster
    whole = replace(problem, M=-(-problem.M // rows) * rows)
    # operands of one step of the reduction, against what L2 gives while the tensor cores work on it
    asked = (c.block_m + c.block_n // c.cluster) * c.block_k * 2 * device.sms
    clocks = 2 * c.block_m * c.block_n * c.block_k / _SM_FLOPS
    share = min(1.0, _L2_BYTES / (asked / clocks))
    left = device.sms - c.beside
    tiles = cost.kernel_seconds(
        c, whole, replace(device, sms=left, sustained_flops=device.sustained_flops * left / device.sms)
    )
    if not c.beside:
        return tiles / share
    stage = 2 * (c.block_n * _BLOCK_K * problem.itemsize + _RIGHT_BYTES) / _SHARED_BANDWIDTH
    return max(tiles / share, -(-_items(c, problem) // c.beside) * -(-problem.M // _BLOCK_K) * stage)


def _passes(kernel: str, problem: Problem, device: DeviceSpec) -> KernelConfig:
    """One of the memory-bound passes, as the model sees it."""
    block_r = min(padded_rank(problem.R), 64)
    if kernel in ("xa", "dyb"):
        return KernelConfig(kernel, "mma", _PASS_M, 0, _BLOCK_K, block_r, 3, 4)
    columns = problem.N if kernel == "dyb_db" else problem.K
    splits = max(1, min(device.sms * _REDUCE_N // columns, -(-problem.M // _PASS_M)))
    return KernelConfig(kernel, "mma", _PASS_M, _REDUCE_N, 0, block_r, 3, 8, splits=splits)


_NAMES = {
    "xa": "xa = x aᵀ",
    "dyb": "dyb = dy b",
    "fwd": "y = x wᵀ + xa bᵀ",
    "dyb_db": "dyb, db from one read of dy",
    "dx": "dx = dy w + dyb a",
    "da": "da = dybᵀ x",
}


def _part(config: KernelConfig, problem: Problem, device: DeviceSpec) -> Part:
    if config.form == "wgmma":
        sums = " and ".join(name for name in ("da", "db") if name in problem.gradients)
        name = _NAMES[config.kernel] + (f", {sums} beside" if config.beside else "")
        return Part(name, _seconds(config, problem, device))
    seconds = cost.kernel_seconds(config, problem, device) + cost.sum_seconds(config, problem, device)
    # the reductions' partial sums are a launch of their own
    return Part(_NAMES[config.kernel], seconds, launches=1 if config.kernel in ("xa", "dyb") else 2)


def _beside(part: Part, small: Part) -> Part:
    """Both in the launches of the first."""
    return replace(part, name=f"{part.name}, {small.name}", seconds=part.seconds + small.seconds)


def _rounded(name: str, size: int, problem: Problem, device: DeviceSpec) -> Part:
    """An adapter of `[size, R]` read, at most in fp32, and written in the base's dtype."""
    return Part(f"{name} rounded", size * problem.R * (4 + problem.itemsize) / device.sustained_bandwidth)
