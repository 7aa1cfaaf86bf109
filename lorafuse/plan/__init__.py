"""Problems → Plan: which backend and kernels run an operator, and why. Standard library only; usable on any machine."""

from lorafuse.plan.candidate import Candidate, KernelConfig
from lorafuse.plan.choose import Plan, clear_cache, interpreted_as, modelled, no_grouped_mm, override, select, state
from lorafuse.plan.devices import DEVICES, DeviceSpec, find, recognize
from lorafuse.plan.problem import Problem

__all__ = [
    "DEVICES",
    "Candidate",
    "DeviceSpec",
    "KernelConfig",
    "Plan",
    "Problem",
    "clear_cache",
    "find",
    "interpreted_as",
    "modelled",
    "no_grouped_mm",
    "override",
    "recognize",
    "select",
    "state",
]
