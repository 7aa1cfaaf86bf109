"""What is measured: a problem gives inputs, the right results, and a variant for each baseline.

`lorafuse bench linear`, `group` and `moe` differ in nothing else.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorafuse.bench.variant import Variant

__all__ = ["Problem", "Work", "title"]


_SIZES = ("M", "E", "k", "H", "I", "N", "K", "R", "routing")


def title(result: dict[str, Any]) -> str:
    """The case of a result and its sizes."""
    sizes = ", ".join(f"{name} {result[name]}" for name in _SIZES if name in result)
    return f"{result['case']}: {sizes}, {result['dtype']}"


@dataclass(frozen=True)
class Work:
    """What one pass has to do at least: multiplications and additions, and bytes that cross the memory bus."""

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Problem:
    """One layer or block at given sizes; `name` is that of its case. Subclasses add the sizes as fields."""

    kind: ClassVar[str]

    name: str
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def sizes(self) -> dict[str, Any]:
        """Every field but the name, in the order in which a table says them."""
        return {name: value for name, value in asdict(self).items() if name not in ("name", "dtype")}

    @property
    def title(self) -> str:
        """The case and its sizes."""
        return title(self.described())

    def described(self) -> dict[str, Any]:
        """What every result of this problem begins with."""
        return {"kind": self.kind, "case": self.name, **self.sizes(), "dtype": self.dtype}

    def inputs(self, device: torch.device) -> Any:
        """The numbers of this problem, the same in every process."""
        raise NotImplementedError

    def references(self, given: Any) -> dict[str, dict[str, Tensor]]:
        """Outputs and gradients in fp64 by what is trained: "nothing", "base", "adapters"."""
        raise NotImplementedError

    def variant(self, name: str, baseline: Any, given: Any, **options: Any) -> Variant:
        """The variant that a baseline's module builds for the inputs."""
        raise NotImplementedError

    def shaped(self, name: str, expected: Tensor, found: Tensor) -> Tensor:
        """An expected tensor in the form in which a variant keeps it."""
        return expected

    def work(self, trains: str) -> dict[str, Work]:
        """The least work of "forward" and "backward" by what is trained."""
        raise NotImplementedError

    def floors(self) -> dict[str, float]:
        """Arithmetic alone: the least "tax" and "ratio_to_full"."""
        flops = {trains: sum(w.flops for w in self.work(trains).values()) for trains in ("nothing", "base", "adapters")}
        return {
            "tax": flops["adapters"] / flops["nothing"] - 1,
            "ratio_to_full": flops["adapters"] / flops["base"],
        }
