"""One linear layer whose rows are of many adapters of mixed ranks, forward and backward, with every baseline.

LoRA tax = time(adapted) / time(fastest frozen) - 1, forward and backward. No number is printed for a wrong result.
"""

import argparse
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorafuse.bench import linear
from lorafuse.bench.problem import SCALE, Problem, Variant, Work, numbered
from lorafuse.testing.cases import Case, find, sizes

SUMMARY = "one linear layer over rows of many adapters"


@dataclass(frozen=True)
class MultiInputs:
    """`x [M, K]`, `w [N, K]`, `dy [M, N]`; of each adapter a `[R, K]` and b `[N, R]`, and `rows`, as many for each."""

    x: Tensor
    w: Tensor
    dy: Tensor
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    rows: int

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(a.shape[0] for a in self.a)

    def trained(self) -> dict[str, Tensor]:
        """Leaves that hold the adapters, by the names of their gradients."""
        pairs = zip(self.a, self.b, strict=True)
        return numbered([{"da": a.clone().requires_grad_(), "db": b.clone().requires_grad_()} for a, b in pairs])

    def split(self, trained: dict[str, Tensor]) -> list[tuple[slice, Tensor, Tensor]]:
        """The rows, a and b of each adapter."""
        starts = range(0, self.x.shape[0], self.rows)
        return [(slice(s, s + self.rows), trained[f"da {i}"], trained[f"db {i}"]) for i, s in enumerate(starts)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--case", action="append", metavar="NAME", help="a layer by name (square-2048)")
    which.add_argument("--shape", metavar="N,K", help="out and in features of a layer")
    parser.add_argument("--adapters", type=int, nargs="+", default=[32], help="in one call (32)")
    parser.add_argument("--rows", type=int, nargs="+", default=[16], help="of each adapter (16)")
    parser.add_argument("--rank", type=int, nargs="+", default=[4, 8, 16, 32], help="of the adapters, in turns")


def cases(args: argparse.Namespace) -> list["Multi"]:
    """Every layer with every number of adapters and rows. Raises ValueError for unknown names and sizes below 1."""
    if args.shape is not None:
        n, k = sizes(args.shape, 2, 2, "two sizes, out and in features", "4096,4096")
        layers = [Case(f"{n}x{k}", n, k)]
    else:
        layers = [find(name) for name in args.case or ["square-2048"]]
    if min(args.adapters + args.rows) < 1:
        raise ValueError(f"--adapters {args.adapters} and --rows {args.rows} must be at least 1")
    return [
        Multi(c.name, args.dtype, adapters * rows, c.N, c.K, tuple(args.rank), adapters)
        for c, adapters, rows in itertools.product(layers, args.adapters, args.rows)
    ]


@dataclass(frozen=True)
class Multi(Problem):
    """`L` adapters of `M / L` rows each on one layer; adapter i has rank `R[i % len(R)]`."""

    kind: ClassVar[str] = "multi"

    M: int
    N: int
    K: int
    R: tuple[int, ...]
    L: int

    @property
    def ranks(self) -> list[int]:
        return [self.R[i % len(self.R)] for i in range(self.L)]

    def inputs(self, device: torch.device) -> MultiInputs:
        one = linear.inputs(self.M, self.N, self.K, 1, self.torch_dtype, device)
        some = [
            linear.inputs(0, self.N, self.K, R, torch.float32, device, seed=1 + i) for i, R in enumerate(self.ranks)
        ]
        a, b = (tuple(getattr(pair, name) for pair in some) for name in "ab")
        return MultiInputs(one.x, one.w, one.dy, a, b, self.M // self.L)

    def references(self, given: MultiInputs) -> dict[str, dict[str, Tensor]]:
        x, w, dy = given.x.double(), given.w.double(), given.dy.double()
        frozen = {"y": x @ w.t(), "dx": dy @ w}
        adapted, layers = {name: t.clone() for name, t in frozen.items()}, []
        for i, (a, b) in enumerate(zip(given.a, given.b, strict=True)):
            rows, a, b = slice(i * given.rows, (i + 1) * given.rows), a.double(), b.double()
            xa, dyb = x[rows] @ a.t(), dy[rows] @ b
            adapted["y"][rows] += SCALE * xa @ b.t()
            adapted["dx"][rows] += SCALE * dyb @ a
            layers.append({"da": SCALE * dyb.t() @ x[rows], "db": SCALE * dy[rows].t() @ xa})
        return {"nothing": frozen, "base": frozen | {"dw": dy.t() @ x}, "adapters": adapted | numbered(layers)}

    def variant(self, name: str, baseline: Any, given: MultiInputs, **options: Any) -> Variant:
        call, trained = baseline.multi(given, **options)
        x = given.x.detach().requires_grad_()
        return Variant(name, lambda: (call(x),), ("y",), (given.dy,), {"dx": x, **trained})

    def work(self, trains: str) -> dict[str, Work]:
        # one base product over all rows, and each adapter's own over its
        work = linear.work(self.M, self.N, self.K, 0, self.torch_dtype.itemsize, trains)
        if trains == "adapters":
            for R in self.ranks:
                own = linear.work(self.M // self.L, self.N, self.K, R, self.torch_dtype.itemsize, trains)
                bare = linear.work(self.M // self.L, self.N, self.K, 0, self.torch_dtype.itemsize, "nothing")
                work = {
                    part: Work(
                        work[part].flops + own[part].flops - bare[part].flops,
                        work[part].bytes + own[part].bytes - bare[part].bytes,
                    )
                    for part in work
                }
        return work
