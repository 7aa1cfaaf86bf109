"""The MLP block of a transformer, gate, up, SwiGLU and down: the peers' largest kernel, and ours layer by layer."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafuse.bench import linear
from lorafuse.bench.linear import Inputs
from lorafuse.bench.problem import Problem, Work
from lorafuse.bench.variant import SCALE, Variant

__all__ = ["Mlp"]


@dataclass(frozen=True)
class Mlp(Problem):
    """`y = down(silu(gate(x)) · up(x))` on `x [M, H]`, intermediate size I, adapters of rank R on all three."""

    kind: ClassVar[str] = "mlp"

    M: int
    H: int
    I: int  # noqa: E741
    R: int

    def inputs(self, device: torch.device) -> tuple[Inputs, Inputs, Inputs]:
        """Gate, up and down; x and dy of each are the block's, `[M, H]`."""
        shapes = ((self.I, self.H), (self.I, self.H), (self.H, self.I))
        gate, up, down = (
            linear.inputs(self.M, n, k, self.R, self.torch_dtype, device, seed) for seed, (n, k) in enumerate(shapes)
        )
        x, dy = gate.x, down.dy
        return (
            Inputs(x, gate.w, gate.a, gate.b, dy),
            Inputs(x, up.w, up.a, up.b, dy),
            Inputs(x, down.w, down.a, down.b, dy),
        )

    def references(self, given: tuple[Inputs, ...]) -> dict[str, dict[str, Tensor]]:
        return {trains: _formula(given, trains) for trains in ("nothing", "base", "adapters")}

    def variant(self, name: str, baseline: Any, given: tuple[Inputs, ...], **options: Any) -> Variant:
        x = given[0].x.detach().requires_grad_()
        if hasattr(baseline, "mlp"):
            call, wanted = baseline.mlp(given, **options)
        else:
            built = [baseline.linear(one, **options) for one in given]
            (gate, up, down), parameters = zip(*built, strict=True)
            wanted = {f"{key} {i}": t for i, named in enumerate(parameters) for key, t in named.items()}

            def call(x: Tensor) -> Tensor:
                return down(F.silu(gate(x)) * up(x))

        return Variant(name, lambda: (call(x),), ("y",), (given[0].dy,), {"dx": x, **wanted})

    def work(self, trains: str) -> dict[str, Work]:
        """Sums over the layers; gate and up share the passes over x and dx, SwiGLU takes no pass of its own."""
        size = self.torch_dtype.itemsize
        layers = ((self.I, self.H), (self.I, self.H), (self.H, self.I))
        every = [linear.work(self.M, n, k, self.R, size, trains) for n, k in layers]
        shared = Work(0, -size * self.M * self.H)
        return {part: sum((one[part] for one in every), Work(0, 0)) + shared for part in ("forward", "backward")}


def _formula(given: tuple[Inputs, ...], trains: str) -> dict[str, Tensor]:
    """y and every gradient in fp64."""
    parts = {"nothing": "", "base": "w", "adapters": "ab"}[trains]
    layers = [{part: getattr(one, part).double() for part in "wab"} for one in given]
    x = given[0].x.double()
    leaves = {"dx": x} | {f"d{part} {i}": layer[part] for i, layer in enumerate(layers) for part in parts}
    for leaf in leaves.values():
        leaf.requires_grad_()

    def project(v: Tensor, layer: dict[str, Tensor]) -> Tensor:
        y = v @ layer["w"].t()
        return y + SCALE * (v @ layer["a"].t()) @ layer["b"].t() if trains == "adapters" else y

    gate, up, down = layers
    y = project(F.silu(project(x, gate)) * project(x, up), down)
    grads = torch.autograd.grad(y, list(leaves.values()), given[0].dy.double())
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))
