"""The launches that `compile_only` compiles of the kernels that decode weights, on meta tensors: one for each way to
read a weight, and of the main loops that decode some.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorafuse.formats.weight import Weight
from lorafuse.kernels import decode, packed
from lorafuse.plan import DeviceSpec, KernelConfig, Problem
from lorafuse.plan.configs_triton import candidates

__all__ = [
    "ARCHITECTURES",
    "CASES",
    "CONFIG",
    "PACKED",
    "PACKED_KERNELS",
    "launch",
    "launch_packed",
    "meta",
    "packed_configs",
]

# one of each kind, for kernels with long main loops
ARCHITECTURES = (80, 90, 100)
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


def _stored(
    N: int, K: int, *statistics: Tensor, format: str, of: torch.dtype = torch.uint8, per_byte: int = 2
) -> Weight:
    return Weight(meta(N, K // per_byte, of=of), statistics=statistics, format=format)


def _nested(N: int, K: int, block: int) -> Weight:
    statistics = meta(-(-N * K // block), of=torch.uint8), meta(16), meta(N * K // block // 256 + 1), meta(256), meta()
    return _stored(N, K, *statistics, format=f"nf4:{N},{K};block={block};dtype=bfloat16")


def _e4m3(N: int, K: int) -> Weight:
    scale, fp8 = meta(-(-N // 128), -(-K // 128)), torch.float8_e4m3fn
    return _stored(N, K, scale, format="fp8:block=128x128;scale=rounded", of=fp8, per_byte=1)


# weights of few rows, by their sizes
PACKED: dict[str, Callable[[int, int], Weight]] = {
    "nf4": lambda N, K: _nested(N, K, 64),
    "nf4 across rows": lambda N, K: _nested(N, K, 4096),
    "int8": lambda N, K: _stored(N, K, meta(N), format="int8", of=torch.int8, per_byte=1),
    "e4m3": _e4m3,
    "mxfp4": lambda N, K: _stored(N, K, meta(N, -(-K // 32), of=torch.uint8), format="mxfp4"),
}
PACKED_KERNELS = ("packed_y", "packed_dx")


def packed_configs(problem: Problem, device: DeviceSpec) -> Iterator[tuple[str, KernelConfig, str]]:
    """`(kernel, configuration, one of PACKED)` of few rows, of the rank, dtype and alignment of `problem`, with masks
    where its dx has one: every tile of NF4, and the largest of the others and of more ranks. On an architecture of each
    kind, as those of siblings.
    """
    if device.arch not in ARCHITECTURES:
        return
    for kernel in PACKED_KERNELS:
        if problem.itemsize == 4 or problem.R not in (16, 64) or problem.dropout != (kernel == "packed_dx"):
            continue
        few = replace(problem, M=64, format="nf4", gradients=("dx",) if kernel == "packed_dx" else ())
        configs = sorted(candidates("packed", few, device), key=lambda c: c.block_m * c.block_n)
        for case in PACKED if problem.R == 16 else ("nf4",):
            every = case == "nf4" and problem.R == 16 and problem.aligned
            yield from ((kernel, config, case) for config in (configs if every else configs[-1:]))


def launch_packed(
    kernel: str, c: KernelConfig, dtype: torch.dtype, case: str, R: int, aligned: bool, dropout: bool
) -> None:
    """One launch of a kernel of `PACKED_KERNELS` over one of `PACKED`, fp32 adapters."""
    # rows of other sizes end within a block of NF4
    M, N, K = (64, 4096, 4112 if "across" in case else 4096) if aligned else (63, 4097, 4098)
    w = PACKED[case](N, K)
    if kernel == "packed_y":
        packed.matmul(meta(M, K, of=dtype), w, meta(N, of=dtype), meta(M, R, of=dtype), meta(N, R), 2.0, c)
        return
    seed = meta(1, of=torch.int64) if dropout else None
    packed.matmul(meta(M, N, of=dtype), w.t, None, meta(M, R, of=dtype), meta(R, K).t(), None, c, seed=seed, p=0.1)
