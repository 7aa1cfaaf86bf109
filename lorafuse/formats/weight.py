"""A frozen weight in any format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafuse.formats import load

__all__ = ["Weight"]


@dataclass(slots=True, eq=False)
class Weight:
    """A frozen matrix `[N, K]`, or one a group `[G, N, K]`, as it is stored: read transposed when `is_transposed`.

    `data` and `statistics` are those of `format` (`lorafuse.formats`), by reference: nothing is copied or kept.
    """

    data: Tensor
    is_transposed: bool = False
    statistics: tuple[Tensor, ...] = ()
    format: str = "dense"

    @property
    def t(self) -> Weight:
        """The same matrices read as `[K, N]`, for the gradient of x."""
        return Weight(self.data, not self.is_transposed, self.statistics, self.format)

    @property
    def format_name(self) -> str:
        """The format without its parameters."""
        return self.format.partition(":")[0]

    @property
    def parameters(self) -> str:
        """What stands after the name in `format`."""
        return self.format.partition(":")[2]

    @property
    def stored(self) -> tuple[int, ...]:
        """The sizes of the matrices as stored: `[N, K]` or `[G, N, K]`, the last two exchanged when transposed."""
        if self.format == "dense":
            return self.data.shape
        return load(self.format).shape(self.data, self.statistics, self.parameters)

    @property
    def sizes(self) -> tuple[int, int]:
        """`(N, K)`."""
        *_, rows, columns = self.stored
        return (columns, rows) if self.is_transposed else (rows, columns)

    def decoded(self, dtype: torch.dtype, out: Tensor | None = None) -> Weight:
        """The same weight in the dense format and in `dtype`, written into `out` (contiguous, of the sizes `stored`)
        where given; itself where it is dense already.
        """
        if self.format == "dense":
            return self
        data = load(self.format).decode(self.data, self.statistics, self.parameters, dtype, out)
        return Weight(data, self.is_transposed)

    @property
    def kernel(self) -> tuple[str, dict[str, Any]] | None:
        """The decode kernel that gives the same bits, with its operands, where the format names one."""
        find = getattr(load(self.format), "kernel", None)
        return None if find is None else find(self.data, self.statistics, self.parameters)

    def select(self, start: int, stop: int) -> Weight:
        """The matrices start … stop - 1 of a stack, by reference. Raises ValueError for bounds outside of it."""
        stored = self.stored
        if len(stored) != 3 or not 0 <= start <= stop <= stored[0]:
            raise ValueError(f"matrices {start} … {stop} of a weight {list(stored)}; the bounds are those of a stack")
        if self.format == "dense":
            return Weight(self.data[start:stop], self.is_transposed)
        selected = load(self.format).select(self.data, self.statistics, self.parameters, start, stop)
        data, statistics, parameters = selected
        format = f"{self.format_name}:{parameters}" if parameters else self.format_name
        return Weight(data, self.is_transposed, statistics, format)

    def left(self) -> Tensor:
        """The tensor `[(G,) N, K]` of a dense weight."""
        return self.data.mT if self.is_transposed else self.data

    def right(self) -> Tensor:
        """The tensor `[(G,) K, N]` of a dense weight."""
        return self.data if self.is_transposed else self.data.mT
