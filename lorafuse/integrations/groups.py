"""Siblings of a patched model: LoRA layers of one parent that read the same x, run as one operator.

The first of them called with x computes the outputs of all (`lora_linears`, one autograd node) and keeps the others in
one slot. Each takes its own when it is called with the same tensor object, unchanged, in the same state; whatever else
is called runs alone, and so does every call without gradients or with a small x. Which layers read one x is known by
their names, or learned from one forward; a group that leaves outputs behind is given up.

Outputs that nobody fetched live until x or their graph's backward is gone, or until the next group runs in the thread.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.functional import Projection, run_linears
from lorafuse.integrations.hf_common import is_zero3_leaf
from lorafuse.integrations.hf_quantized import dtypes_of, is_quantized, stored
from lorafuse.integrations.report import Group, Skipped
from lorafuse.nn.roles import sibling_orders
from lorafuse.operands import Weight

__all__ = ["Siblings", "fits", "form", "is_same_weight", "is_small", "join", "leave", "why_not_alike"]

# elements of x: at K 576 q, k and v as a group took 1.015, 0.97 and 0.99 of the time of the three alone with 32, 64 and
# 128 rows, an MLP 1.09, 1.02 and 0.93 (forward and backward, fp32, EPYC, one thread, a shared machine, 2026-11-29)
SMALL = 1 << 15

_hooks_of_saved_tensors = torch._C._autograd._top_saved_tensors_default_hooks
# the group of this thread that computed last
_latest = threading.local()


class Siblings:
    """The fused linear children of one parent with equal in features, and what was computed for them.

    Args:
        count: how many they are; each is known by its index.
        orders: indices that are called one after the other with one x, by the first of them.
        named: those of them that were not learned; None for all.

    A copy, or what pickle loads, knows the same orders and no member: those join by `join` when they are copied.
    """

    def __init__(
        self, count: int, orders: Iterable[Sequence[int]] = (), named: Iterable[Sequence[int]] | None = None
    ) -> None:
        self.members: list[weakref.ref[Any] | None] = [None] * count
        self.orders = {order[0]: tuple(order) for order in orders}
        self.named = tuple(self.orders.values()) if named is None else tuple(map(tuple, named))
        # of a mixed batch that runs now the calls of each member; which of an order have not left
        self.mixed: dict[Any, Any] | None = None
        self._present: dict[tuple[int, ...], tuple[int, ...]] = {}
        # of orders that were named or learned: how often in a row outputs were left; absent where none was complete
        self._misses: dict[tuple[int, ...], int] = {}
        self._dropped: set[tuple[int, ...]] = set()
        # the orders under hooks on saved tensors: what a checkpoint computes again must save as many tensors
        self._fixed: dict[int, tuple[int, ...]] | None = None
        # x, weak reference to x, state of the call, order, operands and versions of each, outputs not yet fetched
        self.slot: tuple[Any, ...] | None = None
        self._run: list[int] = []
        # whether each of the run was called alone; such runs
        self._is_single = True
        self._single: set[tuple[int, ...] | None] = set()
        self._run_x: weakref.ref[Tensor] | None = None
        self._self = weakref.ref(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Siblings, (len(self.members), tuple(self.orders.values()), self.named)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Siblings":
        memo[id(self)] = copied = Siblings(len(self.members), self.orders.values(), self.named)
        return copied

    @contextlib.contextmanager
    def mixed_batch(self, calls: Callable[[list[Any], list[Any]], Any]) -> Iterator[None]:
        """Within it members run a mixed batch: `calls` makes `lorafuse.nn.multi_groups.SiblingCalls` of an order's
        members and those that have not left. Learned orders are none: bits would depend on batches before.
        """
        before, made = self.mixed, {}
        for order in self.named:
            layers = {i: one() for i in order if (one := self.members[i]) is not None}
            if len(layers) == len(order) and None not in layers.values():
                present = self._present.get(order, order)
                made[order] = calls(list(layers.values()), [layers[i] for i in present])
        self.mixed = {layer: one for one in made.values() for layer in one.layers}
        try:
            yield
            for order, one in made.items():
                one.drop()
                self._present[order] = tuple(i for i in order if self.members[i]() in one.present)  # type: ignore[misc]
        finally:
            self.mixed = before

    def output(
        self, index: int, member: Any, x: Tensor, operands: tuple, read: Callable[[Any], tuple | None]
    ) -> Tensor | None:
        """y of a member called with x, whose present `operands` are given; None where it runs alone.

        `read` gives the operands of another member, or None where it cannot run fused. Layers of an x that `is_small`
        run alone and are not given here.
        """
        slot, is_compiling = self.slot, torch.compiler.is_compiling()
        # what a group saves is in backward; and no trace shows a change of x in place, which autograd forbids
        if not torch.is_grad_enabled():
            if not is_compiling:
                self._end_run(x, index)
                self._run.append(index)
            return None
        if is_compiling:
            if _is_in_subgraph():
                return None
            if slot is not None and slot[0] is x and index in slot[5]:
                y = slot[5].pop(index)
                if not slot[5]:
                    self.slot = None
                return y
            order = self.orders.get(index)
            return None if order is None else self._compute(index, order, member, x, operands, read, None)
        state = _state(x)
        if slot is not None and slot[1] is not None and slot[1]() is x and index in slot[5]:
            if slot[2] == state and _is_same(slot[4][index], operands):
                y = slot[5].pop(index)
                if not slot[5]:
                    self.slot = None
                    self._misses[slot[3]] = 0
                return y
            return None
        reference = self.members[index]
        # a replica of nn.DataParallel has the group of the module that it is made of
        if state is None or reference is None or reference() is not member:
            return None
        orders = self.orders
        if _hooks_of_saved_tensors(False) is not None:
            if self._fixed is None:
                self._fixed = dict(orders)
            orders = self._fixed
            order = orders.get(index)
        else:
            self._end_run(x, index)
            order = orders.get(index)
            # a reentrant checkpoint called the layers without gradients, and the masks drawn then are drawn again
            if operands[5] and torch._C._current_graph_task_id() != -1 and order not in self._single:
                order = None
            # members that will fetch their output are not called to observe
            self._run += (index,) if order is None else [i for i in order if i not in self._run]
            self._is_single &= order is None
        return None if order is None else self._compute(index, order, member, x, operands, read, state)

    def _compute(
        self, index: int, order: tuple[int, ...], member: Any, x: Tensor, operands: tuple,
        read: Callable[[Any], tuple | None], state: tuple | None,
    ) -> Tensor | None:  # fmt: skip
        """y of the first of an order; those of the others are in the slot."""
        every, features, dtypes = {index: operands}, x.shape[-1:], None
        if type(operands[0]) is Weight:
            dtypes = dtypes_of(member._modules["base_layer"], x, operands)
        for i in order[1:]:
            reference = self.members[i]
            other = None if reference is None else reference()
            if other is None or other._lorafuse_backend != member._lorafuse_backend:
                continue
            theirs = read(other)
            if theirs is None or not fits(theirs, operands, x, features):
                continue
            if dtypes is None or dtypes_of(other._modules["base_layer"], x, theirs) == dtypes:
                every[i] = theirs
        if len(every) == 1 or not fits(operands, operands, x, features):
            return None
        layers = [Projection(*one) for one in every.values()]
        if dtypes is None:
            results = run_linears(x, layers, member._lorafuse_backend)
        else:
            made = dtypes.run(run_linears, x, layers, member._lorafuse_backend)
            results = tuple(y.to(dtypes.returned) for y in made)
        ys = dict(zip(every, results, strict=True))
        y = ys.pop(index)
        if state is None:
            self.slot = x, None, None, order, every, ys
            return y
        self._discard()
        # what another group was left with lives no longer than until here
        previous = getattr(_latest, "group", None)
        previous = None if previous is None else previous()
        if previous is not None and previous is not self:
            previous._discard()
        _latest.group = self._self
        reference = weakref.ref(x, functools.partial(_expire, self._self))
        if y.grad_fn is not None:
            # after backward the graph of the others' outputs is gone too
            y.grad_fn.register_prehook(functools.partial(_expire, self._self, reference))
        self.slot = (
            None,
            reference,
            state,
            order,
            {i: (every[i], _version(every[i][1]), _version(every[i][2])) for i in ys},
            ys,
        )
        return y

    def _discard(self) -> None:
        """Empty the slot; outputs left in it count against their order."""
        slot, self.slot = self.slot, None
        # of several threads in one module each may overwrite what the others computed
        if slot is None or slot[1] is None or slot[2][0] != threading.get_ident():
            return
        order = slot[3]
        self._misses[order] = misses = self._misses.get(order, 1) + 1
        if misses > 1:
            self._dropped.add(order)
            if self.orders.get(order[0]) == order:
                del self.orders[order[0]]

    def _end_run(self, x: Tensor, index: int) -> None:
        """Learn from calls, where this one begins another run: members called one after the other with one x."""
        if self._run_x is None or self._run_x() is not x or index in self._run:
            order = tuple(self._run)
            if len(order) > 1 and order not in self._dropped:
                self.orders[order[0]] = order
            if self._is_single:
                self._single.add(order)
            self._run, self._run_x, self._is_single = [], weakref.ref(x), True


def is_small(x: Tensor) -> bool:
    """Whether the layers of this x run alone: a group costs the host more than its passes save; a graph has no host."""
    return x.numel() < SMALL and not torch.compiler.is_compiling()


def _is_in_subgraph() -> bool:
    """Whether Dynamo traces a graph within a graph, a checkpoint's: it must not change the slot, which lies outside."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return not InstructionTranslator.current_tx().output.is_root_tracer()


# called while Dynamo traces, as torch.compiler.assume_constant_result marks it; that would import Dynamo here
_is_in_subgraph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _expire(group: weakref.ref[Siblings], reference: weakref.ref[Tensor], *_: Any) -> None:
    """Empty the slot of a group if it still holds the outputs of this x."""
    siblings = group()
    if siblings is not None and siblings.slot is not None and siblings.slot[1] is reference:
        siblings._discard()


def _state(x: Tensor) -> tuple | None:
    """What outputs depend on besides the layers; None for an x whose changes cannot be seen, or of no plain kind."""
    if x.is_inference() or x.is_meta or x.dim() > 4 or x.is_nested:
        return None
    kind = "cpu" if x.is_cpu else x.device.type
    return (
        threading.get_ident(),
        x._version,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else None,
    )


def _version(tensor: Tensor) -> int:
    """How often an operand was changed in place; an inference tensor does not count it."""
    return -1 if tensor.is_inference() else tensor._version


def _is_same(kept: tuple, operands: tuple) -> bool:
    """Whether a layer still has the operands its output was computed from, and a and b are as they were."""
    (weight, a, b, scale, bias, p), of_a, of_b = kept
    return (
        is_same_weight(weight, operands[0])
        and a is operands[1]
        and b is operands[2]
        and scale == operands[3]
        and bias is operands[4]
        and p == operands[5]
        and of_a == _version(a)
        and of_b == _version(b)
    )


def is_same_weight(kept: Any, now: Any) -> bool:
    """Whether a weight is the one that it was; a quantized one is adopted at each call, by reference."""
    if kept is now:
        return True
    return (
        type(kept) is type(now) is Weight
        and kept.format == now.format
        and kept.data.data_ptr() == now.data.data_ptr()
        and [t.data_ptr() for t in kept.statistics] == [t.data_ptr() for t in now.statistics]
    )


def fits(theirs: tuple, first: tuple, x: Tensor, features: torch.Size) -> bool:
    """Whether a layer of so many in features runs in one operator with the first, whose input x is.

    a and b of a layer without an adapter are None. Sharded and offloaded layers do not fit.
    """
    w, a, b, _, bias, _ = theirs
    if type(w) is Weight:
        # dtypes of quantized layers are compared apart
        if type(first[0]) is not Weight:
            return False
        sizes, tensors = w.stored, [w.data, *w.statistics]
    elif type(first[0]) is Weight or w.dtype is not first[0].dtype or (bias is not None and bias.dtype is not w.dtype):
        return False
    else:
        sizes, tensors = w.shape, [w]
    if sizes[1:] != features:
        return False
    if bias is not None:
        tensors.append(bias)
    if a is not None:
        if a.dtype is not first[1].dtype or a.shape[1:] != features or b.shape != (*sizes[:1], *a.shape[:1]):
            return False
        tensors += a, b
    # comparing devices takes as long as all of the above
    is_cpu, device = x.is_cpu, x.device
    for t in tensors:  # noqa: SIM110 (a generator costs more)
        if not (t.is_cpu if is_cpu else t.device == device):
            return False
    return True


def join(member: Any) -> None:
    """Make a copied member one of its group's copy, if no other object has its place."""
    if "_lorafuse_siblings" in member.__dict__:
        siblings, index = member._lorafuse_siblings
        reference = siblings.members[index]
        if reference is None or reference() is None:
            siblings.members[index] = weakref.ref(member)


def form(model: nn.Module, layers: Iterable[Any]) -> tuple[list[Group], list[Skipped]]:
    """Make groups of the `layers` of a model that are children of one parent with equal in features on one device.

    Returns the groups, and those that were not formed with the reason.
    """
    fused, groups, apart = set(layers), [], []
    for path, parent in model.named_modules():
        children = {name: child for name, child in parent._modules.items() if child in fused}
        fused.difference_update(children.values())
        by_features: dict[int, dict[str, Any]] = {}
        for name, child in children.items():
            by_features.setdefault(child.in_features, {})[name] = child
        for members in by_features.values():
            if len(members) < 2:
                continue
            if reason := _why_apart(members.values()):
                apart.append(Skipped(path, "siblings", f"{reason} ({', '.join(members)})"))
                continue
            names = list(members)
            orders = sibling_orders(names, f"{path.rpartition('.')[2]} {type(parent).__name__}")
            groups += [Group(path, "siblings", tuple(names[i] for i in order)) for order in orders]
            groups += [] if orders else [Group(path, "candidates", tuple(names))]
            _unite(members, orders)
    return groups, apart


def _why_apart(members: Collection[Any]) -> str:
    bases = [member.get_base_layer() for member in members]
    devices = {str(base.weight.device) for base in bases}
    is_gathered = any(map(is_zero3_leaf, members))
    reason = "DeepSpeed's ZeRO-3 gathers one of them at a time" if is_gathered else why_not_alike(bases)
    if reason or devices == {"meta"}:
        return reason or "weights are on the meta device"
    return f"weights are on {' and '.join(sorted(devices))}" if len(devices) > 1 else ""


def why_not_alike(bases: Sequence[nn.Module]) -> str:
    """Why base layers cannot run in one operator, by their kinds; or ""."""
    if other := [type(base).__name__ for base in bases if type(base) is not nn.Linear and not is_quantized(type(base))]:
        return f"a base is a {other[0]}, no plain or quantized nn.Linear"
    if len({stored(base) is None for base in bases}) > 1:
        return "some bases are quantized and others are not"
    return ""


def _unite(members: dict[str, Any], orders: list[list[int]]) -> None:
    """One group of members; one that they already are stays as it is."""
    given = [member.__dict__.get("_lorafuse_siblings", (None,))[0] for member in members.values()]
    if given[0] is not None and len(given[0].members) == len(given) and len(set(given)) == 1:
        return
    siblings = Siblings(len(members), orders)
    for index, member in enumerate(members.values()):
        member._lorafuse_siblings = siblings, index
        siblings.members[index] = weakref.ref(member)


def leave(member: Any) -> None:
    """Take a layer out of its group."""
    if "_lorafuse_siblings" in member.__dict__:
        siblings, index = member._lorafuse_siblings
        siblings.members[index] = siblings.slot = None
        del member._lorafuse_siblings
