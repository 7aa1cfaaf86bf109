"""What DoRA needs of a backend besides LoRA's primitives, in plain torch: norms of rows, and a factor for each column.

    norm[n]² = ‖w[n]‖² + 2 s ⟨w[n] aᵀ, b[n]⟩ + s² ⟨b[n] (a aᵀ), b[n]⟩             of w + s · b a, which nobody builds

w is read once, in parts that stay in the caches: its own sum of squares costs no read of its own, so that nothing is
kept from one step to the next which a write into w could make wrong. The sum is of terms of either sign: where an
adapter cancels most of w, the norm is as exact as ‖w‖ is, not as the small rest.

Cost: 2NKR FLOPs and one read of w; of the factors of columns, one read of z and a write forward, one read of dy and z
and a write backward.
"""

import torch
from torch import Tensor

from lorafuse.operands import Weight
from lorafuse.philox import row_chunks

__all__ = ["columns_backward", "row_norms", "scaled_columns", "small_terms"]


# rows of w at a time: both passes over them read a cache; fewer are slow products (0.74, 0.72 and 0.66 of the time of
# sums over 64 rows and one product of all, at 1024, 2048 and 4096 square, R 16, fp32, one thread of a shared EPYC)
_ROWS = 256
# rows of fewer columns are summed in fp64 (1.3 times PEFT's error at 64 columns otherwise, fp32)
_SHORT = 256


def small_terms(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`(a, s · b, s · b (a aᵀ))` in dtype: what the norm needs besides w."""
    a, b = a.to(dtype), b.to(dtype) * scale
    return a, b, b @ (a @ a.mT)


def row_norms(w: Weight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`‖w[n] + scale · b[n] a‖`, `[N]` in fp32 at least, of a dense w `[N, K]`, a `[R, K]`, b `[N, R]`."""
    left = w.left()
    N, K = left.shape
    dtype = torch.promote_types(left.dtype, torch.float32)
    _, exact_b, squares = small_terms(a, b, scale, torch.float64)
    # the sum of all terms is exact; what is rounded before is w aᵀ, and of long rows the parts of their sums of squares
    total, a = squares.mul_(exact_b).sum(1), a.to(dtype)
    products = b.new_empty(N, a.shape[0], dtype=dtype)
    # on GPUs as many rows as a chunk has, where that is more
    step = max([_ROWS, *(rows.stop for rows in row_chunks(N, K, left.device)[:1])])
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        part = left[rows].to(dtype)
        torch.mm(part, a.mT, out=products[rows])
        total[rows] += _sums_of_squares(part)
    total += 2 * exact_b.mul_(products).sum(1)
    # rounding can leave less than nothing where the adapter cancels w
    return total.clamp_(min=0).sqrt_().to(dtype)


def _sums_of_squares(t: Tensor) -> Tensor:
    """Of each row, in fp64: of long ones norms of 64 columns at a time, which are as fast as one of all, and add up
    exactly. Few of these would not average their roundings out.
    """
    if t.shape[1] < _SHORT:
        return t.double().square().sum(1)
    whole = t.shape[1] // 64 * 64
    total = torch.linalg.vector_norm(t[:, :whole].unflatten(1, (-1, 64)), dim=2).double().square_().sum(1)
    if whole < t.shape[1]:
        total += torch.linalg.vector_norm(t[:, whole:], dim=1).double().square_()
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
    dfactor = None if z is None else torch.zeros_like(factor)
    for rows in row_chunks(dy.shape[0], dy.shape[1], dy.device):
        if dz is not None:
            torch.mul(dy[rows], factor, out=dz[rows])
        if z is not None and dfactor is not None:
            dfactor += torch.mul(dy[rows].to(factor.dtype), z[rows]).sum(0)
    return dz, dfactor
