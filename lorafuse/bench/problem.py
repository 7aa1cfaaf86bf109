"""A problem to measure (inputs, correct results, least work), its variants, and the gate before any timing.

`lorafuse bench linear`, `group`, `layer` and `moe` differ in their problems only.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorafuse.plan import override
from lorafuse.testing.numerics import relative_l2, tolerance

__all__ = ["SCALE", "Problem", "Variant", "Work", "add_case_arguments", "numbered", "title", "wrong"]

# alpha / r of every adapter in the benchmarks
SCALE = 2.0
# the fields of results in the order of titles
_SIZES = ("M", "E", "k", "H", "Q", "KV", "D", "I", "N", "K", "R", "routing", "quant")


def add_case_arguments(parser: argparse.ArgumentParser, what: str, usual: str, shape: str, m: int) -> None:
    """Options of a kind's cases: by name, all, or one by its shape, given as `shape` "METAVAR: meaning"; M and rank."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--case", action="append", metavar="NAME", help=f"{what} by name; may be repeated ({usual})")
    which.add_argument("--all", action="store_true", help="every named one")
    metavar, _, meaning = shape.partition(": ")
    which.add_argument("--shape", metavar=metavar, help=meaning)
    parser.add_argument("--m", type=int, nargs="+", default=[m], help=f"tokens ({m})")
    parser.add_argument("--rank", type=int, nargs="+", default=[16], help="of every adapter (16)")


def title(result: dict[str, Any]) -> str:
    """The case of a result and its sizes."""
    sizes = ", ".join(f"{name} {result[name]}" for name in _SIZES if name in result)
    return f"{result['case']}: {sizes}, {result['dtype']}"


def numbered(layers: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several layers in one dictionary: "da" of layer 1 is "da 1"."""
    return {f"{name} {i}": tensor for i, layer in enumerate(layers) for name, tensor in layer.items()}


@dataclass(frozen=True)
class Work:
    """The least work of one pass: multiplications and additions, and bytes that cross the memory bus."""

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass
class Variant:
    """A layer or block as one baseline runs it; `leaves` are x and trained tensors by the names of their gradients.

    `kernel` is what `lorafuse.plan.override` forces in the passes that have it; "" forces none, and plans follow the
    model alone, as of what is named by its backend; None leaves plans as they are.
    """

    name: str
    call: Callable[[], tuple[Tensor, ...]]
    outputs: tuple[str, ...]
    douts: tuple[Tensor, ...]
    leaves: dict[str, Tensor]
    kernel: str | None = None

    def forward(self) -> tuple[Tensor, ...]:
        with self._planned():
            return self.call()

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with self._planned():
            return torch.autograd.grad(outputs, tuple(self.leaves.values()), self.douts)

    def _planned(self) -> AbstractContextManager[None]:
        # measured tables say what is fastest, and this is what they are made from
        return nullcontext() if self.kernel is None else override(force_kernel=self.kernel or None, measured=())

    def results(self) -> dict[str, Tensor]:
        """Outputs and gradients of one call by name."""
        outputs = self.forward()
        tensors = (*outputs, *self.backward(outputs))
        return {name: t.detach() for name, t in zip((*self.outputs, *self.leaves), tensors, strict=True)}


@dataclass(frozen=True)
class Problem:
    """One layer or block at given sizes; `name` is that of its case. Subclasses add the sizes as fields."""

    kind: ClassVar[str]

    name: str
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def title(self) -> str:
        """The case and its sizes."""
        return title(self.described())

    def described(self) -> dict[str, Any]:
        """The fields with which every result of this problem begins."""
        sizes = {name: value for name, value in asdict(self).items() if name not in ("name", "dtype")}
        return {"kind": self.kind, "case": self.name, **sizes, "dtype": self.dtype}

    def inputs(self, device: torch.device) -> Any:
        """The numbers of this problem, the same in every process."""
        raise NotImplementedError

    def references(self, given: Any) -> dict[str, dict[str, Tensor]]:
        """Outputs and gradients in fp64, by the trained part: "nothing", "base", "adapters"."""
        raise NotImplementedError

    def variant(self, name: str, baseline: Any, given: Any, **options: Any) -> Variant:
        """The variant that a baseline's module builds for the inputs."""
        raise NotImplementedError

    def shaped(self, name: str, expected: Tensor, actual: Tensor) -> Tensor:
        """An expected tensor in the layout of a variant's."""
        return expected

    def work(self, trains: str) -> dict[str, Work]:
        """The least work of "forward" and "backward", by the trained part."""
        raise NotImplementedError

    def floors(self) -> dict[str, float]:
        """The least "tax" and "ratio_to_full" by arithmetic alone."""
        flops = {trains: sum(w.flops for w in self.work(trains).values()) for trains in ("nothing", "base", "adapters")}
        return {
            "tax": flops["adapters"] / flops["nothing"] - 1,
            "ratio_to_full": flops["adapters"] / flops["base"],
        }


def wrong(variant: Variant, expected: dict[str, Tensor], shaped: Callable[[str, Tensor, Tensor], Tensor]) -> str:
    """ "" when every expected tensor is there, correct and not zero; otherwise the first that is not, with its error.

    `shaped(name, expected, actual)` brings an expected tensor into the variant's layout.
    """
    # the second call is checked: it is wrong too when the first one wrote into its inputs
    variant.results()
    results = variant.results()
    missing = expected.keys() - results.keys()
    if missing:
        return f"{variant.name}: it does not give {', '.join(sorted(missing))}"
    # the layer's dtype decides, also for gradients in fp32
    bound = tolerance(results[variant.outputs[0]].dtype)
    for name, reference in expected.items():
        tensor = results[name]
        reference = shaped(name, reference, tensor)
        if tensor.shape != reference.shape:
            return f"{variant.name}: {name} is {list(tensor.shape)}, it must be {list(reference.shape)}"
        error = relative_l2(tensor, reference)
        # not above: NaN fails too
        if not error <= bound or not tensor.any():
            return f"{variant.name}: {name} is wrong by {error:.2e} relative, the bound is {bound:.0e}"
    return ""
