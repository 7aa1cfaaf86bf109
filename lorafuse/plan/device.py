"""GPUs as the planner knows them: a table of datasheets, and how to read a GPU that is not in it."""

import difflib
import re
from dataclasses import dataclass, replace

__all__ = ["DEVICES", "DeviceSpec", "find", "probe"]


@dataclass(frozen=True)
class DeviceSpec:
    """One GPU. `arch` is its compute capability times ten; sizes in bytes, rates per second.

    `bf16_flops`, `fp32_flops` (CUDA cores) and `hbm_bandwidth` are the datasheet's, dense. The sustained ones are what
    a large product in full waves and a large copy reach; `source` says how they are known. `model` is the name under
    which measurements of such GPUs are kept.
    """

    name: str
    model: str
    arch: int
    sms: int
    smem_per_block: int
    l2_bytes: int
    hbm_bandwidth: float
    bf16_flops: float
    fp32_flops: float
    sustained_flops: float
    sustained_bandwidth: float
    source: str


# Measured on an H200: cuBLAS bf16 8192³ on random data 790 TFLOP/s, whose 2048 tiles of 128x256 fill 15.5 of 16 waves
# of 132 SMs, so 815 TFLOP/s in full waves; a copy 4.3 TB/s.
_H200_FLOPS, _H200_BANDWIDTH = 815e12, 4.3e12
_FLOPS_SHARE, _BANDWIDTH_SHARE = _H200_FLOPS / 989e12, _H200_BANDWIDTH / 4.8e12
_MEASURED = "measured on an H200"
_SHARES = f"datasheet x {_FLOPS_SHARE:.2f} and {_BANDWIDTH_SHARE:.2f}, the shares measured on an H200"


def _datasheet(
    name: str, arch: int, sms: int, l2_mb: int, bandwidth: float, flops: float, fp32: float, source: str = _SHARES
) -> DeviceSpec:
    sustained = flops * _FLOPS_SHARE, bandwidth * _BANDWIDTH_SHARE
    rates = bandwidth, flops, fp32, *sustained
    return DeviceSpec(name, name, arch, sms, _SMEM[arch], l2_mb * 2**20, *rates, source)


# shared memory a kernel may ask for, by compute capability (CUDA programming guide, table of technical specifications)
_SMEM = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# datasheets: SMs, L2 in MB, bandwidth, dense bf16 with fp32 accumulation, fp32
DEVICES: dict[str, DeviceSpec] = {
    device.name: device
    for device in (
        _datasheet("A100", 80, 108, 40, 2039e9, 312e12, 19.5e12),
        _datasheet("L40S", 89, 142, 96, 864e9, 362e12, 91.6e12),
        _datasheet("RTX 4090", 89, 128, 72, 1008e9, 165.2e12, 82.6e12),
        _datasheet("H100", 90, 132, 50, 3350e9, 989e12, 67e12),
        _datasheet("H200", 90, 132, 60, 4800e9, 989e12, 67e12, _MEASURED),
        _datasheet("B200", 100, 148, 126, 8000e9, 2250e12, 75e12),
        _datasheet("RTX 5090", 120, 170, 96, 1792e9, 209.5e12, 104.8e12),
    )
}
# dense bf16 FLOPs of one SM in one clock, by compute capability, for a GPU that no datasheet here describes
_FLOPS_PER_CLOCK = {70: 1024, 80: 2048, 86: 512, 87: 512, 89: 512, 90: 4096, 100: 8192, 103: 8192, 120: 512}
_FP32_PER_CLOCK = {70: 128, 80: 128, 86: 256}


def _plain(name: str) -> str:
    return re.sub(r"NVIDIA|GEFORCE|[^A-Z0-9]", "", name.upper())


def find(name: str) -> DeviceSpec:
    """The GPU of that name, whatever its case and spaces. Raises ValueError that lists the nearest and all known."""
    for known, device in DEVICES.items():
        if _plain(known) == _plain(name):
            return device
    near = difflib.get_close_matches(name.upper(), DEVICES, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ";"
    raise ValueError(f"GPU {name!r} is not known{hint} The known ones: {', '.join(DEVICES)}")


def probe(
    *,
    name: str,
    capability: tuple[int, int],
    sms: int,
    smem_per_block: int,
    l2_bytes: int,
    clock_hz: float,
    memory_bandwidth: float,
) -> DeviceSpec:
    """A GPU that is here. One of the table keeps the table's rates; any other gets them from its clocks.

    `clock_hz` is that of the SMs, `memory_bandwidth` in bytes/s.
    """
    arch = capability[0] * 10 + capability[1]
    for known in DEVICES.values():
        # "NVIDIA H100 80GB HBM3" is the H100; the SMs of a laptop's or a partition, and the memory of a PCIe board, say
        # that it is something else
        alike = 0.8 <= sms / known.sms <= 1.1 and 0.85 <= memory_bandwidth / known.hbm_bandwidth <= 1.15
        if _plain(name).startswith(_plain(known.name)) and alike:
            return replace(known, name=name, sms=sms, smem_per_block=smem_per_block, l2_bytes=l2_bytes)
    flops, fp32 = (_of(arch, table) * sms * clock_hz for table in (_FLOPS_PER_CLOCK, _FP32_PER_CLOCK))
    rates = memory_bandwidth, flops, fp32, flops * _FLOPS_SHARE, memory_bandwidth * _BANDWIDTH_SHARE
    source = "estimated from clocks and architecture"
    return DeviceSpec(name, name, arch, sms, smem_per_block, l2_bytes, *rates, source)


def _of(arch: int, table: dict[int, int]) -> int:
    """The entry of the nearest architecture that is not newer."""
    return table[max((a for a in table if a <= arch), default=min(table))]
