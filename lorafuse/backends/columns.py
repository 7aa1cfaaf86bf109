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


def small_terms(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`(a, s · b, s · b (a aᵀ))` in dtype: what the norm needs besides w."""
    a, b = a.to(dtype), b.to(dtype) * scale
    return a, b, b @ (a @ a.mT)


def row_norms(w: Weight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`‖w[n] + scale · b[n] a‖`, `[N]` in fp32 at least, of a dense w `[N, K]`, a `[R, K]`, b `[N, R]`."""
    left = w.left()
    dtype = torch.promote_types(left.dtype, torch.float32)
    a, b, squares = small_terms(a, b, scale, dtype)
    total, is_wide = b.new_empty(left.shape[0], dtype=torch.float64), left.dtype is dtype
    for rows in row_chunks(left.shape[0], left.shape[1], left.device):
        part = left[rows].to(dtype)
        total[rows] = _sums_of_squares(part)
        if not is_wide:
            squares[rows].addmm_(part, a.mT, alpha=2)
    if is_wide:
        # products of few rows are slow: 3.1 ms for 64 at a time, 0.8 for all (1024 x 1024, R 16, fp32, one thread of an
        # EPYC with AVX2, shared, 2026-11-29)
        squares.addmm_(left, a.mT, alpha=2)
    total += squares.mul_(b).sum(1, dtype=torch.float64)
    # rounding can leave less than nothing where the adapter cancels w
    return total.clamp_(min=0).sqrt_().to(dtype)


def _sums_of_squares(t: Tensor) -> Tensor:
    """Of each row, in fp64: norms of 64 columns at a time, which are as fast as one of all, and add up exactly."""
    whole = t.shape[1] // 64 * 64
    of_blocks = torch.linalg.vector_norm(t[:, :whole].unflatten(1, (-1, 64)), dim=2).double().square_().sum(1)
    return of_blocks + torch.linalg.vector_norm(t[:, whole:], dim=1).double().square_()


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
