"""The primitives over ragged rows in plain torch, one group of rows after the other.

Each kind of product runs over all groups before the next one does: between two base products, which stream a weight
through the caches, the small ones of the low-rank path take twice the time. Where the groups end is read on the host.
Groups without rows are not touched. PEFT packs lora_B `[N, R·E]` with neighbours from different groups; as a stack
`[E, N, R]` it is a transposition of two dimensions, for which ATen has a fast copy, where reading it element by element
would cost more than the products.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from lorafuse.backends.protocol import Backend
from lorafuse.operands import LowRank, Rows, Weight

__all__ = ["matmul", "outer", "project"]

# rows of a product are rounded up to these: oneDNN, which multiplies 16 bits, compiles a kernel for each size it meets
ROW_MULTIPLE = {torch.bfloat16: 32, torch.float16: 32}


def project(x: Tensor, a: Tensor, rows: Rows, is_transposed: bool, scale: float) -> Tensor:
    """`project` of the protocol."""
    out = x.new_empty((x.shape[0], a.shape[2 if is_transposed else 1]))
    _products(x, _right_operands(a, x.dtype, not is_transposed, scale), rows, out)
    return out


def matmul(
    run: Backend, x: Tensor, w: Weight, rows: Rows, low: LowRank | None, bias: Tensor | None
) -> Tensor:  # fmt: skip
    """`matmul` of the protocol without an epilogue. A quantized stack is decoded by `run`, one group with rows at a
    time.
    """
    segments, last = _segments(rows)
    y = x.new_empty((x.shape[0], w.sizes[0]))
    if low is not None:
        # the scale is applied before the factor is rounded to x's dtype
        _products(low.xa, _right_operands(low.b, x.dtype, not low.is_transposed, low.scale), rows, y)
    right = _matrices(run, w, x.dtype)
    for e, some in segments:
        padded = _rounded_up(some, last, x.dtype)
        with right(e) as matrix:
            if low is None:
                torch.mm(x[padded], matrix, out=y[padded])
            else:
                beyond = slice(some.stop, padded.stop)
                kept = y[beyond].clone()
                y[padded].addmm_(x[padded], matrix)
                y[beyond] = kept
        if bias is not None:
            y[some].add_(bias[e])
    return y


def outer(narrow: Tensor, wide: Tensor, rows: Rows, like: Tensor, is_transposed: bool, scale: float) -> Tensor:
    """`outer` of the protocol, the factor of each row in `narrow` already."""
    segments, _ = _segments(rows)
    packed = _is_packed(like)
    out = torch.empty(like.shape, dtype=wide.dtype if packed else like.dtype, device=like.device)
    for e, some in segments:
        left, right = (wide, narrow) if is_transposed else (narrow, wide)
        out[e] = _over_rows(left[some], right[some])
    out[rows.offsets.diff(prepend=rows.offsets.new_zeros(1)) == 0] = 0
    if packed:
        E, N, R = out.shape
        out = out.view(E, -1).t().contiguous().to(like.dtype).view(N, R, E).permute(2, 0, 1)
    return out if scale == 1.0 else out.mul_(scale)


def _segments(rows: Rows) -> tuple[list[tuple[int, slice]], int]:
    """Every group that has rows, and where the last one's end."""
    if "segments" not in rows.cache:
        bounds = [0, *rows.offsets.tolist()]
        segments = [
            (e, slice(first, last))
            for e, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
            if last > first
        ]
        rows.cache["segments"] = segments, segments[-1][1].stop if segments else 0
    return rows.cache["segments"]


def _products(x: Tensor, right: Callable[[int], Tensor], rows: Rows, out: Tensor) -> None:
    """`out = x right(e)` for the rows of every group e."""
    segments, last = _segments(rows)
    for e, some in segments:
        padded = _rounded_up(some, last, x.dtype)
        torch.mm(x[padded], right(e), out=out[padded])


def _matrices(run: Backend, w: Weight, dtype: torch.dtype) -> Callable[[int], AbstractContextManager[Tensor]]:
    """From a group to its right operand, for the products within the block."""
    if w.format == "dense":
        right = w.right()
        return lambda e: nullcontext(right[e])

    @contextmanager
    def decoded(e: int) -> Iterator[Tensor]:
        with run.dense(w.select(e, e + 1), dtype) as one:
            yield one.right()[0]

    return decoded


def _rounded_up(rows: slice, last: int, dtype: torch.dtype) -> slice:
    """A group's rows and some of the next ones', which are computed with theirs later, so that sizes are few."""
    step = ROW_MULTIPLE.get(dtype, 1)
    return slice(rows.start, min(rows.start + -(-(rows.stop - rows.start) // step) * step, last))


def _over_rows(left: Tensor, right: Tensor) -> Tensor:
    """`leftᵀ right`; a multiple of some rows and the rest apart, so that sizes are few, their sum in fp32.

    A sum over rows leaves fp16's range where its terms and its product with the scale do not: there it is all fp32.
    """
    if left.dtype is torch.float16:
        left, right = left.float(), right.float()
    step, wide = ROW_MULTIPLE.get(left.dtype, 1), torch.promote_types(left.dtype, torch.float32)
    whole = left.shape[0] // step * step
    if whole in (0, left.shape[0]):
        return torch.mm(left.t(), right)
    first, rest = (torch.mm(left[rows].t(), right[rows]) for rows in (slice(whole), slice(whole, None)))
    # torch.add(first, rest, out=fp32) would round the sum to their dtype
    return first.to(wide).add_(rest)


def _is_packed(t: Tensor) -> bool:
    """Whether the groups of `t [E, …]` are its fastest dimension."""
    return t.stride(0) == 1 and t.permute(1, 2, 0).is_contiguous()


def _right_operands(t: Tensor, dtype: torch.dtype, transposed: bool, scale: float) -> Callable[[int], Tensor]:
    """From a group to its matrix of `t [E, …]` in `dtype`, times `scale` and rounded once; transposed if asked."""

    def rounded(part: Tensor) -> Tensor:
        if scale == 1.0:
            return part.to(dtype)
        return torch.mul(part, scale, out=torch.empty_like(part, dtype=dtype))

    if _is_packed(t):
        stack = rounded(t.permute(1, 2, 0)).view(-1, t.shape[0]).t().contiguous().view(t.shape)
    elif t.stride(0) == 0:
        # shared by all groups: converted once
        stack = rounded(t[:1]).contiguous().expand_as(t)
    else:
        given = t if t.is_contiguous() else t.contiguous()
        return (lambda e: rounded(given[e]).t()) if transposed else (lambda e: rounded(given[e]))
    return (lambda e: stack[e].t()) if transposed else stack.__getitem__
