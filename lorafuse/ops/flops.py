"""FLOPs of the operators, forward and backward, for `torch.utils.flop_counter.FlopCounterMode`.

They are those of the products that torch would do for the same formula and the same gradients: 2 for each multiply-add
of the base and of both low-rank products. Of experts all T·k rows count: shapes do not show which are sentinels.

A formula is called with the operator's arguments, shapes in the place of tensors.
"""

import importlib.abc
import importlib.util
import itertools
import math
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

# they define the operators
import lorafuse.ops.experts
import lorafuse.ops.gated_mlp
import lorafuse.ops.group
import lorafuse.ops.grouped
import lorafuse.ops.linear
import lorafuse.ops.multi
import lorafuse.ops.multi_experts  # noqa: F401
from lorafuse.operands import Weight

__all__ = [
    "experts",
    "experts_backward",
    "experts_multi",
    "experts_multi_backward",
    "gated_mlp",
    "gated_mlp_backward",
    "gated_mlp_multi",
    "gated_mlp_multi_backward",
    "grouped",
    "grouped_backward",
    "linear",
    "linear_backward",
    "linears",
    "linears_backward",
    "multi",
    "multi_backward",
]

_Shape = Sequence[int]
_COUNTER = "torch.utils.flop_counter"


def _stored(w: _Shape, format: str = "dense", statistics: Sequence[_Shape] | None = None) -> _Shape:
    """The sizes of the matrices of a weight in any format."""
    if format == "dense":
        return w
    data, *scales = (torch.empty(sizes, device="meta") for sizes in (w, *(statistics or ())))
    return Weight(data, statistics=tuple(scales), format=format).stored


def _forward(rows: int, w: _Shape, a: _Shape | None) -> int:
    """w `[…, N, K]` or `[…, K, N]`."""
    *_, n, k = w
    return 2 * rows * (n * k + _rank(a) * (n + k))


def _backward(rows: int, w: _Shape, a: _Shape | None, transposed: bool, dx: bool, da: bool, db: bool) -> int:
    """`dyb = dy b`, for dx and da; `dx = dy w + dyb a`, `da = dybᵀ x`, `db = dyᵀ xa`."""
    n, k = (w[-1], w[-2]) if transposed else (w[-2], w[-1])
    low = n * (dx or da) + k * dx + k * da + n * db
    return 2 * rows * (n * k * dx + _rank(a) * low)


def _rank(a: _Shape | None) -> int:
    """That of `a [R, K]`, or of a stack of them."""
    return 0 if a is None else a[-2]


def linear(
    x: _Shape, weight: _Shape, bias: _Shape | None, a: _Shape, b: object, seed: object, scale: float, dropout_p: float,
    backend: str, wide: bool = False, *stored: Any, **_: object,
) -> int:  # fmt: skip
    return _forward(math.prod(x[:-1]), _stored(weight, *stored), a)


def linear_backward(
    dy: _Shape, x: object, xa: object, weight: _Shape, a: _Shape, b: object, seed: object, scale: float,
    dropout_p: float, needs: Sequence[bool], backend: str, wide: bool = False, *stored: Any, **_: object,
) -> int:  # fmt: skip
    return _backward(math.prod(dy[:-1]), _stored(weight, *stored), a, False, needs[0], needs[1], needs[2])


def grouped(
    x: _Shape, ends: object, w: _Shape, bias: object, a: _Shape | None, b: object, scale: float, transposed: bool,
    backend: str, *stored: Any, **_: object,
) -> int:  # fmt: skip
    return _forward(x[0], _stored(w, *stored), a)


def grouped_backward(
    dy: _Shape, x: object, xa: object, ends: object, w: _Shape, a: _Shape | None, b: object, scale: float,
    transposed: bool, needs: Sequence[bool], backend: str, *stored: Any, **_: object,
) -> int:  # fmt: skip
    return _backward(dy[0], _stored(w, *stored), a, transposed, needs[0], needs[1], needs[2])


def linears(
    x: _Shape, weights: Sequence[_Shape], biases: object, a: Sequence[_Shape | None], b: object, seeds: object,
    statistics: Sequence[_Shape], scales: object, dropout_ps: object, formats: Sequence[str], counts: Sequence[int],
    *_: object, **__: object,
) -> int:  # fmt: skip
    """Of siblings, and of a gated MLP, whose every row passes three layers."""
    each = zip(_each(weights, statistics, formats, counts), a, strict=True)
    return sum(_forward(math.prod(x[:-1]), w, one) for w, one in each)


def _each(
    weights: Sequence[_Shape], statistics: Sequence[_Shape], formats: Sequence[str], counts: Sequence[int]
) -> list[_Shape]:  # fmt: skip
    rest = iter(statistics)
    every = zip(weights, formats, counts, strict=True)
    return [_stored(w, format, list(itertools.islice(rest, count))) for w, format, count in every]


gated_mlp = linears


def linears_backward(
    dys: Sequence[_Shape | None], x: object, xa: object, weights: Sequence[_Shape], biases: object,
    a: Sequence[_Shape | None], b: object, seeds: object, statistics: Sequence[_Shape], scales: object,
    dropout_ps: object, formats: Sequence[str], counts: Sequence[int], needs: Sequence[bool], *_: object, **__: object,
) -> int:  # fmt: skip
    weights = _each(weights, statistics, formats, counts)
    G, total = len(weights), 0
    for i, (dy, w, one) in enumerate(zip(dys, weights, a, strict=True)):
        if dy is not None:
            total += _backward(math.prod(dy[:-1]), w, one, False, needs[0], needs[1 + i], needs[1 + G + i])
    return total


def gated_mlp_backward(
    dy: _Shape, x: object, gate: object, up: object, xa: object, ha: object, weights: Sequence[_Shape], biases: object,
    a: Sequence[_Shape | None], b: object, seeds: object, statistics: Sequence[_Shape], scales: object,
    dropout_ps: object, formats: Sequence[str], counts: Sequence[int], needs: Sequence[bool], *_: object, **__: object,
) -> int:  # fmt: skip
    """What `recompute_up` computes again is not counted."""
    weights = _each(weights, statistics, formats, counts)
    rows = math.prod(dy[:-1])
    # of the hidden rows
    dh = any(need for i, need in enumerate(needs) if i == 0 or i % 3)
    of_inputs = needs[0], needs[0], dh
    layers = zip(weights, a, of_inputs, needs[1:4], needs[4:7], strict=True)
    return sum(_backward(rows, w, one, False, dx, da, db) for w, one, dx, da, db in layers)


def experts(
    x: _Shape, index: _Shape, weight: object, up: _Shape, down: _Shape, up_bias: object, down_bias: object,
    up_a: _Shape | None, up_b: object, down_a: _Shape | None, down_b: object, up_scale: float, down_scale: float,
    transposed: bool, activation: str, gate_layout: str, backend: str, *stored: Any, **_: object,
) -> int:  # fmt: skip
    rows, (up, down) = math.prod(index), _both(up, down, *stored)
    return _forward(rows, up, up_a) + _forward(rows, down, down_a)


def _both(
    up: _Shape, down: _Shape, up_format: str = "dense", down_format: str = "dense", up_statistics: Any = None,
    down_statistics: Any = None,
) -> tuple[_Shape, _Shape]:  # fmt: skip
    return _stored(up, up_format, up_statistics), _stored(down, down_format, down_statistics)


def experts_backward(
    dout: object, x: object, weight: _Shape, up: _Shape, down: _Shape, down_bias: object, up_a: _Shape | None,
    up_b: object, down_a: _Shape | None, down_b: object, up_scale: float, down_scale: float, transposed: bool,
    activation: str, gate_layout: str, u: object, xa: object, ha: object, order: object, ends: object,
    needs: Sequence[bool], backend: str, *stored: Any, **_: object,
) -> int:  # fmt: skip
    up, down = _both(up, down, *stored)
    rows, (dx, dweight, d_up_a, d_up_b, d_down_a, d_down_b) = math.prod(weight), needs
    # of the hidden rows; the gradient of a router weight is taken from it
    dh = dx or dweight or d_up_a or d_up_b
    of_up = _backward(rows, up, up_a, transposed, dx, d_up_a, d_up_b)
    return of_up + _backward(rows, down, down_a, transposed, dh, d_down_a, d_down_b)


def multi(
    x: _Shape, offsets: object, weights: Sequence[_Shape], biases: object, a: object, b: object, seeds: object,
    statistics: Sequence[_Shape], ranks: Sequence[int], scales: object, dropout_ps: object, formats: Sequence[str],
    counts: Sequence[int], *_: object, **__: object,
) -> int:  # fmt: skip
    """Every row counts with the largest rank: shapes do not show which adapter it has."""
    each = _widest(weights, statistics, ranks, formats, counts)
    return sum(_forward(math.prod(x[:-1]), w, (rank, 0)) for w, rank in each)


def multi_backward(
    dys: Sequence[_Shape | None], x: object, xas: object, offsets: object, weights: Sequence[_Shape], biases: object,
    a: object, b: object, seeds: object, statistics: Sequence[_Shape], ranks: Sequence[int], scales: object,
    dropout_ps: object, formats: Sequence[str], counts: Sequence[int], transposed: bool, batch_invariant: bool,
    backend: str, wide: bool, da: object, db: object, needs: Sequence[bool], *_: object, **__: object,
) -> int:  # fmt: skip
    each, G, total = _widest(weights, statistics, ranks, formats, counts), len(weights), 0
    for i, (dy, (w, rank)) in enumerate(zip(dys, each, strict=True)):
        if dy is not None:
            of_layer = needs[0], needs[1 + i], needs[1 + G + i]
            total += _backward(math.prod(dy[:-1]), w, (rank, 0), False, *of_layer)
    return total


gated_mlp_multi = multi


def gated_mlp_multi_backward(
    dy: _Shape, x: object, gate: object, up: object, xas: object, offsets: object, weights: Sequence[_Shape],
    *given: Any, **_: object,
) -> int:  # fmt: skip
    needs = given[_NEEDS]
    dys = (*dy[:-1], weights[0][0]), (*dy[:-1], weights[1][0]), dy
    siblings = multi_backward(dys, x, xas, offsets, weights, *given[:_NEEDS], [*needs[:3], False, *needs[4:6], False])
    # of these every layer's own gradient of its input, down's being that of h
    each = _widest(weights, given[4], given[5], given[8], given[9])
    (w, rank), dh = each[2], any((*needs[:3], *needs[4:6]))
    less = _backward(math.prod(dy[:-1]), w, (rank, 0), False, needs[0], False, False)
    return siblings - less + _backward(math.prod(dy[:-1]), w, (rank, 0), False, dh, needs[3], needs[6])


def experts_multi(
    x: _Shape, offsets: object, index: _Shape, weight: object, weights: Sequence[_Shape], biases: object, a: object,
    b: object, seeds: object, statistics: Sequence[_Shape], ranks: Sequence[int], scales: object, dropout_ps: object,
    formats: Sequence[str], counts: Sequence[int], *_: object, **__: object,
) -> int:  # fmt: skip
    """As if no factor were shared."""
    each = _widest(weights, statistics, ranks, formats, counts)
    return sum(_forward(math.prod(index), w, (rank, 0)) for w, rank in each)


def experts_multi_backward(
    dout: object, x: object, weight: _Shape, u: object, xa: object, ha: object, order: object, ends: object,
    offsets: object, weights: Sequence[_Shape], *given: Any, **_: object,
) -> int:  # fmt: skip
    (up, rank), (down, down_rank) = _widest(weights, given[4], given[5], given[8], given[9])
    dx, up_a, down_a, up_b, down_b, dweight = given[_NEEDS]
    rows, transposed, dh = math.prod(weight), given[10], dx or up_a or up_b or dweight
    of_up = _backward(rows, up, (rank, 0), transposed, dx, up_a, up_b)
    return of_up + _backward(rows, down, (down_rank, 0), transposed, dh, down_a, down_b)


# where needs are, after the weights
_NEEDS = 16


def _widest(
    weights: Sequence[_Shape], statistics: Sequence[_Shape], ranks: Sequence[int], formats: Sequence[str],
    counts: Sequence[int],
) -> list[tuple[_Shape, int]]:  # fmt: skip
    """The sizes and the largest rank of each layer."""
    L = len(ranks) // len(weights)
    widest = (max(ranks[first : first + L]) for first in range(0, len(ranks), L))
    return list(zip(_each(weights, statistics, formats, counts), widest, strict=True))


_FORMULAS = {
    "lora_linear": linear,
    "lora_linear_backward": linear_backward,
    "lora_linears": linears,
    "lora_linears_backward": linears_backward,
    "lora_gated_mlp": gated_mlp,
    "lora_gated_mlp_backward": gated_mlp_backward,
    "lora_grouped_linear": grouped,
    "lora_grouped_linear_backward": grouped_backward,
    "lora_linears_multi": multi,
    "lora_linears_multi_backward": multi_backward,
    "lora_gated_mlp_multi": gated_mlp_multi,
    "lora_gated_mlp_multi_backward": gated_mlp_multi_backward,
    "lora_experts_multi": experts_multi,
    "lora_experts_multi_backward": experts_multi_backward,
    "lora_experts": experts,
    "lora_experts_backward": experts_backward,
}


def _register(counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.lorafuse, name))(formula)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas when torch's counter is imported: importing it here costs 0.2 s and loads Triton."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(importlib.abc.Loader):
    """torch's own loader of the module, and then the formulas."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(module)


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _WhenImported())
