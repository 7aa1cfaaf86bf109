"""Rows of many adapters in plain torch, one adapter after the other; where their rows end is read on the host.

BLAS libraries choose their kernels by the number of rows, so that the bits of a row depend on how many there are, and
on where it stands among them (MKL: M mod 4). What is to be the same alone and in a batch is therefore a product of the
adapter's own rows (those of one expert, if there are several), whose sizes no neighbour changes:

    batch_invariant        the base product is one for each adapter. Adapters of few rows, which would stream w from
                           memory each, take their turns on blocks of w that stay in the caches
    not batch_invariant    the base product is one over all rows: rows differ from what they are alone by rounding

The low-rank products and the activations are of one adapter in both.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from lorafuse.activation import ACTIVATIONS, gate_backward, gate_forward
from lorafuse.backends import aten_wide
from lorafuse.backends.multi import Dots, rank_bounds
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
        for g, mine, factor in _factors(f, rows, adapters, dtype):
            for chunk in _chunks(mine, x, is_masked and adapters.seeds is not None):
                masked = _masked(_own(x, chunk).to(dtype), g, chunk, mine, adapters if is_masked else None)
                xa[chunk, : factor.shape[0]] = _product(masked, factor.t())
        return xa

    def matmul(
        self, run: Backend, x: Tensor, w: Weight, xa: Tensor, f: Tensor, rows: Rows, adapters: Adapters,
        plan: Plan | None, bias: Tensor | None, is_masked: bool, batch_invariant: bool, total: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        y = x.new_empty((rows.count, w.sizes[0]), dtype=xa.dtype)
        # as a layer of one adapter computes it
        in_fp32 = xa.dtype is not x.dtype and x.is_cpu and not aten_wide.has_products(x.dtype)
        for e, dense, segments in _by_expert(run, w, x.dtype, rows, adapters):
            parts = segments if batch_invariant else [slice(segments[0].start, segments[-1].stop)]
            if in_fp32:
                for part in parts:
                    y[part] = aten_wide.product(x[part], dense, None, None, xa.dtype)
            elif batch_invariant:
                _base(y, x, dense, segments)
            else:
                # what is added to it is rounded with it, once
                y[parts[0]] = torch.mm(x[parts[0]], dense.right())
            if bias is not None:
                y[segments[0].start : segments[-1].stop] += bias if bias.dim() == 1 else bias[e]
        for g, mine, factor in _factors(f, rows, adapters, xa.dtype, is_scaled=True):
            for chunk in _chunks(mine, y, is_masked and adapters.seeds is not None):
                low = _product(xa[chunk, : factor.shape[0]].contiguous(), factor)
                y[chunk] += _masked(low, g, chunk, mine, adapters if is_masked else None)
        return y.to(x.dtype) if total is None else total.copy_(y.add_(total))

    def outer(
        self, run: Backend, narrow: Tensor, wide: Tensor, out: Tensor, rows: Rows, adapters: Adapters,
        plan: Plan | None, is_masked: bool,
    ) -> None:  # fmt: skip
        dtype = torch.promote_types(narrow.dtype, torch.float32)
        bounds = rank_bounds(adapters.ranks)
        for e, g, mine in _segments(rows, adapters):
            R, sums = 0 if g == len(adapters.ranks) else adapters.ranks[g], None
            if R == 0:
                continue
            for chunk in _chunks(mine, wide, True):
                masked = _masked(_own(wide, chunk).to(narrow.dtype), g, chunk, mine, adapters if is_masked else None)
                part = torch.mm(narrow[chunk, :R].t().contiguous().to(dtype), masked.to(dtype))
                sums = part if sums is None else sums.add_(part)
            assert sums is not None
            gradient = _stack(out, e)[bounds[g] : bounds[g + 1]]
            gradient += sums.mul_(adapters.scales[g])

    # vector instructions leave the last elements of a tensor to scalar ones, whose exponential rounds differently: the
    # bits of an element depend on where the tensor ends
    def activate(self, name: str, gate: Tensor, up: Tensor | None, rows: Rows, adapters: Adapters) -> Tensor:
        h = gate.new_empty(gate.shape)
        for _, _, mine in _segments(rows, adapters):
            h[mine] = _activated(name, gate[mine], None if up is None else up[mine])
        return h

    def activate_backward(
        self, name: str, dh: Tensor, gate: Tensor, up: Tensor | None, dgate: Tensor, dup: Tensor | None, rows: Rows,
        adapters: Adapters, *, row_scale: Tensor | None = None, dots: Dots | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        h, wide = gate.new_empty(gate.shape), torch.promote_types(dh.dtype, torch.float32)
        sums = None if dots is None else dh.new_empty(rows.count, dtype=wide)
        for e, _, mine in _segments(rows, adapters):
            d, u, other = dh[mine], gate[mine], None if up is None else up[mine]
            h[mine] = _activated(name, u, other)
            if dots is not None and sums is not None:
                sums[mine] = (d * h[mine]).sum(1, dtype=wide)
                if dots.bias is not None:
                    sums[mine] += (dots.dy[mine] * dots.bias[e]).sum(1, dtype=wide)
            if row_scale is not None:
                d *= row_scale[mine].to(d.dtype).unsqueeze(1)
            if other is None or dup is None:
                dgate[mine] = ACTIVATIONS[name][1](d, u)
            else:
                dgate[mine], dup[mine] = gate_backward(name, d, u, other)
        return h, sums


def _activated(name: str, gate: Tensor, up: Tensor | None) -> Tensor:
    return ACTIVATIONS[name][0](gate) if up is None else gate_forward(name, gate, up)


def _segments(rows: Rows, adapters: Adapters) -> list[tuple[int, int, slice]]:
    """`(expert, adapter, its rows)` of the groups with rows. Raises ValueError for offsets that descend or lead outside
    of them.
    """
    if "segments" not in rows.cache:
        bounds, each = [0, *rows.offsets.tolist()], len(adapters.ranks) + 1
        if bounds != sorted(bounds):
            raise ValueError(
                f"offsets are {bounds[1:-1]}; they must ascend from 0 to at most {rows.count}, the rows of x"
            )
        rows.cache["segments"] = [
            (*divmod(i, each), slice(*bounds[i : i + 2])) for i in range(rows.groups) if bounds[i] < bounds[i + 1]
        ]
    return rows.cache["segments"]


def _by_expert(
    run: Backend, w: Weight, dtype: torch.dtype, rows: Rows, adapters: Adapters
) -> Iterator[tuple[int, Weight, list[slice]]]:
    """`(expert, its matrix, the rows of each of its groups)`, next to each other; a stack is decoded as it is read."""
    segments = _segments(rows, adapters)
    for e, some in itertools.groupby(segments, key=lambda segment: segment[0]):
        if len(w.stored) == 2:
            one = w
        else:
            stack = w.select(e, e + 1)
            one = stack if w.format != "dense" else Weight(stack.data[0], w.is_transposed)
        with run.dense(one, dtype) as dense:
            matrix = dense if dense.data.dim() == 2 else Weight(dense.data[0], dense.is_transposed)
            yield e, matrix, [mine for _, _, mine in some]


def _stack(f: Tensor, e: int) -> Tensor:
    """The factors `[ΣR, C]` of an expert."""
    return f if f.dim() == 2 else f[e]


def _factors(
    f: Tensor, rows: Rows, adapters: Adapters, dtype: torch.dtype, is_scaled: bool = False
) -> Iterator[tuple[int, slice, Tensor]]:
    """`(g, its rows, its factor [R, C] in dtype, times its scale if asked)` of the groups with rows and ranks."""
    bounds = rank_bounds(adapters.ranks)
    for e, g, mine in _segments(rows, adapters):
        if g < len(adapters.ranks) and adapters.ranks[g]:
            factor = _stack(f, e)[bounds[g] : bounds[g + 1]]
            if is_scaled and adapters.scales[g] != 1.0:
                factor = factor * adapters.scales[g]
            yield g, mine, factor.to(dtype).clone(memory_format=torch.contiguous_format)


def _own(t: Tensor, rows: slice) -> Tensor:
    """Some rows of t, copied unless every row starts on a boundary and is contiguous: which kernel a library takes can
    depend on that.
    """
    size = t.element_size()
    if t.stride(1) == 1 and t.data_ptr() % _LINE == t.stride(0) * size % _LINE == 0:
        return t[rows]
    return t[rows].clone(memory_format=torch.contiguous_format)


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


def _base(y: Tensor, x: Tensor, w: Weight, segments: list[slice]) -> None:
    """`y = x wᵀ`, a product for each segment of rows; those of few rows on one block of w after the other."""
    (N, K), right = w.sizes, w.right()
    few = []
    for mine in segments:
        part = _own(x, mine)
        if part.shape[0] >= _MANY:
            y[mine] = _product(part, right)
        else:
            few.append((mine, part))
    if few:
        block = max(64, _BLOCK[right.stride(1) == 1] // max(1, K * x.element_size()) // 64 * 64)
        for first in range(0, N, block):
            columns = right[:, first : first + block]
            for mine, part in few:
                y[mine, first : first + block] = _product(part, columns)


MULTI = _Multi()
