"""Which backend runs a call, and its plan: asked once, for each direction, when the operator runs."""

import torch

from lorafuse.backends import aten, base, problems
from lorafuse.backends.protocol import Backend, Problems
from lorafuse.plan import Plan, Problem, select

__all__ = ["ATEN", "choose", "plan_for"]

ATEN = aten.BACKEND
# the one backend of a device type, which needs no plan
_ONLY = {"cpu": base.candidates("cpu")[-1]}


def plan_for(problem: Problem | tuple[Problem, ...], device: torch.device) -> Plan:
    """The plan that backend "auto" follows on a device of this machine."""
    available = tuple((name, base.availability(name).reason) for name in base.BACKENDS)
    return select(problem, problems.device_spec(device) if ("triton", "") in available else None, available)


def choose(backend: str, x: torch.Tensor, operator: Problems, is_empty: bool = False) -> tuple[Backend, Plan | None]:
    """The backend that runs a call on x and the plan of the operator; `operator()` is what is planned.

    `is_empty` is a call with nothing to launch over, which plain torch runs after the backend has checked x.
    """
    name = base.resolve(backend)
    if name == "auto":
        name = _ONLY.get(x.device.type) or "auto"
    if name == "eager":
        return ATEN, None if is_empty or x.is_cpu else ATEN.plan(operator, x.device)
    if name != "auto":
        run = base.load(name)
        run.check(x)
        return (ATEN, None) if is_empty else (run, run.plan(operator, x.device))
    if is_empty:
        return ATEN, None
    plan = plan_for(operator(), x.device)
    return (ATEN if plan.backend == "eager" else base.load(plan.backend)), plan
