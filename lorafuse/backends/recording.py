"""A pass of an operator as a recording: what it allocated, which operators of torch it called, and what it launched.

A recording runs again for other tensors of the same shapes, strides and dtypes, in one call of csrc for consecutive
launches, where the pass itself spends most of its time on the host in Python. `lorafuse.backends.recorder` makes them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Call", "Memory", "Recording", "View", "mapped", "views"]


@dataclass(slots=True, eq=False)
class Memory:
    """Bytes begin … end of a tensor, whose `kind` says whence: given, allocated, made by an operator, or zeros."""

    tensor: Tensor
    kind: str
    begin: int
    end: int
    is_seen: bool = False  # by an operator of torch, or by the caller: a tensor of its own
    # launches that use it
    first: int = -1
    last: int = -1
    slot: int = -1
    offset: int = 0  # in the scratch


@dataclass(slots=True, eq=False)
class View:
    """A tensor of a memory. `whole`: as the memory's tensor is, and not a view of it."""

    memory: Memory
    whole: bool
    size: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    offset: int = 0  # in elements, behind the first of the memory's tensor

    def of(self, values: Sequence[Tensor]) -> Tensor:
        base = values[self.memory.slot]
        return base if self.whole else base.as_strided(self.size, self.strides, base.storage_offset() + self.offset)


@dataclass(slots=True, eq=False)
class Call:
    """An operator of torch, after so many launches. `made` are its results."""

    launches: int
    function: Any
    args: Any
    kwargs: dict[str, Any]
    made: list[Memory]

    def of(self, values: Sequence[Any]) -> Sequence[Tensor]:
        """Its results; none where it writes into memory that is there."""

        def fill(view: View) -> Tensor:
            return view.of(values)

        kwargs = {name: mapped(value, View, fill) for name, value in self.kwargs.items()}
        made = self.function(*mapped(self.args, View, fill), **kwargs)
        if not self.made:
            return ()
        return [made] if isinstance(made, Tensor) else made


def mapped(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """`value` with what is of `kind` replaced, in tuples and lists too."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (tuple, list)):
        made = [mapped(one, kind, function) for one in value]
        return tuple(made) if isinstance(value, tuple) else made
    return value


def views(value: Any) -> Iterator[View]:
    if isinstance(value, View):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from views(one)


@dataclass(slots=True, eq=False)
class Recording:
    """A pass that `record` has watched. Immutable: threads may run it side by side."""

    device: torch.device
    launches: Any
    scratch: int
    words: int
    allocations: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
    # the first launch and the last, and the call that comes after them, or none
    steps: list[tuple[int, int, Call | None]]
    results: list[View | None]

    def run(self, backend: Any, given: Sequence[Tensor | None], addresses: list[int]) -> list[Tensor | None]:
        """The results for other tensors, whose `addresses` are given; the list of them is written into."""
        device = self.device
        stream, values = backend.stream(device), [*given]
        values.append(torch.empty(self.scratch, dtype=torch.uint8, device=device) if self.scratch else None)
        values.append(backend.zeros(device, stream, self.words) if self.words else None)
        for size, strides, dtype in self.allocations:
            values.append(torch.empty_strided(size, strides, dtype=dtype, device=device))
        addresses += [0 if t is None else t.data_ptr() for t in values[len(given) :]]
        index = -1 if device.index is None else device.index
        for first, last, call in self.steps:
            if first < last:
                self.launches.run(first, last, addresses, stream, index)
            if call is not None:
                made = call.of(values)
                values += made
                addresses += [t.data_ptr() for t in made]
        return [
            None if view is None else values[view.memory.slot] if view.whole else view.of(values)
            for view in self.results
        ]
