"""Whether training fits on a GPU, the settings with which it does, and where not, the GPU that it needs."""

import math
from dataclasses import dataclass, replace

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
    of LoRA, and `elsewhere` says where the smallest ones fit. `layout` is the name of one of `layouts` where several
    devices hold the model; "" is one device.
    """

    method: str
    checkpointing: bool
    micro_batch: int
    total: int
    fits: bool | None
    elsewhere: str = ""
    layout: str = ""


def usable_bytes(device: DeviceSpec) -> float:
    """What training may take of a GPU's memory; 0 where it is not known."""
    return _USABLE * device.memory_bytes


def fit(
    shapes: ModelShapes, rank: int, length: int, micro_batch: int, device: DeviceSpec | None, *, sequences: int = 1
) -> Fit:
    """The first settings that fit on one device, nothing sharded: LoRA, then with checkpointing, then with smaller
    micro-batches, then QLoRA in the same way, but of stacked experts, which stay bf16. An example of a micro-batch has
    `sequences` of `length` tokens."""
    sizes = [micro_batch >> shift for shift in range(micro_batch.bit_length())]
    names = {"lora": "LoRA"} | ({} if any(x.parameter for x in shapes.adapted) else {"qlora": "QLoRA"})
    tried = [("lora", False, micro_batch)] + [(method, True, size) for method in names for size in sizes]
    settings = [
        Fit(
            method, saved, size,
            memory(shapes, method, rank, size * sequences * length, checkpointing=saved, length=length).total, None,
        )
        for method, saved, size in tried
    ]  # fmt: skip
    if device is None or not usable_bytes(device):
        return settings[0]
    for each in settings:
        if each.total <= usable_bytes(device):
            return replace(each, fits=True)
    least = {each.method: each for each in settings}
    cards = sorted(DEVICES.values(), key=usable_bytes)
    named = []
    for method, name in names.items():
        enough = next((card for card in cards if usable_bytes(card) >= least[method].total), None)
        if enough is not None:
            named.append(f"{name} fits on {enough.name}")
    number = math.ceil(least["lora"].total / usable_bytes(cards[-1]))
    where = ", ".join(named) or f"on no GPU alone: shard the weights over {number} {cards[-1].name} or more (FSDP)"
    return replace(least["lora"], fits=False, elsewhere=where)
