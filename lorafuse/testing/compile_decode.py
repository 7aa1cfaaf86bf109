"""The launches that `compile_only` compiles of the kernels that decode weights, on meta tensors: one for each way to
read a weight, and of the main loops that decode some.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorafuse.kernels import decode, packed
from lorafuse.plan import DeviceSpec, KernelConfig, Problem
from lorafuse.plan.configs_triton import candidates

__all__ = ["CASES", "CONFIG", "PACKED", "launch", "launch_packed", "meta", "packed_configs"]

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


def _nested(N: int, K: int, block: int = 64) -> tuple[str, dict[str, Any]]:
    outer = meta(N * K // block // 256 + 1), meta(256), meta()
    scale = meta(-(-N * K // block), of=torch.uint8)
    given = {"code": meta(N * K // 2, of=torch.uint8), "table": meta(16), "scale": scale, "block": block, "first": 0}
    return "codebook", given | {"rounded": torch.bfloat16, "outer": outer}


def _rows(N: int, K: int) -> tuple[str, dict[str, Any]]:
    return "grid", {"code": meta(N, K, of=torch.int8), "scale": meta(N), "step": 0.5}


def _blocks(N: int, K: int) -> tuple[str, dict[str, Any]]:
    scale = meta(-(-N // 128), -(-K // 128))
    fp8 = {"kind": "e4m3", "block": (128, 128), "is_scale_rounded": True}
    return "grid", {"code": meta(N, K, of=torch.uint8), "scale": scale, **fp8}


_MXFP4: dict[str, Any] = {"block": (1, 32), "scale_kind": "exponent"}


def _exponents(N: int, K: int) -> tuple[str, dict[str, Any]]:
    scale = meta(N, K // 32, of=torch.uint8)
    return "grid", {"code": meta(N, K // 2, of=torch.uint8), "scale": scale, "kind": "e2m1", **_MXFP4}


# weights of few rows, by sizes
PACKED: dict[str, Callable[[int, int], tuple[str, dict[str, Any]]]] = {
    "nf4": _nested, "nf4 across rows": lambda N, K: _nested(N, K, 2048), "int8": _rows, "e4m3": _blocks,
    "mxfp4": _exponents,
}  # fmt: skip


def packed_configs(problem: Problem, device: DeviceSpec) -> Iterator[tuple[str, KernelConfig]]:
    """`(kernel, configuration)` of y and dx over packed weights, of the rank and the dropout of `problem`."""
    few = replace(problem, M=64, format="nf4")
    yield from (("packed_y", config) for config in candidates("packed", few, device))
    yield from (("packed_dx", config) for config in candidates("packed", replace(few, gradients=("dx",)), device))


def launch_packed(
    kernel: str, c: KernelConfig, dtype: torch.dtype, case: str, R: int, aligned: bool, dropout: bool
) -> None:
    """One launch of "packed_y" or "packed_dx" over one of `PACKED`, fp32 adapters."""
    M, N, K = (64, 4096, 4096 + 16 * (case == "nf4 across rows")) if aligned else (63, 4097, 4098)
    is_transposed, weight = kernel == "packed_dx", PACKED[case](N, K)
    x = meta(M, N if is_transposed else K, of=dtype)
    bias = None if is_transposed else meta(N, of=dtype)
    factor = meta(R, K).t() if is_transposed else meta(N, R)
    seed = meta(1, of=torch.int64) if dropout else None
    low = meta(M, R, of=dtype), factor, None if is_transposed else 2.0
    packed.matmul(x, weight, (N, K), is_transposed, bias, *low, c, seed=seed, p=0.1)
