"""Watches a pass of an operator as it runs, and makes the recording of it.

Nothing of a pass is stated twice: a dispatch mode sees torch's operators, csrc its launches (`Launches`), whose
pointers are then found in the memory of the tensors that were given or made.

Scratch, memory that is neither a result nor seen by torch's operators, is one allocation when the recording runs, in
which pieces that are not in use at the same time share bytes.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorafuse.backends.recording import Call, Memory, Recording, View, mapped, views

__all__ = ["ALIGN", "MOST_BYTES", "NotRecorded", "is_watching", "packed", "record", "zeros"]

# what CUDA's allocator aligns to
ALIGN = 256
# bytes that a pass allocates: a recording has all of them at once, where a pass frees piece by piece; and a GPU takes
# longer for one with more than Python does
MOST_BYTES = 1 << 29
_aten = torch.ops.aten
_ALLOCATE = frozenset(
    (
        _aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default,
        _aten.new_empty_strided.default,
    )
)  # fmt: skip


class NotRecorded(Exception):
    """A pass did what a recording cannot repeat; it ran all the same, and `results` are its results."""

    def __init__(self, reason: str, results: Any = None) -> None:
        super().__init__(reason)
        self.results = results


class _Active(threading.local):
    recorder: "_Recorder | None" = None


_active = _Active()


def zeros(memory: Tensor, words: int) -> Tensor:
    """`memory`, and for a recording the word that it is of `Backend.zeros`: no call of the pass allocated it."""
    if _active.recorder is not None:
        _active.recorder.add_zeros(memory, words)
    return memory


def is_watching() -> bool:
    """Whether this thread runs a pass that is recorded."""
    return _active.recorder is not None


class _Recorder(TorchDispatchMode):
    def __init__(self, native: ModuleType, given: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.launches = native.Launches()
        self.calls: list[Call] = []
        self.memories: list[Memory] = []
        self.words = self.bytes = 0
        self.refusal = ""
        # alive until the end, so that no address is given twice
        self.kept: list[Tensor] = []
        self.given = [None if t is None else self.add(t, "given") for t in given]

    def __enter__(self) -> "_Recorder":
        _active.recorder = self
        self.launches.start()
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self.launches.stop()
        _active.recorder = None

    def add(self, t: Tensor, kind: str) -> Memory:
        self.kept.append(t)
        span = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
        begin = t.data_ptr()
        memory = Memory(t, kind, begin, begin + span * t.itemsize)
        if kind == "allocated":
            # rows may be padded behind the last element
            memory.end = t.untyped_storage().data_ptr() + t.untyped_storage().nbytes()
        self.memories.append(memory)
        return memory

    def add_zeros(self, t: Tensor, words: int) -> None:
        self.words = max(self.words, words)
        if not any(m.kind == "zeros" and m.tensor is t for m in self.memories):
            self.add(t, "zeros")

    def view(self, t: Tensor) -> View:
        """`t` as a tensor of some memory."""
        same = [m for m in self.memories if m.tensor is t]
        if len(same) > 1:
            raise NotRecorded("tensors that share memory")
        if same:
            return View(same[0], True)
        owner, bytes_ = self.find(t.data_ptr()) if t.numel() else (None, 0)
        if owner is None or owner.tensor.dtype is not t.dtype:
            raise NotRecorded("an operator of torch reads memory of another dtype, or of nobody")
        base = owner.tensor
        whole = not bytes_ and base.shape == t.shape and base.stride() == t.stride()
        return View(owner, whole, tuple(t.shape), t.stride(), bytes_ // t.itemsize)

    def find(self, address: int) -> tuple[Memory | None, int]:
        """The memory of an address, and how many bytes it begins before that. Raises where it is of several."""
        owners = [m for m in self.memories if m.begin <= address < m.end]
        if len(owners) > 1:
            raise NotRecorded("tensors that share memory")
        return (owners[0], address - owners[0].begin) if owners else (None, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.refusal:
            return result
        try:
            self.watch(func, args, kwargs, result)
        except NotRecorded as error:
            self.refusal = str(error)
            self.kept.clear()
            self.memories.clear()
        return result

    def watch(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        results = [result] if isinstance(result, Tensor) else list(result) if isinstance(result, (list, tuple)) else []
        if not results or not all(isinstance(t, Tensor) for t in results):
            raise NotRecorded(f"{func} returns no tensors")
        if func in _ALLOCATE:
            self.count(results)
            self.add(result, "allocated")
        elif func._schema.is_mutable:
            written = [
                t for t, of in _arguments(func, args, kwargs) if of.alias_info is not None and of.alias_info.is_write
            ]
            if any(self.seen(t).memory.kind in ("given", "zeros") for t in written):
                raise NotRecorded(f"{func} writes into an operand")
            self.add_call(func, args, kwargs, [])
        elif all(t.untyped_storage()._cdata in self.storages() for t in results):
            # a view
            self.kept += results
        elif torch.Tag.nondeterministic_seeded in func.tags:
            raise NotRecorded(f"{func} draws numbers")
        else:
            self.count(results)
            self.add_call(func, args, kwargs, results)

    def count(self, results: Sequence[Tensor]) -> None:
        self.bytes += sum(t.nbytes for t in results)
        if self.bytes > MOST_BYTES:
            raise NotRecorded(f"more than {MOST_BYTES} bytes are made")

    def add_call(self, func: Any, args: Any, kwargs: dict[str, Any], results: Sequence[Tensor]) -> None:
        args, kwargs = mapped(args, Tensor, self.seen), {k: mapped(v, Tensor, self.seen) for k, v in kwargs.items()}
        # what reads nothing that the pass has made comes first, so that launches are one behind the other
        is_first = all(view.memory.kind == "given" for view in views((args, [*kwargs.values()])))
        launches = 0 if is_first else len(self.launches)
        self.calls.append(Call(launches, func, args, kwargs, [self.add(t, "made") for t in results]))

    def storages(self) -> set[int]:
        return {m.tensor.untyped_storage()._cdata for m in self.memories}

    def seen(self, t: Tensor) -> View:
        view = self.view(t)
        view.memory.is_seen = True
        return view


def _arguments(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, Any]]:
    """The tensors of a call, each with what the schema says of the argument."""
    for i, of in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(of.name)
        for t in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(t, Tensor):
                yield t, of


def record(
    native: ModuleType, given: Sequence[Tensor | None], call: Callable[[], Sequence[Tensor | None]]
) -> tuple[Recording, Sequence[Tensor | None]]:
    """The recording of `call()`, whose tensors are `given`, and its results. Raises NotRecorded."""
    recorder = _Recorder(native, given)
    with recorder:
        results = call()
    try:
        if recorder.refusal:
            raise NotRecorded(recorder.refusal)
        return _recording(recorder, results), results
    except NotRecorded as error:
        error.results = results
        raise


def _recording(recorder: _Recorder, results: Sequence[Tensor | None]) -> Recording:
    launches, given = recorder.launches, len(recorder.given)
    # zeros that were allocated on the way are not the pass's
    begins = {m.begin for m in recorder.memories if m.kind == "zeros"}
    memories = [m for m in recorder.memories if m.kind in ("given", "zeros") or m.begin not in begins]
    calls = [call for call in recorder.calls if not any(m.begin in begins for m in call.made)]
    recorder.memories = memories
    outputs: list[View | None] = []
    for t in results:
        view = None if t is None else recorder.seen(t) if t.numel() else _of_nothing(recorder, t)
        if view is not None and view.memory.kind in ("given", "zeros"):
            raise NotRecorded("a result is an operand")
        if view is not None and t is not None and not view.whole:
            _allocate_as(t, view, calls)
        outputs.append(view)
    if len({id(v.memory) for v in outputs if v is not None}) < sum(v is not None for v in outputs):
        raise NotRecorded("results share memory")
    places = []
    for launch in range(len(launches)):
        for index, address in enumerate(launches.pointers(launch)):
            memory, bytes_ = recorder.find(address)
            if memory is None:
                raise NotRecorded("a launch reads memory of nobody")
            memory.first = launch if memory.first < 0 else memory.first
            memory.last = launch
            places.append((launch, index, memory, bytes_))
    allocated = [m for m in memories if m.kind == "allocated"]
    scratch = packed([m for m in allocated if not m.is_seen and m.first >= 0])
    owned = [m for m in allocated if m.is_seen]
    allocations = [(tuple(m.tensor.shape), m.tensor.stride(), m.tensor.dtype) for m in owned]
    # in the order of `Recording.run`
    for slot, one in enumerate(recorder.given):
        if one is not None:
            one.slot = slot
    for memory in memories:
        if memory.kind != "given":
            memory.slot = given + (memory.kind == "zeros")
    # calls run in the order of their launches
    calls.sort(key=lambda call: call.launches)
    for slot, memory in enumerate([*owned, *(m for call in calls for m in call.made)], given + 2):
        memory.slot = slot
    for launch, index, memory, bytes_ in places:
        launches.place(launch, index, memory.slot, bytes_ + memory.offset)
    steps: list[tuple[int, int, Call | None]] = []
    done = 0
    for call in calls:
        steps.append((done, call.launches, call))
        done = call.launches
    if done < len(launches):
        steps.append((done, len(launches), None))
    for memory in memories:
        # tensors are those of the call that was watched
        memory.tensor = None  # type: ignore[assignment]
    device = next(t.device for t in results if t is not None)
    return Recording(device, launches, scratch, recorder.words, allocations, steps, outputs)


def _of_nothing(recorder: _Recorder, t: Tensor) -> View:
    """A result without elements, which has no address."""
    for memory in recorder.memories:
        if memory.kind == "allocated" and memory.tensor is t:
            memory.is_seen = True
            return View(memory, True)
    raise NotRecorded("a result without elements is a view")


def _allocate_as(t: Tensor, view: View, calls: list[Call]) -> None:
    """Makes a result that is all of an allocation no view of it: it is allocated with its own sizes then."""
    memory = view.memory
    base, read = memory.tensor, (v for call in calls for v in views((call.args, [*call.kwargs.values()])))
    is_all = not view.offset and base.is_contiguous() and t.is_contiguous() and t.numel() == base.numel()
    if memory.kind == "allocated" and is_all and not any(v.memory is memory for v in read):
        memory.tensor, view.whole = t, True


def packed(memories: list[Memory]) -> int:
    """Gives each an offset at which nothing lies while it is in use, the largest first; returns the bytes of all.

    A launch may begin while the one before it ends, so what neighbors use is in use together.
    """
    placed: list[Memory] = []
    total = 0
    for one in sorted(memories, key=lambda m: m.begin - m.end):
        size, offset = one.end - one.begin, 0
        for other in sorted(placed, key=lambda m: m.offset):
            is_together = other.first <= one.last + 1 and one.first <= other.last + 1
            if is_together and other.offset < offset + size and offset < other.offset + other.end - other.begin:
                offset = -(-(other.offset + other.end - other.begin) // ALIGN) * ALIGN
        one.offset = offset
        placed.append(one)
        total = max(total, offset + size)
    return total
