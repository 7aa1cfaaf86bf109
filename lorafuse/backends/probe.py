"""From the machine and a call's operands to what the planner decides by."""

import math
from functools import cache, lru_cache

import torch
from torch import Tensor

from lorafuse.plan import DeviceSpec, Problem, no_grouped_mm, recognize

__all__ = ["device_spec", "experts_problems", "grouped_problem", "linear_problem", "runs_grouped_mm"]

# the gradients of a backward pass over ragged rows
_GRADIENTS = ("dx", "da", "db")


@cache
def device_spec(device: torch.device) -> DeviceSpec | None:
    """What the planner needs to know of a CUDA device; None for any other kind."""
    if device.type != "cuda":
        return None
    # not at the top: without Triton there is no kernel to plan for
    from triton.runtime import driver

    properties = torch.cuda.get_device_properties(device)
    rates = driver.active.utils.get_device_properties(device.index or 0)
    return recognize(
        name=properties.name,
        capability=(properties.major, properties.minor),
        sms=properties.multi_processor_count,
        smem_per_block=rates["max_shared_mem"],
        l2_bytes=properties.L2_cache_size,
        clock_hz=rates["sm_clock_rate"] * 1e3,
        # kHz and bits; two transfers a clock
        memory_bandwidth=2 * rates["mem_clock_rate"] * 1e3 * rates["mem_bus_width"] / 8,
    )


def linear_problem(
    x: Tensor, w: Tensor, a: Tensor, bias: bool, dropout: bool, gradients: tuple[str, ...] = (), wide: bool = False,
    format: str = "dense",
) -> Problem:  # fmt: skip
    """The problem of operands `x [..., K]` (or dy `[..., N]`), `w [N, K]` as its format stores it, `a [R, K]`."""
    N, K = w.shape
    aligned = _rows_are_aligned(x) and _rows_are_aligned(w)
    tokens = math.prod(x.shape[:-1])
    return _problem(tokens, N, K, a.shape[0], x.dtype, a.dtype, bias, dropout, gradients, aligned, wide, format=format)


# every call of a layer needs one, and making it takes as long as a launch
@lru_cache(maxsize=4096)
def _problem(
    M: int, N: int, K: int, R: int, dtype: torch.dtype, adapter_dtype: torch.dtype, bias: bool, dropout: bool,
    gradients: tuple[str, ...], aligned: bool, wide: bool, groups: int = 1, is_ragged: bool = False, choices: int = 1,
    format: str = "dense", epilogue: str = "",
) -> Problem:  # fmt: skip
    names = _name(dtype), _name(adapter_dtype)
    return Problem(
        M, N, K, R, *names, bias, dropout, gradients, aligned, wide, groups, is_ragged, choices, format, epilogue
    )


def grouped_problem(
    x: Tensor, w: Tensor, a: Tensor | None, transposed: bool, backward: bool, format: str = "dense"
) -> Problem:
    """The problem of a grouped linear layer: x `[S, K]` or dy `[S, N]`, w `[E, N, K]` or transposed, a `[E, R, K]`."""
    return _ragged(x, x.shape[0], w, a, transposed, backward, _fit_descriptors(w), format=format)


def experts_problems(
    x: Tensor, k: int, up: Tensor, down: Tensor, up_a: Tensor | None, down_a: Tensor | None, transposed: bool,
    gated: bool | None, backward: bool, format: str = "dense",
) -> tuple[Problem, Problem]:  # fmt: skip
    """`(gate_up, down)` of a block in either direction: x `[T, H]`, k experts a token, up `[E, U, H]` and down
    `[E, H, I]`, or transposed, a `[E, R, …]` or None.

    `gated` says whether the activation multiplies gate and up; None is an activation that no epilogue computes.
    """
    epilogue = "" if gated is None else "gated" if gated else "activation"
    # where gate and up are read apart, each starts on a boundary if the rows of down do
    aligned, rows = _fit_descriptors(up, down), x.shape[0] * k
    of_up, of_down = ("", epilogue) if backward else (epilogue, "")
    return (
        _ragged(x, rows, up, up_a, transposed, backward, aligned, k, of_up, format),
        _ragged(x, rows, down, down_a, transposed, backward, aligned, k, of_down, format),
    )


def _ragged(
    x: Tensor, rows: int, w: Tensor, a: Tensor | None, transposed: bool, backward: bool, aligned: bool,
    choices: int = 1, epilogue: str = "", format: str = "dense",
) -> Problem:  # fmt: skip
    E, *sizes = w.shape
    N, K = reversed(sizes) if transposed else sizes
    rank, adapter = (1, x.dtype) if a is None else (a.shape[1], a.dtype)
    return _problem(
        rows, N, K, rank, x.dtype, adapter, bias=False, dropout=False, gradients=_GRADIENTS if backward else (),
        aligned=aligned, wide=False, groups=E, is_ragged=True, choices=choices, format=format, epilogue=epilogue,
    )  # fmt: skip


def runs_grouped_mm(x: Tensor, *weights: Tensor) -> bool:
    """Whether torch has a fast kernel of grouped_mm for these stacks `[E, …]`, in x's dtype and on its device."""
    if not x.is_cuda:
        return False
    one = _ragged(x, max(x.shape[0], 1), weights[0], None, False, False, _weights_are_aligned(*weights))
    return not no_grouped_mm(one, _arch(x.device))


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


def _fit_descriptors(*weights: Tensor) -> bool:
    """The same of stacks that a tensor descriptor can describe: none whose matrices are one, with a stride of 0."""
    return _weights_are_aligned(*weights) and all(w.stride(0) > 0 for w in weights)


def _rows_are_aligned(t: Tensor) -> bool:
    """Whether every row of the matrix that `t` is, its leading sizes flattened, starts on a 16-byte boundary."""
    size = t.element_size()
    return t.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in t.stride()[:-1])
