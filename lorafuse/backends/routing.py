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
    # a radix sort reads its keys once for each byte of them; choices above all experts stay behind them
    keys = torch.int16 if experts < 2**15 else torch.int32
    ordered, order = flat.clamp(max=experts).to(keys).sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(experts, dtype=keys, device=index.device), right=True)
