"""Rows of many adapters in Triton kernels (`lorafuse.kernels.multi`): nothing is read on the host.

Always batch-invariant: the kernels give each adapter's rows tiles of their own.
"""

from functools import lru_cache

import torch
from torch import Tensor

from lorafuse.backends import problems
from lorafuse.backends.multi import Dots, constant
from lorafuse.backends.protocol import Backend
from lorafuse.kernels import gates, multi
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
            x, _stacks(f), _tiles(rows), adapters.ends, adapters.widest, dtype, plan.config("project"),
            source=rows.index, **_mask(adapters, is_masked),
        )  # fmt: skip

    def matmul(
        self, run: Backend, x: Tensor, w: Weight, xa: Tensor, f: Tensor, rows: Rows, adapters: Adapters,
        plan: Plan | None, bias: Tensor | None, is_masked: bool, batch_invariant: bool, total: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert plan is not None
        programs, each = (problems.device_spec(x.device) or interpreted_as()).sms, len(adapters.ranks) + 1
        x, f, xa, bias = _aligned(x), _stacks(f), xa.contiguous(), None if bias is None else bias.contiguous()

        def product(dense: Weight, out: Tensor | None, experts: slice) -> Tensor:
            left, tiles = dense.left(), _tiles(rows).part(slice(experts.start * each, experts.stop * each))
            of_bias = bias if bias is None or bias.dim() == 1 else bias[experts]
            return multi.matmul(
                x, left, of_bias, xa, f[experts], adapters.factors, tiles, adapters.ends, is_masked, programs,
                plan.config("matmul"), source=rows.index, out=out, is_sum=total is not None,
                **_mask(adapters, is_masked),
            )  # fmt: skip

        if len(w.stored) == 2:
            with run.dense(w, x.dtype) as dense:
                return product(Weight(contiguous_rows(dense.data), dense.is_transposed), total, slice(0, 1))
        y = x.new_empty((rows.count, w.sizes[0])) if total is None else total
        for experts, part in run.parts(w, x.dtype):
            product(part, y, experts)
        return y

    def outer(
        self, run: Backend, narrow: Tensor, wide: Tensor, out: Tensor, rows: Rows, adapters: Adapters,
        plan: Plan | None, is_masked: bool,
    ) -> None:  # fmt: skip
        assert plan is not None
        config = plan.config("outer")
        blocks = _blocks(adapters.ranks, config.block_r, wide.device)
        if blocks.numel():
            multi.outer(
                narrow.contiguous(), wide, _stacks(out), blocks, _tiles(rows), adapters.ends, adapters.factors, config,
                source=rows.index, **_mask(adapters, is_masked),
            )  # fmt: skip

    def activate(self, name: str, gate: Tensor, up: Tensor | None, rows: Rows, adapters: Adapters) -> Tensor:
        return gates.activate(name, gate, up)

    def activate_backward(
        self, name: str, dh: Tensor, gate: Tensor, up: Tensor | None, dgate: Tensor, dup: Tensor | None, rows: Rows,
        adapters: Adapters, *, row_scale: Tensor | None = None, dots: Dots | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        of_bias = {}
        if dots is not None and dots.bias is not None:
            ends = rows.offsets.view(-1, len(adapters.ranks) + 1)[:, -1].contiguous()
            place = torch.arange(rows.count, device=ends.device, dtype=ends.dtype)
            experts = torch.searchsorted(ends, place, right=True).clamp_(max=ends.shape[0] - 1)
            of_bias = {
                "dy": dots.dy, "bias": dots.bias.contiguous(), "experts": experts, "source": dots.rows.index,
            }  # fmt: skip
        return gates.activate_backward(
            name, dh, gate, up, dgate, dup, row_scale=row_scale, need_dots=dots is not None, **of_bias
        )


def _stacks(f: Tensor) -> Tensor:
    """Factors `[E, ΣR, C]`; those of a dense layer are one expert's."""
    return f if f.dim() == 3 else f.unsqueeze(0)


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
