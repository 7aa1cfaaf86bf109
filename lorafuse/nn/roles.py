"""Which linear layers of a parent belong together: those that read one x, by their names, and the gate, up and down of
a gated MLP, by a run of the parent's forward on a small input with small layers in their places.

The model itself computes nothing for it, and no random number is drawn.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.activation import ACTIVATIONS, GATES, gate_differentiable

__all__ = ["attributes_of", "gated_roles", "has_attributes", "has_gated_sizes", "sibling_orders"]

# children that read one x, in the order in which families of transformers call them
_NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
# parts of a parent's or its class's name, in which k and v read another tensor than q
_CROSS = ("cross", "encoder_attn", "encdec")
# attributes that are equal where they are not the same object
_SCALARS = (bool, float, int, str)


def sibling_orders(names: list[str], where: str) -> list[list[int]]:
    """The orders known by the names of members; `where` names their parent and its class."""
    is_cross = any(part in where.lower() for part in _CROSS)
    orders = []
    for family in _NAMES:
        # k and v of a cross attention read one x, q another
        order = [names.index(name) for name in (family[1:] if is_cross else family) if name in names]
        orders += [order] if len(order) > 1 else []
    return orders


def has_gated_sizes(sizes: dict[str, tuple[int, int]]) -> bool:
    """Whether there are three layers of which two read x and the third what both compute."""
    every = list(sizes.values())
    return len(every) == 3 and any(every[i] == every[i - 1] and every[i - 2][1] == every[i][0] for i in range(3))


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """What the forward of a module may read besides parameters, buffers and children; it was checked in both modes."""
    return {name: value for name, value in module.__dict__.items() if name[0] != "_" and name != "training"}


def has_attributes(module: nn.Module, attributes: dict[str, Any]) -> bool:
    """Whether a module still has these attributes; numbers may be other objects in a copy."""
    state = module.__dict__
    for name, value in attributes.items():
        now = state.get(name)
        if now is not value and (type(now) not in _SCALARS or now != value):
            return False
    return True


class _Small(nn.Linear):
    """A small layer that notes its calls: itself, x and y."""

    def __init__(self, n: int, k: int, like: Tensor, generator: torch.Generator, has_bias: bool, noted: list) -> None:
        super().__init__(k, n, has_bias, device="meta")
        size = (n, k + 1)
        # gates from -10 to 10: activations differ near 2, and limits are at 7
        made = (3 * k**-0.5 * torch.randn(size, generator=generator, device="cpu", dtype=like.dtype)).to(like.device)
        self.weight = nn.Parameter(made[:, :k].contiguous(), requires_grad=False)
        if has_bias:
            self.bias = nn.Parameter(made[:, k].contiguous(), requires_grad=False)
        self.noted = noted

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.noted.append((self, x, y))
        return y


def gated_roles(
    kind: Any, parent: Any, children: Mapping[str, nn.Linear], others: Mapping[str, nn.Module]
) -> tuple[tuple[str, ...], tuple[str, bool]] | str:
    """The names of the children in the order of their calls and `(activation, whether the first is the gate)`, as a
    run of the forward of `kind`, the parent's class, shows them; or what it shows against a gated MLP.

    `children` are the three linear layers, `others` what else the parent has.
    """
    weight = next(iter(children.values())).weight
    device = torch.device("cpu") if weight.is_meta else weight.device
    like, generator = torch.empty(0, device=device, dtype=torch.float32), torch.Generator().manual_seed(0)
    small: dict[int, int] = {}
    for base in children.values():
        for size in (base.in_features, base.out_features):
            small.setdefault(size, 24 + 8 * len(small))
    noted: list[tuple[Any, Any, Any]] = []
    layers = {
        name: _Small(small[base.out_features], small[base.in_features], like, generator, base.bias is not None, noted)
        for name, base in children.items()
    }
    known = [(name, is_first) for name in (*ACTIVATIONS, *GATES) for is_first in (True, False)]
    orders: set[tuple[str, ...]] = set()
    devices = [] if device.type == "cpu" else [device]
    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices, device_type=device.type),
    ):
        # a dropout layer computes something else in training
        for rows, is_training in (((11,), True), ((2, 7), True), ((2, 7), False)):
            probe = _probe(kind, parent, layers, others, is_training)
            some = list(layers.values())
            first = next(one.in_features for one in some if sum(one.in_features == o.in_features for o in some) > 1)
            x = torch.randn((*rows, first), generator=generator, device="cpu", dtype=like.dtype).to(device)
            noted.clear()
            try:
                y = kind.forward(probe, x)
            # whatever a forward raises, it is not what is looked for
            except Exception as error:
                return f"its forward fails on a small input: {type(error).__name__}: {error}"
            if len({id(one) for one, *_ in noted}) != 3 or len(noted) != 3:
                return "its forward does not call each of its layers once"
            (one, x_one, y_one), (two, x_two, y_two), (three, h, y_three) = noted
            orders.add(tuple(next(name for name in layers if layers[name] is layer) for layer in (one, two, three)))
            if x_one is not x or x_two is not x or y is not y_three or y_one.shape != h.shape:
                return "its forward is not down(act(gate(x)) · up(x))"
            pairs = {True: (y_one, y_two), False: (y_two, y_one)}
            known = [one for one in known if torch.allclose(gate_differentiable(one[0], *pairs[one[1]]), h, 1e-5, 1e-5)]
    if not known or len(orders) > 1:
        names = ", ".join((*ACTIVATIONS, *GATES))
        return f"between its layers lies more than act(gate) · up with an activation of {names}"
    return orders.pop(), known[0]


def _probe(
    kind: Any, parent: Any, layers: Mapping[str, nn.Module], others: Mapping[str, nn.Module], is_training: bool
) -> nn.Module:
    """An object of the parent's class and attributes with these layers and copies of the other children."""
    # the classes that fully_shard makes would run their __init__ in __new__
    probe: Any = object.__new__(kind)
    probe.__dict__.update(parent.__dict__)
    # a child may be None
    probe.__dict__["_modules"] = (
        parent._modules | dict(layers) | {n: copy.deepcopy(module) for n, module in others.items()}
    )
    for module in probe.modules():
        module.training = is_training
    return probe
