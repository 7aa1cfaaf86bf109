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


def linear_forward(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, seed: Tensor | None, scale: float, p: float
) -> tuple[Tensor, Tensor]:
    """See `lorafuse.backends.cuda.linear_forward`."""
    return cuda_linear.forward(_RUN, x, w, bias, a, b, seed, scale, p)


def linear_backward(
    dy: Tensor,
    x: Tensor | None,
    xa: Tensor | None,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    scale: float,
    p: float,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See `lorafuse.backends.cuda.linear_backward`."""
    needs = need_dx, need_da, need_db, need_dbias
    return cuda_linear.backward(_RUN, dy, x, xa, w, a, b, seed, scale, p, *needs)
