"""The primitives over ragged rows by torch's grouped_mm, for the GPUs on which torch has a fast kernel for it.

Where the groups end stays on the device and nothing waits for it. Each product is a grouped one; those over rows, da
and db, come for all groups at once. P being R and the bias's rank rounded up to 16 bytes:

    y = x W + [xa | 1 | 0] [scale b | bias | 0]ᵀ      dx = dy Wᵀ + [dyb | 0] [scale a ; 0]

A bias is one more rank, of ones, so that no row looks up its group. grouped_mm leaves rows after the last group's as it
finds them: products do not read them. Beyond the base product a projection writes and adds a second y, since grouped_mm
cannot accumulate onto the first; the CUDA backend overrides `accumulated`, whose kernel does both at once.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafuse.backends.protocol import Backend
from lorafuse.operands import LowRank, Rows, Weight

__all__ = ["GroupedMM"]

# grouped_mm takes rows that start on such boundaries only
_ALIGNMENT = 16


class GroupedMM:
    """See the module; the methods are primitives of the protocol."""

    def project(self, x: Tensor, a: Tensor, rows: Rows, is_transposed: bool, scale: float) -> Tensor:
        """`project`, `[S, R]`; rows have R elements."""
        a = a if is_transposed else a.mT
        G, K, R = a.shape
        padded = x.new_zeros((G, K, _padded(R, x.dtype)))
        torch.mul(a, scale, out=padded[..., :R]) if scale != 1.0 else padded[..., :R].copy_(a)
        return _product(_aligned(x), padded, rows)[:, :R].contiguous()

    def matmul(
        self, run: Backend, x: Tensor, w: Weight, rows: Rows, low: LowRank | None, bias: Tensor | None
    ) -> Tensor:  # fmt: skip
        """`matmul` without an epilogue; a quantized stack is decoded by `run`.

        Where that takes several parts, the host reads where the rows of each end. A CUDA graph cannot, so that a stack
        is decoded as a whole there.
        """
        x, y, first = _aligned(x), None, 0
        is_whole = x.is_cuda and torch.cuda.is_current_stream_capturing()
        for groups, part in run.parts(w, x.dtype, is_whole):
            if groups.stop - groups.start == rows.groups:
                return self._base_and_rank(x, part.right(), rows, low, bias)
            y = x.new_empty((x.shape[0], w.sizes[0])) if y is None else y
            some = slice(first, int(rows.offsets[groups.stop - 1]))
            first = some.stop
            if some.start < some.stop:
                mine, ends = None, rows.offsets[groups] - some.start
                if low is not None:
                    mine = LowRank(low.xa[some], low.b[groups], low.scale, low.is_transposed)
                y[some] = self._base_and_rank(
                    x[some],
                    part.right(),
                    Rows(some.stop - some.start, ends),
                    mine,
                    None if bias is None else bias[groups],
                )
        assert y is not None, "a stack of no groups"
        return y

    def _base_and_rank(
        self, x: Tensor, right: Tensor, rows: Rows, low: LowRank | None, bias: Tensor | None
    ) -> Tensor:  # fmt: skip
        """`x right + xa (scale · b)ᵀ + bias` for right `[G, K, N]`."""
        if low is None and bias is None:
            return _product(x, right, rows)
        G, _, N = right.shape
        R = 0 if low is None else low.xa.shape[1]
        # N first, as grouped_mm's right operands are read
        factors = x.new_zeros((G, N, _padded(R + (bias is not None), x.dtype)))
        rank = x.new_zeros((x.shape[0], factors.shape[2]))
        if low is not None:
            b = low.b.mT if low.is_transposed else low.b
            factors[..., :R] = b if low.scale == 1.0 else b * low.scale
            rank[:, :R] = low.xa
        if bias is not None:
            factors[..., R] = bias
            rank[:, R] = 1
        return self.accumulated(x, right, rank, factors.mT, rows)

    def accumulated(self, x: Tensor, w: Tensor, xa: Tensor, b: Tensor, rows: Rows) -> Tensor:
        """`x w + xa b` for w `[G, K, N]` and b `[G, P, N]`."""
        return _product(x, w, rows).add_(_product(xa, b, rows))

    def outer(
        self, narrow: Tensor, wide: Tensor, rows: Rows, like: Tensor, is_transposed: bool, scale: float
    ) -> Tensor:  # fmt: skip
        """`outer`, the factor of each row in `narrow` already."""
        R, wide = narrow.shape[1], _aligned(wide)
        narrow = _aligned(F.pad(narrow, (0, _padded(R, narrow.dtype) - R)))
        of_rows = (wide.t(), narrow) if is_transposed else (narrow.t(), wide)
        product = _product(*of_rows, rows)
        product = product[..., :R] if is_transposed else product[:, :R]
        out = torch.empty_like(like).copy_(product)
        if scale != 1.0:
            out *= scale
        empty = rows.offsets.diff(prepend=rows.offsets.new_zeros(1)) == 0
        return out.masked_fill_(empty.view(-1, 1, 1), 0)


def _product(left: Tensor, right: Tensor, rows: Rows) -> Tensor:
    if "int32" not in rows.cache:
        rows.cache["int32"] = rows.offsets.int()
    return F.grouped_mm(left, right, offs=rows.cache["int32"])


def _padded(R: int, dtype: torch.dtype) -> int:
    per = _ALIGNMENT // dtype.itemsize
    return -(-R // per) * per


def _aligned(t: Tensor) -> Tensor:
    """`t`, copied unless its rows are contiguous and start on 16-byte boundaries."""
    step = t.stride(0) * t.element_size()
    fits = t.stride(1) == 1 and t.stride(0) >= t.shape[1] and step % _ALIGNMENT == t.data_ptr() % _ALIGNMENT == 0
    return t if fits else t.clone(memory_format=torch.contiguous_format)
