"""GPUs as the planner knows them: a table of datasheets, and how to read a GPU that is not in it."""

import difflib
import re
from dataclasses import dataclass, replace

__all__ = ["DEVICES", "DeviceSpec", "find", "probe"]


@dataclass(frozen=True)
class DeviceSpec:
    """One GPU. `arch` is its compute capability times ten; sizes in bytes, rates per second.

    `bf16_flops` and `hbm_bandwidth` are the datasheet's, dense. The sustained ones are what a large product in full
    waves and a large copy reach; `source` says how they are known.
    """

    name: str
    arch: int
    sms: int
    smem_per_block: int
    l2_bytes: int
    hbm_bandwidth: float
    bf16_flops: float
    sustained_flops: float
    sustained_bandwidth: float
    source: str


# Measured on an H200: cuBLAS bf16 8192³ on random data 790 TFLOP/s, whose 2048 tiles of 128x256 fill 15.5 of 16 waves
# of 132 SMs, so 815 TFLOP/s in full waves; a copy 4.3 TB/s.
_H200_FLOPS, _H200_BANDWIDTH = 815e12, 4.3e12
_FLOPS_SHARE, _BANDWIDTH_SHARE = _H200_FLOPS / 989e12, _H200_BANDWIDTH / 4.8e12
_MEASURED = "measured on this GPU"
_SHARES = f"datasheet x {_FLOPS_SHARE:.2f} and {_BANDWIDTH_SHARE:.2f}, the shares measured on an H200"


def _datasheet(
    name: str, arch: int, sms: int, smem: int, l2_mb: int, bandwidth: float, flops: float, source: str = _SHARES
) -> DeviceSpec:
    sustained = flops * _FLOPS_SHARE, bandwidth * _BANDWIDTH_SHARE
    return DeviceSpec(name, arch, sms, smem, l2_mb * 2**20, bandwidth, flops, *sustained, source)


# shared memory a kernel may ask for, by compute capability (CUDA programming guide, table of technical specifications)
_SMEM = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# datasheets: SMs, L2, bandwidth, dense bf16 with fp32 accumulation
DEVICES: dict[str, DeviceSpec] = {
    device.name: device
    for device in (
        _datasheet("A100", 80, 108, _SMEM[80], 40, 2039e9, 312e12),
        _datasheet("L40S", 89, 142, _SMEM[89], 96, 864e9, 362e12),
        _datasheet("RTX 4090", 89, 128, _SMEM[89], 72, 1008e9, 165.2e12),
        _datasheet("H100", 90, 132, _SMEM[90], 50, 3350e9, 989e12),
        _datasheet("H200", 90, 132, _SMEM[90], 60, 4800e9, 989e12, _MEASURED),
        _datasheet("B200", 100, 148, _SMEM[100], 126, 8000e9, 2250e12),
        _datasheet("RTX 5090", 120, 170, _SMEM[120], 96, 1792e9, 209.5e12),
    )
}
# dense bf16 FLOPs of one SM in one clock, by compute capability, for a GPU that no datasheet here describes
_FLOPS_PER_CLOCK = {80: 2048, 86: 512, 87: 512, 89: 512, 90: 4096, 100: 8192, 103: 8192, 120: 512}


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

    `clock_hz` is that of the SMs, `memory_bandwidth` in bytes/s. Raises ValueError below compute capability 8.0.
    """
    arch = capability[0] * 10 + capability[1]
    if arch < 80:
        raise ValueError(
            f"{name} has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0 or newer"
        )
    for known in DEVICES.values():
        # "NVIDIA H100 80GB HBM3" is the H100; a laptop's or a partition's SMs say that it is something else
        if _plain(name).startswith(_plain(known.name)) and arch == known.arch and 0.8 <= sms / known.sms <= 1.1:
            return replace(known, name=name, sms=sms, smem_per_block=smem_per_block, l2_bytes=l2_bytes)
    flops = _FLOPS_PER_CLOCK[max(a for a in _FLOPS_PER_CLOCK if a <= arch)] * sms * clock_hz
    sustained = flops * _FLOPS_SHARE, memory_bandwidth * _BANDWIDTH_SHARE
    source = "estimated from clocks and architecture"
    return DeviceSpec(name, arch, sms, smem_per_block, l2_bytes, memory_bandwidth, flops, *sustained, source)
