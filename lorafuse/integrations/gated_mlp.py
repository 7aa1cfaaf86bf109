"""Gated MLPs of a patched model, `down(act(gate(x)) · up(x))`, run as one operator (`lora_gated_mlp`).

`form` looks for parents of three linear layers whose sizes fit, and runs the forward of the parent's class on a small
input with small layers in their places: which layer is which, and the activation, follow from what these computed. The
model itself computes nothing, and no random number is drawn.

The parent keeps its object and gets a subclass of its class, which replaces `forward` only. A call whose layers are not
as they were (hooks, a merged or disabled adapter, another device) runs the forward of the parent's own class.
"""

import functools
import types
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorafuse.functional import MultiProjection, Projection, lora_gated_mlp_multi, run_gated_mlp
from lorafuse.integrations import calls
from lorafuse.integrations.groups import fits, is_small, why_not_alike
from lorafuse.integrations.hf_common import altered, interception, is_called_otherwise, is_zero3_leaf
from lorafuse.integrations.hf_mixed import Mixed, batch_of, run_batch
from lorafuse.integrations.hf_peft import Member, operands_of
from lorafuse.integrations.hf_plain import LINEAR_FORWARD
from lorafuse.integrations.hf_quantized import dtypes_of, stored
from lorafuse.integrations.report import Group, Skipped
from lorafuse.nn.roles import attributes_of, gated_roles, has_attributes, has_gated_sizes
from lorafuse.operands import Weight
from lorafuse.ops.checks import seed_tensor

__all__ = ["dissolve", "form", "formed", "is_ours"]


@functools.cache
def _fused(shipped: Any, own: Any) -> Any:
    """The subclass of a parent's class, whose forward is `own`."""

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # without gradients layers run alone, as siblings do; who kept this method calls it after unpatch too
        if len(args) == 1 and not kwargs and shipped.forward is own and torch.is_grad_enabled():
            mlp = self.__dict__.get("_lorafuse_mlp")
            y = None if mlp is None else mlp.output(self, args[0])
            if y is not None:
                return y
        return shipped.forward(self, *args, **kwargs)

    def reduced(self: Any, protocol: Any) -> Any:
        # pickle finds the shipped class alone
        _, (_, *args), *rest = shipped.__reduce_ex__(self, max(2, int(protocol)))
        return _made, (shipped, *args), *rest

    # tools know a class by its names
    body = {name: getattr(shipped, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"forward": forward, "__reduce_ex__": reduced, "_lorafuse_shipped": shipped}
    return types.new_class(shipped.__name__, (shipped,), exec_body=lambda space: space.update(body))


def _made(shipped: Any, *args: Any) -> Any:
    """A new object of the subclass, for copies and for what pickle loads."""
    ours = _fused(shipped, shipped.forward)
    return ours.__new__(ours, *args)


@dataclass(eq=False)
class _Roles:
    """Which children of a parent are what, and what its forward may read besides them.

    Attributes:
        gate, up, down: names of children.
        is_up_first: whether forward calls up before gate, and so draws its mask first.
        others: the children that are no linear layers, by name, and the public attributes of each.
        attributes: those of the parent.
    """

    gate: str
    up: str
    down: str
    is_up_first: bool
    activation: str
    others: dict[str, tuple[nn.Module, dict[str, Any]]]
    attributes: dict[str, Any]

    @property
    def names(self) -> tuple[str, str, str]:
        return self.gate, self.up, self.down

    def output(self, parent: Any, x: Any) -> Tensor | None:
        """y of the parent called with x; None where its layers have to be called."""
        if not isinstance(x, Tensor) or not 1 <= x.dim() <= 4 or interception(x) is not None:
            return None
        members = [parent._modules.get(name) for name in self.names]
        batch = batch_of([member for member in members if isinstance(member, Member)])
        is_apart = is_small(x) if batch is None else torch.compiler.is_compiling()
        if is_apart or not self._is_as_checked(parent):
            return None
        given: list[Any] = [_operands(member, x, batch) for member in members]
        if None in given or len({id(one.rows) for one in given if isinstance(one, Mixed)}) > 1:
            return None
        operands = [one.stacked() if isinstance(one, Mixed) else one for one in given]
        gate, up, down = operands
        backends = {member._lorafuse_backend for member in members if isinstance(member, Member)}
        first = next((one for one in operands if one[1] is not None), None)
        inner = _out_features(gate)
        if (
            first is None
            or len(backends) > 1
            or not fits(gate, first, x, x.shape[-1:])
            or not fits(up, first, x, x.shape[-1:])
            or not fits(down, first, x, inner)
            or _out_features(up) != inner
        ):
            return None
        dtypes = None
        if type(first[0]) is Weight:
            each = zip(members, operands, strict=True)
            dtypes, *others = {dtypes_of(member.get_base_layer(), x, one) for member, one in each}
            # what lies between layers would be computed in another dtype
            if others or dtypes.computed is not dtypes.returned:
                return None
        backend = backends.pop()
        if batch is not None:
            (y,) = run_batch(partial(_gated, self.activation), x, given, operands, dtypes, backend)
        else:
            seeds: list[Tensor | None] = [None] * 3
            # masks are drawn in the order in which layers are called
            for i in (1, 0, 2) if self.is_up_first else range(3):
                if operands[i][5]:
                    seeds[i] = seed_tensor(None, x.device)
            layers = [
                Projection(w, a, b, scale, bias, p, seed)
                for (w, a, b, scale, bias, p), seed in zip(operands, seeds, strict=True)
            ]
            run = run_gated_mlp if dtypes is None else partial(dtypes.run, run_gated_mlp)
            y = run(x, layers, self.activation, backend)
        for member in members:
            if isinstance(member, Member):
                calls.ran_grouped(member)
        return y

    def _is_as_checked(self, parent: Any) -> bool:
        modules = parent._modules
        for name, (module, attributes) in self.others.items():
            if modules.get(name) is not module or altered(module) or not has_attributes(module, attributes):
                return False
        return has_attributes(parent, self.attributes)


def _out_features(operands: tuple) -> torch.Size | tuple[int, ...]:
    weight = operands[0]
    return weight.stored[:1] if type(weight) is Weight else weight.shape[:1]


def _operands(member: Any, x: Tensor, batch: Any) -> tuple | None:
    """Operands of a layer in its present state, a and b None where it has no adapter; None where it must be called.

    `batch` is what `batch_of` gives: then of a layer with adapters those of x, or of what has x's first sizes.
    """
    kind = type(member)
    is_member = isinstance(member, Member)
    if member is None or altered(member, but_before=is_member and batch is not None) or is_called_otherwise(kind):
        return None
    if is_member:
        return operands_of(member) if batch is None else operands_of(member, x, *batch)
    weight = member._parameters.get("weight")
    if kind.forward is not LINEAR_FORWARD or type(weight) is not nn.Parameter or weight.requires_grad:
        return None
    return weight, None, None, 1.0, member._parameters["bias"], 0.0


def _gated(
    activation: str, x: Tensor, offsets: Tensor, layers: list[MultiProjection], *, backend: str | None, wide: bool
) -> list[Tensor]:
    return [lora_gated_mlp_multi(x, offsets, *layers, activation=activation, backend=backend, wide=wide)]


def form(model: nn.Module, layers: Iterable[Any]) -> tuple[list[Group], list[Skipped]]:
    """Make one operator of each gated MLP of a model that holds one of the `layers`.

    Returns those, and the parents that look like one but are none, with the reason.
    """
    fused, groups, apart = set(layers), [], []
    for path, parent in model.named_modules():
        if fused.isdisjoint(parent._modules.values()):
            continue
        children = {
            name: base for name, child in parent._modules.items() if isinstance(base := _base(child), nn.Linear)
        }
        sizes = {name: (base.out_features, base.in_features) for name, base in children.items()}
        if reason := _why_no_gate(sizes):
            apart.append(Skipped(path, "gated_mlp", reason))
        if not has_gated_sizes(sizes):
            continue
        roles = _roles(parent, children, fused)
        if isinstance(roles, _Roles):
            groups.append(Group(path, "gated_mlp", roles.names))
            kind: Any = type(parent)
            if _shipped(parent) is kind:
                parent.__class__ = _fused(kind, kind.forward)
            parent._lorafuse_mlp = roles
        elif len(set(sizes.values())) > 1:
            # q, k and v of equal sizes are no MLP that somebody would look for
            apart.append(Skipped(path, "gated_mlp", f"{roles} ({', '.join(children)})"))
    return groups, apart


def formed(model: nn.Module) -> list[Any]:
    """The parents of a model that have a class of ours, or one made of it (fully_shard)."""
    return [module for module in model.modules() if hasattr(module, "_lorafuse_shipped")]


def is_ours(parent: Any) -> bool:
    """Whether the class of a formed parent is as `form` left it."""
    return "_lorafuse_shipped" in vars(type(parent))


def dissolve(model: nn.Module) -> None:
    """Give every formed parent its class back; one whose class was changed since only runs as that class ships it."""
    for parent in formed(model):
        if is_ours(parent):
            parent.__class__ = parent._lorafuse_shipped
        parent.__dict__.pop("_lorafuse_mlp", None)


def _shipped(parent: nn.Module) -> Any:
    return getattr(parent, "_lorafuse_shipped", type(parent))


def _base(child: Any) -> Any:
    """A child, or the layer that its adapter is over."""
    return child.get_base_layer() if isinstance(child, BaseTunerLayer) else child


def _why_no_gate(sizes: dict[str, tuple[int, int]]) -> str:
    """The reason for an MLP whose gate and up are one layer, by its sizes; "" for anything else."""
    if len(sizes) == 2:
        (first, (n, _)), (_, (_, k)) = sizes.items()
        if n == 2 * k and "gate" in first:
            return f"gate and up are one layer ({first})"
    return ""


def _roles(parent: Any, children: dict[str, nn.Linear], fused: set[Any]) -> _Roles | str:
    """The roles of three children, whose base layers are given; or why the parent's forward is no operator."""
    if reason := why_not_alike(list(children.values())):
        return reason
    for name, base in children.items():
        child = parent._modules[name]
        if is_zero3_leaf(child):
            return f"DeepSpeed's ZeRO-3 gathers {name} by itself"
        if child is base and stored(base) is not None:
            return f"{name} is quantized and has no adapter"
        if child is not base and child not in fused:
            return f"{name} is left to PEFT"
        if child is not base and not isinstance(child, Member):
            return f"{name} is adapted by its weight (target_parameters)"
    others = {name: child for name, child in parent._modules.items() if name not in children and child is not None}
    for name, module in others.items():
        if altered(module) or module._modules or module._parameters or module._buffers:
            return f"{name} has hooks, parameters or children"
    if forward := parent.__dict__.get("forward"):
        return f"its forward was replaced by {getattr(forward, '__qualname__', type(forward).__name__)}"
    if parent._parameters or parent._buffers:
        return "it has parameters or buffers of its own"
    seen = gated_roles(_shipped(parent), parent, children, others)
    if isinstance(seen, str):
        return seen
    names, activation = seen
    gate, up, down = names if activation[1] else (names[1], names[0], names[2])
    checked = {name: (module, attributes_of(module)) for name, module in others.items()}
    return _Roles(gate, up, down, not activation[1], activation[0], checked, attributes_of(parent))
