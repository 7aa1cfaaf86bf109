"""What DoRA needs of a backend besides LoRA's primitives, in plain torch: norms of rows, and a factor for each column.

    norm[n]² = ‖w[n]‖² + 2 s ⟨w[n] aᵀ, b[n]⟩ + s² ⟨b[n] (a aᵀ), b[n]⟩             of w + s · b a, which nobody builds

‖w‖² is kept from step to step on CPUs. What tells that w is still what it was is no counter, which writes through
`.data` and through other tensors of the same memory pass by, but w itself: beside the product with a there is one with
fixed numbers, and ‖w[n]‖² is computed anew unless all N products have the bits that they had. The numbers are between
1/2 and 3/2, with random signs, so that what rounding hides there it hides in ‖w‖ too.

The sum is of terms of either sign: where an adapter cancels most of w, the norm is as exact as ‖w‖ is, not as the small
rest.

Cost: 2NK(R + 1) FLOPs and one read of w; of the factors of columns, one read of z and a write forward, one read of dy
and z and a write backward.
"""

import threading
from collections import OrderedDict
from functools import lru_cache

import torch
from torch import Tensor

from lorafuse.backends import aten_rank
from lorafuse.formats import cpu
from lorafuse.operands import Weight
from lorafuse.philox import row_chunks

__all__ = ["OF_THREAD", "columns_backward", "row_norms", "scaled_columns", "small_terms"]


# rows of fewer columns are summed in fp64 (1.3 times PEFT's error at 64 columns otherwise, fp32)
_SHORT = 256
# elements of dy and z at a time where torch computes on a CPU, since new memory costs more than the pass over it:
# 0.22 to 0.31 ms with 2^15 to 2^17 of them, 0.50 with 2^14, 1.2 with all (256 x 1024, fp32, minima of 90, one thread,
# shared EPYC)
_PART = 1 << 16
# elements of a thread of `lorafuse._cpu`: 10 us of its time
OF_THREAD = 1 << 15
# weights whose norms are kept: 12 bytes for each row of each
_KEPT = 1024
_kept: OrderedDict[tuple, tuple[Tensor, Tensor]] = OrderedDict()
_lock = threading.Lock()


def small_terms(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`(a, s · b, s · b (a aᵀ))` in dtype: what the norm needs besides w."""
    a, b = a.to(dtype), b.to(dtype) * scale
    return a, b, b @ (a @ a.mT)


def row_norms(w: Weight, a: Tensor, b: Tensor, scale: float, place: int | None = None) -> Tensor:
    """`‖w[n] + scale · b[n] a‖`, `[N]` in fp32 at least, of a dense w `[N, K]`, a `[R, K]`, b `[N, R]`.

    `place` is the address of what w was decoded from, None for that of w itself.
    """
    left = w.left()
    dtype = torch.promote_types(left.dtype, torch.float32)
    a_to, R = a.to(dtype), a.shape[0]
    if left.is_cpu:
        products, numbers = aten_rank.project(left, a_to, False, 1.0), _numbers(left.shape[1], dtype)
        if products is None:
            both = _products(torch.cat((a_to, numbers)), left)
            products, seen = both[:R].t(), both[R]
        else:
            seen = torch.mv(left, numbers[0])
        place = left.data_ptr() if place is None else place
        squares = _kept_squares(left, (place, left.shape, left.stride(), left.dtype), seen)
    else:
        products, squares = _products(a_to, left).t(), _sums_of_squares(left)
    # the sum of all terms is exact; what is rounded before is w aᵀ, and of long rows the parts of their sums of squares
    exact_a, exact_b = a.double(), b.double() * scale
    terms = torch.mm(exact_b, exact_a @ exact_a.mT).add_(products, alpha=2).mul_(exact_b)
    # rounding can leave less than nothing where the adapter cancels w
    return terms.sum(1).add_(squares).clamp_(min=0).sqrt_().to(dtype)


def _products(rows: Tensor, left: Tensor) -> Tensor:
    """`rows leftᵀ` in the dtype of rows."""
    if left.dtype is rows.dtype:
        return torch.mm(rows, left.mT)
    products = rows.new_empty(rows.shape[0], left.shape[0])
    for some in row_chunks(left.shape[0], left.shape[1], left.device):
        products[:, some] = torch.mm(rows, left[some].to(rows.dtype).mT)
    return products


@lru_cache(maxsize=64)
def _numbers(K: int, dtype: torch.dtype) -> Tensor:
    """The fixed numbers, `[1, K]`."""
    made = torch.rand(2, K, generator=torch.Generator().manual_seed(0), device="cpu")
    return (made[:1] + 0.5).copysign(made[1:] - 0.5).to(dtype)


def _kept_squares(left: Tensor, key: tuple, seen: Tensor) -> Tensor:
    """The sums of squares of the rows, those of the last call with this key if what was `seen` of them is too."""
    with _lock:
        kept = _kept.pop(key, None)
    if kept is None or not torch.equal(kept[0], seen):
        kept = seen.clone(), _sums_of_squares(left)
    with _lock:
        _kept[key] = kept
        if len(_kept) > _KEPT:
            _kept.popitem(last=False)
    return kept[1]


def _sums_of_squares(left: Tensor) -> Tensor:
    """Of each row, in fp64: of long ones norms of 64 columns at a time, which are as fast as one of all, and add up
    exactly. Few of these would not average their roundings out.
    """
    N, K = left.shape
    whole = K // 64 * 64 if K >= _SHORT else 0
    total = left.new_zeros(N, dtype=torch.float64)
    for rows in row_chunks(N, K, left.device):
        part = left[rows].to(torch.promote_types(left.dtype, torch.float32))
        if whole:
            norms = torch.linalg.vector_norm(part[:, :whole].unflatten(1, (-1, 64)), dim=2)
            total[rows] += norms.double().square_().sum(1)
        if whole < K:
            rest = part[:, whole:]
            total[rows] += torch.linalg.vector_norm(rest, dim=1, dtype=torch.float64).square_()
    return total


def scaled_columns(z: Tensor, factor: Tensor, addend: Tensor | None) -> Tensor:
    """`z ⊙ factor + addend` in z's dtype, rounded once: z `[…, N]`, factor `[N]`, addend `[N]` or as z."""
    y = torch.empty_like(z)
    return torch.mul(z, factor, out=y) if addend is None else torch.addcmul(addend, z, factor, out=y)


def columns_backward(
    dy: Tensor, z: Tensor | None, factor: Tensor, need_dz: bool
) -> tuple[Tensor | None, Tensor | None]:
    """`(dz = dy ⊙ factor, dfactor = Σ_m dy ⊙ z)` for dy, z `[M, N]`; dz None unless needed, dfactor without z.

    dfactor is summed in factor's dtype.
    """
    dz = torch.empty_like(dy) if need_dz else None
    if (need_dz or z is not None) and _is_read(dy, factor) and (z is None or _is_read(z)):
        dfactor = None if z is None else torch.empty_like(factor)
        (M, N), place = dy.shape, [None if t is None else t.data_ptr() for t in (z, dz, dfactor)]
        cpu.library().lorafuse_columns_backward(
            dy.data_ptr(),
            N,
            place[0],
            N,
            M,
            N,
            factor.data_ptr(),
            *place[1:],
            cpu.threads_for(dy.numel(), OF_THREAD),
        )
        return dz, dfactor
    dfactor, part = None if z is None else torch.zeros_like(factor), None
    chunks = row_chunks(dy.shape[0], dy.shape[1], dy.device)
    if dy.is_cpu:
        step = max(1, _PART // max(1, dy.shape[1]))
        chunks = [slice(start, start + step) for start in range(0, dy.shape[0], step)]
    for rows in chunks:
        given = dy[rows]
        if dz is not None:
            torch.mul(given, factor, out=dz[rows])
        if z is not None and dfactor is not None:
            # one memory for the products of all chunks
            part = factor.new_empty(given.shape) if part is None else part
            dfactor += torch.mul(given.to(factor.dtype), z[rows], out=part[: given.shape[0]]).sum(0)
    return dz, dfactor


def _is_read(*tensors: Tensor) -> bool:
    """Whether `lorafuse._cpu` reads them: dense ones in fp32, of some elements."""
    return cpu.reads(tensors[0]) and all(cpu.is_plain_fp32(t) and t.is_contiguous() and t.numel() for t in tensors)
