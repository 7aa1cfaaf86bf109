"""What every launch of a Triton kernel needs: operands that the kernels take, and the device guard."""

import contextlib

import torch
import triton
from torch import Tensor

__all__ = ["check_device", "device_guard"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_device(x: Tensor) -> None:
    """Raises TypeError or ValueError, with the way out, for a tensor that Triton kernels cannot run here."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"backend='triton' got {x.dtype}; its kernels run float32, float16 and bfloat16: use 'eager'")
    if x.is_cuda:
        return
    if not triton.knobs.runtime.interpret:
        raise ValueError(
            f"backend='triton' got a tensor on {x.device}; its kernels run on CUDA devices: move the tensors with "
            ".cuda(), use backend='eager', or set TRITON_INTERPRET=1 before Python starts to interpret them slowly"
        )
    if x.dtype is torch.bfloat16:
        raise TypeError(
            "backend='triton' got torch.bfloat16 in Triton's interpreter, whose bfloat16 products are wrong "
            "(triton-lang/triton#11585): use float16 or float32 there, or backend='eager'"
        )


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes the device current."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()
