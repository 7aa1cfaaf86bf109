"""The layers of an operator whose rows are of many adapters: how a schema lists them, and one's products.

    y[s] = x[s] Wᵀ[e] + bias[e] + scale[g] · xa[s] b[e, g]ᵀ     xa[s] = drop(x[s]) a[e, g]ᵀ
    dx[s] = dy[s] W[e] + drop(scale[g] · dyb[s] a[e, g])         dyb[s] = dy[s] b[e, g]
    da[e, g] = scale[g] · Σ dybᵀ drop(x)       db[e, g] = scale[g] · Σ dyᵀ xa       over the rows of e and g

g is the adapter of row s, e its expert; of a dense layer there is one. W `[(E,) N, K]`; a `[(E,) ΣR, K]` and b
`[(E,) N, ΣR]`, the adapters' factors next to each other; xa `[S, max R]`. dyb is kept without its scale. W and the bias
have no gradient. An adapter's mask is drawn by its seed over its own rows.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafuse.backends.base import candidates, resolve
from lorafuse.backends.multi import Multi, adapters_on
from lorafuse.backends.problems import multi_problem
from lorafuse.backends.protocol import Backend
from lorafuse.operands import Adapters, Rows, Weight
from lorafuse.ops.autocast import outside_autocast
from lorafuse.ops.choose import ATEN, choose
from lorafuse.plan import Plan

__all__ = ["SCHEMA", "MultiLayer", "MultiSettings", "entries", "layers_of", "low_dtype", "running", "widest"]

# one entry for each layer, and of ranks, scales and dropout_ps one for each of its adapters; of the statistics of
# quantized weights layer i has counts[i]
SCHEMA = (
    "Tensor[] weights, Tensor?[] biases, Tensor[] a, Tensor[] b, Tensor?[] seeds, Tensor[] statistics, int[] ranks,"
    " float[] scales, float[] dropout_ps, str[] formats, int[] counts, bool transposed, bool batch_invariant,"
    " str backend, bool wide"
)
# how many arguments these are
_ARGUMENTS = SCHEMA.count(",") + 1


class MultiSettings(NamedTuple):
    """What no tensor holds, in the order of `SCHEMA`."""

    ranks: Sequence[int]
    scales: Sequence[float]
    dropout_ps: Sequence[float]
    formats: Sequence[str]
    counts: Sequence[int]
    transposed: bool
    batch_invariant: bool
    backend: str
    wide: bool

    def arguments(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """All of `SCHEMA`; `tensors` are weights, biases, a, b and seeds, then statistics."""
        G = len(self.formats)
        lists = (list(tensors[i : i + G]) for i in range(0, 5 * G, G))
        ranks, scales, dropout_ps, formats, counts, *rest = self
        given = list(ranks), list(scales), list(dropout_ps), list(formats), list(counts)
        return *lists, list(tensors[5 * G :]), *given, *rest


class _Entry(NamedTuple):
    """One layer as a schema lists it."""

    weight: Weight
    bias: Tensor | None
    a: Tensor
    b: Tensor
    seeds: Tensor | None
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    dropout_ps: tuple[float, ...]


@dataclass(slots=True, eq=False)
class MultiLayer:
    """One layer, and what runs it in one direction; factors of a stack of experts are stacks too, or shared by all."""

    weight: Weight
    bias: Tensor | None
    a: Tensor
    b: Tensor
    adapters: Adapters
    batch_invariant: bool
    low: torch.dtype
    run: Backend
    plan: Plan | None

    @property
    def multi(self) -> Multi:
        """The primitives."""
        assert self.run.multi is not None
        return self.run.multi

    def xa(self, x: Tensor, rows: Rows) -> Tensor:
        """`drop(x) aᵀ`."""
        return self.multi.project(self.run, x, self.a, rows, self.adapters, self.plan, True, self.low)

    def y(self, x: Tensor, xa: Tensor, rows: Rows) -> Tensor:
        """`x Wᵀ + bias + scale · xa bᵀ`."""
        given = self.run, x, self.weight, xa, self._stacked(self.b.mT), rows, self.adapters, self.plan
        return self.multi.matmul(*given, self.bias, False, self.batch_invariant)

    def dyb(self, dy: Tensor, rows: Rows) -> Tensor:
        """`dy b`."""
        return self.multi.project(self.run, dy, self.b.mT, rows, self.adapters, self.plan, False, self.low)

    def dx(self, dy: Tensor, dyb: Tensor, rows: Rows, total: Tensor | None = None) -> Tensor:
        """`dy W + drop(scale · dyb a)`, added to `total`."""
        given = self.run, dy, self.weight.t, dyb, self._stacked(self.a), rows, self.adapters, self.plan
        return self.multi.matmul(*given, None, True, self.batch_invariant, total)

    def add_da(self, dyb: Tensor, x: Tensor, rows: Rows, da: Tensor) -> None:
        """Add the gradient of a to `da`."""
        self.multi.outer(self.run, dyb, x, da, rows, self.adapters, self.plan, True)

    def add_db(self, xa: Tensor, dy: Tensor, rows: Rows, db: Tensor) -> None:
        """Add the gradient of b to `db`."""
        self.multi.outer(self.run, xa, dy, db.mT, rows, self.adapters, self.plan, False)

    def _stacked(self, f: Tensor) -> Tensor:
        E = self.weight.stored[0]
        return f if f.dim() == len(self.weight.stored) else f.unsqueeze(0).expand(E, -1, -1)


def low_dtype(x: Tensor, wide: bool) -> torch.dtype:
    """That of xa and dyb."""
    return torch.float32 if wide else x.dtype


def entries(arguments: Sequence[Any]) -> Iterator[_Entry]:
    """The layers that these arguments of `SCHEMA` list."""
    (
        weights, biases, a, b, seeds, statistics, ranks, scales, dropout_ps, formats, counts, transposed, *_,
    ) = arguments[:_ARGUMENTS]  # fmt: skip
    of_weights, L = iter(statistics), len(ranks) // len(weights)
    for i, w in enumerate(weights):
        weight = Weight(w, transposed, tuple(itertools.islice(of_weights, counts[i])), formats[i])
        some = slice(i * L, (i + 1) * L)
        yield _Entry(
            weight, biases[i], a[i], b[i], seeds[i], tuple(ranks[some]), tuple(scales[some]), tuple(dropout_ps[some])
        )


def widest(arguments: Sequence[Any]) -> list[tuple[Weight, int]]:
    """The weight and the largest rank of each layer that these arguments of `SCHEMA` list."""
    return [(one.weight, max(one.ranks)) for one in entries(arguments)]


def layers_of(x: Tensor, backward: bool, arguments: Sequence[Any]) -> list[MultiLayer]:
    """The layers that arguments of `SCHEMA` list, and what runs each on x, or on dy. Raises ValueError for a backend
    that has no kernels for them.
    """
    batch_invariant, backend, wide = arguments[_ARGUMENTS - 3 : _ARGUMENTS]
    backend = resolve(backend)
    if backend == "auto":
        # the one backend that reads nothing on the host
        runs = x.dtype is not torch.float64 and "triton" in candidates(x.device.type)
        backend = "triton" if runs else "eager"
    if backend not in ("eager", "triton"):
        raise ValueError(
            f"backend={backend!r} has no kernels for rows of many adapters; use 'triton', 'eager' or 'auto'"
        )
    layers = []
    for w, bias, a, b, seeds, ranks, scales, p in entries(arguments):

        def problem(w: Weight = w, a: Tensor = a) -> Any:
            return multi_problem(x, w, a, backward, wide)

        run, plan = choose(backend, x, problem, w.data)
        adapters = adapters_on(x.device, ranks, scales, None if seeds is None else p, seeds)
        plan = plan if run is not ATEN else None
        layers.append(MultiLayer(w, bias, a, b, adapters, batch_invariant, low_dtype(x, wide), run, plan))
    return layers


@contextlib.contextmanager
def running(layers: Sequence[MultiLayer], x: Tensor) -> Iterator[Backend]:
    """The backend of the layers of one operator, where its primitives run."""
    run = layers[0].run
    with outside_autocast(x), run.guard(x.device):
        yield run
