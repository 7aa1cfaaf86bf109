"""Layers of one x by the CUDA kernels: the primitives of plans that run them together ("siblings").

    project         project_x: xa of all layers from one read of x
    matmuls         siblings_forward: every y in one launch, after one that rounds every scale · b
    project_outers  reduce_each: dyb, db and dbias of all layers, in two launches, from one read of each dy
    matmul_sum      siblings_dx: dx in one launch, after one that rounds the a of all layers
    outer           reduce_x: da of all layers from one read of x
    matmul_gated    gated_forward: gate, up and h of a gated MLP in one launch, after one that rounds both scale · b
    gated_backward  gated_backward: dgate, dup and h in one launch, after one that rounds a of the down projection

Ranks that are no multiples of 8 cost copies of xa and dyb. Under any other plan one layer after the other runs in
composites, and these primitives are ATen's.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from lorafuse.backends.aten import Aten
from lorafuse.backends.cuda_grouped import TYPES, tiling
from lorafuse.backends.cuda_operands import (
    adapter_of,
    address,
    aligned,
    aligned_rows,
    mask,
    padded,
    rounding,
    scratch,
)
from lorafuse.backends.protocol import side_by_side
from lorafuse.operands import Dropout, LowRank, Rows, Weight, contiguous_rows
from lorafuse.plan import Plan

__all__ = ["ACTIVATIONS", "Siblings"]

# the numbers of activations in api_gated.hpp
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "clamped_swiglu": 5}


class Siblings(Aten):
    """See the module; `native` and `place` are those of `lorafuse.backends.cuda.Cuda`."""

    native: ModuleType

    def place(self, device: torch.device) -> dict[str, int]:
        """Where a launch goes."""
        raise NotImplementedError

    def runs_siblings(self, plan: Plan | None) -> bool:
        return plan is not None and plan.kernel == "siblings"

    def project(
        self, x: Tensor, a: Tensor, rows: Rows | None, plan: Plan | None, *, is_transposed: bool = False,
        scale: float = 1.0, dropout: Dropout | None = None, dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        if not self.runs_siblings(plan):
            of_a = {"is_transposed": is_transposed, "scale": scale, "dropout": dropout, "dtype": dtype}
            return super().project(x, a, rows, plan, **of_a)  # type: ignore[arg-type]
        assert scale == 1.0
        assert not is_transposed
        (M, K), R, (given, a_type) = x.shape, a.shape[0], adapter_of(a, x.dtype)
        xa = x.new_empty((M, padded(R)))
        self.native.project_x(
            type=TYPES[x.dtype], a_type=a_type, M=M, K=K, R=R, x=x.data_ptr(), stride_x=x.stride(0), a=given.data_ptr(),
            stride_a=K, xa=xa.data_ptr(), stride_xa=xa.shape[1], **mask(dropout), **self.place(x.device),
        )  # fmt: skip
        return xa[:, :R]

    def matmuls(
        self, x: Tensor, weights: Sequence[Weight], plan: Plan | None, *, lows: Sequence[LowRank | None],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:  # fmt: skip
        if not self.runs_siblings(plan):
            return super().matmuls(x, weights, plan, lows=lows, biases=biases)
        assert plan is not None
        (M, K), dtype, data = x.shape, x.dtype, [contiguous_rows(w.data) for w in weights]
        y = [x.new_empty((M, len(w))) for w in data]
        of_bias = [None if bias is None else aligned(bias) for bias in biases]
        xa = [None if low is None else aligned_rows(low.xa) for low in lows]
        _given, b, rounded = _rounded_b(lows, dtype)
        self.native.siblings_forward(
            type=TYPES[dtype], count=len(data), M=M, K=K, N=tuple(map(len, data)),
            R=tuple(0 if t is None else t.shape[1] for t in xa), x=x.data_ptr(), stride_x=x.stride(0), w=_places(data),
            stride_w=_strides(data), bias=_places(of_bias), xa=_places(xa), stride_xa=_strides(xa), b=_places(b),
            stride_b=_strides(b), y=_places(y), stride_y=_strides(y), rounded=rounded,
            tiling=tiling(plan.config("matmul")), **self.place(x.device),
        )  # fmt: skip
        return y

    def matmul_gated(
        self, x: Tensor, weights: Sequence[Weight], plan: Plan | None, *, lows: Sequence[LowRank | None],
        biases: Sequence[Tensor | None], activation: str, need_up: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        if not self.runs_siblings(plan):
            return super().matmul_gated(
                x, weights, plan, lows=lows, biases=biases, activation=activation, need_up=need_up
            )
        assert plan is not None
        (M, K), dtype, data = x.shape, x.dtype, [contiguous_rows(w.data) for w in weights]
        gate, h = (x.new_empty((M, len(data[0]))) for _ in range(2))
        up = torch.empty_like(gate) if need_up else None
        of_bias = [None if bias is None else aligned(bias) for bias in biases]
        xa = _side_by_side([low.xa for low in lows if low is not None])
        _given, b, rounded = _rounded_b(lows, dtype)
        self.native.gated_forward(
            type=TYPES[dtype], activation=ACTIVATIONS[activation], M=M, N=gate.shape[1], K=K,
            R=tuple(0 if low is None else low.xa.shape[1] for low in lows), x=x.data_ptr(), stride_x=x.stride(0),
            w=_places(data), stride_w=_strides(data), bias=_places(of_bias), xa=address(xa),
            stride_xa=0 if xa is None else xa.stride(0), b=_places(b), stride_b=_strides(b), gate=gate.data_ptr(),
            stride_gate=gate.stride(0), up=address(up), stride_up=gate.stride(0), h=h.data_ptr(), stride_h=h.stride(0),
            rounded=rounded, tiling=tiling(plan.config("matmul")), **self.place(x.device),
        )  # fmt: skip
        return gate, up, h

    def gated_backward(
        self, dy: Tensor, w: Weight, plan: Plan | None, *, low: LowRank, gate: Tensor, up: Tensor, activation: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.runs_siblings(plan):
            return super().gated_backward(dy, w, plan, low=low, gate=gate, up=up, activation=activation)
        assert plan is not None
        dy, dyb, gate, up = map(aligned_rows, (dy, low.xa, gate, up))
        data, dtype, (given, _) = contiguous_rows(w.data), dy.dtype, adapter_of(low.b, dy.dtype)
        a, rounded = rounding(given, dtype, low.scale)
        (M, N), (dgate, dup, h) = gate.shape, (gate.new_empty(gate.shape) for _ in range(3))
        self.native.gated_backward(
            type=TYPES[dtype], activation=ACTIVATIONS[activation], M=M, N=N, K=dy.shape[1], R=dyb.shape[1],
            dy=dy.data_ptr(), stride_dy=dy.stride(0), w=data.data_ptr(), stride_w=data.stride(0), dyb=dyb.data_ptr(),
            stride_dyb=dyb.stride(0), a=a.data_ptr(), stride_a=a.stride(0), gate=gate.data_ptr(),
            stride_gate=gate.stride(0), up=up.data_ptr(), stride_up=up.stride(0), dgate=dgate.data_ptr(),
            stride_dgate=N, dup=dup.data_ptr(), stride_dup=N, h=h.data_ptr(), stride_h=N, rounded=rounded,
            tiling=tiling(plan.config("matmul")), **mask(low.dropout), **self.place(dy.device),
        )  # fmt: skip
        return dgate, dup, h

    def project_outer(
        self, dy: Tensor, b: Tensor, xa: Tensor | None, plan: Plan | None, *, scale: float, need_dyb: bool,
        need_dbias: bool, dtype: torch.dtype | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        if not self.runs_siblings(plan):
            return super().project_outer(
                dy, b, xa, plan, scale=scale, need_dyb=need_dyb, need_dbias=need_dbias, dtype=dtype
            )
        dyb, (db,), (dbias,) = self.project_outers(
            [dy], [b], [xa], plan, scales=[scale], need_dbias=[need_dbias], parts=[[0]] if need_dyb else []
        )
        return dyb[0] if dyb else None, db, dbias

    def project_outers(
        self, dys: Sequence[Tensor], bs: Sequence[Tensor], xas: Sequence[Tensor | None], plan: Plan | None, *,
        scales: Sequence[float], need_dbias: Sequence[bool], parts: Sequence[Sequence[int]],
        dtype: torch.dtype | None = None,
    ) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:  # fmt: skip
        if not (dys and self.runs_siblings(plan)):
            return super().project_outers(
                dys, bs, xas, plan, scales=scales, need_dbias=need_dbias, parts=parts, dtype=dtype
            )
        M, of, ranks = dys[0].shape[0], dys[0].dtype, [b.shape[1] for b in bs]
        dyb: list[Tensor | None] = [None] * len(dys)
        buffers = [dys[0].new_empty((M, sum(padded(ranks[i]) for i in part))) for part in parts]
        for part, buffer in zip(parts, buffers, strict=True):
            first = 0
            for i in part:
                dyb[i] = buffer[:, first : first + ranks[i]]
                first += padded(ranks[i])
        given, xas = [adapter_of(b, of) for b in bs], [None if xa is None else aligned_rows(xa) for xa in xas]
        dbs = [None if xa is None else b.new_empty(b.shape) for xa, (b, _) in zip(xas, given, strict=True)]
        dbiases = [dy.new_empty(dy.shape[1]) if need else None for dy, need in zip(dys, need_dbias, strict=True)]
        results = zip(dyb, dbs, dbiases, strict=True)
        if here := [i for i, some in enumerate(results) if any(t is not None for t in some)]:
            read = [aligned_rows(dys[i]) for i in here]

            def of_each(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
                return [tensors[i] for i in here]

            reduced = {
                "type": TYPES[of], "count": len(here), "M": M, "b_type": tuple(given[i][1] for i in here),
                "N": tuple(dy.shape[1] for dy in read), "R": tuple(ranks[i] for i in here), "dy": _places(read),
                "stride_dy": _strides(read), "b": tuple(given[i][0].data_ptr() for i in here),
                "stride_b": tuple(ranks[i] for i in here), "xa": _places(of_each(xas)),
                "stride_xa": _strides(of_each(xas)), "scale": tuple(scales[i] for i in here),
                "dyb": _places(of_each(dyb)), "stride_dyb": _strides(of_each(dyb)), "db": _places(of_each(dbs)),
                "dbias": _places(of_each(dbiases)),
            }  # fmt: skip
            work = scratch(self.native.reduce_each_workspace(**reduced), dys[0].device)
            self.native.reduce_each(**reduced, workspace=work.data_ptr(), **self.place(dys[0].device))
        dybs = []
        for part, buffer in zip(parts, buffers, strict=True):
            has_gaps = any(ranks[i] != padded(ranks[i]) for i in part[:-1])
            each = [t for i in part if (t := dyb[i]) is not None]
            dybs.append(side_by_side(each) if has_gaps else buffer[:, : sum(ranks[i] for i in part)])
        return dybs, [db if db is None else db.to(b.dtype) for db, b in zip(dbs, bs, strict=True)], dbiases

    def matmul_sum(
        self, terms: Sequence[tuple[Tensor, Weight]], lows: Sequence[LowRank], plan: Plan | None, *,
        wide: Tensor | None = None, likes: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        if not self.runs_siblings(plan):
            return super().matmul_sum(terms, lows, plan, wide=wide, likes=likes)
        assert plan is not None
        dys, data = [aligned_rows(dy) for dy, _ in terms], [contiguous_rows(w.data) for _, w in terms]
        dtype, dx = dys[0].dtype, dys[0].new_empty((dys[0].shape[0], data[0].shape[1]))
        dyb, masks = [aligned_rows(low.xa) for low in lows], [mask(low.dropout) for low in lows]
        _given, a, rounded = _rounded_b(lows, dtype)
        self.native.siblings_dx(
            type=TYPES[dtype], count=len(dys), M=dx.shape[0], K=dx.shape[1], N=tuple(map(len, data)), dy=_places(dys),
            stride_dy=_strides(dys), w=_places(data), stride_w=_strides(data), lows=len(lows),
            R=tuple(t.shape[1] for t in dyb), dyb=_places(dyb), stride_dyb=_strides(dyb), a=_places(a),
            stride_a=_strides(a), seed=tuple(one.get("seed", 0) for one in masks),
            drop_below=tuple(one.get("drop_below", 0) for one in masks), rounded=rounded, dx=dx.data_ptr(),
            stride_dx=dx.stride(0), tiling=tiling(plan.config("matmul")), **self.place(dx.device),
        )  # fmt: skip
        return dx, self.outers(lows, wide, plan, likes)

    def outer(
        self, narrow: Tensor, wide: Tensor, rows: Rows | None, plan: Plan | None, *, like: Tensor,
        is_transposed: bool = False, scale: float = 1.0, row_scale: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:  # fmt: skip
        if not self.runs_siblings(plan):
            return super().outer(
                narrow, wide, rows, plan, like=like, is_transposed=is_transposed, scale=scale, row_scale=row_scale,
                dropout=dropout,
            )  # fmt: skip
        assert scale == 1.0
        assert not is_transposed
        assert row_scale is None
        narrow, wide, dtype = aligned_rows(narrow), aligned_rows(wide), wide.dtype
        (M, K), R = wide.shape, narrow.shape[1]
        da = wide.new_empty((R, K), dtype=like.dtype if like.dtype in (dtype, torch.float32) else torch.float32)
        reduced = {
            "type": TYPES[dtype], "a_type": TYPES[da.dtype], "M": M, "K": K, "R": R, "x": wide.data_ptr(),
            "stride_x": wide.stride(0), "dyb": narrow.data_ptr(), "stride_dyb": narrow.stride(0), "da": da.data_ptr(),
            **mask(dropout),
        }  # fmt: skip
        work = scratch(self.native.reduce_x_workspace(**reduced), wide.device)
        self.native.reduce_x(**reduced, workspace=work.data_ptr(), **self.place(wide.device))
        return da.to(like.dtype)


def _rounded_b(
    lows: Sequence[LowRank | None], dtype: torch.dtype
) -> tuple[list[Tensor | None], list[Tensor | None], tuple[dict[str, int | float] | None, ...]]:
    """Of each b, or a of dx: the one given, which must live until it is rounded, the one that a product reads, and that
    rounding.
    """
    given = [None if low is None else adapter_of(low.b, dtype)[0] for low in lows]
    made = [
        (None, None) if low is None or t is None else rounding(t, dtype, low.scale)
        for low, t in zip(lows, given, strict=True)
    ]
    return given, [b for b, _ in made], tuple(rounded for _, rounded in made)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    """xa `[M, ΣR]` of parts `[M, R]`, on 16-byte boundaries: as `project` returned it, or copied; None of none."""
    if len(parts) < 2:
        return aligned_rows(parts[0]) if parts else None
    first, second = parts
    (M, R), place = first.shape, first.storage_offset()
    together = R + second.shape[1]
    if (
        first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.stride() == second.stride()
        and first.stride(1) == 1
        and second.storage_offset() == place + R
    ):
        return aligned_rows(first.as_strided((M, together), first.stride(), place))
    return aligned_rows(torch.cat(parts, 1))


def _places(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(map(address, tensors))


def _strides(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(0 if t is None else t.stride(0) for t in tensors)
