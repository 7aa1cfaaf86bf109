"""The choice of a backend for a problem, with its reasons."""

from dataclasses import dataclass
from functools import lru_cache

from lorafuse.plan.problem import Problem

__all__ = ["Plan", "select"]


@dataclass(frozen=True)
class Plan:
    """The choice for one problem: `backend`, its `kernel`, the kernel's `config`, and one line per reason."""

    backend: str
    kernel: str
    config: object = None
    reasons: tuple[str, ...] = ()


@lru_cache(maxsize=4096)
def select(problem: Problem, available: tuple[tuple[str, str], ...]) -> Plan:
    """The plan of `problem`. `available` pairs every known backend with "" or the reason why it cannot run here.

    Raises ValueError when no backend can run the problem.
    """
    reasons = []
    for backend, reason in available:
        if backend == "eager":
            continue
        if problem.device_type != "cuda":
            reasons.append(f"{backend}: runs on CUDA devices, the input is on {problem.device_type}")
        elif reason:
            reasons.append(f"{backend}: {reason}")
    if ("eager", "") not in available:
        raise ValueError(f"no backend can run {problem}: " + "; ".join(reasons))
    reasons.append("eager: runs every problem; low-rank product first, base GEMM accumulated onto it (beta = 1)")
    return Plan("eager", "aten_beta1", None, tuple(reasons))
