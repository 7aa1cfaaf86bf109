"""The primitives in plain torch: the ground truth, the CPU implementation, and cuBLAS used well on a GPU.

Fused: nothing full-size is scaled, cast or added outside a GEMM: of each pair of products the second accumulates onto
the first (beta = 1). Dropout, and fp32 adapters over an fp16 base, work in row chunks, so that neither a mask nor a
copy of x exists at full size. Sums over rows run in a fixed order. Ragged rows are multiplied by torch's grouped_mm
where the plan says so (`aten_grouped`), else one group after the other (`aten_loop`). On a CPU a dense layer's products
by the rank are csrc/cpu's where those are faster (`aten_rank`), and those by weights, in blocks whose low-rank product
is added, and whose quantized weight is decoded, in a core's caches (`aten_blocks`).

Cost of a dense layer forward: 2MNK + 2MR(N + K) FLOPs; beyond the base product one read of x, and of y a write and a
read. Backward: 2MNK + 4MR(N + K) FLOPs; beyond the base product two reads of dy, one of x, and of dx a write and a
read.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafuse.backends import aten_blocks, aten_loop, aten_multi, aten_rank, aten_wide, base, problems
from lorafuse.backends.aten_grouped import GroupedMM
from lorafuse.backends.protocol import Backend, Problems, finish
from lorafuse.operands import Dropout, Epilogue, LowRank, Rows, Weight
from lorafuse.philox import keep_mask, row_chunks
from lorafuse.plan import Plan, no_grouped_mm, select

__all__ = ["Aten", "backend"]

# what addmm adds nothing of
_NO_TERM = {
    dtype: torch.zeros((), dtype=dtype, device="cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}


class Aten(Backend):
    """See the module."""

    name = "eager"
    grouped_mm = GroupedMM()
    multi = aten_multi.MULTI

    def plan(self, operator: Problems, device: torch.device) -> Plan | None:
        if device.type != "cuda":
            return None
        planned = operator()
        if base.availability("triton").ok:
            return select(planned, problems.device_spec(device), (("eager", ""),))
        # without Triton nothing is known of the GPU but its architecture
        projections = planned if isinstance(planned, tuple) else (planned,)
        if not projections[0].is_ragged:
            return Plan("eager", "aten_beta1")
        arch = problems.arch(device)
        return Plan("eager", "loop" if any(no_grouped_mm(p, arch) for p in projections) else "grouped_mm")

    def decode(self, w: Weight, dtype: torch.dtype, out: Tensor) -> Tensor:
        # the codecs of the formats pass over the weight several times
        if out.is_cuda and base.availability("triton").ok:
            return base.load("triton").decode(w, dtype, out)
        return super().decode(w, dtype, out)

    def project(
        self, x: Tensor, a: Tensor, rows: Rows | None, plan: Plan | None, *, is_transposed: bool = False,
        scale: float = 1.0, dropout: Dropout | None = None, dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        if rows is not None:
            return self._ragged(plan).project(x, a, rows, is_transposed, scale)
        of_x = x.dtype
        dtype = dtype or of_x
        if a.dtype is not dtype:
            a = a.to(dtype)
        if dropout is None and dtype is of_x:
            own = aten_rank.project(x, a, is_transposed, scale) if x.numel() >= aten_rank.MANY else None
            if own is not None:
                return own
            xa = torch.mm(x, a) if is_transposed else F.linear(x, a)
        else:
            right = a if is_transposed else a.t()
            xa = x.new_empty((x.shape[0], right.shape[1]), dtype=dtype)
            for chunk in row_chunks(x.shape[0], x.shape[1], x.device):
                torch.mm(_masked(x[chunk].to(dtype), dropout, chunk), right, out=xa[chunk])
        return xa if scale == 1.0 else xa.mul_(scale)

    def matmul(
        self, x: Tensor, w: Weight, rows: Rows | None, plan: Plan | None, *, low: LowRank | None = None,
        bias: Tensor | None = None, epilogue: Epilogue | None = None,
    ) -> Any:  # fmt: skip
        if rows is not None:
            return finish(self._ragged(plan).matmul(self, x, w, rows, low, bias), epilogue)
        own = aten_blocks.product(x, w, bias, low) if x.shape[0] >= aten_blocks.LEAST_ROWS else None
        if own is not None:
            return own
        if w.format != "dense":
            with self.dense(w, x.dtype) as dense:
                return self.matmul(x, dense, None, plan, low=low, bias=bias)
        if low is None:
            return F.linear(x, w.left(), bias)
        if low.dropout is not None:
            y = _masked_matmul(x, w, low, None, None)
            return y if bias is None else y.add_(bias)
        xa, b, scale = low.xa, low.b, low.scale
        if b.dtype is not xa.dtype:
            b = b.to(xa.dtype)
        right = b if low.is_transposed else b.t()
        if xa.dtype is not x.dtype:
            right = right if scale == 1.0 else right * scale
            if x.is_cpu and not aten_wide.has_products(x.dtype):
                return aten_wide.product(x, w, bias, (xa, right), x.dtype)
            y = F.linear(x, w.left(), bias)
            for chunk in row_chunks(x.shape[0], max(w.sizes), x.device):
                y[chunk] = torch.addmm(y[chunk].to(xa.dtype), xa[chunk], right)
            return y
        M, N = x.shape[0], w.data.shape[1 if w.is_transposed else 0]
        if M * N >= aten_rank.SOME and aten_rank.adds(xa, b, low.is_transposed, M, N):
            return aten_rank.add(F.linear(x, w.left(), bias), xa, b, low.is_transposed, scale)
        # on a CPU forward adds 0.62 ms to a base of 4.1 ms in the first order, 0.70 ms in the other (M 1024, K = N
        # 2048, R 16, bf16, Xeon with AMX, 2 threads, 2026-11-24), and at M = 1 it is one operator less
        if not low.is_transposed if plan is None else plan.kernel == "aten_addmm":
            return F.linear(x, w.data.mT if w.is_transposed else w.data, bias).addmm_(xa, right, alpha=scale)
        # accumulating the base product onto the low-rank one hides the read of y behind the large GEMM
        if scale != 1.0:
            xa = xa * scale
        y = torch.mm(xa, right) if bias is None else torch.addmm(bias, xa, right)
        return y.addmm_(x, w.data if w.is_transposed else w.data.mT)

    def outer(
        self, narrow: Tensor, wide: Tensor, rows: Rows | None, plan: Plan | None, *, like: Tensor,
        is_transposed: bool = False, scale: float = 1.0, row_scale: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:  # fmt: skip
        if row_scale is not None:
            narrow = narrow * row_scale.to(narrow.dtype).unsqueeze(1)
        if rows is not None:
            return self._ragged(plan).outer(narrow, wide, rows, like, is_transposed, scale)
        if dropout is not None or narrow.dtype is not wide.dtype:
            product = _chunked_outer(narrow, wide, dropout, like).mul_(scale)
            return (product.t() if is_transposed else product).to(like.dtype)
        own = aten_rank.outer(narrow, wide, like, is_transposed, scale) if wide.numel() >= aten_rank.MANY else None
        if own is not None:
            return own
        takes_transposed = _takes_transposed(wide)
        if is_transposed and takes_transposed and not wide.is_cuda:
            product = _product(wide.t(), narrow, scale)
        else:
            product = _product(narrow.t() if takes_transposed else narrow.t().contiguous(), wide, scale)
            if is_transposed:
                # (narrowᵀ wide)ᵀ: with the long side last it took 0.26 ms where wideᵀ narrow took 0.34 ms (M 1024,
                # N 2048, R 16, bf16, Xeon with AMX, 2 threads, 2026-11-24)
                return like.new_empty(like.shape).copy_(product.t())
        # `to` its own dtype took 1.6 us, a product of one row 2.3 us (EPYC, torch 2.13, 2026-11-29)
        return product if product.dtype is like.dtype else product.to(like.dtype)

    def project_outer(
        self, dy: Tensor, b: Tensor, xa: Tensor | None, plan: Plan | None, *, scale: float, need_dyb: bool,
        need_dbias: bool, dtype: torch.dtype | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        if need_dyb and xa is not None and dy.numel() >= aten_rank.SOME:
            own = aten_rank.project_outer(dy, b, xa, scale)
            if own is not None:
                return *own, dy.sum(0) if need_dbias else None
        return super().project_outer(
            dy, b, xa, plan, scale=scale, need_dyb=need_dyb, need_dbias=need_dbias, dtype=dtype
        )

    def matmul_outer(  # type: ignore[override]
        self, dy: Tensor, w: Weight, plan: Plan | None, low: LowRank, x: Tensor, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        da = _zeros_of(like)
        with self.dense(w, dy.dtype) as dense:
            return _masked_matmul(dy, dense, low, x, da), da.to(like.dtype)

    def matmul_sum(
        self, terms: Sequence[tuple[Tensor, Weight]], lows: Sequence[LowRank], plan: Plan | None, *,
        wide: Tensor | None = None, likes: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        # dx of masked low-rank products, and of fp32 ones over 16 bits, is added in row chunks
        apart = [low.dropout is not None or low.xa.dtype is not terms[0][0].dtype for low in lows]
        plain = [low for low, is_apart in zip(lows, apart, strict=True) if not is_apart]
        has_rows = terms[0][0].shape[0] >= aten_blocks.LEAST_ROWS
        total = aten_blocks.sum_of_products(terms, plain) if has_rows else None
        if total is None:
            total = self._sum(terms, plain)
        outers = []
        if likes:
            assert wide is not None
            outers = [
                # a mask is drawn once, for the product and for this sum
                self.outer(low.xa, wide, None, plan, like=like) if low.dropout is None else _zeros_of(like)
                for low, like in zip(lows, likes, strict=True)
            ]
        for j, low in enumerate(lows):
            if apart[j]:
                _add_low_rank(total, low, wide, outers[j] if outers else None)
        return total, [outer.to(like.dtype) for outer, like in zip(outers, likes, strict=True)]

    def _sum(self, terms: Sequence[tuple[Tensor, Weight]], lows: Sequence[LowRank]) -> Tensor:
        total, sizes = None, (terms[0][0].shape[0], terms[0][1].sizes[0])
        late = [low for low in lows if aten_rank.adds(low.xa, low.b, low.is_transposed, *sizes)]
        # the low-rank products first, where torch computes them: the large GEMMs accumulate onto them, and no full-size
        # sum has a pass of its own
        for low in lows:
            if low not in late:
                total = _accumulated(total, low.xa, _right(low), low.scale)
        for x, w in terms:
            with self.dense(w, x.dtype) as dense:
                total = _accumulated(total, x, dense.right())
        assert total is not None
        for low in late:
            aten_rank.add(total, low.xa, low.b, low.is_transposed, low.scale)
        return total

    def combine(self, y: Tensor, rows: Rows, weight: Tensor | None) -> Tensor:
        assert rows.order is not None
        S, order, last = rows.count, rows.order, rows.offsets[-1:]
        if S == 0:
            return y.new_zeros((0, y.shape[1]))
        place = torch.empty_like(order).scatter_(0, order, torch.arange(S, device=order.device))
        if rows.groups == 0:
            last = order.new_zeros(1)
        # the last row is a sentinel's if any is: zeroed, it stands for all of them
        y[-1:].masked_fill_(last < S, 0)
        beyond = place >= last
        place.masked_fill_(beyond, S - 1)
        if weight is not None:
            weight = weight.to(y.dtype).masked_fill(beyond.view(-1, rows.choices), 0)
        return F.embedding_bag(place.view(-1, rows.choices), y, mode="sum", per_sample_weights=weight)

    def _ragged(self, plan: Plan | None) -> Any:
        return aten_loop if plan is None or plan.kernel == "loop" else self.grouped_mm


def _masked_matmul(x: Tensor, w: Weight, low: LowRank, wide: Tensor | None, outer: Tensor | None) -> Tensor:
    """`x wᵀ + mask ⊙ (scale · xa bᵀ)`; adds `xaᵀ (mask ⊙ wide)` to `outer`, from the same mask of each row chunk."""
    assert low.dropout is not None
    dropout, xa, b = low.dropout, low.xa, low.b.to(low.xa.dtype)
    right, columns = b if low.is_transposed else b.t(), w.sizes[0]
    scaled = xa if low.scale == 1.0 else xa * low.scale
    is_fp32 = xa.dtype is not x.dtype
    if not is_fp32:
        y = torch.mm(scaled, right)
    elif not x.is_cpu or aten_wide.has_products(x.dtype):
        y = torch.mm(x, w.right())
    else:
        y = aten_wide.product(x, w, None, None, torch.float32)
    for chunk in row_chunks(x.shape[0], columns, x.device):
        keep = keep_mask(dropout.seed, dropout.p, chunk, columns)
        if is_fp32:
            y[chunk] = y[chunk] + torch.mm(scaled[chunk], right) * keep
        else:
            y[chunk] *= keep
        if outer is not None and wide is not None:
            outer += torch.mm(xa[chunk].t(), wide[chunk].to(xa.dtype) * keep)
    if is_fp32:
        return y.to(x.dtype)
    total = aten_blocks.product(x, w, total=y)
    return y.addmm_(x, w.right()) if total is None else total


def _accumulated(total: Tensor | None, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """`total + scale · left right`, written into total where there is one."""
    return _scaled(torch.mm(left, right), scale) if total is None else total.addmm_(left, right, alpha=scale)


def _right(low: LowRank) -> Tensor:
    """The right operand `[R, N]` of a low-rank product, in xa's dtype."""
    b = low.b if low.b.dtype is low.xa.dtype else low.b.to(low.xa.dtype)
    return b if low.is_transposed else b.t()


def _add_low_rank(y: Tensor, low: LowRank, wide: Tensor | None, outer: Tensor | None) -> None:
    """Adds `mask ⊙ (scale · xa bᵀ)` to y; and `xaᵀ (mask ⊙ wide)` to `outer` where there is a mask."""
    xa, right, dropout = low.xa, _right(low), low.dropout
    for chunk in row_chunks(y.shape[0], y.shape[1], y.device):
        part = _scaled(torch.mm(xa[chunk], right), low.scale)
        if dropout is not None:
            keep = keep_mask(dropout.seed, dropout.p, chunk, y.shape[1])
            part *= keep
            if outer is not None and wide is not None:
                outer += torch.mm(xa[chunk].t(), wide[chunk].to(xa.dtype) * keep)
        y[chunk] += part


def _zeros_of(like: Tensor) -> Tensor:
    """Where a gradient of `like` is summed: its shape, fp32 at least."""
    return torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _chunked_outer(narrow: Tensor, wide: Tensor, dropout: Dropout | None, like: Tensor) -> Tensor:
    """`narrowᵀ drop(wide)`, `[R, C]` in fp32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    total = torch.zeros((narrow.shape[1], wide.shape[1]), dtype=dtype, device=like.device)
    for chunk in row_chunks(wide.shape[0], wide.shape[1], wide.device):
        total += torch.mm(narrow[chunk].t(), _masked(wide[chunk].to(narrow.dtype), dropout, chunk))
    return total


def _masked(x: Tensor, dropout: Dropout | None, rows: slice) -> Tensor:
    return x if dropout is None else x * keep_mask(dropout.seed, dropout.p, rows, x.shape[1])


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """`scale · left right`."""
    if scale == 1.0:
        return torch.mm(left, right)
    if not left.is_cpu:
        return torch.mm(left, right).mul_(scale)
    # one operator less, 4.8 instead of 8.1 us for db of one row, and in 16 bits one rounding less (N 64, R 16, fp32,
    # EPYC, torch 2.13, 2026-11-29); beta = 0 reads no term
    return torch.addmm(_NO_TERM[left.dtype], left, right, beta=0, alpha=scale)


def _scaled(t: Tensor, scale: float) -> Tensor:
    return t if scale == 1.0 else t.mul_(scale)


def _takes_transposed(t: Tensor) -> bool:
    """Whether products read `tᵀ` as fast as a contiguous copy: cuBLAS does and MKL, but not oneDNN's of 16 bits."""
    return t.is_cuda or t.dtype.itemsize >= 4


BACKEND = Aten()


def backend() -> Aten:
    """The one instance."""
    return BACKEND
