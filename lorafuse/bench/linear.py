"""One linear layer, forward and backward, with every baseline.

LoRA tax = time(adapted) / time(fastest frozen) - 1, forward and backward. No number is printed for a wrong result.
"""

import argparse
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorafuse.bench.problem import SCALE, Problem, Variant, Work, add_case_arguments
from lorafuse.testing.cases import CASES, Case, find, sizes

SUMMARY = "one linear layer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_case_arguments(parser, "a layer", "square-2048", "N,K: out and in features of a layer", 1024)


def cases(args: argparse.Namespace) -> list["Linear"]:
    """Every layer at every M and rank. Raises ValueError for unknown names, sizes below 1, ranks above the layer's."""
    return [Linear(c.name, args.dtype, m, c.N, c.K, r) for c, m, r in settings(args)]


def settings(args: argparse.Namespace) -> list[tuple[Case, int, int]]:
    """Every requested layer with M and rank, with the errors of `cases`."""
    if args.shape is not None:
        n, k = sizes(args.shape, 2, 2, "two sizes, out and in features", "4096,4096")
        layers = [Case(f"{n}x{k}", n, k)]
    else:
        layers = list(CASES.values()) if args.all else [find(name) for name in args.case or ["square-2048"]]
    for layer, rank in itertools.product(layers, args.rank):
        if min(layer.N, layer.K) < rank:
            raise ValueError(f"--rank {rank}: {layer.name} is {layer.N} x {layer.K}, no rank above that")
    return list(itertools.product(layers, args.m, args.rank))


@dataclass(frozen=True)
class Inputs:
    """`x [M, K]`, `w [N, K]`, `a [R, K]`, `b [N, R]`, `dy [M, N]` of one layer; b is not zero."""

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    dy: Tensor


def inputs(m: int, n: int, k: int, r: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Normal numbers; the base and the low-rank part of y have one size, adapters are fp32 like PEFT's."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * std).to(dtype)

    return Inputs(
        x=normal(m, k),
        w=normal(n, k, std=k**-0.5),
        a=normal(r, k, std=k**-0.5, dtype=torch.float32),
        b=normal(n, r, std=r**-0.5 / SCALE, dtype=torch.float32),
        dy=normal(m, n),
    )


@dataclass(frozen=True)
class Linear(Problem):
    """`y [M, N] = x [M, K] · wᵀ + scale · (x · aᵀ) · bᵀ` with rank R."""

    kind: ClassVar[str] = "linear"

    M: int
    N: int
    K: int
    R: int

    def inputs(self, device: torch.device) -> Inputs:
        return inputs(self.M, self.N, self.K, self.R, self.torch_dtype, device)

    def references(self, given: Inputs) -> dict[str, dict[str, Tensor]]:
        return references(given)

    def variant(self, name: str, baseline: Any, given: Inputs, **options: Any) -> Variant:
        call, trained = baseline.linear(given, **options)
        x = given.x.detach().requires_grad_()
        return Variant(name, lambda: (call(x),), ("y",), (given.dy,), {"dx": x, **trained})

    def work(self, trains: str) -> dict[str, Work]:
        return work(self.M, self.N, self.K, self.R, self.torch_dtype.itemsize, trains)


def references(given: Inputs) -> dict[str, dict[str, Tensor]]:
    """y and every gradient in fp64, with and without the adapter."""
    x, w, a, b, dy = (t.double() for t in (given.x, given.w, given.a, given.b, given.dy))
    xa, dyb = x @ a.t(), dy @ b
    y, dx = x @ w.t(), dy @ w
    adapted = {
        "y": y + SCALE * xa @ b.t(),
        "dx": dx + SCALE * dyb @ a,
        "da": SCALE * dyb.t() @ x,
        "db": SCALE * dy.t() @ xa,
    }
    frozen = {"y": y, "dx": dx}
    return {"nothing": frozen, "base": frozen | {"dw": dy.t() @ x}, "adapters": adapted}


def work(m: int, n: int, k: int, r: int, size: int, trains: str) -> dict[str, Work]:
    """The least work of a layer: its products, and one pass each over x, w, y, dy, w and dx of `size` bytes an element.

    A trained base adds the product for dw and passes over x and dw. Adapters add six products of rank R, and passes
    over x for da and over their own factors.
    """
    forward = Work(2 * m * n * k, size * (m * k + n * k + m * n))
    backward = Work(2 * m * n * k, size * (m * n + n * k + m * k))
    if trains == "base":
        backward += Work(2 * m * n * k, size * (m * k + n * k))
    if trains == "adapters":
        forward += Work(2 * m * r * (n + k), size * r * (n + k + m))
        backward += Work(4 * m * r * (n + k), size * (m * k + r * (2 * n + 2 * k + m)))
    return {"forward": forward, "backward": backward}
