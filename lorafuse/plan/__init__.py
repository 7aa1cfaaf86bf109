"""Problem → Plan: which backend and kernels run a call, and why. Standard library only; usable on any machine."""

from lorafuse.plan.config import KernelConfig
from lorafuse.plan.device import DEVICES, DeviceSpec, find, probe
from lorafuse.plan.experts import ExpertsProblem, GroupedProblem, select_experts
from lorafuse.plan.problem import Problem
from lorafuse.plan.ragged import ragged_config
from lorafuse.plan.select import Candidate, Plan, forget, modelled, only, runs_kernels, select

__all__ = [
    "DEVICES",
    "Candidate",
    "DeviceSpec",
    "ExpertsProblem",
    "GroupedProblem",
    "KernelConfig",
    "Plan",
    "Problem",
    "find",
    "forget",
    "modelled",
    "only",
    "probe",
    "ragged_config",
    "runs_kernels",
    "select",
    "select_experts",
]
