"""The CUDA kernels of csrc in the planner: what they can run, their configurations, and each candidate, step by step.

The matmuls run on sm_90a alone, in tiles of 128 rows. The memory-bound kernels choose their own tiles.

    two_kernel            xa and b rounded; y
    xa_in_tiles           a rounded; b rounded; xa and y, where N has few columns of tiles: the first ones' compute xa
    split_k               y and xa by clusters that divide K, where tiles are fewer than half of the SMs
    fused_forward         everything, in one launch
    one_pass_backward     dyb, db, dbias and a rounded; dx; da
    concurrent_backward   dyb, db, dbias and a rounded; dx and da; or b rounded; dyb and a rounded; dx, da and db
    fused_backward        everything, in one launch
    siblings              layers of one x: xa of all; every b rounded; every y, of gate and up with h; or every dyb,
                          db and dbias; every a rounded; one dx; da of all. Of down of a gated MLP the last four, with
                          dgate, dup and h in place of dx
    siblings_ha           gate and up as "siblings", with partial sums of down's xa in the launch of h, and their sum
    ragged                y or dx of ragged rows; ATen computes everything else
    gathered              xa; y, or u and h; or dyb and db; dx, or du and h; da: of rows where they lie
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lorafuse.plan import cost
from lorafuse.plan.candidate import Candidate, KernelConfig, Part, in_a_row, padded_rank
from lorafuse.plan.devices import DeviceSpec
from lorafuse.plan.problem import Problem

__all__ = [
    "CONCURRENT",
    "MOST_SIBLINGS",
    "RAGGED",
    "SPLITS",
    "SUM_ROWS",
    "TILES",
    "gives_ha",
    "illegal",
    "matmuls",
    "operator_candidates",
    "refusal",
    "sum_blocks",
]

_ARCH = 90
_BLOCK_M, _BLOCK_K = 128, 64
# a producer's warpgroup and two that multiply
_WARPS = 12
_MAX_FUSED_R = 64
# where tiles compute xa beside their columns of y: ranks, and columns of y. Of more columns of tiles the first would be
# a smaller part, and the pass over x that it saves one too (model)
_MAX_TILE_R, _MAX_TILE_N = 32, 1024
# where a cluster divides K: its tile, of which the sums take all shared memory of three stages and more; its blocks
_SPLIT_TILE, SPLITS = (128, 4, 1), (2, 4)
# layers whose y, or whose part of dx, one launch computes: side_by_side.cuh
MOST_SIBLINGS = 4
# shared memory next to the ring and the tile that is stored: barriers, and what alignment to 1024 bytes may cost
_SHARED_REST = 2048
# (block_n, stages, cluster); two stages of 256 columns would fit twice, three are what hides the loads (published
# ablations of Hopper kernels; not measured here)
TILES = tuple((block_n, stages, cluster) for block_n, stages in ((256, 3), (128, 4)) for cluster in (2, 1))
# row blocks that are walked together (assumed)
_GROUP_M = 16
# where tiles wait for flags of their row blocks: the first wave then waits for half as many (model: 14 to 42 us at
# 8192 x 4096 x 4096 on an H200; not measured)
_FUSED_GROUP_M = 8
# rows of a part of da and db: of 512 to 8192 the ones whose uneven ends cost least, 374 us of 8192 x 4096 x 4096 where
# 4096 rows take 388 (`python bench/schedule.py --shape 8192,4096,4096`, simulated); and bytes of the partial sums
SUM_ROWS, _PARTIAL_BYTES = 2048, 64 << 20
# ranks of down whose xa comes with h: of 64 its partial sums are as large as h, and adding them takes longer than the
# pass over h that they save (model, docs/performance.md)
_MAX_HA_R = 32
# columns of a block of the reductions, and rows of one of project
_REDUCE_N, _PASS_M = 256, 64
# the kernel before dx, and what is summed in dx's launch then
CONCURRENT = (("project", ("da", "db")), ("project_outer", ("da",)))

_Tiles = Sequence[tuple[int, int, int]]


def refusal(problem: Problem, device: DeviceSpec) -> str:
    """Why no CUDA kernel runs a problem on a device; "" when some do."""
    if device.arch != _ARCH:
        return f"its kernels are for sm_{_ARCH}, {device.name} is sm_{device.arch}"
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
    """Why a matmul cannot run a problem on a device; "" when it can. The one statement of what is legal."""
    c = config
    if reason := refusal(problem, device):
        return reason
    if (c.block_m, c.block_k, c.warps) != (_BLOCK_M, _BLOCK_K, _WARPS) or c.block_n not in (128, 256):
        return f"tiles are 128 x 128 or 128 x 256, in steps of {_BLOCK_K} by {_WARPS} warps"
    if c.cluster not in (1, 2):
        return f"a cluster of {c.cluster} blocks: they have 1 or 2"
    if c.xa_in_tiles and (problem.gradients or problem.dropout or c.cluster != 1 or problem.R > _MAX_TILE_R):
        return f"tiles of y compute xa of up to {_MAX_TILE_R} ranks, in clusters of 1 and without a mask"
    if c.fused_forward and (problem.gradients or problem.dropout or c.cluster != 1 or problem.R > _MAX_FUSED_R):
        return f"one launch computes y of up to {_MAX_FUSED_R} ranks, in clusters of 1 and without a mask"
    if c.sum_blocks and (not problem.gradients or c.cluster != 1 or problem.R > _MAX_FUSED_R):
        return f"da and db concurrent with dx are of up to {_MAX_FUSED_R} ranks, in clusters of 1"
    if c.sum_blocks and problem.dropout:
        return "blocks that sum da draw no mask"
    if c.fused_backward and ("dx" not in problem.gradients or c.cluster != 1 or problem.R > _MAX_FUSED_R):
        return f"one launch computes dx, da and db of up to {_MAX_FUSED_R} ranks, in clusters of 1"
    if c.fused_backward and (problem.dropout or "dbias" in problem.gradients):
        return "a launch that computes dx, da and db draws no mask and sums no dbias"
    if (is_split := c.splits > 1 and not problem.gradients) and (
        (c.block_n, c.stages, c.cluster) != _SPLIT_TILE or c.splits not in SPLITS or problem.R > _MAX_TILE_R
    ):
        return f"{' or '.join(map(str, SPLITS))} blocks divide K, in tiles of 128 x 128 and for {_MAX_TILE_R} ranks"
    if is_split and (problem.dropout or c.splits > -(-problem.K // _BLOCK_K)):
        return f"blocks that divide K draw no mask, and have a part of K {problem.K} each"
    rows = _BLOCK_M + c.block_n + (padded_rank(problem.R) if c.xa_in_tiles or is_split else 0)
    needed = c.stages * rows * _BLOCK_K * 2 + _BLOCK_M * c.block_n * 2 + _SHARED_REST
    if c.stages < 2 or needed > device.smem_per_block:
        return f"{c.stages} stages need {needed} bytes of shared memory of {device.smem_per_block}, and are 2 or more"
    return ""


def matmuls(
    problem: Problem, device: DeviceSpec, tiles: _Tiles = TILES, **form: Any
) -> tuple[KernelConfig, ...]:  # fmt: skip
    """The legal configurations of y, or of a backward problem's dx; `form` are fields of a KernelConfig."""
    # one row block leaves a neighbour without rows
    configs = (_matmul(tile, **form) for tile in tiles if tile[2] == 1 or problem.M > _BLOCK_M)
    return tuple(config for config in configs if not illegal(config, problem, device))


def _matmul(tile: tuple[int, int, int], **form: Any) -> KernelConfig:
    block_n, stages, cluster = tile
    waits = any(form.get(name) for name in ("xa_in_tiles", "fused_forward", "fused_backward"))
    return KernelConfig(
        "matmul", "wgmma", _BLOCK_M, block_n, _BLOCK_K, _BLOCK_K, stages, _WARPS, _FUSED_GROUP_M if waits else _GROUP_M,
        cluster=cluster, **form,
    )  # fmt: skip


# that of ragged rows (nothing was measured)
RAGGED = _matmul((256, 3, 1))


def operator_candidates(operator: Sequence[Problem], device: DeviceSpec, tiles: _Tiles = TILES) -> Iterator[Candidate]:
    """Every candidate for an operator that `refusal` lets pass."""
    p = operator[0]
    if p.is_ragged:
        matmuls = [RAGGED] * len(operator)
        for kernel in ("ragged", "gathered"):
            parts = cost.ragged(operator, matmuls, device, kernel == "gathered")
            yield Candidate("cuda", kernel, tuple((c,) for c in matmuls), parts)
    elif p.gradients:
        yield from _backward(p, device, tiles)
    else:
        yield from _forward(p, device, tiles)


def _forward(problem: Problem, device: DeviceSpec, tiles: _Tiles) -> Iterator[Candidate]:
    round_a, round_b = _roundings(problem, device)
    xa = _skinny("project", problem, device)
    two = _best(problem, device, tiles)
    assert two is not None
    parts = [_with(cost.step(xa, problem, device), round_b), cost.step(two, problem, device)]
    yield _candidate("two_kernel", (xa, two), parts)
    if _are_siblings(problem):
        together = [cost.step(xa, problem, device), round_b, parts[-1]]
        yield _candidate("siblings", (xa, two), together)
        if problem.epilogue == "gated":
            # down's ranks are not known here: as many as those of gate or of up
            sums = cost.down_xa(two, problem.M, -(-problem.R // 2), problem.N // 2, device)
            yield _candidate("siblings_ha", (xa, two), [*together, sums])
    if problem.N <= _MAX_TILE_N and (one := _best(problem, device, tiles, {"xa_in_tiles": True})):
        yield _candidate("xa_in_tiles", (one,), [round_a, round_b, cost.step(one, problem, device)])
    if one := _best(problem, device, tiles, {"fused_forward": True}):
        product = cost.step(one, problem, device)
        yield _candidate("fused_forward", (one,), [replace(product, name=f"xa, {product.name} in one launch")])
    tiles_of_y = -(-problem.M // _BLOCK_M) * -(-problem.N // _SPLIT_TILE[0])
    forms = [{"splits": count} for count in SPLITS if tiles_of_y * count <= device.sms]
    if forms and _SPLIT_TILE in tiles and (one := _best(problem, device, (_SPLIT_TILE,), *forms)):
        yield _candidate("split_k", (one,), [cost.step(one, problem, device)])


def _backward(problem: Problem, device: DeviceSpec, tiles: _Tiles) -> Iterator[Candidate]:
    configs = [_skinny("project_outer", problem, device)]
    first, round_a = cost.step(configs[0], problem, device), _roundings(problem, device)[0]
    parts = [first]
    if "dx" in problem.gradients:
        dx = _best(problem, device, tiles)
        assert dx is not None
        configs.append(dx)
        parts = [_with(first, round_a), cost.step(dx, problem, device)]
    if "da" in problem.gradients:
        configs.append(_skinny("outer", problem, device))
        parts.append(cost.step(configs[-1], problem, device))
    yield _candidate("one_pass_backward", configs, parts)
    if "dx" in problem.gradients and (_are_siblings(problem) or _is_down(problem)):
        yield _candidate("siblings", configs, [first, round_a, *parts[1:]])
    yield from sorted(_concurrent(problem, device, tiles), key=lambda candidate: candidate.seconds)[:1]
    sums = [name for name in ("da", "db") if name in problem.gradients]
    if sums and (one := _best(problem, device, tiles, {"fused_backward": True, "splits": splits(problem)})):
        product = cost.step(one, problem, device)
        parts = [replace(product, name=f"dyb, {product.name}, {' and '.join(sums)} in one launch")]
        yield _candidate("fused_backward", (one,), parts)


def gives_ha(config: KernelConfig, M: int, R: int, inner: int) -> bool:
    """Whether the tiles of h `[M, inner]` give ha `[M, R]` too."""
    return R <= _MAX_HA_R and cost.down_partials(config, M, R, inner) <= _PARTIAL_BYTES


def _are_siblings(problem: Problem) -> bool:
    """Whether one launch can run the products of a problem's layers."""
    return 1 < problem.siblings <= MOST_SIBLINGS and problem.format == "dense"


def _is_down(problem: Problem) -> bool:
    """Whether a launch of dx can go on to the activation's backward, which da needs too."""
    is_one = problem.siblings == 1 and problem.format == "dense"
    return is_one and problem.epilogue == "gated" and "da" in problem.gradients


def _concurrent(problem: Problem, device: DeviceSpec, tiles: _Tiles) -> Iterator[Candidate]:
    """Those that sum da, or da and db, in dx's launch."""
    round_a, round_b = _roundings(problem, device)
    for first, sums in CONCURRENT:
        concurrent = tuple(name for name in sums if name in problem.gradients)
        # dbias takes a pass over dy, and db comes with it
        if not concurrent or "dx" not in problem.gradients or (first == "project" and "dbias" in problem.gradients):
            continue
        alone = replace(problem, gradients=("dx", *concurrent))
        dx = _best(alone, device, tiles, *({"sum_blocks": count} for count in sum_blocks(problem, device)))
        if dx is not None:
            before, product = _skinny(first, problem, device), cost.step(dx, alone, device)
            product = replace(product, name=f"{product.name}, {' and '.join(concurrent)} concurrent")
            parts = [_with(cost.step(before, problem, device), round_a), product]
            yield _candidate("concurrent_backward", (before, dx), [round_b, *parts] if first == "project" else parts)


def _candidate(kernel: str, configs: Sequence[KernelConfig], parts: Sequence[Part]) -> Candidate:
    return Candidate("cuda", kernel, (tuple(configs),), in_a_row(parts))


def sum_blocks(problem: Problem, device: DeviceSpec) -> list[int]:
    """Numbers of blocks that sum: the fewest for each number of column blocks that the busiest of them sums."""
    items = -(-problem.N // _REDUCE_N) + -(-problem.K // _REDUCE_N)
    return sorted({-(-items // rounds) for rounds in range(-(-items // (device.sms // 2)), items + 1)})


def splits(problem: Problem) -> int:
    """Parts of the rows of which one launch sums da and db."""
    most = _PARTIAL_BYTES // (4 * problem.R * (problem.N + problem.K))
    return max(1, min(most, -(-problem.M // SUM_ROWS)))


def _best(problem: Problem, device: DeviceSpec, tiles: _Tiles, *forms: dict[str, Any]) -> KernelConfig | None:
    """The matmul of the least modelled time, in one of the forms; the plain one where none is given."""
    configs = [config for form in forms or ({},) for config in matmuls(problem, device, tiles, **form)]
    return min(configs, key=lambda config: cost.kernel_seconds(config, problem, device), default=None)


def _skinny(kernel: str, problem: Problem, device: DeviceSpec) -> KernelConfig:
    """One of the memory-bound kernels, as the model sees it."""
    block_r = min(padded_rank(problem.R), 64)
    if kernel == "project":
        return KernelConfig(kernel, "mma", _PASS_M, 0, _BLOCK_K, block_r, 3, 4)
    columns = problem.N if kernel == "project_outer" else problem.K
    splits = max(1, min(device.sms * _REDUCE_N // columns, -(-problem.M // _PASS_M)))
    return KernelConfig(kernel, "mma", _PASS_M, _REDUCE_N, 0, block_r, 3, 8, splits=splits)


def _with(part: Part, small: Part) -> Part:
    """Both in the launches of the first."""
    return replace(part, name=f"{part.name}, {small.name}", seconds=part.seconds + small.seconds)


def _roundings(problem: Problem, device: DeviceSpec) -> list[Part]:
    """a `[R, K]` and b `[N, R]` read, at most in fp32, and written in the base's dtype."""
    seconds = problem.R * (4 + problem.itemsize) / device.sustained_bandwidth
    return [Part("a rounded", problem.K * seconds), Part("b rounded", problem.N * seconds)]
