"""The experts of a mixture-of-experts block, forward and backward, with every baseline.

LoRA tax = time(adapted) / time(fastest frozen) - 1, forward and backward; frozen is transformers' own grouped_mm block,
or lorafuse's kernels without adapters. No number is printed for a wrong result.
"""

import argparse
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafuse.bench.problem import SCALE, Problem, Variant, Work, add_case_arguments
from lorafuse.testing.cases import MOE_CASES, MoECase, find_moe, sizes

SUMMARY = "the experts of a mixture-of-experts block"
_STACKS = ("gate_up", "down")
_FACTORS = ("gate_up_a", "gate_up_b", "down_a", "down_b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_case_arguments(
        parser, "experts", "moe-64", "E,k,H,I: experts, of each token, hidden and intermediate size", 512
    )
    parser.add_argument(
        "--routing", nargs="+", default=["balanced"], choices=ROUTINGS, help="of tokens to experts (balanced)"
    )


def cases(args: argparse.Namespace) -> list["Experts"]:
    """Every block at every M, rank and routing. Raises ValueError for unknown names, ranks above the experts'."""
    if args.shape is not None:
        E, k, H, I = sizes(args.shape, 4, 4, "experts, experts of a token, hidden and inner size", "64,8,2048,768")
        if k > E:
            raise ValueError(f"--shape {args.shape}: a token cannot have {k} of {E} experts")
        blocks = [MoECase(f"experts-{args.shape.replace(',', '-')}", E, k, H, I)]
    else:
        blocks = list(MOE_CASES.values()) if args.all else [find_moe(name) for name in args.case or ["moe-64"]]
    problems = [
        Experts(c.name, args.dtype, m, c.E, c.k, c.H, c.I, r, routing)
        for c in blocks for m in args.m for r in args.rank for routing in args.routing
    ]  # fmt: skip
    for problem in problems:
        if min(problem.H, problem.I) < problem.R:
            raise ValueError(
                f"--rank {problem.R}: {problem.name} has H {problem.H}, I {problem.I}, no rank above those"
            )
    return problems


@dataclass(frozen=True)
class ExpertsInputs:
    """`x` and `dout` `[M, H]`, `index` and `weight` `[M, k]`, `gate_up [E, 2I, H]`, `down [E, H, I]`, fp32 factors."""

    x: Tensor
    index: Tensor
    weight: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_a: Tensor
    gate_up_b: Tensor
    down_a: Tensor
    down_b: Tensor
    dout: Tensor


def _balanced(tokens: int, experts: int, k: int) -> Tensor:
    return (torch.arange(tokens * k) % experts).view(tokens, k)


def _zipf(tokens: int, experts: int, k: int) -> Tensor:
    """Experts drawn without repetition, the n-th most frequent with weight 1/n."""
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial((1 / torch.arange(1, experts + 1)).expand(tokens, -1), k, generator=generator)


def _one_hot(tokens: int, experts: int, k: int) -> Tensor:
    """Every token to the same k experts."""
    return torch.arange(k).expand(tokens, -1).contiguous()


ROUTINGS = {"balanced": _balanced, "zipf": _zipf, "one-hot": _one_hot}


@dataclass(frozen=True)
class Experts(Problem):
    """E experts, k for each of M tokens, of hidden size H and intermediate size I, adapters of rank R on each."""

    kind: ClassVar[str] = "moe"

    M: int
    E: int
    k: int
    H: int
    I: int  # noqa: E741
    R: int
    routing: str

    def inputs(self, device: torch.device) -> ExpertsInputs:
        """Normal numbers of unit size, no factor zero."""
        generator = torch.Generator(device).manual_seed(0)
        dtype, fp32 = self.torch_dtype, torch.float32
        M, E, H, I, R = self.M, self.E, self.H, self.I, self.R

        def normal(*size: int, fan: int = 1, of: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*size, generator=generator, device=device) * fan**-0.5).to(of)

        return ExpertsInputs(
            x=normal(M, H),
            index=ROUTINGS[self.routing](M, E, self.k).to(device),
            weight=torch.rand(M, self.k, generator=generator, device=device).to(dtype),
            gate_up=normal(E, 2 * I, H, fan=H),
            down=normal(E, H, I, fan=I),
            gate_up_a=normal(E, R, H, fan=H, of=fp32),
            gate_up_b=normal(E, 2 * I, R, fan=R, of=fp32) / SCALE,
            down_a=normal(E, R, I, fan=I, of=fp32),
            down_b=normal(E, H, R, fan=R, of=fp32) / SCALE,
            dout=normal(M, H),
        )

    def references(self, given: ExpertsInputs) -> dict[str, dict[str, Tensor]]:
        base = _formula(given, _STACKS)
        frozen = {name: tensor for name, tensor in base.items() if name.removeprefix("d_") not in _STACKS}
        return {"nothing": frozen, "base": base, "adapters": _formula(given, _FACTORS)}

    def variant(self, name: str, baseline: Any, given: ExpertsInputs, **options: Any) -> Variant:
        call, trained = baseline.experts(given, **options)
        x, weight = (t.detach().requires_grad_() for t in (given.x, given.weight))
        leaves = {"dx": x, "dweight": weight, **trained}
        return Variant(name, lambda: (call(x, given.index, weight),), ("out",), (given.dout,), leaves)

    def shaped(self, name: str, expected: Tensor, actual: Tensor) -> Tensor:
        """Gradients of factors in PEFT's packing, for variants that return them so."""
        if expected.shape == actual.shape:
            return expected
        return expected.flatten(0, 1) if name.endswith("_a") else expected.permute(1, 2, 0).flatten(1)

    def work(self, trains: str) -> dict[str, Work]:
        """The three products of every (token, expert); one pass over x, out and the weights of the routed experts."""
        size, rows = self.torch_dtype.itemsize, self.M * self.k
        chosen = {"one-hot": self.k}.get(self.routing, min(self.E, rows))
        base, weights = 2 * rows * 3 * self.I * self.H, size * chosen * 3 * self.I * self.H
        forward = Work(base, weights + 2 * size * self.M * self.H)
        backward = Work(base, weights + 3 * size * self.M * self.H)
        if trains == "base":
            backward += Work(base, weights)
        if trains == "adapters":
            # gate_up has rank R from H to 2I, down from I to H
            rank = self.R * (2 * self.H + 3 * self.I)
            forward += Work(2 * rows * rank, size * chosen * rank)
            backward += Work(4 * rows * rank, 2 * size * chosen * rank)
        return {"forward": forward, "backward": backward}


def _formula(given: ExpertsInputs, trained: tuple[str, ...]) -> dict[str, Tensor]:
    """out and every gradient in fp64, one expert at a time to save memory."""
    x, weight, dout = (t.double() for t in (given.x, given.weight, given.dout))
    results = {"out": torch.zeros_like(x), "dx": torch.zeros_like(x), "dweight": torch.zeros_like(weight)}
    results |= {f"d_{name}": torch.zeros_like(getattr(given, name), dtype=torch.float64) for name in trained}
    names = _STACKS + (_FACTORS if trained == _FACTORS else ())
    for e in range(given.gate_up.shape[0]):
        token, slot = torch.where(given.index == e)
        if token.numel() == 0:
            continue
        rows, factor = x[token].requires_grad_(), weight[token, slot].requires_grad_()
        of = {name: getattr(given, name)[e].double().requires_grad_(name in trained) for name in names}

        def project(v: Tensor, name: str, of: dict[str, Tensor] = of) -> Tensor:
            y = v @ of[name].t()
            return y + SCALE * (v @ of[f"{name}_a"].t()) @ of[f"{name}_b"].t() if f"{name}_a" in of else y

        gate, up = project(rows, "gate_up").chunk(2, 1)
        y = project(F.silu(gate) * up, "down") * factor.unsqueeze(1)
        dx, dfactor, *grads = torch.autograd.grad(y, (rows, factor, *(of[name] for name in trained)), dout[token])
        results["out"].index_add_(0, token, y.detach())
        results["dx"].index_add_(0, token, dx)
        results["dweight"][token, slot] = dfactor
        for name, grad in zip(trained, grads, strict=True):
            results[f"d_{name}"][e] = grad
    return results
