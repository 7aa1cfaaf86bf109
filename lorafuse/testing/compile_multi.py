"""The launches of the kernels of many adapters that `compile_only` compiles, on meta tensors, as they are planned."""

import functools
from collections.abc import Iterable, Iterator

import torch

from lorafuse.backends.problems import multi_settings
from lorafuse.kernels import multi
from lorafuse.kernels.rows import Tiles
from lorafuse.plan import DeviceSpec, KernelConfig
from lorafuse.plan.configs_triton import best
from lorafuse.testing.compile_decode import meta

__all__ = ["KERNELS", "configs", "launch"]

# (kernel, its configuration, whether it is one of backward)
KERNELS = {
    "multi_project": ("project", False), "multi_y": ("matmul", False), "multi_dx": ("matmul", True),
    "multi_outer": ("outer", True), "multi_experts": ("matmul", False),
}  # fmt: skip
_ADAPTERS, _RANK = 64, 40


def configs(
    kinds: Iterable[tuple[str, bool]], device: DeviceSpec
) -> Iterator[tuple[tuple[str, KernelConfig, str], bool]]:
    """`((kernel, configuration, dtype), is_aligned)` of layers on a device, for each dtype and alignment."""
    for dtype, is_aligned in kinds:
        for kernel, (of, backward) in KERNELS.items():
            config = best(of, multi_settings(dtype, "float32", is_aligned, backward), device)
            if config is not None:
                yield (kernel, config, dtype), is_aligned


def launch(kernel: str, c: KernelConfig, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    """Launch one of `KERNELS` for x `[m, k]` and w `[n, k]`."""
    tensor = functools.partial(meta, of=dtype)
    tiles = Tiles(tensor(_ADAPTERS + 1, of=torch.int32), m)
    tiles.preset(c.block_m, tensor(m // 16, 3, of=torch.int32))
    ends, below = (tensor(_ADAPTERS, of=torch.int32) for _ in range(2))
    scales, mask = tensor(_ADAPTERS, of=torch.float32), {"seeds": tensor(_ADAPTERS, of=torch.int64), "below": below}
    total = _ADAPTERS * _RANK
    x, w, dy, xa = tensor(m, k), tensor(n, k), tensor(m, n), tensor(m, _RANK)
    a, b = tensor(total, k, of=torch.float32), tensor(n, total, of=torch.float32).t()
    if kernel == "multi_experts":
        # two experts of half as many adapters each, whose rows are gathered
        stack, factors, ends = tensor(2, n, k), b[None].expand(2, -1, -1), ends[: _ADAPTERS // 2]
        multi.matmul(
            x, stack, tensor(2, n), xa, factors, scales, tiles, ends, False, 132, c, source=tensor(m, of=torch.int64)
        )
    elif kernel == "multi_project":
        multi.project(x, a[None], tiles, ends, _RANK, dtype, c, **mask)
    elif kernel == "multi_y":
        multi.matmul(x, w, tensor(n), xa, b[None], scales, tiles, ends, False, 132, c, **mask)
    elif kernel == "multi_dx":
        multi.matmul(dy, w.t(), None, xa, a[None], scales, tiles, ends, True, 132, c, **mask)
    else:
        multi.outer(xa, x, a[None], tensor(total, 2, of=torch.int32), tiles, ends, scales, c, **mask)
