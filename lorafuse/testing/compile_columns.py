"""The launches of DoRA's kernels that `compile_only` compiles, on meta tensors."""

import torch

from lorafuse.kernels import columns
from lorafuse.plan import KernelConfig
from lorafuse.testing.compile_decode import meta

__all__ = ["CASES", "CONFIG", "launch"]

# they have nothing to plan
CONFIG = KernelConfig("columns", "pointer", 0, 0, 0, 0, 1, 4)
# norms of rows at one tile of ranks and at several, the backward of a factor, each at sizes that are no multiples of 16
CASES = ("norms 16", "norms 128", "norms odd", "backward", "backward odd")


def launch(case: str, dtype: torch.dtype) -> None:
    """Launch one of `CASES` for operands of `dtype`."""
    name, _, kind = case.partition(" ")
    M, N, K = (8191, 4097, 4095) if kind == "odd" else (8192, 4096, 4096)
    if name == "norms":
        R = 128 if kind == "128" else 16
        columns.row_norms(meta(N, K, of=dtype), meta(R, K), meta(N, R), meta(N, R))
    else:
        columns.columns_backward(meta(M, N, of=dtype), meta(M, N, of=dtype), meta(N), True)
