"""A frozen weight in any format."""

from __future__ import annotations

from dataclasses import dataclass

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
    def stored(self) -> tuple[int, ...]:
        """The sizes of the matrices as stored: `[N, K]` or `[G, N, K]`, the last two exchanged when transposed."""
        if self.format == "dense":
            return self.data.shape
        return load(self.format).shape(self.data, self.statistics)

    @property
    def sizes(self) -> tuple[int, int]:
        """`(N, K)`."""
        *_, rows, columns = self.stored
        return (columns, rows) if self.is_transposed else (rows, columns)

    def decoded(self, dtype: torch.dtype) -> Weight:
        """The same weight in the dense format and in `dtype`; itself where it is dense already."""
        if self.format == "dense":
            return self
        return Weight(load(self.format).decode(self.data, self.statistics, dtype), self.is_transposed)

    def left(self) -> Tensor:
        """The tensor `[(G,) N, K]` of a dense weight."""
        return self.data.mT if self.is_transposed else self.data

    def right(self) -> Tensor:
        """The tensor `[(G,) K, N]` of a dense weight."""
        return self.data if self.is_transposed else self.data.mT
