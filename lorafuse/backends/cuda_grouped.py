"""Products of ragged rows by the CUDA kernel `grouped_linear`: a base product and its low-rank one in one launch."""

from typing import Any

import torch
from torch import Tensor

from lorafuse.backends.aten_grouped import GroupedMM
from lorafuse.operands import Rows
from lorafuse.plan import KernelConfig, configs_cuda

__all__ = ["INSTEAD", "TYPES", "GroupedLinear", "is_stored_by_columns", "tiling"]

# the numbers of Type in api.hpp
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
INSTEAD = "use 'triton', 'eager' or 'auto'"


def tiling(config: KernelConfig) -> tuple[int, int, int, int, int]:
    """The fields of Tiling in api.hpp."""
    # the last: as many blocks as the device has SMs
    return config.block_n, config.stages, config.cluster, config.group_m, 0


def is_stored_by_columns(w: Tensor, name: str) -> bool:
    """Whether a stack `[G, K, N]` is contiguous, and not by rows of `[G, N, K]`; `name` is the backend's.

    Raises ValueError for one with gaps, of which a copy would cost more than the kernel gains.
    """
    if not (is_contiguous := w.is_contiguous()) and not w.mT.is_contiguous():
        raise ValueError(
            f"backend={name!r}: its kernels read stacks of matrices without gaps; the strides of weights "
            f"{list(w.shape)} are {w.stride()}: {INSTEAD}"
        )
    return is_contiguous


class GroupedLinear(GroupedMM):
    """grouped_mm, with a base product and its low-rank one in one kernel: the second adds to the reduction."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def accumulated(self, x: Tensor, w: Tensor, xa: Tensor, b: Tensor, rows: Rows) -> Tensor:
        run, (G, K, N) = self.run, w.shape
        is_transposed = is_stored_by_columns(w, run.name)
        if "int64" not in rows.cache:
            rows.cache["int64"] = rows.offsets.long()
        # both with columns and rows exchanged, or neither
        b, y = b.contiguous() if is_transposed else b.mT.contiguous(), x.new_empty((x.shape[0], N))
        place = run.place(x.device)
        run.native.grouped_linear(
            type=TYPES[x.dtype], rows=x.shape[0], groups=G, N=N, K=K, R=xa.shape[1], transposed=is_transposed,
            offsets=rows.cache["int64"].data_ptr(), x=x.data_ptr(), stride_x=x.stride(0), w=w.data_ptr(),
            xa=xa.data_ptr(), stride_xa=xa.stride(0), b=b.data_ptr(), y=y.data_ptr(), stride_y=N,
            tiling=tiling(configs_cuda.RAGGED), workspace=run.ticket(x.device, place["stream"]).data_ptr(), **place,
        )  # fmt: skip
        return y
