"""Passes of operators that are repeated from a recording where the kernels' backend makes one (`backends.recording`).

The first pass of its kind runs, the second is recorded, later ones repeat it. Of one kind are passes of one function,
backend, plan and settings, whose tensors have the same sizes, strides, dtypes and devices and lie on 16-byte
boundaries: all that a pass depends on but the addresses. Layers of one shape share a recording.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lorafuse import plan
from lorafuse.backends import base
from lorafuse.backends.recorder import NotRecorded, record
from lorafuse.backends.recording import Recording
from lorafuse.ops.choose import latest

__all__ = ["KINDS", "MOST_KINDS", "clear", "repeated"]

# kinds that are kept: those of some hundred shapes of a batch
MOST_KINDS = 4096
_UNKNOWN: Any = object()
# by kind the `Backend` that ran it and, from the second time on, the recording; None where none repeats it
KINDS: dict[Hashable, "tuple[Any, Recording | None] | None"] = {}


def clear() -> None:
    """Forget all recordings."""
    KINDS.clear()


def repeated(
    function: Callable[..., Sequence[Tensor | None]], backend: str, settings: Hashable,
    tensors: Sequence[Tensor | None], *arguments: Any,
) -> Sequence[Tensor | None]:  # fmt: skip
    """`function(*arguments)`, tensors or None, which depend on `settings` and `tensors` alone."""
    sizes: list[Any] = []
    addresses, bits = [], 0
    for t in tensors:
        if t is None:
            sizes.append(None)
            addresses.append(0)
            continue
        address = t.data_ptr()
        addresses.append(address)
        bits |= address
        if t.is_contiguous():
            sizes.append((t.shape, t.dtype, t.get_device()))
        else:
            # rows may be padded behind the last element
            rest = t.untyped_storage().nbytes() - t.storage_offset() * t.itemsize
            sizes.append((t.shape, t.stride(), t.dtype, t.get_device(), rest))
    if bits % 16:
        return function(*arguments)
    kind = function, base.resolve(backend), plan.state(), settings, tuple(sizes)
    known = KINDS.get(kind, _UNKNOWN)
    if known is _UNKNOWN:
        results = function(*arguments)
        if len(KINDS) >= MOST_KINDS:
            KINDS.clear()
        KINDS[kind] = (run, None) if (run := base.load(latest.name)).repeats else None
        return results
    if known is None:
        return function(*arguments)
    run, recording = known
    if recording is not None:
        latest.name = run.name
        return recording.run(run, tensors, addresses)
    if run.is_capturing():
        return function(*arguments)
    try:
        recording, results = record(run.native, tensors, partial(function, *arguments))
        KINDS[kind] = run, recording
    except NotRecorded as error:
        KINDS[kind], results = None, error.results
    return results
