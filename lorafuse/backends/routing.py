"""Which choice of which token an expert takes, found without a wait for the device and without Triton."""

import torch
from torch import Tensor

__all__ = ["route"]


def route(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """`(order [T·k], ends [E])`: choices in the order of their experts, and where each expert's end.

    Nothing waits for the device; a negative index stops it with a device-side assertion.
    """
    flat = index.reshape(-1)
    torch._assert_async((flat >= 0).all(), "topk_index holds a negative expert")
    ordered, order = flat.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(experts, device=index.device), right=True)
