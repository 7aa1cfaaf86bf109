"""The layers of an operator that runs several: what each is, how a schema lists them, and one of them alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorafuse.backends.problems import siblings_problem
from lorafuse.backends.protocol import Backend
from lorafuse.operands import Dropout, LowRank, Weight
from lorafuse.ops import linear as of_one
from lorafuse.ops.choose import choose
from lorafuse.philox import keep_mask, rescaled
from lorafuse.plan import Plan, Problem

__all__ = [
    "SCHEMA",
    "Layer",
    "Settings",
    "choose_for",
    "columns",
    "layer_backward",
    "layer_forward",
    "layers_of",
    "names_of",
    "plain_layer",
    "plain_xa",
    "plan_of",
    "problem_of",
    "refuse_masks_of_nested",
]

# one entry for each layer; of the statistics of quantized weights layer i has counts[i]
SCHEMA = (
    "Tensor[] weights, Tensor?[] biases, Tensor?[] a, Tensor?[] b, Tensor?[] seeds, Tensor[] statistics,"
    " float[] scales, float[] dropout_ps, str[] formats, int[] counts"
)
_GRADIENTS = ("dx", "da", "db", "dbias")


@dataclass(slots=True, eq=False)
class Layer:
    """One layer: a and b are None where it has no adapter, the seed where it has no mask."""

    weight: Weight
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    seed: Tensor | None
    scale: float
    dropout_p: float

    @property
    def rank(self) -> int:
        """R; 0 without an adapter."""
        return 0 if self.a is None else self.a.shape[0]

    @property
    def dropout(self) -> Dropout | None:
        """Its mask."""
        return None if self.seed is None else Dropout(self.seed, self.dropout_p)

    @property
    def factor(self) -> float:
        """The scale of what the mask leaves."""
        return self.scale if self.seed is None else rescaled(self.scale, self.dropout_p)


def layers_of(*arguments: Any) -> list[Layer]:
    """The layers of the arguments that `SCHEMA` names."""
    settings, tensors = Settings.of(arguments)
    return settings.layers(tensors)


@dataclass(slots=True, eq=False)
class Settings:
    """The arguments that `SCHEMA` names and that are no tensors, for autograd, which gets tensors one by one."""

    scales: Sequence[float]
    dropout_ps: Sequence[float]
    formats: Sequence[str]
    counts: Sequence[int]

    @property
    def key(self) -> tuple[tuple, ...]:
        """The same to be looked up."""
        return tuple(self.scales), tuple(self.dropout_ps), tuple(self.formats), tuple(self.counts)

    @classmethod
    def of(cls, arguments: Sequence) -> "tuple[Settings, tuple[Tensor | None, ...]]":
        """The settings, and the tensors of `arguments`, those that `SCHEMA` names."""
        *lists, statistics, scales, dropout_ps, formats, counts = arguments
        return cls(scales, dropout_ps, formats, counts), (*chain(*lists), *statistics)

    @classmethod
    def of_layers(cls, layers: Sequence[Layer]) -> "tuple[Settings, tuple[Tensor | None, ...]]":
        """The same of layers."""
        scales, dropout_ps, formats, counts = [], [], [], []
        statistics: list[Tensor] = []
        each = []
        for layer in layers:
            w = layer.weight
            each.append((w.data, layer.bias, layer.a, layer.b, layer.seed))
            scales.append(layer.scale)
            dropout_ps.append(layer.dropout_p)
            formats.append(w.format)
            counts.append(len(w.statistics))
            statistics += w.statistics
        return cls(scales, dropout_ps, formats, counts), (*chain(*zip(*each, strict=True)), *statistics)

    def arguments(self, tensors: Sequence[Tensor | None]) -> tuple:
        """All of `SCHEMA`; `tensors` are weights, biases, a, b and seeds, then statistics."""
        G = len(self.scales)
        lists = (list(tensors[i : i + G]) for i in range(0, 5 * G, G))
        return *lists, list(tensors[5 * G :]), self.scales, self.dropout_ps, self.formats, self.counts

    def layers(self, tensors: Sequence[Tensor | None]) -> list[Layer]:
        """The layers of the same `tensors`."""
        G, layers, first, given = len(self.scales), [], 5 * len(self.scales), tuple(tensors)
        numbers = zip(self.formats, self.counts, self.scales, self.dropout_ps, strict=True)
        for i, (format, count, scale, dropout_p) in enumerate(numbers):
            weight, bias, a, b, seed = given[i : 5 * G : G]
            statistics: Any = given[first : first + count]
            layers.append(Layer(Weight(weight, False, statistics, format), bias, a, b, seed, scale, dropout_p))  # type: ignore[arg-type]
            first += count
        return layers

    def needs(self, of_tensors: Sequence[bool]) -> list[bool]:
        """Which of da, db and dbias are needed, of each layer, where `of_tensors` says it of `tensors`."""
        G = len(self.scales)
        return [*of_tensors[2 * G : 4 * G], *of_tensors[G : 2 * G]]

    def gradients(self, grads: Sequence[Tensor | None], tensors: int) -> tuple[Tensor | None, ...]:
        """Those of so many `tensors`, of the gradients that `needs` lists."""
        G = len(self.scales)
        return *[None] * G, *grads[2 * G :], *grads[: 2 * G], *[None] * (tensors - 4 * G)


def problem_of(
    x: Tensor, layers: Sequence[Layer], wide: bool, gradients: tuple[str, ...] = (), also: Sequence[Layer] = (),
    epilogue: str = "",
) -> Problem:  # fmt: skip
    """The problem of layers of one x `[M, K]`, or of their dy."""
    weights, others = ([layer.weight for layer in some] for some in (layers, also))
    adapters = [layer.a for layer in layers if layer.a is not None]
    has_mask = any(layer.seed is not None for layer in layers)
    has_bias = not gradients and any(layer.bias is not None for layer in layers)
    return siblings_problem(x, weights, adapters, has_bias, has_mask, gradients, wide, others, epilogue)


def choose_for(
    backend: str, x: Tensor, layers: Sequence[Layer], wide: bool, needs: Sequence[bool] = (),
    also: Sequence[Layer] = (),
) -> tuple[Backend, Plan | None]:  # fmt: skip
    """The backend of layers of one x `[M, K]`, or of their dy where `needs` are those of `names_of`; one plan for all.

    `also` are layers that the same backend runs after them, and in forward after an activation.
    """

    def problem() -> Problem:
        gradients = names_of(needs)
        return problem_of(x, layers, wide, gradients, also, "gated" if also and not gradients else "")

    return choose(backend, x, problem, *[layer.weight.data for layer in (*layers, *also)])


def columns(xa: Tensor | None, layers: Sequence[Layer]) -> list[Tensor | None]:
    """The columns of xa `[M, ΣR]` that are each layer's; None for those without an adapter."""
    parts: list[Tensor | None] = [None] * len(layers)
    if xa is not None:
        ranks = [0 if layer.a is None else layer.a.shape[0] for layer in layers]
        # one operator for all views
        for i, part in enumerate(torch.split_with_sizes(xa, ranks, 1)):
            if ranks[i]:
                parts[i] = part
    return parts


def layer_forward(
    run: Backend, x: Tensor, layer: Layer, wide: bool, low: LowRank | None = None
) -> tuple[Tensor, Tensor | None]:
    """`(y [M, N], xa [M, R])` of one layer and x `[M, K]`, by `low` where that is known; no xa without an adapter."""
    plan, w = run.plan(lambda: problem_of(x, [layer], wide), x.device), layer.weight
    if layer.a is None or layer.b is None:
        return run.matmul(x, w, None, plan, bias=layer.bias), None
    b, scale, xa = (layer.b, layer.factor, None) if low is None else (low.b, low.scale, low.xa)
    return of_one.forward(run, plan, x, w, layer.bias, layer.a, b, scale, layer.dropout, wide, xa)


def plan_of(
    run: Backend, dy: Tensor, layer: Layer, needs: Sequence[bool], wide: bool, epilogue: str = ""
) -> Plan | None:
    """The plan of one layer's backward, and of what follows dx; `needs` are dx, da, db and dbias."""
    gradients = tuple(name for name, need in zip(_GRADIENTS, needs, strict=True) if need)
    return run.plan(lambda: problem_of(dy, [layer], wide, gradients, epilogue=epilogue), dy.device)


def layer_backward(
    run: Backend, dy: Tensor, x: Tensor | None, xa: Tensor | None, layer: Layer, needs: Sequence[bool], wide: bool
) -> tuple[Tensor | None, ...]:
    """`(dx, da, db, dbias)` of one layer and dy `[M, N]`, None where not needed."""
    if not any(needs):
        return None, None, None, None
    plan, w = plan_of(run, dy, layer, needs, wide), layer.weight
    if layer.a is None or layer.b is None:
        return run.matmul(dy, w.t, None, plan) if needs[0] else None, None, None, dy.sum(0) if needs[3] else None
    xa = None if xa is None else xa.contiguous()
    return of_one.backward(run, plan, dy, x, xa, w, layer.a, layer.b, layer.factor, layer.dropout, list(needs), wide)


def names_of(needs: Sequence[bool]) -> tuple[str, ...]:
    """Which kinds of gradients a plan is for: `needs` are dx, every da, every db, every dbias."""
    G = len(needs) // 3
    kinds = {"dx": needs[:1], "da": needs[1 : 1 + G], "db": needs[1 + G : 1 + 2 * G], "dbias": needs[1 + 2 * G :]}
    return tuple(name for name, some in kinds.items() if any(some))


def plain_xa(x: Tensor, layer: Layer, wide: bool) -> Tensor:
    """xa `[…, R]` of a layer with an adapter, in plain torch."""
    assert layer.a is not None
    if layer.seed is not None:
        rows = slice(0, math.prod(x.shape[:-1]))
        x = x * keep_mask(layer.seed, layer.dropout_p, rows, x.shape[-1]).view(x.shape)
    low = torch.float32 if wide else x.dtype
    return linear(x.to(low), layer.a.to(low))


def plain_layer(x: Tensor, xa: Tensor | None, layer: Layer) -> Tensor:
    """y of a layer in plain torch, which every transform and every order of differentiation knows."""
    y = linear(x, layer.weight.decoded(x.dtype).data, layer.bias)
    if xa is None or layer.b is None:
        return y
    return (y + linear(xa, layer.b.to(xa.dtype)) * layer.factor).to(x.dtype)


def refuse_masks_of_nested(operator: str, x: Tensor, layers: Sequence[Layer]) -> None:
    """Raises NotImplementedError where a mask would be drawn for a nested x."""
    if x.is_nested and any(layer.seed is not None for layer in layers):
        raise NotImplementedError(f"{operator} draws no dropout mask for a nested x; pad it, or set dropout_p=0")
