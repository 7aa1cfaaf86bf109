"""Layers that read the same x (q, k and v; gate and up; the whole MLP), forward and backward, in every way compared.

LoRA tax = time(adapted) / time(frozen) - 1, forward and backward. No number is printed for a result that is not right.
"""

import argparse
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorafuse.bench import linear
from lorafuse.bench.linear import Inputs
from lorafuse.bench.mlp import Mlp
from lorafuse.bench.problem import Problem, Work
from lorafuse.bench.timed import closing, run_case, select, table
from lorafuse.bench.variant import Variant
from lorafuse.testing.cases import GROUPS, Case, find_group, sizes
from lorafuse.testing.timing import timing

__all__ = ["SUMMARY", "Group", "add_arguments", "cases", "closing", "run_case", "select", "table", "timing"]

SUMMARY = "linear layers that read the same x"
_DEFAULT = "smollm2-135m.qkv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--case", action="append", metavar="NAME", help=f"layers by name; may be repeated ({_DEFAULT})")
    which.add_argument("--all", action="store_true", help="every named group")
    which.add_argument("--shape", metavar="N,…,K", help="out features of each layer, and the in features of all")
    parser.add_argument("--m", type=int, nargs="+", default=[1024], help="tokens (1024)")
    parser.add_argument("--rank", type=int, nargs="+", default=[16], help="of each adapter (16)")


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
            trains: {"dx": sum(one[trains]["dx"] for one in every)}
            | {f"{name} {i}": t for i, one in enumerate(every) for name, t in one[trains].items() if name != "dx"}
            for trains in every[0]
        }

    def variant(self, name: str, baseline: Any, given: tuple[Inputs, ...], **options: Any) -> Variant:
        x = given[0].x.detach().requires_grad_()
        douts = tuple(one.dy for one in given)
        outputs = tuple(f"y {i}" for i in range(len(given)))
        if hasattr(baseline, "group"):
            call, parameters = baseline.group(given, **options)
            return Variant(name, lambda: tuple(call(x)), outputs, douts, {"dx": x, **parameters})
        built = [baseline.linear(one, **options) for one in given]
        wanted = {f"{key} {i}": t for i, (_, parameters) in enumerate(built) for key, t in parameters.items()}
        return Variant(name, lambda: tuple(call(x) for call, _ in built), outputs, douts, {"dx": x, **wanted})

    def work(self, trains: str) -> dict[str, Work]:
        """Sums over the layers, without the passes over x and dx that layers of one x can share."""
        size, first, *rest = self.torch_dtype.itemsize, *self.N
        every = [linear.work(self.M, n, self.K, self.R, size, trains) for n in (first, *rest)]
        shared = Work(0, -size * self.M * self.K * len(rest))
        return {part: sum((one[part] for one in every), Work(0, 0)) + shared for part in ("forward", "backward")}
