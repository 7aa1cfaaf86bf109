"""One way to run a layer or a block, and the gate that it has to pass before it is timed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafuse.testing.numerics import relative_l2, tolerance

__all__ = ["SCALE", "Call", "Variant", "wrong"]

# alpha / r of every adapter in the benchmarks
SCALE = 2.0

# what a baseline gives: the call, and the tensors it trains by the names of their gradients ("da", "db", "dw", …)
Call = tuple[Callable[..., Any], dict[str, Tensor]]


@dataclass
class Variant:
    """`forward()` gives the outputs by name, whose gradients `backward` asks for the tensors in `wanted`, by name."""

    name: str
    call: Callable[[], tuple[Tensor, ...]]
    outputs: tuple[str, ...]
    douts: tuple[Tensor, ...]
    wanted: dict[str, Tensor]

    def forward(self) -> tuple[Tensor, ...]:
        return self.call()

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, tuple(self.wanted.values()), self.douts)

    def results(self) -> dict[str, Tensor]:
        """Outputs and gradients of one call by name."""
        outputs = self.forward()
        grads = self.backward(outputs)
        found = dict(zip(self.outputs, outputs, strict=True)) | dict(zip(self.wanted, grads, strict=True))
        return {name: tensor.detach() for name, tensor in found.items()}


def wrong(variant: Variant, expected: dict[str, Tensor], shaped: Callable[[str, Tensor, Tensor], Tensor]) -> str:
    """ "" when every expected tensor is there, right and not zero; else which is not, and by how much.

    `shaped(name, expected, found)` brings an expected tensor into the form in which this variant keeps it.
    """
    # what is checked is a second call: it is wrong too where the first one wrote into its inputs
    variant.results()
    found = variant.results()
    missing = expected.keys() - found.keys()
    if missing:
        return f"{variant.name}: it does not give {', '.join(sorted(missing))}"
    # of the layer's dtype also for gradients that are kept in fp32
    bound = tolerance(found[variant.outputs[0]].dtype)
    for name, given in expected.items():
        tensor = found[name]
        right = shaped(name, given, tensor)
        if tensor.shape != right.shape:
            return f"{variant.name}: {name} is {list(tensor.shape)}, it must be {list(right.shape)}"
        error = relative_l2(tensor, right)
        # not above: NaN fails too
        if not error <= bound or not tensor.any():
            return f"{variant.name}: {name} is wrong by {error:.2e} relative, the bound is {bound:.0e}"
    return ""
