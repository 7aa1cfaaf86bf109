"""This device's peak rates, measured now: percentages in tables refer to these, not to a data sheet."""

from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

__all__ = ["RATES", "copy_bytes", "matmul_flops", "usual_dtype"]

# what was measured, of products by dtype and of copies by "copy", on a device; processes hand it on
RATES: dict[tuple[torch.dtype | str, torch.device], float] = {}

# the longest product in seconds; CPUs without bfloat16 instructions need minutes for large ones
PATIENCE = 0.6
# seconds of repeating, while clocks rise and neighbours on the machine pause: five calls once measured half of the
# CPU's rate (AMD EPYC, 2 threads, 2026-11-26)
_REPEATED = 1.5


def matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square product of normal numbers, the best of several.

    Its size is 8192 on a GPU; on a CPU the largest of 256, 512, 1024 and 2048 that should take at most 0.6 seconds.
    """
    if (dtype, device) not in RATES:
        RATES[dtype, device] = _matmul_flops(dtype, device)
    return RATES[dtype, device]


def _matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    if device.type == "cuda":
        return _product(8192, dtype, device)
    # smaller sizes only predict the time of the next
    size = 256
    rate = _product(size, dtype, device, repeated=0)
    while size < 2048 and 2 * (2 * size) ** 3 / rate < PATIENCE:
        size *= 2
        rate = _product(size, dtype, device, repeated=0)
    return max(rate, _product(size, dtype, device))


def _product(size: int, dtype: torch.dtype, device: torch.device, repeated: float = _REPEATED) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, repeated)


def copy_bytes(device: torch.device) -> float:
    """Bytes/s, read and written, of a copy: the best of several, of 1 GiB on a GPU, 256 MiB on a CPU."""
    if ("copy", device) not in RATES:
        RATES["copy", device] = _copy_bytes(device)
    return RATES["copy", device]


def _copy_bytes(device: torch.device) -> float:
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source))


def usual_dtype(device: torch.device) -> str:
    """ "bfloat16", but "float32" on a CPU whose products are slower in bfloat16."""
    if device.type == "cpu" and matmul_flops(torch.bfloat16, device) < matmul_flops(torch.float32, device):
        return "float32"
    return "bfloat16"


def _best(run: Callable[[], object], repeated: float = _REPEATED) -> float:
    """Seconds of a call in the fastest block of calls, of those that fit into `repeated` seconds."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=repeated).times)
