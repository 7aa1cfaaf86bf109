"""The choice of backend, kernels and configurations for a problem, with its reasons."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from lorafuse.plan import cost, cuda, tuned
from lorafuse.plan.config import KernelConfig, candidates
from lorafuse.plan.cost import Part
from lorafuse.plan.device import DeviceSpec
from lorafuse.plan.problem import Problem

__all__ = ["Candidate", "Plan", "forget", "modelled", "only", "runs_kernels", "select"]


@dataclass(frozen=True)
class Candidate:
    """One way to run a problem, and what the model says it costs."""

    backend: str
    kernel: str
    configs: tuple[KernelConfig, ...]
    parts: tuple[Part, ...]

    @property
    def seconds(self) -> float:
        """Modelled seconds of all parts."""
        return cost.total(self.parts)


@dataclass(frozen=True)
class Plan:
    """The choice for one problem: `backend`, its `kernel`, the configurations of its kernels, one line per reason.

    `candidates` are all the ways that could run here, with their modelled times.
    """

    backend: str
    kernel: str
    configs: tuple[KernelConfig, ...] = ()
    reasons: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()

    def config(self, kernel: str) -> KernelConfig:
        """The configuration of a kernel of this plan."""
        (found,) = (config for config in self.configs if config.kernel == kernel)
        return found


# what the kernels of every backend but eager need
_OLDEST_ARCH = 80
_DTYPES = ("bfloat16", "float16", "float32")

# taken only where they were measured to be the fastest, whatever the model says: what waits for other programs of its
# own launch never was on an H200, and da and db beside dx have run on no GPU yet
_MEASURED_FIRST = ("single_kernel", "one_launch_backward")

_only: str | None = None


def runs_kernels(arch: int, dtype: str) -> bool:
    """Whether the kernels of any backend but eager run a dtype on a GPU of compute capability `arch` / 10."""
    return arch >= _OLDEST_ARCH and dtype in _DTYPES


@contextmanager
def only(kernel: str) -> Iterator[None]:
    """Within it, plans take this kernel (one of `tuned.KERNELS`) wherever it can run.

    For tests and benchmarks; it holds for the whole process. Raises ValueError for an unknown kernel.
    """
    global _only
    if kernel not in tuned.KERNELS:
        raise ValueError(f"kernel {kernel!r} is not one of {', '.join(tuned.KERNELS)}")
    former, _only = _only, kernel
    try:
        yield
    finally:
        _only = former


def select(problem: Problem, device: DeviceSpec | None, available: tuple[tuple[str, str], ...]) -> Plan:
    """The plan of a problem on a GPU, or off GPUs when `device` is None.

    `available` pairs every backend that may be chosen with "" or the reason why it cannot run here. The least modelled
    time wins, unless a measurement for this GPU says otherwise. Raises ValueError when no backend can run the problem.
    """
    return _select(problem, device, available, _only)


def forget() -> None:
    """Read measurements again for the next plan: for whoever wrote them, or changed LORAFUSE_CACHE_DIR, meanwhile."""
    tuned.load.cache_clear()
    _select.cache_clear()


def modelled(ways: Sequence[Candidate]) -> Candidate:
    """The one of a plan's candidates that the model takes where there is no measurement."""
    return min((way for way in ways if way.kernel not in _MEASURED_FIRST), key=lambda way: way.seconds)


@lru_cache(maxsize=4096)
def _select(
    problem: Problem, device: DeviceSpec | None, available: tuple[tuple[str, str], ...], wanted: str | None
) -> Plan:
    reasons, ways = [], []
    for backend, reason in available:
        if backend == "eager":
            reason = reason and f"eager: {reason}"
        elif device is None and not reason:
            reason = f"{backend}: runs on CUDA devices, the input is not on one"
        elif reason:
            reason = f"{backend}: {reason}"
        elif device is not None and device.arch < _OLDEST_ARCH:
            reason = f"{backend}: its kernels need sm_{_OLDEST_ARCH}, {device.name} is sm_{device.arch}"
        elif problem.dtype not in _DTYPES:
            reason = f"{backend}: its kernels run {', '.join(_DTYPES)}, not {problem.dtype}"
        elif problem.base_format != "dense":
            reason = f"{backend}: its kernels read dense weights, not {problem.base_format}"
        elif problem.M == 0:
            reason = f"{backend}: there are no tokens"
        elif backend == "cuda" and device is not None and (refused := cuda.refusal(problem, device)):
            reason = f"{backend}: {refused}"
        if reason:
            reasons.append(reason)
        else:
            ways += _ways(backend, problem, device)
    if not ways:
        raise ValueError(f"no backend can run {problem}: " + "; ".join(reasons))
    chosen, why = _choose(ways, problem, device, wanted)
    for way in ways:
        if way is not chosen and way.seconds:
            reasons.append(f"{way.backend} {way.kernel}: not chosen, model {way.seconds * 1e6:.0f} us")
    reasons.append(f"{chosen.backend}: {why}")
    return Plan(chosen.backend, chosen.kernel, chosen.configs, tuple(reasons), tuple(ways))


def _ways(backend: str, problem: Problem, device: DeviceSpec | None) -> list[Candidate]:
    if backend == "eager":
        parts = cost.eager(problem, device) if device and problem.M else ()
        return [Candidate("eager", "aten_beta1", (), parts)]
    if device is None:
        return []
    if backend == "cuda":
        return [Candidate(backend, *way) for way in cuda.ways(problem, device)]
    if backend != "triton":
        return []
    wanted = problem.gradients
    if wanted:
        kernels = {"one_pass_backward": ["dyb_db", "reduce", *(kernel for kernel in ("dx", "da") if kernel in wanted)]}
    else:
        kernels = {"two_kernel": ["xa", "fwd"], "single_kernel": ["fwd"]}
    ways = []
    for name, needed in kernels.items():
        best = [_best(kernel, problem, device, single=name == "single_kernel") for kernel in needed]
        configs = tuple(config for config in best if config is not None)
        if len(configs) == len(best):
            ways.append(Candidate("triton", name, configs, cost.triton_linear(configs, problem, device)))
    return ways


def _best(kernel: str, problem: Problem, device: DeviceSpec, single: bool) -> KernelConfig | None:
    found = [config for config in candidates(kernel, problem, device) if config.single == single]

    def seconds(config: KernelConfig) -> float:
        return cost.kernel_seconds(config, problem, device) + cost.sum_seconds(config, problem, device)

    return min(found, key=seconds, default=None)


def _choose(
    ways: list[Candidate], problem: Problem, device: DeviceSpec | None, wanted: str | None
) -> tuple[Candidate, str]:
    by_name = {tuned.name_of(way.backend, way.kernel): way for way in ways}
    # of several backends with such a kernel the one whose name it is comes first
    asked = by_name.get(wanted or "") or next((way for way in ways if way.kernel == wanted), None)
    if asked:
        return asked, f"{wanted} was asked for"
    measured = device and tuned.match(problem, device, by_name)
    if measured:
        return by_name[measured.kernel], f"{measured.kernel} was {measured.said(problem, device.name)}"  # type: ignore[union-attr]
    chosen = modelled(ways)
    if chosen.backend == "eager":
        why = "runs every problem; low-rank product first, base GEMM accumulated onto it (beta = 1)"
        return chosen, why + (f", model {chosen.seconds * 1e6:.0f} us" if chosen.seconds else "")
    why = f"{chosen.kernel}, model {chosen.seconds * 1e6:.0f} us"
    others = [name for name in _MEASURED_FIRST if any(way.kernel == name for way in ways)]
    return chosen, why + "".join(f"; {name} is taken only where measured" for name in others)
