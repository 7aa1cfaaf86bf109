"""Rows of many adapters in plain torch, one adapter after the other; where their rows end is read on the host.

BLAS libraries choose their kernels by the number of rows, so that the bits of a row depend on how many there are, and
on where it stands among them (MKL: M mod 4). What is to be the same alone and in a batch is therefore a product of the
adapter's own rows, whose sizes no neighbour changes:

    batch_invariant        the base product is one for each adapter. Adapters of few rows, which would stream w from
                           memory each, take their turns on blocks of w that stay in the caches
    not batch_invariant    the base product is one over all rows: rows differ from what they are alone by rounding

The low-rank products are of one adapter in both.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lorafuse.backends import aten_wide
from lorafuse.backends.multi import rank_bounds
from lorafuse.backends.protocol import Backend
from lorafuse.operands import Adapters, Rows, Weight
from lorafuse.philox import keep_mask, row_chunks
from lorafuse.plan import Plan

__all__ = ["MULTI"]

# adapters of as many rows have base products of their own at once
_MANY = 128
# bytes of a block of w
_BLOCK = {False: 1 << 20, True: 2 << 20}
# bytes of a cache line
_LINE = 64
# oneDNN compiles a kernel for each size it meets: rows of 16 bits are rounded up to these
_ROW_MULTIPLE = {torch.bfloat16: 32, torch.float16: 32}


class _Multi:
    """See the module; the methods are those of `lorafuse.backends.multi.Multi`."""

    def project(
        self, run: Backend, x: Tensor, f: Tensor, rows: Rows, adapters: Adapters, plan: Plan | None, is_masked: bool,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        xa = x.new_zeros((rows.count, adapters.widest), dtype=dtype)
        for g, mine, factor in _adapters(f, rows, adapters, dtype):
            for chunk in _chunks(mine, x, is_masked and adapters.seeds is not None):
                masked = _masked(_own(x, chunk).to(dtype), g, chunk, mine, adapters if is_masked else None)
                xa[chunk, : factor.shape[0]] = _product(masked, factor.t())
        return xa

    def matmul(
        self, run: Backend, x: Tensor, w: Weight, xa: Tensor, f: Tensor, rows: Rows, adapters: Adapters,
        plan: Plan | None, bias: Tensor | None, is_masked: bool, batch_invariant: bool,
    ) -> Tensor:  # fmt: skip
        # as a layer of one adapter computes it
        in_fp32 = xa.dtype is not x.dtype and x.is_cpu and not aten_wide.has_products(x.dtype)
        with run.dense(w, x.dtype) as dense:
            if in_fp32:
                parts = [mine for _, mine in _segments(rows)] if batch_invariant else [slice(0, rows.count)]
                y = torch.cat([aten_wide.product(x[part], dense, None, None, xa.dtype) for part in parts])
            else:
                # what is added to it is rounded with it, once
                y = (_base(x, dense, rows) if batch_invariant else torch.mm(x, dense.right())).to(xa.dtype)
        if bias is not None:
            y += bias
        for g, mine, factor in _adapters(f, rows, adapters, xa.dtype, is_scaled=True):
            for chunk in _chunks(mine, y, is_masked and adapters.seeds is not None):
                low = _product(xa[chunk, : factor.shape[0]].contiguous(), factor)
                y[chunk] += _masked(low, g, chunk, mine, adapters if is_masked else None)
        return y.to(x.dtype)

    def outer(
        self, run: Backend, narrow: Tensor, wide: Tensor, out: Tensor, rows: Rows, adapters: Adapters,
        plan: Plan | None, is_masked: bool, is_sum: bool,
    ) -> None:  # fmt: skip
        if not is_sum:
            out.zero_()
        dtype = torch.promote_types(narrow.dtype, torch.float32)
        bounds = rank_bounds(adapters.ranks)
        for g, mine in _segments(rows)[:-1]:
            R, total = adapters.ranks[g], None
            if mine.stop == mine.start or R == 0:
                continue
            for chunk in _chunks(mine, wide, True):
                masked = _masked(_own(wide, chunk).to(narrow.dtype), g, chunk, mine, adapters if is_masked else None)
                part = torch.mm(narrow[chunk, :R].t().contiguous().to(dtype), masked.to(dtype))
                total = part if total is None else total.add_(part)
            assert total is not None
            gradient = out[bounds[g] : bounds[g + 1]]
            gradient += total.mul_(adapters.scales[g])


def _segments(rows: Rows) -> list[tuple[int, slice]]:
    """The rows of every adapter, and the rest. Raises ValueError for offsets that descend or lead outside."""
    if "segments" not in rows.cache:
        bounds = [0, *rows.offsets.tolist()]
        if bounds != sorted(bounds):
            raise ValueError(
                f"offsets are {bounds[1:-1]}; they must ascend from 0 to at most {rows.count}, the rows of x"
            )
        rows.cache["segments"] = [(g, slice(*bounds[g : g + 2])) for g in range(rows.groups)]
    return rows.cache["segments"]


def _adapters(
    f: Tensor, rows: Rows, adapters: Adapters, dtype: torch.dtype, is_scaled: bool = False
) -> Iterator[tuple[int, slice, Tensor]]:
    """`(g, its rows, its factor [R, C] in dtype, times its scale if asked)` of the adapters with rows and ranks."""
    bounds = rank_bounds(adapters.ranks)
    for g, mine in _segments(rows)[:-1]:
        if mine.stop > mine.start and adapters.ranks[g]:
            factor = f[bounds[g] : bounds[g + 1]]
            if is_scaled and adapters.scales[g] != 1.0:
                factor = factor * adapters.scales[g]
            yield g, mine, factor.to(dtype).clone(memory_format=torch.contiguous_format)


def _own(t: Tensor, rows: slice) -> Tensor:
    """Some rows of t, copied unless every row starts on a boundary: which kernel a library takes can depend on that."""
    size = t.element_size()
    return t[rows] if t.data_ptr() % _LINE == t.stride(0) * size % _LINE == 0 else t[rows].clone()


def _chunks(mine: slice, t: Tensor, is_masked: bool) -> list[slice]:
    """The rows of an adapter, in chunks where masks of them are made."""
    if not is_masked:
        return [mine]
    chunks = row_chunks(mine.stop - mine.start, t.shape[1], t.device)
    return [slice(mine.start + chunk.start, mine.start + chunk.stop) for chunk in chunks]


def _masked(t: Tensor, g: int, rows: slice, mine: slice, adapters: Adapters | None) -> Tensor:
    """Some rows of the adapter g, `t`, under its mask where there are adapters with one."""
    if adapters is None or adapters.seeds is None or adapters.p is None or adapters.p[g] == 0.0:
        return t
    own = slice(rows.start - mine.start, rows.stop - mine.start)
    return t * keep_mask(adapters.seeds[g : g + 1], adapters.p[g], own, t.shape[1])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left right`, of sizes that are few."""
    rows = left.shape[0]
    step = _ROW_MULTIPLE.get(left.dtype, 1)
    if rows % step == 0:
        return torch.mm(left, right)
    padded = left.new_zeros((-(-rows // step) * step, left.shape[1]))
    padded[:rows] = left
    return torch.mm(padded, right)[:rows]


def _base(x: Tensor, w: Weight, rows: Rows) -> Tensor:
    """`x wᵀ`, a product for each adapter's rows; those of few rows on one block of w after the other."""
    (N, K), right = w.sizes, w.right()
    y = x.new_empty((rows.count, N))
    few = []
    for _, mine in _segments(rows):
        part = _own(x, mine)
        if part.shape[0] >= _MANY:
            y[mine] = _product(part, right)
        elif part.shape[0]:
            few.append((mine, part))
    if few:
        block = max(64, _BLOCK[right.stride(1) == 1] // max(1, K * x.element_size()) // 64 * 64)
        for first in range(0, N, block):
            columns = right[:, first : first + block]
            for mine, part in few:
                y[mine, first : first + block] = _product(part, columns)
    return y


MULTI = _Multi()
