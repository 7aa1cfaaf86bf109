"""Rows of many adapters in Triton kernels (`lorafuse.kernels.multi`): nothing is read on the host.

Always batch-invariant: the kernels give each adapter's rows tiles of their own.
"""

from functools import lru_cache

import torch
from torch import Tensor

from lorafuse.backends import problems
from lorafuse.backends.multi import constant
from lorafuse.backends.protocol import Backend
from lorafuse.kernels import multi
from lorafuse.kernels.rows import Tiles
from lorafuse.operands import Adapters, Rows, Weight, contiguous_rows
from lorafuse.plan import Plan, interpreted_as

__all__ = ["MULTI"]


class _Multi:
    """The methods are those of `lorafuse.backends.multi.Multi`."""

    def project(
        self, run: Backend, x: Tensor, f: Tensor, rows: Rows, adapters: Adapters, plan: Plan | None, is_masked: bool,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        assert plan is not None
        if adapters.widest == 0:
            return x.new_empty((rows.count, 0), dtype=dtype)
        return multi.project(
            x, f, _tiles(rows), adapters.ends, adapters.widest, dtype, plan.config("project"),
            **_mask(adapters, is_masked),
        )  # fmt: skip

    def matmul(
        self, run: Backend, x: Tensor, w: Weight, xa: Tensor, f: Tensor, rows: Rows, adapters: Adapters,
        plan: Plan | None, bias: Tensor | None, is_masked: bool, batch_invariant: bool,
    ) -> Tensor:  # fmt: skip
        assert plan is not None
        programs = (problems.device_spec(x.device) or interpreted_as()).sms
        with run.dense(w, x.dtype) as dense:
            left = Weight(contiguous_rows(dense.data), dense.is_transposed).left()
            return multi.matmul(
                _aligned(x), left, None if bias is None else bias.contiguous(), xa.contiguous(), f, adapters.factors,
                _tiles(rows), adapters.ends, is_masked, programs, plan.config("matmul"), **_mask(adapters, is_masked),
            )  # fmt: skip

    def outer(
        self, run: Backend, narrow: Tensor, wide: Tensor, out: Tensor, rows: Rows, adapters: Adapters,
        plan: Plan | None, is_masked: bool, is_sum: bool,
    ) -> None:  # fmt: skip
        assert plan is not None
        config = plan.config("outer")
        blocks = _blocks(adapters.ranks, config.block_r, wide.device)
        if blocks.numel():
            multi.outer(
                narrow.contiguous(), wide, out, blocks, _tiles(rows), adapters.ends, adapters.factors, is_sum, config,
                **_mask(adapters, is_masked),
            )  # fmt: skip


def _mask(adapters: Adapters, is_masked: bool) -> dict[str, Tensor | None]:
    return {"seeds": adapters.seeds, "below": adapters.below} if is_masked else {}


def _tiles(rows: Rows) -> Tiles:
    if "tiles" not in rows.cache:
        rows.cache["tiles"] = Tiles(rows.offsets, rows.count)
    return rows.cache["tiles"]


@lru_cache(maxsize=256)
def _blocks(ranks: tuple[int, ...], step: int, device: torch.device) -> Tensor:
    """The pairs `[P, 2]` of an adapter and each `step`-th of its ranks."""
    pairs = tuple(number for g, R in enumerate(ranks) for first in range(0, R, step) for number in (g, first))
    return constant(pairs, torch.int32, device).view(-1, 2)


def _aligned(x: Tensor) -> Tensor:
    """x, copied unless its rows start on 16-byte boundaries where their length allows that."""
    size = x.element_size()
    if x.data_ptr() % 16 == 0 and (x.stride(0) * size % 16 == 0 or x.shape[1] * size % 16):
        return x
    return x.clone(memory_format=torch.contiguous_format)


MULTI = _Multi()
