"""The launches of DoRA's kernels, and of activations of many adapters, that `compile_only` compiles, on meta."""

import torch

from lorafuse.kernels import columns, gates
from lorafuse.plan import KernelConfig
from lorafuse.testing.compile_decode import meta

__all__ = ["CASES", "CONFIG", "launch"]

# they have nothing to plan
CONFIG = KernelConfig("columns", "pointer", 0, 0, 0, 0, 1, 4)
# of each kernel: norms at one tile of ranks and at several, and sizes that are no multiples of 16; activations hold
# most registers where they are a function of gate and up
CASES = (
    ("row_norms", "r16"),
    ("row_norms", "r128"),
    ("row_norms", "odd"),
    ("columns_backward", ""),
    ("columns_backward", "odd"),
    ("gates", "clamped_swiglu"),
    ("gates_backward", "clamped_swiglu"),
)


def launch(kernel: str, case: str, dtype: torch.dtype) -> None:
    """Launch one of `CASES` for operands of `dtype`."""
    M, N, K = (8191, 4097, 4095) if case == "odd" else (8192, 4096, 4096)
    if kernel == "row_norms":
        R = 128 if case == "r128" else 16
        columns.row_norms(meta(N, K, of=dtype), meta(R, K), meta(N, R), meta(N, R))
    elif kernel.startswith("gates"):
        u, du, h = meta(M, 2 * N, of=dtype), meta(M, 2 * N, of=dtype), meta(M, N, of=dtype)
        gate, up = u[:, :N], u[:, N:]
        if kernel == "gates":
            gates.activate(case, gate, up)
        else:
            gates.activate_backward(
                case, h, gate, up, du[:, :N], du[:, N:], row_scale=meta(M), need_dots=True, dy=meta(M, K, of=dtype),
                bias=meta(8, K, of=dtype), experts=meta(M, of=torch.int64), source=meta(M, of=torch.int64),
            )  # fmt: skip
    else:
        columns.columns_backward(meta(M, N, of=dtype), meta(M, N, of=dtype), meta(N), True)
