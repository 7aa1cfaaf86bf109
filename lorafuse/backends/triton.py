"""The primitives in Triton kernels (`lorafuse.kernels`), configured by the plan of each call.

Launches go to the current stream of x's device and nothing waits for the GPU, so that CUDA graphs, torch.compile and
checkpointing see ordinary asynchronous work. Two launches sort choices by expert, the kernels that read rows of tokens
gather them, tiles of ragged rows are cut on the device. A known activation is computed in the epilogue of the first
projection, its backward in that of the product that gives dh; a function of the caller's runs in torch between them. On
CPU tensors the kernels run in Triton's interpreter, where TRITON_INTERPRET=1 asked for it.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from lorafuse.activation import Activation
from lorafuse.backends import columns, problems, triton_multi
from lorafuse.backends.protocol import Backend, Problems, device_guard, finish
from lorafuse.kernels import columns as column_kernels
from lorafuse.kernels import combine, decode, epilogues, gated, lowrank, matmul, packed, routing, siblings, tickets
from lorafuse.kernels.rows import Tiles
from lorafuse.operands import Activate, Dropout, Epilogue, LowRank, Rows, Weight, contiguous_rows, refuse_negative
from lorafuse.plan import DeviceSpec, KernelConfig, Plan, interpreted_as, select

__all__ = ["DYB_BYTES", "Triton", "backend", "rows_at_once"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# of dyb's fp32 partial sums, which grow with rows, columns and ranks: 896 MiB for Llama-70B's gate at 32768 rows, r 64,
# in blocks of 256 columns
DYB_BYTES = 64 << 20


class Triton(Backend):
    """See the module."""

    name = "triton"
    multi = triton_multi.MULTI

    def plan(self, operator: Problems, device: torch.device) -> Plan:
        return select(operator(), _spec(device), (("triton", ""),))

    def guard(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        return device_guard(device)

    def check(self, x: Tensor) -> None:
        if x.dtype not in _DTYPES:
            raise TypeError(
                f"backend='triton' got {x.dtype}; its kernels run float32, float16 and bfloat16: use 'eager'"
            )
        if x.is_cuda:
            return
        if not triton.knobs.runtime.interpret:
            raise ValueError(
                f"backend='triton' got a tensor on {x.device}; its kernels run on CUDA devices: move the tensors with "
                ".cuda(), use backend='eager', or set TRITON_INTERPRET=1 before Python starts to interpret them slowly"
            )
        if x.dtype is torch.bfloat16:
            raise TypeError(
                "backend='triton' got torch.bfloat16 in Triton's interpreter, whose bfloat16 products are wrong "
                "(triton-lang/triton#11585): use float16 or float32 there, or backend='eager'"
            )

    def matrix(self, t: Tensor) -> Tensor:
        return contiguous_rows(t)

    def in_order(self, x: Tensor, rows: Rows, plan: Plan | None) -> tuple[Tensor, Rows]:
        return x, rows.gathered

    def route(self, index: Tensor, groups: int) -> Rows:
        if not index.numel() or groups > routing.MOST_GROUPS:
            return super().route(index, groups)
        flat, choices = index.reshape(-1).contiguous(), index.shape[1]
        made = routing.route(flat, groups, choices)
        refuse_negative(flat, groups, made.valid.view(torch.bool))
        return Rows(flat.shape[0], made.offsets, made.order, choices, cache={"token": made.token})

    def decode(self, w: Weight, dtype: torch.dtype, out: Tensor) -> Tensor:
        known = w.kernel
        if known is None or not out.numel() or dtype not in _DTYPES:
            return super().decode(w, dtype, out)
        name, operands = known
        decode.KERNELS[name](out=out, **operands)
        return out

    def project(
        self, x: Tensor, a: Tensor, rows: Rows | None, plan: Plan | None, *, is_transposed: bool = False,
        scale: float = 1.0, dropout: Dropout | None = None, dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        assert plan is not None
        if rows is None:
            a = a.t() if is_transposed else a
        else:
            # PEFT packs b with the experts fastest: there each element is a sector of its own
            a = _packed(a.mT, x.dtype) if is_transposed else a.to(x.dtype)
        wide = dtype is torch.float32 and x.dtype is not dtype
        xa = lowrank.project(x, a, plan.config("project"), wide=wide, **_read(rows), **_mask(dropout))
        return xa if scale == 1.0 else xa.mul_(scale)

    def matmul(
        self, x: Tensor, w: Weight, rows: Rows | None, plan: Plan | None, *, low: LowRank | None = None,
        bias: Tensor | None = None, epilogue: Epilogue | None = None,
    ) -> Any:  # fmt: skip
        assert plan is not None
        is_packed = rows is None and plan.kernel == "packed"
        config, programs = plan.config("packed" if is_packed else "matmul"), _spec(x.device).sms
        bias, xa, b, scale = None if bias is None else bias.contiguous(), None, None, None
        if low is not None:
            xa, b, scale = low.xa.contiguous(), low.b, None if low.scale == 1.0 else low.scale
            # the kernel reads a few rows of b, or columns of a; it rounds them, after the scale
            b = b.mT if low.is_transposed else _packed(b, b.dtype)
        product = tickets.matmul if config.tickets else matmul.matmul
        if rows is None:
            mask = _mask(None if low is None else low.dropout)
            if is_packed:
                return finish(packed.matmul(x, w, bias, xa, b, scale, config, **mask), epilogue)
            with self.dense(w, x.dtype) as dense:
                return finish(product(x, _left(dense), bias, xa, b, scale, programs, config, **mask), epilogue)
        act = None if epilogue is None else epilogue.activation
        known = act if isinstance(act, Activation) and _is_fused(act) else None
        out: Any = None
        for groups, part in self.parts(w, x.dtype):
            of_b, of_bias = (None if t is None else t[groups] for t in (b, bias))
            read = {"tiles": _tiles(rows).part(groups), "source": rows.index, "out": out}
            if known is None:
                out = product(x, part.left(), of_bias, xa, of_b, scale, programs, config, **read)
            elif isinstance(epilogue, Activate):
                out = matmul.activated(
                    x, part.left(), of_bias, xa, of_b, scale, known.name, known.layout.value, programs, config, **read
                )
            else:
                assert epilogue is not None
                out = matmul.activation_backward(
                    x, part.left(), xa, of_b, scale, epilogue.u, known.name, known.layout.value,
                    epilogue.need_router_grad, programs, config, row_scale=epilogue.row_scale, **read,
                )  # fmt: skip
        if known is None:
            return finish(out, epilogue)
        if isinstance(epilogue, Activate):
            return out
        du, h, shares = out
        return du, h, None if shares is None else shares.sum(0)

    def matmuls(
        self, x: Tensor, weights: Sequence[Weight], plan: Plan | None, *, lows: Sequence[LowRank | None],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:  # fmt: skip
        assert plan is not None
        if plan.kernel != "siblings":
            return super().matmuls(x, weights, plan, lows=lows, biases=biases)
        given = _side_by_side(weights, biases, lows)
        return siblings.matmuls(x, *given, _spec(x.device).sms, plan.config("matmul"))

    def matmul_gated(
        self, x: Tensor, weights: Sequence[Weight], plan: Plan | None, *, lows: Sequence[LowRank | None],
        biases: Sequence[Tensor | None], activation: str, need_up: bool = True,
        down: tuple[Tensor, Tensor, float] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, LowRank | None]:  # fmt: skip
        assert plan is not None
        given = _side_by_side(weights, biases, lows) if plan.kernel == "siblings" else None
        if given is None or len({w.stride(1) == 1 for w in given[0]}) > 1:
            return super().matmul_gated(x, weights, plan, lows=lows, biases=biases, activation=activation)
        return *gated.gated(x, *given, activation, _spec(x.device).sms, plan.config("matmul")), None

    def gated_backward(
        self, dy: Tensor, w: Weight, plan: Plan | None, *, low: LowRank, gate: Tensor, up: Tensor, activation: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert plan is not None
        if plan.kernel != "siblings":
            return super().gated_backward(dy, w, plan, low=low, gate=gate, up=up, activation=activation)
        (xa, b, scale, seed, p), u = _low(low), (gate.contiguous(), up.contiguous())
        programs, config = _spec(dy.device).sms, plan.config("matmul")
        operands = dy, _left(w), xa.contiguous(), b, scale, *u
        return matmul.gated_backward(*operands, activation, programs, config, seed=seed, p=p)

    def matmul_sum(
        self, terms: Sequence[tuple[Tensor, Weight]], lows: Sequence[LowRank], plan: Plan | None, *,
        wide: Tensor | None = None, likes: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        assert plan is not None
        if plan.kernel != "siblings":
            return super().matmul_sum(terms, lows, plan, wide=wide, likes=likes)
        given, added = [(x, _left(w)) for x, w in terms], [_low(low) for low in lows]
        total = siblings.matmul_sum(given, added, _spec(terms[0][0].device).sms, plan.config("matmul"))
        return total, self.outers(lows, wide, plan, likes)

    def outer(
        self, narrow: Tensor, wide: Tensor, rows: Rows | None, plan: Plan | None, *, like: Tensor,
        is_transposed: bool = False, scale: float = 1.0, row_scale: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:  # fmt: skip
        assert plan is not None
        config, out = plan.config("outer"), like.new_empty(like.shape)
        if rows is not None:
            given = out if is_transposed else out.mT
            lowrank.outer(wide, narrow, scale, given, config, row_scale=row_scale, **_read(rows))
            return out
        if row_scale is not None:
            narrow = narrow * row_scale.to(narrow.dtype).unsqueeze(1)
        parts = lowrank.outer_partials(wide, narrow, config, **_mask(dropout))
        total = out.t().contiguous() if is_transposed else out
        lowrank.sum_partials([(parts, total, scale)], plan.config("reduce"))
        return out.copy_(total.t()) if is_transposed else out

    def project_outer(
        self, dy: Tensor, b: Tensor, xa: Tensor | None, plan: Plan | None, *, scale: float, need_dyb: bool,
        need_dbias: bool, dtype: torch.dtype | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        assert plan is not None
        (M, N), R, config = dy.shape, b.shape[1], plan.config("project_outer")
        b, xa = b.contiguous(), None if xa is None else xa.contiguous()
        dyb = dy.new_empty((M, R), dtype=dtype) if need_dyb else None
        db = None if xa is None else b.new_empty(b.shape)
        dbias = dy.new_empty(N) if need_dbias else None
        rows = rows_at_once(M, N, R, config) if need_dyb else M
        # what chunks of rows have summed of db and dbias, in fp32
        sums: list[Tensor | None] = [None, None]
        for first in range(0, M, rows):
            part, is_last = slice(first, first + rows), first + rows >= M
            of_dyb, *of_columns = lowrank.project_outer(
                dy[part], b, None if xa is None else xa[part], need_dyb, need_dbias, config
            )
            segments = [] if of_dyb is None or dyb is None else [(of_dyb, dyb[part], scale)]
            for i, (parts, out, factor) in enumerate(zip(of_columns, (db, dbias), (scale, 1.0), strict=True)):
                if parts is None or out is None:
                    continue
                before = sums[i]
                parts = parts if before is None else torch.cat([before, parts])
                total = sums[i] = out if is_last else parts.new_empty((1, *out.shape))
                segments.append((parts, total, factor if is_last else 1.0))
            lowrank.sum_partials(segments, plan.config("reduce"))
        return dyb, db, dbias

    def combine(self, y: Tensor, rows: Rows, weight: Tensor | None) -> Tensor:
        assert rows.order is not None
        weight = None if weight is None else weight.contiguous()
        return combine.combine(y, rows.order, rows.offsets, weight, rows.count // rows.choices)

    def row_norms(self, w: Weight, a: Tensor, b: Tensor, scale: float, place: int | None = None) -> Tensor:
        terms = columns.small_terms(a, b, scale, torch.float32)
        return column_kernels.row_norms(w.left(), *(t.contiguous() for t in terms))

    def columns_backward(
        self, dy: Tensor, z: Tensor | None, factor: Tensor, need_dz: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        return column_kernels.columns_backward(dy, z, factor, need_dz)


def _left(w: Weight) -> Tensor:
    """A dense w `[N, K]` as a product reads it."""
    return Weight(contiguous_rows(w.data), w.is_transposed).left()


def _low(low: LowRank) -> siblings.Low:
    """A low-rank product as the kernels of siblings take it."""
    b, scale = low.b.mT if low.is_transposed else low.b, None if low.scale == 1.0 else low.scale
    return siblings.Low(contiguous_rows(low.xa), b, scale, **_mask(low.dropout))


def _side_by_side(
    weights: Sequence[Weight], biases: Sequence[Tensor | None], lows: Sequence[LowRank | None]
) -> tuple[list[Tensor], list[Tensor | None], list[siblings.Low | None]]:
    """The operands of layers of one x as the kernels of siblings take them."""
    of_bias = [None if bias is None else bias.contiguous() for bias in biases]
    return [_left(w) for w in weights], of_bias, [None if low is None else _low(low) for low in lows]


def _read(rows: Rows | None) -> dict[str, Any]:
    """How kernels find rows."""
    return {} if rows is None else {"tiles": _tiles(rows), "source": rows.index}


def _tiles(rows: Rows) -> Tiles:
    if "tiles" not in rows.cache:
        rows.cache["tiles"] = Tiles(rows.offsets, rows.count)
    return rows.cache["tiles"]


def rows_at_once(M: int, N: int, R: int, config: KernelConfig) -> int:
    """Rows of dy `[M, N]` whose partial sums of dyb take `DYB_BYTES` at most, or are of one step; chunks are alike."""
    step = 4 * config.block_m * triton.cdiv(N, config.block_n) * R
    steps = triton.cdiv(M, config.block_m)
    chunks = triton.cdiv(steps, max(1, DYB_BYTES // step))
    return min(M, triton.cdiv(steps, chunks) * config.block_m)


def _mask(dropout: Dropout | None) -> dict[str, Any]:
    return {} if dropout is None else {"seed": dropout.seed, "p": dropout.p}


def _spec(device: torch.device) -> DeviceSpec:
    return problems.device_spec(device) or interpreted_as()


def _is_fused(act: Activation) -> bool:
    """Whether the epilogue of a kernel computes it."""
    return act.name in (*epilogues.ACTIVATIONS, *epilogues.GATES)


def _packed(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t` contiguous in `dtype`."""
    if t.is_contiguous() and t.dtype is dtype:
        return t
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format).copy_(t)


BACKEND = Triton()


def backend() -> Triton:
    """The one instance."""
    return BACKEND
