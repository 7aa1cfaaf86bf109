"""The launches of the kernels of routing that `compile_only` compiles, on meta tensors: those of a large block."""

import torch

from lorafuse.kernels import routing
from lorafuse.testing.compile_decode import meta

__all__ = ["KERNELS", "launch"]

_CHOICES, _OF_A_TOKEN, _GROUPS = 65536, 8, 128


def launch(kernel: str) -> None:
    """Launch one of `KERNELS`."""
    KERNELS[kernel](routing.made(meta(_CHOICES, of=torch.int64), _GROUPS, _OF_A_TOKEN))


KERNELS = {"route_count": routing.count, "route_scatter": routing.scatter}
