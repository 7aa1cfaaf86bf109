"""The operators in the CUDA kernels of csrc, for Hopper (`lorafuse.backends.cuda_linear`).

Same operator as `eager`, shapes and meaning of arguments included, in bfloat16 and float16 on devices of compute
capability 9.0. Launches go to the current stream of x's device. Experts: `lorafuse.backends.cuda_experts`.
"""

import torch
from torch import Tensor

from lorafuse.backends import cuda_experts, cuda_linear, cuda_native, probe
from lorafuse.backends.on_gpu import device_guard

__all__ = [
    "experts_backward",
    "experts_forward",
    "grouped_backward",
    "grouped_forward",
    "linear_backward",
    "linear_forward",
]


def _stream(device: torch.device) -> int:
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index)


_RUN = cuda_linear.Runner(
    name="cuda",
    native=cuda_native.native("_cuda"),
    spec=probe.device_spec,
    stream=_stream,
    guard=device_guard,
    capturing=torch.cuda.is_current_stream_capturing,
)
experts_forward, experts_backward, grouped_forward, grouped_backward = cuda_experts.functions(_RUN)


def linear_forward(*operands) -> tuple[Tensor, Tensor]:
    """See `lorafuse.backends.cuda_linear.forward`."""
    return cuda_linear.forward(_RUN, *operands)


def linear_backward(*operands) -> tuple[Tensor | None, ...]:
    """See `lorafuse.backends.cuda_linear.backward`."""
    return cuda_linear.backward(_RUN, *operands)
