"""The launches of decode kernels that `compile_only` compiles, on meta tensors: one for each way to read a weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorafuse.kernels import decode
from lorafuse.plan import KernelConfig

__all__ = ["CASES", "CONFIG", "launch", "meta"]

# they have nothing to plan
CONFIG = KernelConfig("decode", "pointer", 0, 0, 0, 0, 1, 4)
# of a matrix whose sizes and start are multiples of 16, and of one whose are not
_ALIGNED, _ODD = (4096, 4096), (4097, 4095)


def meta(*sizes: int, of: torch.dtype = torch.float32) -> Tensor:
    """A tensor that a launch specializes on, and nobody reads."""
    return torch.empty(sizes, dtype=of, device="meta")


def _codebook(out: Tensor, nested: bool = False, first: int = 0, block: int = 64) -> None:
    outer = (meta(1024), meta(256), meta()) if nested else None
    scale = meta(2**20, of=torch.uint8 if nested else torch.float32)
    decode.codebook(
        meta(2**24, of=torch.uint8), out, table=meta(16), scale=scale, block=block, first=first, rounded=out.dtype,
        outer=outer,
    )  # fmt: skip


def _grid(out: Tensor, kind: str, block: tuple[int, int] | None = None, **more: Any) -> None:
    N, K = out.shape
    of = torch.int8 if kind == "integer" else torch.uint8
    scale = meta(N * K // 16, of=torch.uint8 if more.get("scale_kind") else torch.float32)
    decode.grid(meta(N, K // 2 if kind == "e2m1" else K, of=of), out, scale=scale, kind=kind, block=block, **more)


CASES: dict[str, tuple[tuple[int, int], Callable[[Tensor], None]]] = {
    "codebook": (_ALIGNED, _codebook),
    "codebook nested": (_ALIGNED, lambda out: _codebook(out, nested=True)),
    "codebook nested 32": (_ALIGNED, lambda out: _codebook(out, nested=True, block=32)),
    "codebook nested odd": (_ODD, lambda out: _codebook(out, nested=True, first=5)),
    "int8": (_ALIGNED, lambda out: _grid(out, "integer", step=0.5)),
    "int8 odd": (_ODD, lambda out: _grid(out, "integer")),
    "e4m3 blocks": (_ALIGNED, lambda out: _grid(out, "e4m3", (128, 128), is_scale_rounded=True)),
    "e4m3 blocks odd": (_ODD, lambda out: _grid(out, "e4m3", (128, 128), scale_kind="e8m0")),
    "e5m2 rows": (_ALIGNED, lambda out: _grid(out, "e5m2")),
    "mxfp4": (_ALIGNED, lambda out: _grid(out, "e2m1", (1, 32), scale_kind="exponent")),
    "nvfp4": (_ALIGNED, lambda out: _grid(out, "e2m1", (1, 16), scale_kind="float8", divisor=meta(1))),
}


def launch(case: str, dtype: torch.dtype) -> None:
    """Launch the kernel of one of `CASES` into an out of `dtype`."""
    sizes, run = CASES[case]
    run(meta(*sizes, of=dtype))
