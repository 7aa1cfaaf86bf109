"""From the machine and a call's operands to what the planner decides by."""

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from lorafuse.formats.sizes import DECODED_IN_LOOP
from lorafuse.operands import Weight
from lorafuse.plan import DeviceSpec, Problem, recognize
from lorafuse.plan.configs_triton import MOST_PACKED_ROWS

__all__ = [
    "arch",
    "device_spec",
    "experts_problems",
    "grouped_problem",
    "linear_problem",
    "multi_problem",
    "multi_settings",
    "siblings_problem",
]

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
    x: Tensor, w: Weight, a: Tensor, bias: bool, dropout: bool, gradients: tuple[str, ...] = (), wide: bool = False
) -> Problem:
    """The problem of matrices `x [M, K]` (or dy `[M, N]`), w `[N, K]` and `a [R, K]`, in any strides."""
    N, K = w.sizes
    aligned = _rows_are_aligned(x) and (w.format != "dense" or _rows_are_aligned(w.data))
    packed = x.shape[0] <= MOST_PACKED_ROWS and _is_packed(w)
    return _problem(
        x.shape[0], N, K, a.shape[0], x.dtype, a.dtype, bias, dropout, gradients, aligned, wide, format=w.format_name,
        packed=packed,
    )  # fmt: skip


def siblings_problem(
    x: Tensor, weights: Sequence[Weight], adapters: Sequence[Tensor], bias: bool, dropout: bool,
    gradients: tuple[str, ...] = (), wide: bool = False, also: Sequence[Weight] = (), epilogue: str = "",
) -> Problem:  # fmt: skip
    """The problem of layers of one x `[M, K]`, or of their dy, as that of one layer with all their out features and
    ranks; `adapters` are the a `[R, K]` of those that have one. `also` are weights that the same backend reads after.
    """
    size = x.element_size()
    aligned = _rows_are_aligned(x) and all(
        w.sizes[0] * size % 16 == 0 and (w.format != "dense" or _rows_are_aligned(w.data)) for w in (*weights, *also)
    )
    formats = {w.format_name for w in weights}
    return _problem(
        x.shape[0], sum(w.sizes[0] for w in weights), weights[0].sizes[1], sum(a.shape[0] for a in adapters) or 1,
        x.dtype, adapters[0].dtype if adapters else x.dtype, bias, dropout, gradients, aligned, wide,
        format=next((name for name in sorted(formats) if name != "dense"), "dense"), epilogue=epilogue,
        siblings=len(weights),
    )  # fmt: skip


# every call of a layer needs one, and making it takes as long as a launch
@lru_cache(maxsize=4096)
def _problem(
    M: int, N: int, K: int, R: int, dtype: torch.dtype, adapter_dtype: torch.dtype, bias: bool, dropout: bool,
    gradients: tuple[str, ...], aligned: bool, wide: bool, groups: int = 1, is_ragged: bool = False, choices: int = 1,
    format: str = "dense", epilogue: str = "", siblings: int = 1, packed: bool = False,
) -> Problem:  # fmt: skip
    of, to = _name(dtype), _name(adapter_dtype)
    return Problem(
        M, N, K, R, of, to, bias, dropout, gradients, aligned, wide, groups, is_ragged, choices, format, epilogue,
        siblings=siblings, packed=packed,
    )  # fmt: skip


def grouped_problem(x: Tensor, w: Weight, a: Tensor | None, backward: bool) -> Problem:
    """The problem of a grouped linear layer: x `[S, K]` or dy `[S, N]`, w `[E, N, K]`, a `[E, R, K]`."""
    return _ragged(x, x.shape[0], w, a, backward, _fit_descriptors(w))


def multi_problem(x: Tensor, w: Weight, a: Tensor, backward: bool, wide: bool) -> Problem:
    """The problem of a layer whose rows are of many adapters: x `[S, K]` or dy `[S, N]`, w `[(E,) N, K]`, a `[…, K]`.

    Sizes and dropout are not those of the call: an adapter's bits depend on the configuration, which must be one
    whatever its neighbours are.
    """
    stack = Weight(w.data[None], w.is_transposed) if w.format == "dense" and w.data.dim() == 2 else w
    aligned = _fit_descriptors(stack) and not any(size * x.element_size() % 16 for size in w.sizes)
    return multi_settings(_name(x.dtype), _name(a.dtype), aligned, backward, wide)


@cache
def multi_settings(dtype: str, adapter_dtype: str, aligned: bool, backward: bool, wide: bool = False) -> Problem:
    """What layers of many adapters are planned by: 64 rows and 32 ranks an adapter of 64, on a 4096 x 4096 layer."""
    return Problem(
        4096, 4096, 4096, 32, dtype, adapter_dtype, dropout=True, gradients=_GRADIENTS if backward else (),
        aligned=aligned, wide=wide, groups=64, is_ragged=True,
    )  # fmt: skip


def experts_problems(
    x: Tensor, k: int, up: Weight, down: Weight, up_a: Tensor | None, down_a: Tensor | None, gated: bool | None,
    backward: bool,
) -> tuple[Problem, Problem]:  # fmt: skip
    """`(gate_up, down)` of a block in either direction: x `[T, H]`, k experts a token, up `[E, U, H]` and down
    `[E, H, I]`, a `[E, R, …]` or None.

    `gated` says whether the activation multiplies gate and up; None is an activation that no epilogue computes.
    """
    epilogue = "" if gated is None else "gated" if gated else "activation"
    # where gate and up are read apart, each starts on a boundary if the rows of down do
    aligned, rows = _fit_descriptors(up, down), x.shape[0] * k
    of_up, of_down = ("", epilogue) if backward else (epilogue, "")
    return (
        _ragged(x, rows, up, up_a, backward, aligned, k, of_up),
        _ragged(x, rows, down, down_a, backward, aligned, k, of_down),
    )


def _ragged(
    x: Tensor, rows: int, w: Weight, a: Tensor | None, backward: bool, aligned: bool, choices: int = 1,
    epilogue: str = "",
) -> Problem:  # fmt: skip
    (N, K), E = w.sizes, w.stored[0]
    rank, adapter = (1, x.dtype) if a is None else (a.shape[1], a.dtype)
    return _problem(
        rows, N, K, rank, x.dtype, adapter, bias=False, dropout=False, gradients=_GRADIENTS if backward else (),
        aligned=aligned, wide=False, groups=E, is_ragged=True, choices=choices, format=w.format_name, epilogue=epilogue,
    )  # fmt: skip


def _is_packed(w: Weight) -> bool:
    """Whether the codes of a quantized w are contiguous and each row begins with a byte."""
    if w.format_name not in DECODED_IN_LOOP or (known := w.kernel) is None:
        return False
    *_, rows, columns = w.stored
    return columns % 2 == 0 or known[1]["code"].numel() == rows * columns


@cache
def arch(device: torch.device) -> int:
    """90 for a CUDA device of compute capability 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fit_descriptors(*weights: Weight) -> bool:
    """Whether each is a stack of matrices with contiguous rows or columns, which start on 16-byte boundaries, as do the
    rows of what they are multiplied with; and no stack repeats one matrix by a stride of 0. A decoded stack is.
    """
    for weight in weights:
        if weight.format != "dense":
            continue
        w = weight.data
        rows = w if w.stride(2) == 1 else w.mT
        sizes = all(size * w.element_size() % 16 == 0 for size in w.shape[1:])
        if not sizes or rows.stride(2) != 1 or rows.stride(1) < rows.shape[2] or w.stride(0) <= 0:
            return False
        if w.data_ptr() % 16 or any(stride * w.element_size() % 16 for stride in rows.stride()[:-1]):
            return False
    return True


def _rows_are_aligned(t: Tensor) -> bool:
    """Whether every row of the matrix `t` starts on a 16-byte boundary, or is copied to where it does before kernels
    read it (`lorafuse.operands.contiguous_rows`).
    """
    if t.stride(1) != 1 or (t.stride(0) < t.shape[1] and t.shape[0] > 1):
        return True
    return t.data_ptr() % 16 == 0 and (t.shape[0] == 1 or t.stride(0) * t.element_size() % 16 == 0)
