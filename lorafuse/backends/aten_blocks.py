"""Products with a whole weight by `lorafuse._cpu` (csrc/cpu/matmul.cpp), in fp32 on CPUs with AVX2 and FMA.

Each thread multiplies blocks of columns by the sgemm that torch was built with, adds the low-rank product while a block
is in its caches, and decodes a quantized weight block by block: it is nowhere whole. None where torch is to multiply:
for other dtypes and devices, tensors without an address, sizes that do not fit (torch raises), CPUs with AVX-512, more
threads than were measured, few rows, and a torch without MKL. Sums have another order than torch's, the
same for the same sizes and number of threads.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafuse.backends import aten_rank
from lorafuse.formats import cpu, load
from lorafuse.operands import LowRank, Weight

__all__ = ["LEAST_ROWS", "MOST_THREADS", "OF_THREAD", "functions", "product", "sum_of_products", "why_not"]

# rows and products of a thread from which on it pays
LEAST_ROWS, OF_THREAD = 16, 1 << 20
# with more it was not measured
MOST_THREADS = 2
_INT32 = 2**31


@cache
def functions() -> tuple[Any, int] | None:
    """`lorafuse_matmul`, and the address of torch's sgemm; None where they do not run."""
    library = cpu.library()
    # another library's sgemm may have threads of its own, which were not measured
    if library is None or not library.lorafuse_rank_runs() or not torch.backends.mkl.is_available():
        return None
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        gemm = ctypes.cast(torch_cpu.sgemm_, ctypes.c_void_p).value
    except (OSError, AttributeError):
        # a torch of another system
        return None
    return None if gemm is None else (library.lorafuse_matmul, gemm)


def why_not() -> str:
    """Why torch multiplies by weights on this CPU; "" where this function does."""
    if reason := aten_rank.why_not():
        return reason
    if functions() is None:
        return "torch was built without MKL, or its sgemm cannot be called by name"
    if torch.get_num_threads() > MOST_THREADS:
        return f"it was measured with {MOST_THREADS} threads at most"
    return ""


def product(
    x: Tensor, w: Weight, bias: Tensor | None = None, low: LowRank | None = None, total: Tensor | None = None
) -> Tensor | None:
    """`x wᵀ + bias + low`, or `total` after it was added there."""
    M, K = x.shape
    if M < LEAST_ROWS or not _is_rows(x) or not cpu.has_addresses() or (calls := functions()) is None:
        return None
    columns, rows = w.stored if len(w.stored) == 2 else (0, 0)
    N, reduced = (rows, columns) if w.is_transposed else (columns, rows)
    threads = cpu.threads_for(M * N * K, OF_THREAD)
    if reduced != K or not N or not K or threads > MOST_THREADS:
        return None
    data, stored, codes, row = None, None, None, rows
    if w.format == "dense":
        if not _is_rows(w.data):
            return None
        data, row = w.data.data_ptr(), w.data.stride(0)
    else:
        find = getattr(load(w.format), "codes", None)
        codes = None if find is None or not cpu.reads(w.data) else find(w.data, w.statistics, w.parameters)
        if codes is None or codes.rounded is torch.float16:
            return None
        if (stored := cpu.stored(codes, codes.first + N * K)) is None:
            return None
    if bias is not None and not (cpu.is_plain_fp32(bias) and bias.is_contiguous() and bias.shape == (N,)):
        return None
    narrow: tuple[Any, ...] = (None, 0, 0, None, 0, 0, 0.0)
    if low is not None:
        factor = aten_rank.factor_of(low.b, not low.is_transposed, low.xa.shape[1], N)
        if factor is None or low.dropout is not None or low.xa.shape[0] != M or not _is_rows(low.xa):
            return None
        narrow = low.xa.data_ptr(), low.xa.stride(0), low.xa.shape[1], *factor, low.scale
    y = x.new_empty((M, N)) if total is None else total
    if total is not None and (total.shape != (M, N) or not _is_rows(total)):
        return None
    of = cpu.Matmul(
        calls[1], x.data_ptr(), x.stride(0), M, K, N, data, None if stored is None else ctypes.addressof(stored), row,
        0 if codes is None else codes.first, y.data_ptr(), y.stride(0), None if bias is None else bias.data_ptr(),
        *narrow, w.is_transposed, total is not None, codes is not None and codes.rounded is torch.bfloat16,
    )  # fmt: skip
    calls[0](ctypes.byref(of), threads)
    return y


def sum_of_products(terms: Sequence[tuple[Tensor, Weight]], lows: Sequence[LowRank]) -> Tensor | None:
    """`Σ_i x_i w_iᵀ + Σ_j low_j`, of lows no more than terms; None where torch is to multiply one of them."""
    total = None
    for i, (x, w) in enumerate(terms):
        total = product(x, w, None, lows[i] if i < len(lows) else None, total)
        if total is None:
            return None
    return total


def _is_rows(t: Tensor) -> bool:
    """Whether sgemm reads it row by row."""
    return cpu.is_plain_fp32(t) and t.dim() == 2 and t.stride(1) == 1 and t.shape[1] <= t.stride(0) < _INT32
