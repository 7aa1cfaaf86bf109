"""GPUs as the planner knows them: a row for each datasheet and for each architecture, and how a GPU is recognized.

A new GPU is a row of `_DATASHEETS`; what it can do follows from the row of its architecture.
"""

import difflib
import re
from dataclasses import dataclass, fields, replace

__all__ = ["DEVICES", "DeviceSpec", "features", "find", "recognize"]


@dataclass(frozen=True)
class _Architecture:
    """What GPUs of one compute capability have in common; FLOPs of one SM in one clock, dense bf16 and fp32.

    `smem` is the shared memory that a program may use, 0 where no datasheet is known. `has_tma`: the Triton kernels run
    with tensor descriptors. `has_warpgroup_mma`: several warps multiply together, from shared memory.
    `has_tensor_memory`: accumulators come from it all at once. `has_grouped_mm`: torch's grouped_mm has a fast kernel.
    """

    bf16: int
    fp32: int
    smem: int = 0
    has_tma: bool = False
    has_warpgroup_mma: bool = False
    has_tensor_memory: bool = False
    has_grouped_mm: bool = False


_HOPPER = {"has_warpgroup_mma": True, "has_grouped_mm": True}
_BLACKWELL = {"has_warpgroup_mma": True, "has_tensor_memory": True}
# by compute capability times ten; shared memory of the CUDA programming guide's table of technical specifications
_ARCHITECTURES = {
    70: _Architecture(1024, 128),
    75: _Architecture(1024, 128, 65536),
    80: _Architecture(2048, 128, 166912),
    86: _Architecture(512, 256, 101376),
    87: _Architecture(512, 256),
    89: _Architecture(512, 256, 101376),
    90: _Architecture(4096, 256, 232448, has_tma=True, **_HOPPER),
    100: _Architecture(8192, 256, 232448, has_tma=True, has_grouped_mm=True, **_BLACKWELL),
    103: _Architecture(8192, 256, has_grouped_mm=True, **_BLACKWELL),
    110: _Architecture(8192, 256, **_BLACKWELL),
    # in every TMA kernel there Triton 3.6 leaves 8 bytes in local memory
    120: _Architecture(512, 256, 101376),
}


def features(arch: int) -> _Architecture:
    """What GPUs of a compute capability can do: the row of the nearest one that is not newer."""
    return _ARCHITECTURES[max((known for known in _ARCHITECTURES if known <= arch), default=min(_ARCHITECTURES))]


@dataclass(frozen=True)
class DeviceSpec:
    """One GPU. `arch` is its compute capability times ten; sizes in bytes, rates per second.

    `bf16_flops`, `fp32_flops` (CUDA cores) and `hbm_bandwidth` are the datasheet's, dense. The sustained ones are what
    a large product in full waves and a large copy reach; `source` says how they are known. `model` is the name under
    which measurements of such GPUs are kept. `memory_bytes` is the datasheet's GB, 0 where none is known.
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
    memory_bytes: float = 0.0

    def __post_init__(self) -> None:
        # every call of a layer looks its plan up by it
        object.__setattr__(self, "_hash", hash(tuple(getattr(self, field.name) for field in fields(self))))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    @property
    def features(self) -> _Architecture:
        """What its architecture can do."""
        return features(self.arch)


# Measured on an H200: cuBLAS bf16 8192³ on random data 790 TFLOP/s, whose 2048 tiles of 128x256 fill 15.5 of 16 waves
# of 132 SMs, so 815 TFLOP/s in full waves; a copy 4.3 TB/s.
_H200_FLOPS, _H200_BANDWIDTH = 815e12, 4.3e12
_FLOPS_SHARE, _BANDWIDTH_SHARE = _H200_FLOPS / 989e12, _H200_BANDWIDTH / 4.8e12
_MEASURED = "measured on an H200"
_SHARES = f"datasheet x {_FLOPS_SHARE:.2f} and {_BANDWIDTH_SHARE:.2f}, the shares measured on an H200"


def _rates(bandwidth: float, flops: float, fp32: float) -> tuple[float, float, float, float, float]:
    """The rates of a `DeviceSpec`, the sustained ones as shares."""
    return bandwidth, flops, fp32, flops * _FLOPS_SHARE, bandwidth * _BANDWIDTH_SHARE


# datasheets: compute capability, SMs, L2 in MB, memory in GB, bandwidth, dense bf16 with fp32 accumulation (T4: fp16),
# fp32
_DATASHEETS = {
    "A100": (80, 108, 40, 80, 2039e9, 312e12, 19.5e12),
    "L40S": (89, 142, 96, 48, 864e9, 362e12, 91.6e12),
    "RTX 4090": (89, 128, 72, 24, 1008e9, 165.2e12, 82.6e12),
    "H100": (90, 132, 50, 80, 3350e9, 989e12, 67e12),
    "H200": (90, 132, 60, 141, 4800e9, 989e12, 67e12),
    "B200": (100, 148, 126, 180, 8000e9, 2250e12, 75e12),
    "RTX 5090": (120, 170, 96, 32, 1792e9, 209.5e12, 104.8e12),
    "T4": (75, 40, 4, 16, 320e9, 65e12, 8.1e12),
    "A10G": (86, 80, 6, 24, 600e9, 70e12, 35e12),
    "RTX A6000": (86, 84, 6, 48, 768e9, 154.8e12, 38.7e12),
    "RTX 3090": (86, 82, 6, 24, 936e9, 71e12, 35.6e12),
    "L4": (89, 58, 48, 24, 300e9, 121e12, 30.3e12),
}
DEVICES: dict[str, DeviceSpec] = {
    name: DeviceSpec(
        name, name, arch, sms, _ARCHITECTURES[arch].smem, l2_mb * 2**20, *_rates(*rates),
        _MEASURED if name == "H200" else _SHARES, memory_gb * 1e9,
    )
    for name, (arch, sms, l2_mb, memory_gb, *rates) in _DATASHEETS.items()
}  # fmt: skip


def _plain(name: str) -> str:
    return re.sub(r"NVIDIA|GEFORCE|[^A-Z0-9]", "", name.upper())


def find(name: str) -> DeviceSpec:
    """The GPU of that name, whatever its case and spaces, with or without RTX.

    Raises ValueError that lists the nearest and all known.
    """
    for known, device in DEVICES.items():
        if _plain(known) in (_plain(name), "RTX" + _plain(name)):
            return device
    near = difflib.get_close_matches(name.upper(), DEVICES, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ";"
    raise ValueError(f"GPU {name!r} is not known{hint} The known ones: {', '.join(DEVICES)}")


def recognize(
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
        # "NVIDIA H100 80GB HBM3" is the H100; a laptop's GPU or a partition has fewer SMs, a PCIe board less bandwidth
        alike = 0.8 <= sms / known.sms <= 1.1 and 0.85 <= memory_bandwidth / known.hbm_bandwidth <= 1.15
        if _plain(name).startswith(_plain(known.name)) and alike:
            return replace(known, name=name, sms=sms, smem_per_block=smem_per_block, l2_bytes=l2_bytes)
    flops, fp32 = (per_clock * sms * clock_hz for per_clock in (features(arch).bf16, features(arch).fp32))
    rates = _rates(memory_bandwidth, flops, fp32)
    return DeviceSpec(name, name, arch, sms, smem_per_block, l2_bytes, *rates, "estimated from clocks and architecture")
