"""Which backend runs a call, and its plan: asked once, for each direction, when the operator runs."""

import threading
from collections.abc import Iterable

import torch
from torch import Tensor

from lorafuse.backends import aten, base, problems
from lorafuse.backends.protocol import Backend, Problems
from lorafuse.philox import check_dropout_rng
from lorafuse.plan import Plan, Problem, select

__all__ = [
    "ATEN",
    "SOLE_BACKEND",
    "choose",
    "current_backend",
    "for_masks",
    "latest",
    "plan_for",
    "requested_backend",
]

ATEN = aten.BACKEND


class _Latest(threading.local):
    """The backend that an operator of this thread chose last, for who counts calls."""

    name = ATEN.name


latest = _Latest()
# the one backend of a device type, which needs no plan
SOLE_BACKEND = {"cpu": base.candidates("cpu")[-1]}


def plan_for(problem: Problem | tuple[Problem, ...], device: torch.device) -> Plan:
    """The plan that backend "auto" follows on a device of this machine."""
    available = tuple((name, base.availability(name).reason) for name in base.BACKENDS)
    return select(problem, problems.device_spec(device) if ("triton", "") in available else None, available)


def choose(backend: str, x: Tensor, operator: Problems, *weights: Tensor) -> tuple[Backend, Plan | None]:
    """The backend that runs a call on x, and the plan of the operator; `operator()` is what is planned.

    Where x or a weight is empty there is nothing to launch over: plain torch runs it, after the backend that was asked
    for has checked x.
    """
    latest.name = ATEN.name
    name, is_cpu = base.current() if backend == "current" else backend, x.is_cpu
    if name == "auto":
        name = SOLE_BACKEND.get("cpu" if is_cpu else x.device.type, name)
    if is_cpu and name == "eager":
        return ATEN, None
    is_empty = not x.numel() or not all(w.numel() for w in weights)
    if name == "auto" and not is_empty:
        plan = plan_for(operator(), x.device)
        latest.name = plan.backend
        return (ATEN if plan.backend == "eager" else base.load(plan.backend)), plan
    if name in ("auto", "eager"):
        return ATEN, None if is_empty else ATEN.plan(operator, x.device)
    run = base.load(name)
    run.check(x)
    if is_empty:
        return ATEN, None
    latest.name = name
    return run, run.plan(operator, x.device)


def current_backend() -> str:
    """The backend of a call that names none."""
    # Dynamo reads no context variables: a compiled graph looks when it runs
    return "current" if torch.compiler.is_compiling() else base.current()


def requested_backend(backend: str | None) -> str:
    """`backend` where it can run here, that of `use_backend` for None. Raises ValueError or BackendUnavailable."""
    return current_backend() if backend is None else base.require(backend)


def for_masks(backend: str, seeds: Iterable[Tensor | None]) -> str:
    """The backend of a call with these seeds: "eager" where one is a mask, which no kernel reads.

    Raises ValueError for a mask and another backend that was asked for by name.
    """
    if any(seed is not None and seed.dtype is torch.bool for seed in seeds):
        check_dropout_rng("torch", backend)
        return "eager"
    return backend
