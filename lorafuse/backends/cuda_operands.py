"""Operands as the CUDA kernels read them: addresses, masks, adapters, and rows that start on 16-byte boundaries."""

import torch
from torch import Tensor

from lorafuse.backends.cuda_grouped import TYPES
from lorafuse.operands import Dropout

__all__ = [
    "adapter_of",
    "address",
    "aligned",
    "aligned_rows",
    "mask",
    "padded",
    "padded_rows",
    "rounding",
    "scratch",
]

# elements of 16 bits in 16 bytes
_ALIGN = 8


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def scratch(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def mask(dropout: Dropout | None) -> dict[str, int]:
    if dropout is None:
        return {}
    # at p = 1 one draw of 2^32 is kept, in a term whose scale is 0
    return {"seed": dropout.seed.data_ptr(), "drop_below": min(int(dropout.p * 2**32), 2**32 - 1)}


def padded(R: int) -> int:
    return -(-R // _ALIGN) * _ALIGN


def aligned(t: Tensor) -> Tensor:
    """`t`, contiguous and on a 16-byte boundary."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def adapter_of(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """An adapter as the memory-bound kernels read it, of x's dtype or fp32, and its type."""
    return (t := aligned(t if t.dtype in (dtype, torch.float32) else t.float())), TYPES[t.dtype]


def rounding(
    t: Tensor, dtype: torch.dtype, scale: float, transposed: bool = False
) -> tuple[Tensor, dict[str, int | float] | None]:
    """`scale · t`, or its transpose, in x's dtype with rows padded to 16 bytes; and the arguments of its launch.

    They are None where the result is `t` itself. `t` is of `adapter_of`, and must live until that launch: memory freed
    before it could be allocated again, and written by the same launch.
    """
    rows, columns = reversed(t.shape) if transposed else t.shape
    if scale == 1.0 and t.dtype is dtype and columns % _ALIGN == 0 and not transposed:
        return t, None
    out = t.new_empty((rows, padded(columns)), dtype=dtype)
    return out, {
        "in_type": TYPES[t.dtype], "type": TYPES[dtype], "transposed": transposed, "rows": rows, "columns": columns,
        "in": t.data_ptr(), "stride_in": t.shape[1], "scale": scale, "out": out.data_ptr(), "stride_out": out.shape[1],
    }  # fmt: skip


def padded_rows(xa: Tensor) -> Tensor:
    """xa `[M, R]` in a buffer whose rows start on 16-byte boundaries: as `linear_forward` returned it, or copied."""
    R = xa.shape[1]
    if R % _ALIGN == 0:
        return aligned(xa)
    end = xa.storage_offset() + xa.shape[0] * padded(R)
    if xa.stride() == (padded(R), 1) and xa.data_ptr() % 16 == 0 and end <= xa.untyped_storage().nbytes() // 2:
        return xa
    out = xa.new_zeros((xa.shape[0], padded(R)))
    out[:, :R] = xa
    return out


def aligned_rows(t: Tensor) -> Tensor:
    """`t [M, C]` where its rows are contiguous and start on 16-byte boundaries, else a copy of which they do."""
    (M, C), (step, along) = t.shape, t.stride()
    if along == 1 and step % _ALIGN == 0 and step >= C and t.data_ptr() % 16 == 0:
        return t
    out = t.new_zeros((M, padded(C)))
    return out[:, :C].copy_(t)
