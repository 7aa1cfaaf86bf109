"""What the planner is told of the machine and of a call's operands."""

import math
from functools import cache

import torch
from torch import Tensor

from lorafuse.backends import base
from lorafuse.plan import DeviceSpec, Problem, probe, runs_kernels

__all__ = ["device_spec", "grouped_backend", "linear_problem"]


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
    x: Tensor, w: Tensor, a: Tensor, bias: bool, dropout: bool, gradients: tuple[str, ...] = ()
) -> Problem:
    """The problem of operands `x [..., K]` (or dy `[..., N]`), `w [N, K]`, `a [R, K]`."""
    return Problem(
        M=math.prod(x.shape[:-1]),
        N=w.shape[0],
        K=w.shape[1],
        R=a.shape[0],
        dtype=str(x.dtype).removeprefix("torch."),
        adapter_dtype=str(a.dtype).removeprefix("torch."),
        bias=bias,
        dropout=dropout,
        gradients=gradients,
        aligned=_rows_are_aligned(x) and _rows_are_aligned(w),
    )


def grouped_backend(x: Tensor) -> str:
    """The backend of "auto" for layers of many groups: on GPUs the kernels, where they can run x.

    Eager waits there for the device to say where the groups end.
    """
    device = device_spec(x.device)
    if device is None or not runs_kernels(device.arch, str(x.dtype).removeprefix("torch.")):
        return "eager"
    return "triton" if base.availability("triton").ok else "eager"


def _rows_are_aligned(t: Tensor) -> bool:
    """Whether every row of the matrix that `t` is, its leading sizes flattened, starts on a 16-byte boundary."""
    size = t.element_size()
    return t.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in t.stride()[:-1])
