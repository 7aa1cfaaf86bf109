"""Weights of random codes, as a library stores them: to measure kernels over a format takes no library."""

import math

import torch
from torch import Tensor

from lorafuse.operands import Weight

__all__ = ["FORMATS", "random_weight"]

# those of a linear layer's weight that a main loop can decode; blocks are their libraries' usual ones
FORMATS = ("nf4", "fp4", "int8", "fp8")


def random_weight(format: str, N: int, K: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Weight:
    """A weight `[N, K]` in one of FORMATS that had `dtype`; its products have about unit size.

    4 bits have nested statistics and a table of even steps, since values take no time.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def codes(*sizes: int) -> Tensor:
        return torch.randint(0, 256, sizes, dtype=torch.uint8, device=device, generator=generator)

    # a code is spread evenly over -1 … 1
    unit = math.sqrt(3 / K)
    if format == "int8":
        rows = torch.full((N, 1), unit / 127, device=device)
        return Weight(codes(N, K).view(torch.int8), statistics=(rows,), format="int8")
    if format == "fp8":
        values = torch.rand((N, K), device=device, generator=generator).mul_(2).sub_(1)
        scale = torch.full((-(-N // 128), -(-K // 128)), unit, device=device)
        data = values.to(torch.float8_e4m3fn)
        return Weight(data, statistics=(scale,), format="fp8:block=128x128;scale=rounded")
    block = 64
    blocks = -(-N * K // block)
    outer = torch.full((-(-blocks // 256),), unit / 2, device=device)
    tables = (torch.linspace(-1, 1, size, device=device) for size in (16, 256))
    statistics = codes(blocks), next(tables), outer, next(tables), torch.tensor(unit, device=device)
    text = f"{format}:{N},{K};block={block};dtype={str(dtype).removeprefix('torch.')}"
    return Weight(codes(-(-N * K // 2)), statistics=statistics, format=text)
