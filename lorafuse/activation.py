"""The activations between an expert's two projections, forward and backward, without autograd.

A gated activation takes `u [rows, 2I]`, gate and up either one after the other (concatenated) or alternating
(interleaved), and gives `act(gate) · up`; one without a gate takes `u [rows, I]`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "Activation", "Recomputed", "named"]

# name: (forward of x, gradient of x from that of the result)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    ),
    "relu": (F.relu, lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0)),
    "relu2": (lambda x: F.relu(x).square(), lambda dy, x: 2 * dy * F.relu(x)),
}


@dataclass(frozen=True)
class Activation:
    """A known activation: its name, and how `u` holds gate and up."""

    name: str
    gated: bool
    interleaved: bool

    def _parts(self, u: Tensor) -> tuple[Tensor, Tensor]:
        if self.interleaved:
            return u[:, ::2], u[:, 1::2]
        half = u.shape[1] // 2
        return u[:, :half], u[:, half:]

    def forward(self, u: Tensor) -> Tensor:
        """`h [rows, I]` of `u`."""
        act = ACTIVATIONS[self.name][0]
        if not self.gated:
            return act(u)
        gate, up = self._parts(u)
        return act(gate).mul_(up)

    def backward(self, u: Tensor, dh: Tensor) -> Tensor:
        """The gradient of `u` from that of `h`."""
        act, backward = ACTIVATIONS[self.name]
        if not self.gated:
            return backward(dh, u)
        gate, up = self._parts(u)
        du = torch.empty_like(u)
        d_gate, d_up = self._parts(du)
        d_gate.copy_(backward(dh * up, gate))
        torch.mul(dh, act(gate), out=d_up) if d_up.is_contiguous() else d_up.copy_(dh * act(gate))
        return du


@dataclass(frozen=True)
class Recomputed:
    """Any differentiable `u → h`; its backward runs it again under autograd."""

    function: Callable[[Tensor], Tensor]

    def forward(self, u: Tensor) -> Tensor:
        return self.function(u)

    def backward(self, u: Tensor, dh: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            (du,) = torch.autograd.grad(self.function(leaf), leaf, dh)
        return du


def named(name: str, gated: bool, interleaved: bool) -> Activation:
    """A known activation. Raises ValueError that lists the known ones."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}; or pass a function of u")
    return Activation(name, gated, interleaved)
