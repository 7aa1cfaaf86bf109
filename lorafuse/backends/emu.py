"""The CUDA kernels of csrc on CPU tensors, run by their emulator (`lorafuse._emu`), planned as for an H200. For tests.

Same functions as `cuda`. `lorafuse._emu.configure` says how launches run. Seconds where a GPU takes microseconds.
"""

import contextlib

import torch
from torch import Tensor

from lorafuse.backends import cuda_experts, cuda_linear, cuda_native
from lorafuse.plan import DeviceSpec, find

__all__ = [
    "experts_backward",
    "experts_forward",
    "grouped_backward",
    "grouped_forward",
    "linear_backward",
    "linear_forward",
]


def _spec(device: torch.device) -> DeviceSpec:
    if device.type != "cpu":
        raise ValueError(f"backend='emu' got a tensor on {device}; the emulator runs on CPU tensors: use 'cuda'")
    return find("H200")


_RUN = cuda_linear.Runner(
    name="emu",
    native=cuda_native.native("_emu"),
    spec=_spec,
    stream=lambda device: 0,
    guard=lambda device: contextlib.nullcontext(),
    capturing=lambda: False,
)
experts_forward, experts_backward, grouped_forward, grouped_backward = cuda_experts.functions(_RUN)


def linear_forward(*operands) -> tuple[Tensor, Tensor]:
    """See `lorafuse.backends.cuda_linear.forward`."""
    return cuda_linear.forward(_RUN, *operands)


def linear_backward(*operands) -> tuple[Tensor | None, ...]:
    """See `lorafuse.backends.cuda_linear.backward`."""
    return cuda_linear.backward(_RUN, *operands)
