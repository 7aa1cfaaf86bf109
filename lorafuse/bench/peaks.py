"""What this device reaches, measured on the spot: percentages in tables are of these, not of a data sheet's."""

from collections.abc import Callable
from functools import cache

import torch

from lorafuse.testing.timing import Clock

__all__ = ["copy_bytes", "matmul_flops", "usual_dtype"]


# seconds that one product may take; CPUs without bfloat16 instructions need minutes for large ones
_PATIENCE = 0.3


@cache
def matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square product of normal numbers, the best of 5.

    Of size 8192 on a GPU; on a CPU the largest of 256, 512, 1024 and 2048 that takes less than a third of a second.
    """
    if device.type == "cuda":
        return _product(8192, dtype, device)
    found, size = _product(256, dtype, device), 256
    while size < 2048 and 2 * (2 * size) ** 3 / found < _PATIENCE:
        size *= 2
        found = _product(size, dtype, device)
    return found


def _product(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, device)


@cache
def copy_bytes(device: torch.device) -> float:
    """Bytes/s, read and written, of a copy: the best of 5, of 1 GiB on a GPU, 256 MiB on a CPU."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def usual_dtype(device: torch.device) -> str:
    """ "bfloat16", but "float32" on a CPU whose products are slower in bfloat16."""
    if device.type == "cpu" and matmul_flops(torch.bfloat16, device) < matmul_flops(torch.float32, device):
        return "float32"
    return "bfloat16"


def _best(run: Callable[[], object], device: torch.device) -> float:
    clock = Clock(device)
    run()
    return min(clock.time(run)[0] for _ in range(5))
