"""A decoder layer, forward and backward, with every baseline: its seven linear layers and what lies between them.

One sequence of M tokens, as transformers' Llama runs it: RMSNorm, q, k and v, rotary embedding, causal attention with
grouped queries, o, RMSNorm, gate, up and down, residual sums. LoRA tax = time(adapted) / time(fastest frozen) - 1,
forward and backward; "over frozen" is over the frozen layer as transformers runs it. No number is printed for a wrong
result.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lorafuse.bench import group, linear
from lorafuse.bench.linear import Inputs
from lorafuse.bench.problem import SCALE, Problem, Variant, Work, add_case_arguments
from lorafuse.testing.cases import DECODERS, DecoderCase, find_decoder, sizes

SUMMARY = "a decoder layer"
_DEFAULT = "smollm2-135m.layer"
_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
# transformers' defaults for Llama; no time depends on them
_EPSILON, _THETA = 1e-6, 10000.0

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shape = "H,Q,KV,D,I: hidden size, features of all queries, of all keys, of a head, and intermediate size"
    add_case_arguments(parser, "decoder layers", _DEFAULT, shape, 256)


def cases(args: argparse.Namespace) -> list["DecoderLayer"]:
    """Every layer at every M and rank. Raises ValueError for unknown names, heads that do not fit, ranks above."""
    if args.shape is not None:
        meaning = "hidden size, features of queries, of keys, of a head, intermediate size"
        H, Q, KV, D, I = sizes(args.shape, 5, 5, meaning, "4096,4096,1024,128,14336")  # noqa: E741
        if D % 2 or KV % D or Q % KV:
            raise ValueError(f"--shape {args.shape}: D must be even and divide KV, KV must divide Q")
        layers = [DecoderCase(args.shape, H, Q, KV, D, I)]
    else:
        layers = list(DECODERS.values()) if args.all else [find_decoder(name) for name in args.case or [_DEFAULT]]
    for c in layers:
        for r in args.rank:
            if min(c.H, c.KV, c.I) < r:
                raise ValueError(f"--rank {r}: {c.name} has layers of {min(c.H, c.KV, c.I)} features, no rank above")
    return [DecoderLayer(c.name, args.dtype, m, c.H, c.Q, c.KV, c.D, c.I, r) for c in layers for m in args.m
            for r in args.rank]  # fmt: skip


@dataclass(frozen=True)
class LayerInputs:
    """The linear layers by name, whose x and dy are the block's `[M, H]`; `norms` two of `[H]`; `rotary` cos and sin,
    `[M, D]` each."""

    linears: dict[str, Inputs]
    norms: tuple[Tensor, Tensor]
    rotary: tuple[Tensor, Tensor]

    def of(self, *names: str) -> tuple[Inputs, ...]:
        return tuple(self.linears[name] for name in names)


@dataclass(frozen=True)
class DecoderLayer(Problem):
    """`h = x + o(attention(qkv(norm(x))))`, `y = h + down(silu(gate(n)) · up(n))` with `n = norm(h)`; x and y `[M, H]`,
    adapters of rank R on all seven linear layers. With a trained base the norms are trained too."""

    kind: ClassVar[str] = "layer"

    M: int
    H: int
    Q: int
    KV: int
    D: int
    I: int  # noqa: E741
    R: int

    @property
    def _layers(self) -> dict[str, tuple[int, int]]:
        """Out and in features by name."""
        H, Q, KV, I = self.H, self.Q, self.KV, self.I  # noqa: E741
        return dict(zip(_LINEARS, ((Q, H), (KV, H), (KV, H), (H, Q), (I, H), (I, H), (H, I)), strict=True))

    def inputs(self, device: torch.device) -> LayerInputs:
        dtype = self.torch_dtype
        block = linear.inputs(self.M, self.H, self.H, 1, dtype, device)
        linears = {}
        for seed, (name, (n, k)) in enumerate(self._layers.items(), 1):
            # of one token: each layer's own x and dy come from the others
            one = linear.inputs(1, n, k, self.R, dtype, device, seed)
            linears[name] = Inputs(block.x, one.w, one.a, one.b, block.dy)
        noise = linear.inputs(2, self.H, self.H, 1, torch.float32, device, len(linears) + 1)
        before, after = (1 + 0.1 * noise.x).to(dtype)
        frequency = _THETA ** -(torch.arange(0, self.D, 2, device=device) / self.D)
        angles = torch.outer(torch.arange(self.M, device=device), frequency).repeat(1, 2)
        return LayerInputs(linears, (before, after), (angles.cos().to(dtype), angles.sin().to(dtype)))

    def references(self, given: LayerInputs) -> dict[str, dict[str, Tensor]]:
        return {trains: self._formula(given, trains) for trains in ("nothing", "base", "adapters")}

    def variant(self, name: str, baseline: Any, given: LayerInputs, **options: Any) -> Variant:
        block = given.linears["q"]
        leaves, calls = {"dx": block.x.detach().requires_grad_()}, []
        for names, build in (
            (("q", "k", "v"), group.siblings),
            (("o",), group.siblings),
            (("gate", "up", "down"), group.gated_mlp),
        ):
            call, trained = build(baseline, given.of(*names), **options)
            calls.append(call)
            # "da 1" of q, k and v is "da k"
            for key, tensor in trained.items():
                gradient, _, index = key.partition(" ")
                leaves[f"{gradient} {names[int(index)]}"] = tensor
        norms = tuple(norm.detach() for norm in given.norms)
        if getattr(baseline, "TRAINS", "adapters") == "base":
            leaves |= {f"dnorm {i}": norm.requires_grad_() for i, norm in enumerate(norms)}

        def run(x: Tensor) -> Tensor:
            return self._run(x, norms, given.rotary, calls[0], lambda x: calls[1](x)[0], calls[2], _attention)

        whole = baseline.layer(run) if hasattr(baseline, "layer") else run
        return Variant(name, lambda: (whole(leaves["dx"]),), ("y",), (block.dy,), leaves)

    def work(self, trains: str) -> dict[str, Work]:
        """Sums over the linear layers, causal attention's products (two forward, four backward), a pass over each
        operand of attention and norms; SwiGLU, rotary embedding and residuals have no pass of their own."""
        size, M = self.torch_dtype.itemsize, self.M
        every = [linear.work(M, n, k, self.R, size, trains) for n, k in self._layers.values()]
        # q, k and v share the passes over x and dx, gate and up too
        total = group.sum_of_work(every, Work(0, -3 * size * M * self.H))
        # half of M x M scores
        products, rows = M * M * self.Q, 2 * size * M * (self.Q + self.KV)
        total["forward"] += Work(2 * products, rows + 4 * size * M * self.H)
        total["backward"] += Work(4 * products, 2 * rows + 6 * size * M * self.H)
        return total

    def _run(
        self, x: Tensor, norms: Sequence[Tensor], rotary: Sequence[Tensor],
        qkv: Callable[[Tensor], Sequence[Tensor]], o: Callable[[Tensor], Tensor], mlp: Callable[[Tensor], Tensor],
        attention: Attention,
    ) -> Tensor:  # fmt: skip
        q, k, v = (t.view(1, self.M, -1, self.D).transpose(1, 2) for t in qkv(_norm(x, norms[0])))
        mixed = attention(_rotated(q, *rotary), _rotated(k, *rotary), v)
        h = x + o(mixed.transpose(1, 2).reshape(self.M, self.Q))
        return h + mlp(_norm(h, norms[1]))

    def _formula(self, given: LayerInputs, trains: str) -> dict[str, Tensor]:
        """y and every gradient in fp64."""
        parts = {"nothing": "", "base": "w", "adapters": "ab"}[trains]
        layers = {name: {part: getattr(one, part).double() for part in "wab"} for name, one in given.linears.items()}
        block, norms = given.linears["q"], [norm.double() for norm in given.norms]
        leaves = {"dx": block.x.double()}
        leaves |= {f"d{part} {name}": layer[part] for name, layer in layers.items() for part in parts}
        leaves |= {f"dnorm {i}": norm for i, norm in enumerate(norms) if trains == "base"}
        for leaf in leaves.values():
            leaf.requires_grad_()

        def project(v: Tensor, name: str) -> Tensor:
            w, a, b = (layers[name][part] for part in "wab")
            return v @ w.t() + (SCALE * (v @ a.t()) @ b.t() if trains == "adapters" else 0)

        y = self._run(
            leaves["dx"], norms, [t.double() for t in given.rotary],
            lambda x: [project(x, name) for name in "qkv"], lambda x: project(x, "o"),
            lambda x: project(F.silu(project(x, "gate")) * project(x, "up"), "down"), _attention_by_head,
        )  # fmt: skip
        grads = torch.autograd.grad(y, list(leaves.values()), block.dy.double())
        return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm, in fp32 or above, as transformers' Llama computes it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPSILON)).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of heads, `[1, heads, M, D]`, as transformers computes it."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _attention_by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, one head at a time and again in backward: M x M scores of all heads in fp64 are many gigabytes."""
    group_size = q.shape[1] // k.shape[1]
    heads = [
        checkpoint(_one_head, q[0, i], k[0, i // group_size], v[0, i // group_size], use_reentrant=False)
        for i in range(q.shape[1])
    ]
    return torch.stack(heads)[None]


def _one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.t()) * q.shape[1] ** -0.5
    above = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(above, -torch.inf).softmax(-1) @ v
