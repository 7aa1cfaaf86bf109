"""The launches of DoRA's kernels that `compile_only` compiles, on meta tensors."""

import torch

from lorafuse.kernels import columns
from lorafuse.plan import KernelConfig
from lorafuse.testing.compile_decode import meta

__all__ = ["CASES", "CONFIG", "launch"]

# they have nothing to plan
CONFIG = KernelConfig("columns", "pointer", 0, 0, 0, 0, 1, 4)
# of each kernel: norms at one tile of ranks and at several, and sizes that are no multiples of 16
CASES = (
    ("row_norms", "r16"),
    ("row_norms", "r128"),
    ("row_norms", "odd"),
    ("columns_backward", ""),
    ("columns_backward", "odd"),
)


def launch(kernel: str, case: str, dtype: torch.dtype) -> None:
    """Launch one of `CASES` for operands of `dtype`."""
    M, N, K = (8191, 4097, 4095) if case == "odd" else (8192, 4096, 4096)
    if kernel == "row_norms":
        R = 128 if case == "r128" else 16
        columns.row_norms(meta(N, K, of=dtype), meta(R, K), meta(N, R), meta(N, R))
    else:
        columns.columns_backward(meta(M, N, of=dtype), meta(M, N, of=dtype), meta(N), True)
