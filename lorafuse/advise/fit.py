"""Whether training fits on a GPU, the settings with which it does, and where not, the GPU that it needs."""

import math
from dataclasses import dataclass

from lorafuse.advise.memory import memory
from lorafuse.advise.shapes import ModelShapes
from lorafuse.plan import DEVICES, DeviceSpec

__all__ = ["Fit", "fit", "usable_bytes"]

# the rest is the driver's, error correction's and the allocator's (assumed)
_USABLE = 0.95


@dataclass(frozen=True)
class Fit:
    """Settings of training: a method of `memory`, `micro_batch` sequences a device, and the modelled peak in bytes.

    `fits` is None without a GPU, or where its memory is not known. Where it is False, the settings are the smallest
    there are, and `elsewhere` says where they fit.
    """

    method: str
    checkpointing: bool
    micro_batch: int
    total: int
    fits: bool | None
    elsewhere: str = ""


def usable_bytes(device: DeviceSpec) -> float:
    """What training may take of a GPU's memory; 0 where it is not known."""
    return _USABLE * device.memory_bytes


def fit(shapes: ModelShapes, rank: int, length: int, micro_batch: int, device: DeviceSpec | None) -> Fit:
    """The first settings that fit on one device, nothing sharded: LoRA, then with checkpointing, then with smaller
    micro-batches, then QLoRA in the same way."""
    sizes = [micro_batch >> shift for shift in range(micro_batch.bit_length())]
    tried = [("lora", False, micro_batch)]
    tried += [(method, True, size) for method in ("lora", "qlora") for size in sizes]
    found = [
        Fit(method, saved, size, memory(shapes, method, rank, size * length, checkpointing=saved).total, None)
        for method, saved, size in tried
    ]
    if device is None or not usable_bytes(device):
        return found[0]
    for each in found:
        if each.total <= usable_bytes(device):
            return Fit(each.method, each.checkpointing, each.micro_batch, each.total, True)
    least = {each.method: each for each in found}
    cards = sorted(DEVICES.values(), key=lambda card: card.memory_bytes)
    for method, name in (("lora", "LoRA"), ("qlora", "QLoRA")):
        enough = [card for card in cards if usable_bytes(card) >= least[method].total]
        if enough:
            settings = f"{name} with checkpointing at micro-batch 1 fits on {enough[0].name}"
            return Fit(method, True, 1, least[method].total, False, settings)
    largest = cards[-1]
    number = math.ceil(least["qlora"].total / usable_bytes(largest))
    where = f"on no single GPU: shard the weights over at least {number} {largest.name} (FSDP)"
    return Fit("qlora", True, 1, least["qlora"].total, False, where)
