"""Layers that read the same x (q, k and v; gate and up; the whole MLP), forward and backward, with every baseline.

LoRA tax = time(adapted) / time(fastest frozen) - 1, forward and backward. No number is printed for a wrong result.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafuse.bench import linear
from lorafuse.bench.linear import Inputs
from lorafuse.bench.problem import SCALE, Problem, Variant, Work, add_case_arguments, numbered
from lorafuse.testing.cases import GROUPS, Case, find_group, sizes

SUMMARY = "linear layers that read the same x"
_DEFAULT = "smollm2-135m.qkv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_case_arguments(
        parser, "layers", _DEFAULT, "N,…,K: out features of each layer, and the in features of all", 1024
    )


def cases(args: argparse.Namespace) -> list[Problem]:
    """Every group at every M and rank. Raises ValueError for unknown names, sizes below 1, ranks above the layers'."""
    if args.shape is not None:
        *many, k = sizes(args.shape, 2, 64, "out features of each layer, then in features", "4096,1024,1024,4096")
        groups = {"x".join(map(str, (*many, k))): tuple(Case(args.shape, n, k) for n in many)}
    else:
        groups = {name: find_group(name) for name in (list(GROUPS) if args.all else args.case or [_DEFAULT])}
    problems: list[Problem] = []
    for name, layers in groups.items():
        N, K = tuple(layer.N for layer in layers), layers[0].K
        for r in args.rank:
            if min(*N, K) < r:
                raise ValueError(f"--rank {r}: {name} has {N} x {K}, no rank above those")
        for m in args.m:
            for r in args.rank:
                whole = name.endswith(".mlp")
                problems.append(Mlp(name, args.dtype, m, K, N[0], r) if whole else Group(name, args.dtype, m, N, K, r))
    return problems


def sum_of_work(works: list[dict[str, Work]], shared: Work) -> dict[str, Work]:
    """Sums over layers, with the correction for what they share in each pass."""
    return {part: sum((one[part] for one in works), shared) for part in ("forward", "backward")}


def siblings(
    baseline: Any, given: tuple[Inputs, ...], **options: Any
) -> tuple[Callable[[Tensor], Sequence[Tensor]], dict[str, Tensor]]:
    """Layers of one x by a baseline's `group`, or by its `linear` one by one: the call, and the trained tensors."""
    if hasattr(baseline, "group") and (len(given) > 1 or not hasattr(baseline, "linear")):
        call, trained = baseline.group(given, **options)
        return call, trained
    calls, layers = zip(*(baseline.linear(one, **options) for one in given), strict=True)
    return (lambda x: tuple(one(x) for one in calls)), numbered(layers)


def gated_mlp(
    baseline: Any, given: tuple[Inputs, ...], **options: Any
) -> tuple[Callable[[Tensor], Tensor], dict[str, Tensor]]:
    """Gate, up and down by a baseline's `mlp`, or by its `linear` one by one: the call, and the trained tensors."""
    if hasattr(baseline, "mlp"):
        call, trained = baseline.mlp(given, **options)
        return call, trained
    (gate, up, down), layers = zip(*(baseline.linear(one, **options) for one in given), strict=True)
    return (lambda x: down(F.silu(gate(x)) * up(x))), numbered(layers)


@dataclass(frozen=True)
class Group(Problem):
    """Layers of `N` out features each on one `x [M, K]`, adapters of rank R each."""

    kind: ClassVar[str] = "group"

    M: int
    N: tuple[int, ...]
    K: int
    R: int

    def inputs(self, device: torch.device) -> tuple[Inputs, ...]:
        """One for each layer, all with the same x."""
        made = [
            linear.inputs(self.M, n, self.K, self.R, self.torch_dtype, device, seed) for seed, n in enumerate(self.N)
        ]
        return tuple(Inputs(made[0].x, one.w, one.a, one.b, one.dy) for one in made)

    def references(self, given: tuple[Inputs, ...]) -> dict[str, dict[str, Tensor]]:
        every = [linear.references(one) for one in given]
        return {
            trains: {"dx": sum(one[trains].pop("dx") for one in every)} | numbered([one[trains] for one in every])
            for trains in every[0]
        }

    def variant(self, name: str, baseline: Any, given: tuple[Inputs, ...], **options: Any) -> Variant:
        x = given[0].x.detach().requires_grad_()
        call, trained = siblings(baseline, given, **options)
        outputs = tuple(f"y {i}" for i in range(len(given)))
        return Variant(name, lambda: tuple(call(x)), outputs, tuple(one.dy for one in given), {"dx": x, **trained})

    def work(self, trains: str) -> dict[str, Work]:
        """Sums over the layers, without the passes over x and dx that layers of one x can share."""
        size = self.torch_dtype.itemsize
        every = [linear.work(self.M, n, self.K, self.R, size, trains) for n in self.N]
        return sum_of_work(every, Work(0, -size * self.M * self.K * (len(self.N) - 1)))


@dataclass(frozen=True)
class Mlp(Problem):
    """The gated MLP of a transformer: `y = down(silu(gate(x)) · up(x))` on `x [M, H]`, intermediate size I, adapters of
    rank R on all three; the largest kernel of the peers, and ours layer by layer."""

    kind: ClassVar[str] = "mlp"

    M: int
    H: int
    I: int  # noqa: E741
    R: int

    @property
    def _layers(self) -> tuple[tuple[int, int], ...]:
        """Out and in features of gate, up and down."""
        return (self.I, self.H), (self.I, self.H), (self.H, self.I)

    def inputs(self, device: torch.device) -> tuple[Inputs, ...]:
        """Gate, up and down; x and dy of each are the block's, `[M, H]`."""
        made = [
            linear.inputs(self.M, n, k, self.R, self.torch_dtype, device, i) for i, (n, k) in enumerate(self._layers)
        ]
        return tuple(Inputs(made[0].x, one.w, one.a, one.b, made[2].dy) for one in made)

    def references(self, given: tuple[Inputs, ...]) -> dict[str, dict[str, Tensor]]:
        return {trains: _formula(given, trains) for trains in ("nothing", "base", "adapters")}

    def variant(self, name: str, baseline: Any, given: tuple[Inputs, ...], **options: Any) -> Variant:
        x = given[0].x.detach().requires_grad_()
        call, trained = gated_mlp(baseline, given, **options)
        return Variant(name, lambda: (call(x),), ("y",), (given[0].dy,), {"dx": x, **trained})

    def work(self, trains: str) -> dict[str, Work]:
        """Sums over the layers; gate and up share the passes over x and dx, SwiGLU has no pass of its own."""
        size = self.torch_dtype.itemsize
        every = [linear.work(self.M, n, k, self.R, size, trains) for n, k in self._layers]
        return sum_of_work(every, Work(0, -size * self.M * self.H))


def _formula(given: tuple[Inputs, ...], trains: str) -> dict[str, Tensor]:
    """y and every gradient in fp64."""
    parts = {"nothing": "", "base": "w", "adapters": "ab"}[trains]
    layers = [{part: getattr(one, part).double() for part in "wab"} for one in given]
    x = given[0].x.double()
    leaves = {"dx": x} | numbered([{f"d{part}": layer[part] for part in parts} for layer in layers])
    for leaf in leaves.values():
        leaf.requires_grad_()

    def project(v: Tensor, layer: dict[str, Tensor]) -> Tensor:
        y = v @ layer["w"].t()
        return y + SCALE * (v @ layer["a"].t()) @ layer["b"].t() if trains == "adapters" else y

    gate, up, down = layers
    y = project(F.silu(project(x, gate)) * project(x, up), down)
    grads = torch.autograd.grad(y, list(leaves.values()), given[0].dy.double())
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))
