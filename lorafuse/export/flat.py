"""Many tensors in one buffer, for weight sync: one collective operation, or one handle, carries an adapter."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Flat", "flatten"]

# bytes: what vector loads and collective operations start on
_ALIGNMENT = 16


@dataclass(frozen=True)
class Flat:
    """Tensors next to each other in one buffer, uint8 `[bytes]`: one NCCL call or one IPC handle carries all.

    `table` is what JSON can hold: of each tensor `[name, dtype, shape, first byte]`, for `views` on the other side.
    """

    buffer: Tensor
    table: list[list[Any]]

    def views(self) -> dict[str, Tensor]:
        """The tensors, as views of the buffer: what is written into either is in both."""
        out = {}
        for name, dtype, shape, first in self.table:
            kind = getattr(torch, dtype)
            out[name] = self.buffer[first : first + math.prod(shape) * kind.itemsize].view(kind).view(shape)
        return out

    @torch.no_grad()
    def update(self, tensors: dict[str, Tensor]) -> None:
        """Copy newer values of the same tensors in. Raises ValueError for other names or shapes."""
        views = self.views()
        other = {k: list(t.shape) for k, t in tensors.items()}
        if other != {k: list(t.shape) for k, t in views.items()}:
            raise ValueError("update got other tensors than the buffer has: flatten those")
        for name, view in views.items():
            view.copy_(tensors[name])


def flatten(tensors: dict[str, Tensor], *, dtype: torch.dtype | None = None) -> Flat:
    """The tensors, of one device, copied into one buffer, each from a multiple of 16 bytes on; in `dtype` if given.

    Raises ValueError for none, and for several devices.
    """
    devices = {t.device for t in tensors.values()}
    if len(devices) != 1:
        raise ValueError(
            f"flatten got tensors on {len(devices)} devices ({', '.join(map(str, devices))}); it needs one"
        )
    table: list[list[Any]] = []
    size = 0
    for name, t in tensors.items():
        kind = dtype or t.dtype
        table.append([name, str(kind).removeprefix("torch."), list(t.shape), size])
        size += -(-t.numel() * kind.itemsize // _ALIGNMENT) * _ALIGNMENT
    flat = Flat(torch.zeros(size, dtype=torch.uint8, device=devices.pop()), table)
    flat.update(tensors)
    return flat
