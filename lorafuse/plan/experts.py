"""The choice of backend for the experts of a block, or for one grouped linear layer, with its reasons."""

from collections.abc import Sequence
from functools import lru_cache

from lorafuse.plan import experts_cost, grouped
from lorafuse.plan.config import KernelConfig
from lorafuse.plan.device import DeviceSpec
from lorafuse.plan.experts_cost import BASELINES, WAYS, ExpertsProblem, configs
from lorafuse.plan.grouped import GroupedProblem, no_grouped_mm
from lorafuse.plan.ragged import ragged_config
from lorafuse.plan.select import Candidate, Plan, runs_kernels

__all__ = ["BASELINES", "WAYS", "ExpertsProblem", "GroupedProblem", "configs", "select_experts"]

_BACKENDS = ("eager", "triton")


@lru_cache(maxsize=4096)
def select_experts(
    problem: ExpertsProblem | GroupedProblem, device: DeviceSpec | None, available: tuple[tuple[str, str], ...]
) -> Plan:
    """The plan of a problem on a GPU, or off GPUs when `device` is None.

    `available` pairs every backend that may be chosen with "" or the reason why it cannot run here. Kernels are
    "grouped_mm" and "loop", the two ways of the eager backend, and "ragged", Triton's. The least modelled time wins,
    but eager's loop, which waits for the device, is taken only where nothing else runs. Raises ValueError when no
    backend can run the problem.
    """
    reasons, ways = [], []
    for backend, reason in available:
        if not reason and backend not in _BACKENDS:
            reason = "it has no kernels for groups of rows"
        if not reason and backend != "eager":
            reason = _cannot(problem, device)
        if reason:
            reasons.append(f"{backend}: {reason}")
        elif backend == "eager":
            missing = _no_grouped_mm(problem, device)
            if missing:
                reasons.append(f"eager grouped_mm: {missing}")
            else:
                ways.append(_way("eager", "grouped_mm", problem, device))
            ways.append(_way("eager", "loop", problem, device))
        else:
            ways.append(_way("triton", "ragged", problem, device))
    if not ways:
        raise ValueError(f"no backend can run {problem}: " + "; ".join(reasons))
    chosen = _fastest([way for way in ways if way.kernel != "loop"] or ways)
    for way in ways:
        if way is not chosen and way.seconds:
            waits = ", waits for the device to say where groups end" if way.kernel == "loop" else ""
            reasons.append(f"{way.backend} {way.kernel}: not chosen, model {way.seconds * 1e6:.0f} us{waits}")
    why = "runs every problem, one group after the other" if chosen.kernel == "loop" else chosen.kernel
    model = f", model {chosen.seconds * 1e6:.0f} us with rows spread evenly" if chosen.seconds else ""
    reasons.append(f"{chosen.backend}: {why}{model}")
    return Plan(chosen.backend, chosen.kernel, chosen.configs, tuple(reasons), tuple(ways))


def _fastest(ways: Sequence[Candidate]) -> Candidate:
    return min(ways, key=lambda way: way.seconds)


def _cannot(problem: ExpertsProblem | GroupedProblem, device: DeviceSpec | None) -> str:
    """Why no backend but eager runs a problem; "" if one may."""
    if device is None:
        return "runs on CUDA devices, the input is not on one"
    if not runs_kernels(device.arch, problem.dtype):
        return f"its kernels do not run {problem.dtype} on {device.name}, sm_{device.arch}"
    return "" if problem.S else "there are no rows"


def _no_grouped_mm(problem: ExpertsProblem | GroupedProblem, device: DeviceSpec | None) -> str:
    if device is None:
        return "torch's grouped_mm has fast kernels on CUDA devices, the input is not on one"
    if not problem.S:
        return "there are no rows"
    return no_grouped_mm(problem.dtype, problem.E, problem.aligned, device.arch)


def _way(backend: str, kernel: str, problem: ExpertsProblem | GroupedProblem, device: DeviceSpec | None) -> Candidate:
    if device is None or not problem.S:
        return Candidate(backend, kernel, (), ())
    if isinstance(problem, ExpertsProblem):
        way = {"grouped_mm": experts_cost.eager_grouped, "loop": experts_cost.eager_loop, "ragged": experts_cost.triton}
        parts = way[kernel](problem, device, problem.backward)
    else:
        one = {"grouped_mm": grouped.eager_grouped, "loop": grouped.eager_loop, "ragged": grouped.triton}
        parts = one[kernel](problem, device)
    return Candidate(backend, kernel, _configs(kernel, problem, device), parts)


def _configs(kernel: str, problem: ExpertsProblem | GroupedProblem, device: DeviceSpec) -> tuple[KernelConfig, ...]:
    if kernel != "ragged":
        return ()
    if isinstance(problem, ExpertsProblem):
        return tuple(configs(problem, device).values())
    return (ragged_config("ragged", problem.problem, problem.E, device),)
