"""What the planner is told of the machine and of a call's operands."""

import math
from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor

from lorafuse.backends import base
from lorafuse.plan import DeviceSpec, ExpertsProblem, GroupedProblem, Plan, Problem, probe, select_experts
from lorafuse.plan.grouped import no_grouped_mm

__all__ = [
    "device_spec",
    "experts_problem",
    "grouped_backend",
    "grouped_problem",
    "linear_problem",
    "plan_grouped",
    "runs_grouped_mm",
]


@cache
def device_spec(device: torch.device) -> DeviceSpec | None:
    """What the planner needs to know of a CUDA device; None for any other kind."""
    if device.type != "cuda":
        return None
    # not at the top: without Triton there is no kernel to plan for
    from triton.runtime import driver

    found = torch.cuda.get_device_properties(device)
    rates = driver.active.utils.get_device_properties(device.index or 0)
    return probe(
        name=found.name,
        capability=(found.major, found.minor),
        sms=found.multi_processor_count,
        smem_per_block=rates["max_shared_mem"],
        l2_bytes=found.L2_cache_size,
        clock_hz=rates["sm_clock_rate"] * 1e3,
        # kHz and bits; two transfers a clock
        memory_bandwidth=2 * rates["mem_clock_rate"] * 1e3 * rates["mem_bus_width"] / 8,
    )


def linear_problem(
    x: Tensor, w: Tensor, a: Tensor, bias: bool, dropout: bool, gradients: tuple[str, ...] = (), wide: bool = False
) -> Problem:
    """The problem of operands `x [..., K]` (or dy `[..., N]`), `w [N, K]`, `a [R, K]`."""
    N, K = w.shape
    aligned = _rows_are_aligned(x) and _rows_are_aligned(w)
    tokens = math.prod(x.shape[:-1])
    return _problem(tokens, N, K, a.shape[0], x.dtype, a.dtype, bias, dropout, gradients, aligned, wide)


# every call of a layer asks, and making one takes as long as a launch
@lru_cache(maxsize=4096)
def _problem(
    M: int, N: int, K: int, R: int, dtype: torch.dtype, adapter_dtype: torch.dtype, bias: bool, dropout: bool,
    gradients: tuple[str, ...], aligned: bool, wide: bool,
) -> Problem:  # fmt: skip
    return Problem(M, N, K, R, _name(dtype), _name(adapter_dtype), bias, dropout, gradients, aligned, wide)


def experts_problem(
    x: Tensor,
    k: int,
    up: Tensor,
    down: Tensor,
    up_a: Tensor | None,
    down_a: Tensor | None,
    transposed: bool,
    backward: bool,
) -> ExpertsProblem:
    """The problem of a block: x `[T, H]`, up `[E, U, H]` and down `[E, H, I]`, or transposed, a `[E, R, …]` or None."""
    (E, H, I), U = (down.mT if transposed else down).shape, up.shape[2 if transposed else 1]
    factors = [a for a in (up_a, down_a) if a is not None]
    return ExpertsProblem(
        T=x.shape[0],
        E=E,
        k=k,
        H=H,
        I=I,
        # both projections are planned with the larger rank
        R=max((a.shape[1] for a in factors), default=1),
        dtype=_name(x.dtype),
        adapter_dtype=_name((factors[0] if factors else x).dtype),
        gated=U != I,
        aligned=_weights_are_aligned(up, down),
        backward=backward,
    )


def grouped_problem(x: Tensor, w: Tensor, a: Tensor | None, transposed: bool, backward: bool) -> GroupedProblem:
    """The problem of a grouped linear layer: x `[S, K]` or dy `[S, N]`, w `[E, N, K]` or transposed, a `[E, R, K]`."""
    E, N, K = (w.mT if transposed else w).shape
    rank, dtypes = 1 if a is None else a.shape[1], (_name(x.dtype), _name((x if a is None else a).dtype))
    return GroupedProblem(x.shape[0], E, N, K, rank, *dtypes, aligned=_weights_are_aligned(w), backward=backward)


def plan_grouped(problem: ExpertsProblem | GroupedProblem, device: torch.device) -> Plan:
    """The plan that backend "auto" follows for layers of many groups on a device of this machine."""
    available = tuple((name, base.availability(name).reason) for name in base.BACKENDS)
    return select_experts(problem, device_spec(device) if ("triton", "") in available else None, available)


def grouped_backend(device: torch.device, problem: Callable[[], ExpertsProblem | GroupedProblem]) -> str:
    """The backend of "auto" for layers of many groups: that of the plan where there is more than one."""
    able = base.candidates(device.type)
    return able[0] if len(able) == 1 else plan_grouped(problem(), device).backend


def runs_grouped_mm(x: Tensor, *weights: Tensor) -> bool:
    """Whether torch has a fast kernel of grouped_mm for these stacks `[E, …]`, in x's dtype and on its device."""
    if not x.is_cuda:
        return False
    return not no_grouped_mm(_name(x.dtype), weights[0].shape[0], _weights_are_aligned(*weights), _arch(x.device))


@cache
def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _weights_are_aligned(*weights: Tensor) -> bool:
    """Whether each is a stack of matrices with contiguous rows or columns, which start on 16-byte boundaries, and so do
    the rows of what they are multiplied with.
    """
    for w in weights:
        rows = w if w.stride(2) == 1 else w.mT
        sizes = all(size * w.element_size() % 16 == 0 for size in w.shape[1:])
        if not sizes or rows.stride(2) != 1 or rows.stride(1) < rows.shape[2] or not _rows_are_aligned(rows):
            return False
    return True


def _rows_are_aligned(t: Tensor) -> bool:
    """Whether every row of the matrix that `t` is, its leading sizes flattened, starts on a 16-byte boundary."""
    size = t.element_size()
    return t.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in t.stride()[:-1])
