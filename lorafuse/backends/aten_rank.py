"""Products with a side of the rank by `lorafuse._cpu` (csrc/cpu/rank.cpp), in fp32 on CPUs with AVX2 and FMA.

A function returns None or False where torch is to multiply: for other dtypes and devices, tensors without an address,
sizes that do not fit (torch raises), CPUs with AVX-512, ranks that are no multiples of 8 or larger than 64, and
matrices of fewer elements than pay for the call. Sums have another order than torch's, the same for the same sizes and
number of threads.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorafuse.formats import cpu

__all__ = ["MANY", "OF_THREAD", "SOME", "add", "adds", "functions", "outer", "project", "project_outer", "why_not"]

_STEP, _LARGEST = 8, 64
# elements of wide, from which on the call pays: of `project` and `outer`, and of `add` and `project_outer`
MANY, SOME = 1 << 18, 1 << 14
# products of a thread, 10 us of its time
OF_THREAD = 1 << 18
_FLOAT, _PLAIN = torch.float32, cpu.PLAIN


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
    (M, C), (R, K) = x.shape, a.shape
    if is_transposed:
        R, K = K, R
    if M * C < MANY or R % _STEP or R > _LARGEST or K != C or not (_is_rows(x) and _is_plain(a)):
        return None
    calls, factor = _here(), _strided(a, is_transposed)
    if calls is None or factor is None:
        return None
    xa = x.new_empty((M, R))
    calls[0](
        x.data_ptr(), x.stride(0), M, C, R, *factor, scale, xa.data_ptr(), R, None, 0, 1.0, None, 0, 0,
        _threads(M * C * R),
    )  # fmt: skip
    return xa


def adds(xa: Tensor, b: Tensor, is_transposed: bool, M: int, C: int) -> bool:
    """Whether `add` runs for a y `[M, C]` that torch makes."""
    R = xa.shape[1]
    if M * C < SOME or R % _STEP or R > _LARGEST or not (_is_rows(xa) and _is_plain(b)):
        return False
    fits = xa.shape[0] == M and b.shape == ((R, C) if is_transposed else (C, R))
    return fits and 1 in b.stride() and _here() is not None


def add(y: Tensor, xa: Tensor, b: Tensor, is_transposed: bool, scale: float) -> Tensor:
    """y, to which `scale · xa bᵀ` was added, for operands that `adds`."""
    calls, factor, (M, C), R = functions(), _strided(b, not is_transposed), y.shape, xa.shape[1]
    assert calls is not None
    assert factor is not None
    assert y.stride(1) == 1
    calls[1](
        y.data_ptr(), y.stride(0), M, C, R, xa.data_ptr(), xa.stride(0), *factor, scale, _threads(M * C * R)
    )  # fmt: skip
    return y


def outer(narrow: Tensor, wide: Tensor, like: Tensor, is_transposed: bool, scale: float) -> Tensor | None:
    """`scale · narrowᵀ wide`, as the primitive of the protocol."""
    (M, C), (rows, R) = wide.shape, narrow.shape
    if (
        M * C < MANY
        or R % _STEP
        or R > _LARGEST
        or rows != M
        or not (_is_rows(wide) and _is_rows(narrow) and _is_plain(like))
    ):
        return None
    calls = _here()
    if calls is None:
        return None
    sums = wide.new_empty((C, R) if is_transposed else (R, C))
    to = (R, 1) if is_transposed else (1, C)
    calls[0](
        wide.data_ptr(), wide.stride(0), M, C, R, None, 0, 0, 1.0, None, 0, narrow.data_ptr(), narrow.stride(0), scale,
        sums.data_ptr(), *to, _threads(M * C * R),
    )  # fmt: skip
    return sums


def project_outer(dy: Tensor, b: Tensor, xa: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """`(scale · dy b, scale · dyᵀ xa)` from one read of dy."""
    (M, C), (N, R) = dy.shape, b.shape
    if M * C < SOME or R % _STEP or R > _LARGEST or not (_is_rows(dy) and _is_rows(xa) and _is_plain(b)):
        return None
    if N != C or xa.shape != (M, R):
        return None
    calls, factor = _here(), _strided(b, True)
    if calls is None or factor is None:
        return None
    dyb, db = dy.new_empty((M, R)), dy.new_empty((C, R))
    calls[0](
        dy.data_ptr(), dy.stride(0), M, C, R, *factor, scale, dyb.data_ptr(), R, xa.data_ptr(), xa.stride(0), scale,
        db.data_ptr(), R, 1, _threads(M * C * R),
    )  # fmt: skip
    return dyb, db


def _threads(products: int) -> int:
    return max(1, min(torch.get_num_threads(), products // OF_THREAD))


def _strided(f: Tensor, is_transposed: bool) -> tuple[int, int, int] | None:
    """Address and strides of a factor `[R, C]`, or `[C, R]` when transposed: of C, of R; None if neither is 1."""
    row, column = f.stride()
    if row != 1 and column != 1:
        return None
    return (f.data_ptr(), row, column) if is_transposed else (f.data_ptr(), column, row)


def _is_plain(t: Tensor) -> bool:
    return type(t) in _PLAIN and t.dtype is _FLOAT and t.is_cpu and not t.is_neg()


def _is_rows(t: Tensor) -> bool:
    """Whether it can be read row by row."""
    return type(t) in _PLAIN and t.dtype is _FLOAT and t.is_cpu and t.stride(1) == 1 and not t.is_neg()
