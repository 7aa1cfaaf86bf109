"""The choice of backend, kernels and configurations for an operator, with its reasons."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

from lorafuse import formats
from lorafuse.plan import configs_cuda, configs_triton, cost, tuned
from lorafuse.plan.candidate import Candidate, KernelConfig
from lorafuse.plan.devices import DeviceSpec, features, find
from lorafuse.plan.problem import Problem

__all__ = ["Plan", "clear_cache", "interpreted_as", "modelled", "no_grouped_mm", "override", "select", "state"]


@dataclass(frozen=True)
class Plan:
    """The choice for one operator: `backend`, its `kernel`, one line per reason.

    `configs` are those of the kernels of every projection, `candidates` all that could run here.
    """

    backend: str
    kernel: str
    configs: tuple[KernelConfig, ...] = ()
    reasons: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    projections: tuple["Plan", ...] = ()

    def of(self, projection: int) -> "Plan":
        """The plan of one projection, in the order of the problems."""
        return self.projections[projection] if self.projections else self

    @property
    def chosen(self) -> Candidate:
        """The candidate that was chosen for the operator."""
        return next(one for one in self.candidates if (one.backend, one.kernel) == (self.backend, self.kernel))

    def config(self, kernel: str) -> KernelConfig:
        """The configuration of a kernel of a plan of one projection."""
        for config in self.configs:
            if config.kernel == kernel:
                return config
        raise KeyError(f"{self.backend} {self.kernel} has no kernel {kernel!r}")


# what the kernels of every backend but eager need
_OLDEST_ARCH = 80
_DTYPES = ("bfloat16", "float16", "float32")
# chosen only where a measurement says so, or forced. xa in the tiles of y, K divided by clusters, sums concurrent with
# dx, one launch each way and siblings in one have run on no GPU, and the grouped CUDA kernel took 5.6 ms where Triton's
# took 3.2. The one of rows where they lie, Triton's siblings in one launch, and its main loop that decodes, have run on
# no GPU.
_MEASURED_FIRST = (
    "cuda xa_in_tiles", "cuda split_k", "cuda fused_forward", "cuda concurrent_backward", "cuda fused_backward",
    "cuda siblings", "cuda siblings_ha", "cuda ragged", "cuda gathered", "siblings", "packed",
)  # fmt: skip
# what is forced in the passes that a forced kernel has no form of
_FORCED_TOO = {"cuda siblings_ha": "cuda siblings"}
# torch starts a thread for each group of grouped_mm, in one block
_MOST_GROUPS = 1023


@dataclass(frozen=True, eq=False)
class _Override:
    """What tests and benchmarks put in place of the planner's own choice or tables."""

    kernel: str = ""
    tiles: tuple[tuple[int, int, int], ...] = configs_cuda.TILES
    measured: tuple[tuned.Tuned, ...] | None = None
    interpreted_as: DeviceSpec = find("H200")
    triton_config: configs_triton.Pick = configs_triton.best


_NOTHING = _Override()
# None where nothing is overridden: every call of a layer hashes it
_override: _Override | None = None
# how often measurements were read anew
_generation = 0


@contextmanager
def override(
    *,
    force_kernel: str | None = None,
    cuda_tiles: Sequence[tuple[int, int, int]] | None = None,
    measured: Sequence[tuned.Tuned] | None = None,
    interpreted_as: DeviceSpec | None = None,
    triton_config: configs_triton.Pick | None = None,
) -> Iterator[None]:
    """Within it, plans take what is given wherever it can run. For tests and benchmarks.

    `force_kernel` is one of `tuned.KERNELS`; `cuda_tiles` are the (block_n, stages, cluster) of the CUDA matmuls;
    `measured` are the entries of every GPU, instead of those in files; `interpreted_as` is the GPU that Triton's
    interpreter and the emulator stand for; `triton_config` picks the configuration of a Triton kernel. It holds for the
    whole process, and for what is nested in it unless given there again. Raises ValueError for an unknown kernel.
    """
    global _override
    if force_kernel is not None and force_kernel not in tuned.KERNELS:
        raise ValueError(f"kernel {force_kernel!r} is not one of {', '.join(tuned.KERNELS)}")
    former, base = _override, _override or _NOTHING
    _override = _Override(
        base.kernel if force_kernel is None else force_kernel,
        base.tiles if cuda_tiles is None else tuple(cuda_tiles),
        base.measured if measured is None else tuple(measured),
        interpreted_as or base.interpreted_as,
        triton_config or base.triton_config,
    )
    try:
        yield
    finally:
        _override = former


def select(
    problems: Problem | tuple[Problem, ...], device: DeviceSpec | None, available: tuple[tuple[str, str], ...]
) -> Plan:
    """The plan of an operator, one problem for each of its projections, on a GPU, or off GPUs when `device` is None.

    `available` pairs every backend that may be chosen with "" or the reason why it cannot run here. What a measurement
    of this GPU says is fastest is chosen, else the least `Candidate.step_seconds`. Raises ValueError when no backend
    can run the operator.
    """
    return _select(problems, device, available, _override)


def state() -> Hashable:
    """What plans depend on besides their problem and what is available."""
    return _override, _generation


def interpreted_as() -> DeviceSpec:
    """The GPU whose plans kernels follow that run on a CPU, in Triton's interpreter or in the emulator."""
    return (_override or _NOTHING).interpreted_as


def clear_cache() -> None:
    """Read measurements again for the next plan: for whoever wrote them, or changed LORAFUSE_CACHE_DIR, meanwhile."""
    global _generation
    tuned.load.cache_clear()
    _select.cache_clear()
    _generation += 1


def modelled(candidates: Sequence[Candidate]) -> Candidate:
    """The one of a plan's candidates that the model takes where there is no measurement."""
    # a loop over groups waits until the host has read where they end
    able = [c for c in candidates if c.name not in _MEASURED_FIRST and c.kernel != "loop"]
    # without one, the first of what waits for a measurement: of a backend that was requested by name
    return min(able, key=lambda c: c.step_seconds) if able else candidates[0]


@lru_cache(maxsize=4096)
def _select(
    problems: Problem | tuple[Problem, ...],
    device: DeviceSpec | None,
    available: tuple[tuple[str, str], ...],
    overridden: _Override | None,
) -> Plan:
    given = overridden or _NOTHING
    operator = problems if isinstance(problems, tuple) else (problems,)
    assert operator[0].is_ragged or len(operator) == 1, "a dense operator of several projections"
    reasons: list[str] = []
    candidates: list[Candidate] = []
    for backend, unavailable in available:
        reason = unavailable or _refusal(backend, operator, device)
        if reason:
            reasons.append(f"{backend}: {reason}")
        elif backend == "eager":
            candidates += _eager(operator, device, reasons)
        elif device is not None and backend == "triton":
            candidates += configs_triton.operator_candidates(operator, device, given.triton_config)
        elif device is not None:
            candidates += configs_cuda.operator_candidates(operator, device, given.tiles)
    if device is not None and (decoding := cost.decoding(operator, device)):
        candidates = [one if one.kernel == "packed" else replace(one, parts=decoding + one.parts) for one in candidates]
    if not candidates:
        raise ValueError(f"no backend can run {problems}: " + "; ".join(reasons))
    chosen, why = _choose(candidates, operator, device, given)
    for one in candidates:
        if one is not chosen and one.seconds:
            waits = ", waits until the host has read where groups end" if one.kernel == "loop" else ""
            reasons.append(f"{one.backend} {one.kernel}: not chosen, {_model(one)}{waits}")
    reasons.append(f"{chosen.backend}: {why}")
    plan = Plan(chosen.backend, chosen.kernel, sum(chosen.configs, ()), tuple(reasons), tuple(candidates))
    if len(operator) == 1:
        return plan
    each = chosen.configs or ((),) * len(operator)
    return replace(plan, projections=tuple(Plan(chosen.backend, chosen.kernel, configs) for configs in each))


def _refusal(backend: str, operator: Sequence[Problem], device: DeviceSpec | None) -> str:
    """Why a backend cannot run an operator; "" when it can."""
    p = operator[0]
    if backend == "eager":
        return ""
    if device is None:
        return "runs on CUDA devices, the input is not on one"
    if device.arch < _OLDEST_ARCH:
        return f"its kernels need sm_{_OLDEST_ARCH}, {device.name} is sm_{device.arch}"
    if p.dtype not in _DTYPES:
        return f"its kernels run {', '.join(_DTYPES)}, not {p.dtype}"
    unknown = [q.format for q in operator if q.format not in ("dense", *formats.FORMATS)]
    if unknown:
        return f"its kernels read dense weights, not {unknown[0]}"
    if p.M == 0:
        return "there are no rows" if p.is_ragged else "there are no tokens"
    refusals = (configs_cuda.refusal(problem, device) for problem in operator if backend == "cuda")
    return next(filter(None, refusals), "")


def _eager(operator: Sequence[Problem], device: DeviceSpec | None, reasons: list[str]) -> list[Candidate]:
    p = operator[0]
    if p.is_ragged:
        kernels = ["loop"]
        arch = None if device is None else device.arch
        missing = next(filter(None, (no_grouped_mm(problem, arch) for problem in operator)), "")
        if missing:
            reasons.append(f"eager grouped_mm: {missing}")
        else:
            kernels.insert(0, "grouped_mm")
    elif device is None:
        # on a CPU the first adds 0.62 ms to a base of 4.1 ms, the other 0.70 ms, and at M = 1 it is one operator less
        # (M 1024, K = N 2048, R 16, bf16, Xeon with AMX, 2 threads, 2026-11-24)
        kernels = ["aten_beta1" if p.gradients else "aten_addmm"]
    else:
        # a mask of the low-rank product alone, or fp32 xa over fp16, leave nothing to accumulate onto the base's
        kernels = ["aten_beta1"] if p.wide or (p.gradients and p.dropout) else ["aten_beta1", "aten_addmm"]
    parts = [cost.aten(operator, kernel, device) if device and p.M else () for kernel in kernels]
    return [Candidate("eager", kernel, (), steps) for kernel, steps in zip(kernels, parts, strict=True)]


def no_grouped_mm(problem: Problem, arch: int | None) -> str:
    """Why torch's grouped_mm has no fast kernel for a problem on sm_`arch`; "" where it has.

    Elsewhere it reads on the host where groups end and multiplies one group after the other (torch 2.11 to 2.13).
    """
    if arch is None:
        return "torch's grouped_mm has fast kernels on CUDA devices, the input is not on one"
    if problem.M == 0:
        return "there are no rows"
    if not features(arch).has_grouped_mm:
        return f"torch's grouped_mm has a fast kernel for sm_90 and sm_100, this is sm_{arch}"
    if problem.dtype != "bfloat16":
        return f"torch's grouped_mm has a fast kernel for bfloat16, not {problem.dtype}"
    if problem.groups > _MOST_GROUPS:
        return f"torch's grouped_mm takes up to {_MOST_GROUPS} groups, there are {problem.groups}"
    return "" if problem.aligned else "torch's grouped_mm takes weights whose rows start on 16-byte boundaries"


def _choose(
    candidates: list[Candidate], operator: Sequence[Problem], device: DeviceSpec | None, given: _Override
) -> tuple[Candidate, str]:
    by_name = {one.name: one for one in candidates}
    # of several backends with such a kernel the one whose name it is comes first
    forced = by_name.get(given.kernel) or next((one for one in candidates if one.kernel == given.kernel), None)
    forced = forced or by_name.get(_FORCED_TOO.get(given.kernel, ""))
    if forced:
        return forced, f"{given.kernel} is forced"
    if device:
        entries = [tuned.match(problem, device, by_name, entries=given.measured) for problem in operator]
        # experts were measured as a block: of both projections, or of none
        if (entry := entries[0]) and {one and one.kernel for one in entries} == {entry.kernel}:
            return by_name[entry.kernel], f"{entry.kernel} was {entry.reason(operator[0], device.name)}"
    chosen = modelled(candidates)
    why = chosen.kernel
    if chosen.kernel == "loop":
        why = "runs every problem, one group after the other"
    elif chosen.backend == "eager" and not operator[0].is_ragged:
        why = f"{_ORDER[chosen.kernel]}; runs every problem"
    if chosen.seconds:
        why += f", {_model(chosen)}" + (" with rows spread evenly" if operator[0].is_ragged else "")
    others = [one.name for one in candidates if one.name in _MEASURED_FIRST and one is not chosen]
    if chosen.backend == "eager":
        return chosen, why
    return chosen, why + "".join(f"; {name} is chosen only where measured" for name in others)


_ORDER = {
    "aten_beta1": "aten_beta1: low-rank product first, base GEMM accumulated onto it (beta = 1)",
    "aten_addmm": "aten_addmm: base GEMM first, low-rank product accumulated onto it",
}


def _model(candidate: Candidate) -> str:
    launches = candidate.launch_seconds
    waits = f", {launches * 1e6:.0f} us to launch" if launches > candidate.seconds else ""
    return f"model {candidate.seconds * 1e6:.0f} us{waits}"
