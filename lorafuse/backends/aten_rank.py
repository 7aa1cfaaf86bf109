"""Products with a side of the rank by `lorafuse._cpu` (csrc/cpu/rank.cpp), in fp32 on CPUs with AVX2 and FMA.

A function returns None or False where torch is to multiply: for other dtypes and devices, tensors without an address,
sizes that do not fit (torch raises), CPUs with AVX-512, ranks that are no multiples of 8 or larger than 64, and
matrices of fewer elements than pay for the call. Sums have another order than torch's, the same for the same sizes and
number of threads.
"""

from functools import cache
from typing import Any

from torch import Tensor

from lorafuse.formats import cpu

__all__ = [
    "MANY",
    "OF_THREAD",
    "SOME",
    "add",
    "adds",
    "factor_of",
    "functions",
    "outer",
    "project",
    "project_outer",
    "why_not",
]

_STEP, _LARGEST = 8, 64
# elements of wide, from which on the call pays: of `project` and `outer`, and of `add` and `project_outer`
MANY, SOME = 1 << 18, 1 << 14
# products of a thread, 10 us of its time
OF_THREAD = 1 << 18
# of a call that reads, where one of its products is left out
_NO_PROJECTION, _NO_SUMS = (None, 0, 0, 1.0, None, 0), (None, 0, 1.0, None, 0, 0)


@cache
def functions() -> tuple[Any, Any] | None:
    """`lorafuse_rank_read` and `lorafuse_rank_add`; None where they do not run."""
    library = cpu.library()
    if library is None or not library.lorafuse_rank_runs():
        return None
    return library.lorafuse_rank_read, library.lorafuse_rank_add


def _here() -> tuple[Any, Any] | None:
    return functions() if cpu.has_addresses() else None


def why_not() -> str:
    """Why torch multiplies by the rank on this CPU; "" where these functions do."""
    if reason := cpu.why_not():
        return reason
    return "" if functions() else "they are for CPUs with AVX2 and FMA and without AVX-512"


def project(x: Tensor, a: Tensor, is_transposed: bool, scale: float) -> Tensor | None:
    """`scale · x aᵀ`, as the primitive of the protocol."""
    (M, C), R = x.shape, a.shape[1 if is_transposed else 0]
    calls = _here() if _pays(M * C, R, MANY) and _is_rows(x) else None
    if calls is None or (factor := factor_of(a, is_transposed, R, C)) is None:
        return None
    xa = x.new_empty((M, R))
    _read(calls, x, R, (*factor, scale, xa.data_ptr(), R), _NO_SUMS)
    return xa


def adds(xa: Tensor, b: Tensor, is_transposed: bool, M: int, C: int) -> bool:
    """Whether `add` runs for a y `[M, C]` that torch makes."""
    R = xa.shape[1]
    calls = _here() if _pays(M * C, R, SOME) and xa.shape[0] == M and _is_rows(xa) else None
    return calls is not None and factor_of(b, not is_transposed, R, C) is not None


def add(y: Tensor, xa: Tensor, b: Tensor, is_transposed: bool, scale: float) -> Tensor:
    """y, to which `scale · xa bᵀ` was added, for operands that `adds`."""
    (M, C), R, calls = y.shape, xa.shape[1], functions()
    factor = factor_of(b, not is_transposed, R, C)
    assert calls is not None
    assert factor is not None
    assert y.stride(1) == 1
    threads = cpu.threads_for(M * C * R, OF_THREAD)
    calls[1](y.data_ptr(), y.stride(0), M, C, R, xa.data_ptr(), xa.stride(0), *factor, scale, threads)
    return y


def outer(narrow: Tensor, wide: Tensor, like: Tensor, is_transposed: bool, scale: float) -> Tensor | None:
    """`scale · narrowᵀ wide`, as the primitive of the protocol."""
    (M, C), (rows, R) = wide.shape, narrow.shape
    if not (_pays(M * C, R, MANY) and rows == M and _is_rows(wide) and _is_rows(narrow) and cpu.is_plain_fp32(like)):
        return None
    if (calls := _here()) is None:
        return None
    sums = wide.new_empty((C, R) if is_transposed else (R, C))
    strides = (R, 1) if is_transposed else (1, C)
    _read(calls, wide, R, _NO_PROJECTION, (narrow.data_ptr(), narrow.stride(0), scale, sums.data_ptr(), *strides))
    return sums


def project_outer(dy: Tensor, b: Tensor, xa: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """`(scale · dy b, scale · dyᵀ xa)` from one read of dy."""
    (M, C), R = dy.shape, b.shape[1]
    calls = _here() if _pays(M * C, R, SOME) and xa.shape == (M, R) and _is_rows(dy) and _is_rows(xa) else None
    if calls is None or (factor := factor_of(b, True, R, C)) is None:
        return None
    dyb, db = dy.new_empty((M, R)), dy.new_empty((C, R))
    sums = xa.data_ptr(), xa.stride(0), scale, db.data_ptr(), R, 1
    _read(calls, dy, R, (*factor, scale, dyb.data_ptr(), R), sums)
    return dyb, db


def _pays(elements: int, R: int, least: int) -> bool:
    return elements >= least and R % _STEP == 0 and R <= _LARGEST


def _read(calls: tuple[Any, Any], wide: Tensor, R: int, projection: tuple[Any, ...], sums: tuple[Any, ...]) -> None:
    """`lorafuse_rank_read` of wide `[M, C]`."""
    M, C = wide.shape
    threads = cpu.threads_for(M * C * R, OF_THREAD)
    calls[0](wide.data_ptr(), wide.stride(0), M, C, R, *projection, *sums, threads)


def factor_of(f: Tensor, is_tall: bool, R: int, C: int) -> tuple[int, int, int] | None:
    """Address and strides, of C and of R, of a factor `[C, R]` where it `is_tall`, else `[R, C]`. None for other sizes,
    where neither stride is 1, and for what has no address.
    """
    column, rank = f.stride() if is_tall else reversed(f.stride())
    if f.shape != ((C, R) if is_tall else (R, C)) or (column != 1 and rank != 1) or not cpu.is_plain_fp32(f):
        return None
    return f.data_ptr(), column, rank


def _is_rows(t: Tensor) -> bool:
    """Whether it can be read row by row."""
    return cpu.is_plain_fp32(t) and t.stride(1) == 1
