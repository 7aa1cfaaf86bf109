"""Products with a side of the rank by `lorafuse._cpu` (csrc/cpu/rank.cpp), in fp32 on CPUs with AVX2 and FMA.

A function does nothing and says so by its result (None, False) where torch is to multiply: for other dtypes and
devices, tensors without an address, CPUs with AVX-512, ranks that are no multiples of 8 or larger than 64, and matrices
of fewer elements than pay for the call. Sums have another order than torch's; it is the same for the same sizes and
number of threads.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorafuse.formats import cpu

__all__ = ["add", "adds", "outer", "project", "project_outer", "why_not"]

_STEP, _LARGEST = 8, 64
_SMALLEST = 1
# products of a thread, 10 us of its time
_OF_THREAD = 1 << 18


@cache
def _functions() -> tuple[Any, Any] | None:
    library = cpu.library()
    if library is None or not library.lorafuse_rank_runs():
        return None
    return library.lorafuse_rank_read, library.lorafuse_rank_add


def why_not() -> str:
    """Why torch multiplies by the rank on this CPU; "" where these functions do."""
    if reason := cpu.why_not():
        return reason
    return "" if _functions() else "they are for CPUs with AVX2 and FMA and without AVX-512"


def project(x: Tensor, a: Tensor, is_transposed: bool, scale: float) -> Tensor | None:
    """`scale · x aᵀ`, as the primitive of the protocol."""
    R = a.shape[1 if is_transposed else 0]
    if not (_runs(x, R) and _is_factor(a)):
        return None
    xa = x.new_empty((x.shape[0], R))
    _read(x, R, _strided(a, is_transposed), scale, xa, None, 1.0, _NOWHERE)
    return xa


def adds(xa: Tensor, b: Tensor, columns: int) -> bool:
    """Whether `add` runs for a y `[M, columns]` that torch has just made."""
    M, R = xa.shape
    return _fits(M * columns, R) and _is_rows(xa) and _is_factor(b) and _is_here()


def add(y: Tensor, xa: Tensor, b: Tensor, is_transposed: bool, scale: float) -> Tensor:
    """y, to which `scale · xa bᵀ` was added, for operands that `adds`."""
    functions, (M, R), C = _functions(), xa.shape, y.shape[1]
    assert functions is not None
    assert y.stride(1) == 1
    functions[1](
        y.data_ptr(), y.stride(0), M, C, R, xa.data_ptr(), xa.stride(0), *_strided(b, not is_transposed), scale,
        _threads(M * C * R),
    )  # fmt: skip
    return y


def outer(narrow: Tensor, wide: Tensor, like: Tensor, is_transposed: bool, scale: float) -> Tensor | None:
    """`scale · narrowᵀ wide`, as the primitive of the protocol."""
    R = narrow.shape[1]
    if not (_runs(wide, R) and _is_rows(narrow) and like.dtype is torch.float32):
        return None
    sums = like.new_empty(like.shape)
    _read(wide, R, _NOWHERE, 1.0, None, narrow, scale, _strided(sums, is_transposed))
    return sums


def project_outer(dy: Tensor, b: Tensor, xa: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """`(scale · dy b, scale · dyᵀ xa)` from one read of dy."""
    R = b.shape[1]
    if not (_runs(dy, R) and _is_factor(b) and _is_rows(xa)):
        return None
    dyb, db = dy.new_empty((dy.shape[0], R)), b.new_empty(b.shape)
    _read(dy, R, _strided(b, True), scale, dyb, xa, scale, _strided(db, True))
    return dyb, db


_NOWHERE = None, 0, 0


def _read(
    wide: Tensor, R: int, factor: tuple[int | None, int, int], alpha: float, projected: Tensor | None,
    narrow: Tensor | None, beta: float, sums: tuple[int | None, int, int],
) -> None:  # fmt: skip
    functions, (M, C) = _functions(), wide.shape
    assert functions is not None
    functions[0](
        wide.data_ptr(), wide.stride(0), M, C, R, *factor, alpha, None if projected is None else projected.data_ptr(), R,
        None if narrow is None else narrow.data_ptr(), 0 if narrow is None else narrow.stride(0), beta, *sums,
        _threads(M * C * R),
    )  # fmt: skip


def _threads(products: int) -> int:
    return max(1, min(torch.get_num_threads(), products // _OF_THREAD))


def _strided(f: Tensor, is_transposed: bool) -> tuple[int, int, int]:
    """Address and strides of a factor `[R, C]`, or `[C, R]` when transposed: of C, of R."""
    row, column = f.stride()
    return (f.data_ptr(), row, column) if is_transposed else (f.data_ptr(), column, row)


def _fits(elements: int, R: int) -> bool:
    return elements >= _SMALLEST and R % _STEP == 0 and 0 < R <= _LARGEST


def _runs(wide: Tensor, R: int) -> bool:
    return _fits(wide.numel(), R) and _is_rows(wide) and _is_here()


def _is_here() -> bool:
    return cpu.has_addresses() and _functions() is not None


def _is_plain(t: Tensor) -> bool:
    return type(t) in cpu.PLAIN and t.dtype is torch.float32 and t.is_cpu and not t.is_neg()


def _is_rows(t: Tensor) -> bool:
    """Whether it can be read row by row."""
    return _is_plain(t) and t.stride(1) == 1


def _is_factor(t: Tensor) -> bool:
    return _is_plain(t) and 1 in t.stride()
