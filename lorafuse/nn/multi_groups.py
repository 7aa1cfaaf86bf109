"""Layers of many adapters in a model's own code, run as one operator: those that read one x, and gated MLPs.

`SiblingCalls` computes all of its layers in the call of the first (`lora_linears_multi`, one autograd node) and keeps
the others' outputs, which each returns where it is called with the same tensor, unchanged, in the same state. Whatever
else is called runs alone, and so does every call without gradients, or while torch.compile traces: y has the same bits.
`MultiSiblings` are layers of a pool; `lorafuse.integrations.hf_mixed` has PEFT's.

`MultiGatedMLP` replaces the forward of a parent, which then calls its layers only where one of them, or what stands
between them, is no longer as it was (`lora_gated_mlp_multi`).

Which layers run as one depends on the model and its calls, never on sizes or rows: an adapter has the bits that it has
alone.
"""

import types
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lorafuse.functional import lora_gated_mlp_multi, lora_linears_multi
from lorafuse.nn.multi import LoRALinearMulti, multi_projections, shared_rows
from lorafuse.nn.roles import attributes_of, gated_roles, has_attributes, has_gated_sizes, sibling_orders

__all__ = ["MultiGatedMLP", "MultiSiblings", "SiblingCalls", "cast_dtype", "form_groups"]

_hooks_of_saved_tensors = torch._C._autograd._top_saved_tensors_default_hooks


@dataclass(eq=False)
class _Slot:
    """What was computed of x and not yet fetched, by layer: the state that it was computed in, and y. `is_fixed` of
    calls that a checkpoint may make again.
    """

    x: Tensor
    is_fixed: bool
    ys: dict[Any, tuple[Any, Tensor]]


class SiblingCalls:
    """Layers that are called one after the other with one x, in that order. One that was not called with it leaves.

    What is not fetched has no gradient and adds nothing to that of x: leaving changes no bit.
    """

    def __init__(self, layers: Sequence[Any], present: Sequence[Any] | None = None) -> None:
        """`present` are those that have not left."""
        self.layers = tuple(layers)
        self.present = self.layers if present is None else tuple(present)
        self._slot: _Slot | None = None

    def compute(self, layers: Sequence[Any], x: Tensor, given: Any) -> dict[Any, tuple[Any, Tensor]]:
        """State and y of all the layers, in which the first is called, with this x and what is `given` besides."""
        raise NotImplementedError

    def state(self, layer: Any, x: Tensor, given: Any) -> Any:
        """What the y of a layer depends on, as it is now."""
        raise NotImplementedError

    def output(self, layer: Any, x: Tensor, given: Any = None) -> Tensor | None:
        """y of one of the layers; None where it runs alone."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.is_inference():
            return None
        slot = self._slot
        is_fixed = _hooks_of_saved_tensors(False) is not None
        layers = self.layers if is_fixed else self.present
        if layer is not layers[0]:
            if slot is None or slot.x is not x or layer not in slot.ys:
                return None
            if slot.ys[layer][0] != self.state(layer, x, given):
                return None
            _, y = slot.ys.pop(layer)
            if not slot.ys:
                self._slot = None
            return y
        self.drop()
        if len(layers) == 1:
            return None
        slot = _Slot(x, is_fixed or torch._C._current_graph_task_id() != -1, self.compute(layers, x, given))
        _, y = slot.ys.pop(layer)
        self._slot = slot
        if y.grad_fn is not None:
            # backward frees the graph of all of them; the graph does not hold what holds it
            reference = weakref.ref(slot)
            y.grad_fn.register_prehook(lambda *_: self._expire(reference))
        return y

    def drop(self) -> None:
        """Forget what was not fetched, and whose it was."""
        slot, self._slot = self._slot, None
        # backward may run a checkpointed call again in part, and must run as many layers as the call did
        if slot is not None and slot.ys and not slot.is_fixed:
            self.present = tuple(layer for layer in self.present if layer not in slot.ys)

    def _expire(self, reference: weakref.ref[_Slot]) -> None:
        if self._slot is not None and self._slot is reference():
            self.drop()

    def forget(self) -> None:
        """Drop what was not fetched of a call that did not end."""
        self._slot = None


class MultiSiblings(SiblingCalls):
    """Such layers of many adapters."""

    def __init__(self, layers: Sequence[LoRALinearMulti]) -> None:
        super().__init__(layers)
        for layer in layers:
            layer.siblings = self

    def compute(self, layers: Sequence[Any], x: Tensor, given: Any) -> dict[Any, tuple[Any, Tensor]]:
        rows = shared_rows(layers)
        assert rows is not None
        flat, offsets = rows.sorted(x)
        ys = lora_linears_multi(flat, offsets, multi_projections(layers, rows))
        return {one: (self.state(one, x, given), rows.restored(y, x)) for one, y in zip(layers, ys, strict=True)}

    def state(self, layer: Any, x: Tensor, given: Any) -> Any:
        of_layer = id(layer.rows), id(layer.a), layer.a._version, id(layer.b), layer.b._version, layer.training
        return x._version, cast_dtype(x), *of_layer


def cast_dtype(x: Tensor) -> Any:
    """The dtype of autocast, where that is on for x; False where it is not."""
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)


def _is_bare(module: nn.Module) -> bool:
    """Whether a call of the module runs the forward of its class, and nothing else."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return not any(hooks) and "forward" not in module.__dict__


@dataclass(eq=False)
class MultiGatedMLP:
    """The roles of a parent's three layers, and what its forward may read besides them; `form` makes one."""

    names: tuple[str, str, str]
    activation: str
    others: dict[str, tuple[nn.Module, dict[str, Any]]]
    attributes: dict[str, Any]

    def output(self, parent: nn.Module, x: Any) -> Tensor | None:
        """y of the parent called with x; None where its layers have to be called."""
        modules = parent._modules
        layers: list[Any] = [modules.get(name) for name in self.names]
        if not isinstance(x, Tensor) or _has_any_global_hook() or not has_attributes(parent, self.attributes):
            return None
        for name, (module, attributes) in self.others.items():
            if modules.get(name) is not module or not _is_bare(module) or not has_attributes(module, attributes):
                return None
        if not all(_fits(layer) and _is_bare(layer) for layer in layers):
            return None
        rows = shared_rows([layer for layer in layers if isinstance(layer, LoRALinearMulti)])
        if rows is None:
            return None
        flat, offsets = rows.sorted(x)
        y = lora_gated_mlp_multi(flat, offsets, *multi_projections(layers, rows), activation=self.activation)
        return rows.restored(y, x)

    @staticmethod
    def form(parent: nn.Module) -> bool:
        """Let a parent with such a forward run as one operator, if it is one and has a layer of many adapters."""
        children = {name: child for name, child in parent._modules.items() if child is not None and _fits(child)}
        bases: dict[str, Any] = {n: c.base if isinstance(c, LoRALinearMulti) else c for n, c in children.items()}
        sizes = {name: (base.out_features, base.in_features) for name, base in bases.items()}
        others: dict[str, Any] = {n: c for n, c in parent._modules.items() if n not in children and c is not None}
        if not (
            any(isinstance(child, LoRALinearMulti) for child in children.values())
            and has_gated_sizes(sizes)
            and all(_is_bare(module) for module in (*children.values(), *others.values()))
            and not any(module._modules or module._parameters or module._buffers for module in others.values())
            and not (parent._parameters or parent._buffers or "forward" in parent.__dict__)
        ):
            return False
        seen = gated_roles(type(parent), parent, bases, others)
        if isinstance(seen, str):
            return False
        (first, second, down), (activation, is_gate_first) = seen
        names = (first, second, down) if is_gate_first else (second, first, down)
        checked = {name: (module, attributes_of(module)) for name, module in others.items()}
        parent._lorafuse_gated = MultiGatedMLP(names, activation, checked, attributes_of(parent))  # type: ignore
        parent.forward = types.MethodType(_gated_forward, parent)
        return True

    @staticmethod
    def dissolve(parent: nn.Module) -> None:
        """Give a parent its own forward back; one that was replaced since calls that."""
        if getattr(parent.__dict__.get("forward"), "__func__", None) is _gated_forward:
            del parent.forward
        parent.__dict__.pop("_lorafuse_gated", None)


def _fits(layer: Any) -> bool:
    """Whether an operator takes a layer: one of many adapters, or a frozen `nn.Linear`."""
    return isinstance(layer, LoRALinearMulti) or (type(layer) is nn.Linear and not layer.weight.requires_grad)


def _gated_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    mlp = self.__dict__.get("_lorafuse_gated")
    y = mlp.output(self, args[0]) if mlp is not None and len(args) == 1 and not kwargs else None
    return type(self).forward(self, *args, **kwargs) if y is None else y


def form_groups(model: nn.Module) -> tuple[list[MultiSiblings], list[nn.Module]]:
    """Make groups of the layers of many adapters of a model; returns the siblings, and the parents of gated MLPs."""
    siblings, gated = [], []
    for path, parent in model.named_modules():
        children = {name: c for name, c in parent._modules.items() if isinstance(c, LoRALinearMulti)}
        alike: dict[tuple[object, ...], list[str]] = {}
        for name, child in children.items():
            w = child.weight
            alike.setdefault((w.sizes[1], w.data.device, w.format == "dense" and w.data.dtype), []).append(name)
        for names in alike.values():
            where = f"{path.rpartition('.')[2]} {type(parent).__name__}"
            for order in sibling_orders(names, where):
                siblings.append(MultiSiblings([children[names[i]] for i in order]))
        if children and MultiGatedMLP.form(parent):
            gated.append(parent)
    return siblings, gated
