"""A batch of many adapters, and what it is to give: the formula for each adapter alone, in fp64."""

import random
import sys
from collections import Counter
from dataclasses import dataclass, replace

import torch

from lorafuse.functional import lora_linear_multi
from lorafuse.operands import Weight
from lorafuse.philox import keep_mask, rescaled
from lorafuse.testing.numerics import lora_formula

__all__ = ["GPU", "Batch", "batch", "count_reads", "mover", "reference", "run"]

# where Triton's kernels run
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Batch:
    """Operands of `lora_linear_multi`; `counts` are the rows of each adapter."""

    counts: list
    ranks: list
    scales: list
    p: list | None
    seeds: torch.Tensor
    x: torch.Tensor
    w: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    dy: torch.Tensor

    @property
    def offsets(self):
        return torch.tensor(self.counts, device=self.x.device).cumsum(0).int()

    def rows(self, g):
        first = sum(self.counts[:g])
        return slice(first, first + self.counts[g])

    def of(self, g):
        """The ranks of adapter g in the stacks."""
        first = sum(self.ranks[:g])
        return slice(first, first + self.ranks[g])

    def pick(self, order):
        """The batch of some adapters, in this order, and of no other rows."""

        def joined(t, slices, dim=0):
            return torch.cat([t.movedim(dim, 0)[one] for one in slices]).movedim(0, dim).contiguous()

        rows, ranks = [self.rows(g) for g in order], [self.of(g) for g in order]
        counts, sizes, scales = ([t[g] for g in order] for t in (self.counts, self.ranks, self.scales))
        return Batch(
            counts, sizes, scales, self.p and [self.p[g] for g in order], self.seeds[list(order)],
            joined(self.x, rows), self.w, self.bias, joined(self.a, ranks), joined(self.b, ranks, 1),
            joined(self.dy, rows),
        )  # fmt: skip

    def to(self, dtype):
        cast = (t if t is None else t.to(dtype) for t in (self.x, self.w, self.bias, self.a, self.b, self.dy))
        return Batch(self.counts, self.ranks, self.scales, self.p, self.seeds, *cast)


def batch(counts, ranks, dtype=torch.float64, N=36, K=40, rest=5, dropout=True, bias=True):
    """Random operands of which `rest` rows have no adapter."""
    L, S, R = len(counts), sum(counts) + rest, sum(ranks)
    draw = random.Random(L)
    p = [draw.choice([0.0, 0.25]) for _ in counts] if dropout else None
    if p:
        p[0] = 0.5
    scales = [draw.choice([0.5, 1.0, 3.0]) for _ in counts]
    seeds = torch.arange(L) * 12345678912345 + 3
    x, w, a = torch.randn(S, K), torch.randn(N, K) / K**0.5, torch.randn(R, K) / K**0.5
    bias = torch.randn(N) if bias else None
    made = Batch(list(counts), list(ranks), scales, p, seeds, x, w, bias, a, torch.randn(N, R), torch.randn(S, N))
    return made.to(dtype)


def mover(backend):
    """Moves a tensor, a weight or None to where a backend runs: Triton on a GPU, if there is one."""
    device = GPU if backend == "triton" else torch.device("cpu")

    def move(t):
        if isinstance(t, Weight):
            return replace(t, data=move(t.data), statistics=tuple(map(move, t.statistics)))
        return None if t is None else t.to(device)

    return move


def run(given, **more):
    """`{"y", "dx", "da", "db"}` of a batch."""
    move = mover(more.get("backend"))
    x, a, b = (move(t.detach().clone()).requires_grad_() for t in (given.x, given.a, given.b))
    weight = more.pop("weight", given.w)
    y = lora_linear_multi(
        x, move(given.offsets), move(weight), a, b, ranks=given.ranks, scales=given.scales, bias=move(given.bias),
        dropout_p=given.p, seeds=move(given.seeds) if given.p else None, **more,
    )  # fmt: skip
    y.backward(move(given.dy))
    return {name: t.cpu() for name, t in {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}.items()}


def reference(given):
    """The same in fp64, by a loop over the adapters."""
    x, w, dy = given.x.double(), given.w.double(), given.dy.double()
    bias = 0.0 if given.bias is None else given.bias.double()
    out = {"y": x @ w.t() + bias, "dx": dy @ w}
    out |= {"da": torch.zeros_like(given.a.double()), "db": torch.zeros_like(given.b.double())}
    for g, (count, scale) in enumerate(zip(given.counts, given.scales, strict=True)):
        rows, ranks, keep = given.rows(g), given.of(g), None
        if given.p:
            keep = keep_mask(given.seeds[g : g + 1], given.p[g], slice(0, count), x.shape[1])
            scale = rescaled(scale, given.p[g])
        one = lora_formula(given.x[rows], given.w, given.a[ranks], given.b[:, ranks], given.dy[rows], scale, keep)
        out["y"][rows], out["dx"][rows] = one["y"] + bias, one["dx"]
        out["da"][ranks], out["db"][:, ranks] = one["da"], one["db"]
    return out


_READS = "item", "cpu", "tolist", "numpy", "__bool__", "__int__", "__index__", "__float__", "nonzero", "to", "cuda"


def count_reads(monkeypatch):
    """A counter of tensors that lorafuse itself reads on the host, or copies from it, from now on: a stand-in for
    stream capture.
    """
    seen = Counter()

    def counting(name, function):
        def call(*args, **kwargs):
            module = sys._getframe(1).f_globals["__name__"]
            moves = name != "to" or any(isinstance(t, str | torch.device) for t in args[1:])
            if module.startswith("lorafuse.") and moves:
                seen[f"{name} in {module}"] += 1
            return function(*args, **kwargs)

        return call

    for name in _READS:
        monkeypatch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
    monkeypatch.setattr(torch, "tensor", counting("tensor", torch.tensor))
    return seen
