"""The dropout mask of every backend: Philox 4x32-10 counters, written in torch integer operations.

This file is the definition; kernels must reproduce it bit for bit. For an input of `M` rows and `K` columns, element
`(m, k)` has the index `i = m * K + k`. Its random word is word `i % 4` of Philox 4x32-10 with

    counter = (lo32(i // 4), hi32(i // 4), 0, 0)        key = (lo32(seed), hi32(seed))

and the element is kept when `word >= floor(p * 2**32)`. Kept elements are not rescaled here: `1 / (1 - p)` is part of
the scale of the low-rank path. No mask is ever stored: forward and backward compute it again from the seed.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "DROPOUT_RNGS",
    "check_dropout_rng",
    "draw_mask",
    "draw_seed",
    "keep_mask",
    "philox_4x32",
    "rescaled",
    "row_chunks",
]

_LO32 = 0xFFFFFFFF
_MUL_0, _MUL_1 = 0xD2511F53, 0xCD9E8D57
_KEY_STEP_0, _KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
# who draws masks: this file, or `torch.nn.Dropout`'s own generator
DROPOUT_RNGS = ("philox", "torch")
# elements of a mask that exist at a time, whose words take 32 bytes each while they are made: enough work for every
# thread, and small beside the tensors it serves
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 22}


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed, int64 `[1]` on `device`, from torch's default generator, so that checkpointing replays it."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def check_dropout_rng(dropout_rng: str, backend: str = "auto") -> None:
    """Raises ValueError for an unknown one, and for "torch" with a backend whose kernels read seeds alone."""
    if dropout_rng not in DROPOUT_RNGS:
        raise ValueError(f"dropout_rng={dropout_rng!r} is unknown; it is one of {', '.join(map(repr, DROPOUT_RNGS))}")
    if dropout_rng == "torch" and backend not in ("auto", "current", "eager"):
        raise ValueError(
            f"backend={backend!r} computes dropout's mask from a seed; a mask that torch drew runs by 'eager' or 'auto'"
        )


def draw_mask(x: Tensor, dtype: torch.dtype, p: float) -> Tensor:
    """The elements that `torch.nn.Dropout(p)` would keep of x cast to `dtype`: bool, with x's sizes and strides, from
    the same numbers of torch's default generator.
    """
    # by what nn.Dropout calls: on GPUs the order of the numbers depends on dtype and strides
    return F.dropout(torch.ones_like(x, dtype=dtype, requires_grad=False), p).to(torch.bool)


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of Philox 4x32-10. Tensors are int64 holding unsigned 32-bit values; the counter's have one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # the int64 products wrap, yet their 64 bits are those of the unsigned product; c1 and c3 keep the high halves
        # too, which the mask behind the next xor removes
        p0, p1 = c0 * _MUL_0, c2 * _MUL_1
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LO32)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LO32)
        c1, c3 = p1, p0
        k0, k1 = (k0 + _KEY_STEP_0) & _LO32, (k1 + _KEY_STEP_1) & _LO32
    return c0, c1 & _LO32, c2, c3 & _LO32


def keep_mask(seed: Tensor, p: float, rows: slice, columns: int) -> Tensor:
    """Which elements of rows `rows.start … rows.stop` survive dropout: bool `[rows, columns]` on the seed's device.

    `seed` is int64 `[1]`; `0 <= p <= 1`; the mask of a row does not depend on which other rows are asked for. A bool
    `seed` is the mask itself, of all rows.
    """
    if seed.dtype is torch.bool:
        return seed.reshape(-1, columns)[rows]
    if p == 1.0:
        return torch.zeros(rows.stop - rows.start, columns, dtype=torch.bool, device=seed.device)
    first, last = rows.start * columns, rows.stop * columns
    group = torch.arange(first // 4, -(-last // 4), dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(group)
    words = philox_4x32((group & _LO32, (group >> 32) & _LO32, zero, zero), (seed & _LO32, (seed >> 32) & _LO32))
    keep = torch.stack(words, dim=1) >= int(p * 2**32)
    skip = first % 4
    return keep.flatten()[skip : skip + last - first].view(rows.stop - rows.start, columns)


def rescaled(scale: float, p: float) -> float:
    """The scale of a low-rank path that dropout masked: `scale / (1 - p)`, and 0 where nothing is kept."""
    return 0.0 if p == 1.0 else scale / (1.0 - p)


def row_chunks(rows: int, columns: int, device: torch.device) -> list[slice]:
    """Row ranges over which masks are made one at a time, so that no full-size mask ever exists."""
    step = max(1, CHUNK.get(device.type, CHUNK["cuda"]) // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
