"""The launches of the main loop by ticket that `compile_only` compiles, on meta tensors: y, dx, and gathered rows."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from lorafuse.kernels import tickets
from lorafuse.kernels.rows import Tiles
from lorafuse.plan import DeviceSpec, KernelConfig, Problem
from lorafuse.plan.configs_triton import by_tickets
from lorafuse.testing.compile_decode import meta

__all__ = ["KERNELS", "RAGGED", "configs", "launch"]

RAGGED = "tickets_ragged"
# kernel: its gradients
KERNELS: dict[str, tuple[str, ...]] = {"tickets": (), "tickets_dx": ("dx", "da", "db"), RAGGED: ()}
_GROUPS, _PROGRAMS = 128, 132


def configs(given: Problem, device: DeviceSpec, everything: bool) -> Iterator[tuple[str, KernelConfig]]:
    """Kernels and the configurations that `by_tickets` picks; without `everything` of 16-bit problems of 64 ranks."""
    if given.wide or not (everything or (given.R == 64 and given.itemsize == 2 and not given.dropout)):
        return
    for kernel, gradients in KERNELS.items():
        ragged = kernel == RAGGED
        if given.dropout and not gradients:
            continue
        problem = replace(given, gradients=gradients, is_ragged=ragged, groups=_GROUPS if ragged else 1)
        config = by_tickets("matmul", problem, device)
        if config is not None and config.tickets:
            yield kernel, config


def launch(variant: Any, r: int) -> None:
    """One launch of a `compile_only.Variant` of r ranks."""
    c, of = variant.config, getattr(torch, variant.dtype)
    adapter = getattr(torch, variant.adapter_dtype)
    m, n, k = (8192, 4096, 4096) if variant.aligned else (8191, 4097, 4095)
    x, w, xa = meta(m, k, of=of), meta(n, k, of=of), meta(m, r, of=of)
    seed, p = (meta(1, of=torch.int64), 0.1) if variant.dropout else (None, 0.0)
    if variant.kernel == RAGGED:
        tiles = Tiles(meta(_GROUPS, of=torch.int64), m)
        tiles.preset(c.block_m, meta(m // 16, 3, of=torch.int32))
        w, b, bias = meta(_GROUPS, n, k, of=of), meta(_GROUPS, n, r, of=adapter), meta(_GROUPS, n, of=of)
        source = meta(m, of=torch.int64)
        tickets.matmul(x, w, bias, xa, b, 2.0, _PROGRAMS, c, tiles=tiles, source=source)
    elif variant.kernel == "tickets":
        tickets.matmul(x, w, meta(n, of=of), xa, meta(n, r, of=adapter), 2.0, _PROGRAMS, c)
    else:
        dy, a = meta(m, n, of=of), meta(r, k, of=adapter)
        tickets.matmul(dy, w.t(), None, xa, a.t(), None, _PROGRAMS, c, seed=seed, p=p)
