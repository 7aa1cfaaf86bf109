"""Layers of one x by the CUDA kernels: the primitives of plans that run them together ("siblings").

    project         project_x: xa of all layers from one read of x
    matmuls         siblings_forward: every y in one launch, after one that rounds every scale · b
    project_outers  reduce_each: dyb, db and dbias of all layers, in two launches, from one read of each dy
    matmul_sum      siblings_dx: dx in one launch, after one that rounds the a of all layers
    outer           reduce_x: da of all layers from one read of x
    matmul_gated    gated_forward: gate, up and h of a gated MLP in one launch, after one that rounds both scale · b. By
                    plans "siblings_ha" partial sums of ha too, which another launch adds; a and scale · b of down are
                    rounded with the others
    gated_backward  gated_backward: dgate, dup and h in one launch, masked or not, after one that rounds a of down

Ranks that are no multiples of 8 cost copies of xa and dyb. Under any other plan one layer after the other runs in
composites, and these primitives are ATen's.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

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
from lorafuse.plan import Plan, configs_cuda

__all__ = ["ACTIVATIONS", "Siblings"]

# fields of the structs of api_siblings.hpp and api_reduce.hpp, in the order in which launches list those of a layer
_LOW = "R", "{0}", "stride_{0}", "{1}", "stride_{1}", "rounded"
_FORWARD = ("N", "w", "stride_w", "bias", "y", "stride_y", *(name.format("xa", "b") for name in _LOW))
_GATED = "w", "stride_w", "bias", "R", "b", "stride_b", "rounded"
_TERMS = "N", "dy", "stride_dy", "w", "stride_w"
_LOWS = (*(name.format("dyb", "a") for name in _LOW), "seed", "drop_below")
_NO_B = 0, 0, None
_NO_LOW = 0, 0, 0, *_NO_B
_REDUCED = (
    *("N", "R", "b_type", "dy", "stride_dy", "b", "stride_b", "scale", "dyb", "stride_dyb"),
    *("xa", "stride_xa", "db", "dbias"),
)
# the numbers of activations in api_gated.hpp
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "clamped_swiglu": 5}


class Siblings(Aten):
    """See the module; `native`, `place` and `ticket` are those of `lorafuse.backends.cuda.Cuda`."""

    native: ModuleType

    def place(self, device: torch.device) -> dict[str, int]:
        """Where a launch goes."""
        raise NotImplementedError

    def ticket(self, device: torch.device, stream: int) -> Tensor:
        """The word of a launch whose blocks draw their tiles."""
        raise NotImplementedError

    def by_ticket(self, device: torch.device) -> dict[str, int]:
        """Where a launch goes whose blocks draw their tiles, and the word that counts them."""
        place = self.place(device)
        return {**place, "workspace": self.ticket(device, place["stream"]).data_ptr()}

    def runs_siblings(self, plan: Plan | None) -> bool:
        return plan is not None and plan.kernel in ("siblings", "siblings_ha")

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
        (M, K), dtype, y = x.shape, x.dtype, []
        given, kept = [], []
        for w, low, bias in zip(weights, lows, biases, strict=True):
            data, of_low = contiguous_rows(w.data), _NO_LOW
            N = data.shape[0]
            mine = x.new_empty((M, N))
            y.append(mine)
            if bias is not None:
                bias = aligned(bias)
            if low is not None:
                of_low, operands = _low_of(low, dtype)
                kept.append(operands)
            kept.append((data, bias))
            given.append((N, data.data_ptr(), data.stride(0), address(bias), mine.data_ptr(), N, *of_low))
        self.native.siblings_forward(
            type=TYPES[dtype], count=len(y), M=M, K=K, x=x.data_ptr(), stride_x=x.stride(0), **_fields(_FORWARD, given),
            tiling=tiling(plan.config("matmul")), **self.by_ticket(x.device),
        )  # fmt: skip
        return y

    def matmul_gated(
        self, x: Tensor, weights: Sequence[Weight], plan: Plan | None, *, lows: Sequence[LowRank | None],
        biases: Sequence[Tensor | None], activation: str, need_up: bool = True,
        down: tuple[Tensor, Tensor, float] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, LowRank | None]:  # fmt: skip
        if not self.runs_siblings(plan):
            return super().matmul_gated(
                x, weights, plan, lows=lows, biases=biases, activation=activation, need_up=need_up, down=down
            )
        assert plan is not None
        (M, K), N, dtype = x.shape, weights[0].data.shape[0], x.dtype
        gate, h = (x.new_empty((M, N)) for _ in range(2))
        up = torch.empty_like(gate) if need_up else None
        xa = _side_by_side([low.xa for low in lows if low is not None])
        given, kept = [], []
        for w, low, bias in zip(weights, lows, biases, strict=True):
            data, R, of_b = contiguous_rows(w.data), 0, _NO_B
            if bias is not None:
                bias = aligned(bias)
            if low is not None:
                R, (of_b, operands) = low.xa.shape[1], _b_of(low, dtype)
                kept.append(operands)
            kept.append((data, bias))
            given.append((data.data_ptr(), data.stride(0), address(bias), R, *of_b))
        launch: dict[str, Any] = {
            "type": TYPES[dtype], "activation": ACTIVATIONS[activation], "M": M, "N": N, "K": K, "x": x.data_ptr(),
            "stride_x": x.stride(0), "xa": address(xa), "stride_xa": 0 if xa is None else xa.stride(0),
            **_fields(_GATED, given), "gate": gate.data_ptr(), "stride_gate": N, "up": address(up), "stride_up": N,
            "h": h.data_ptr(), "stride_h": N, "tiling": tiling(config := plan.config("matmul")), "workspace": 0,
        }  # fmt: skip
        low_of_down = None
        if down is not None and plan.kernel == "siblings_ha" and configs_cuda.gives_ha(config, M, *down[0].shape):
            low_of_down, of_down = self._add_down(launch, x, *down)
            kept.append(of_down)
        self.native.gated_forward(**launch | self.by_ticket(x.device))
        return gate, up, h, low_of_down

    def _add_down(
        self, launch: dict[str, Any], x: Tensor, a: Tensor, b: Tensor, scale: float
    ) -> tuple[LowRank, tuple[Tensor, ...]]:
        """Down's low-rank product, whose xa a launch of gated_forward then gives too, and what must live until it."""
        R, (given_a, _), (given_b, _), round_b = len(a), adapter_of(a, x.dtype), adapter_of(b, x.dtype), None
        a, round_a = rounding(given_a, x.dtype, 1.0)
        if padded(R) == R:
            (b, round_b), scale = rounding(given_b, x.dtype, scale), 1.0
        ha = x.new_empty((len(x), padded(R)))
        launch |= {
            "R_down": R, "a_down": a.data_ptr(), "stride_a_down": a.stride(0), "ha": ha.data_ptr(),
            "stride_ha": ha.shape[1], "rounded": (*launch["rounded"], round_a, round_b),
        }  # fmt: skip
        partials = scratch(self.native.gated_forward_partials(**launch), x.device)
        launch["partials"] = partials.data_ptr()
        return LowRank(ha[:, :R], b, scale), (given_a, given_b, a, partials)

    def gated_backward(
        self, dy: Tensor, w: Weight, plan: Plan | None, *, low: LowRank, gate: Tensor, up: Tensor, activation: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.runs_siblings(plan):
            return super().gated_backward(dy, w, plan, low=low, gate=gate, up=up, activation=activation)
        assert plan is not None
        dy, dyb, gate, up = map(aligned_rows, (dy, low.xa, gate, up))
        data, ((a, stride_a, rounded), _kept) = contiguous_rows(w.data), _b_of(low, dy.dtype)
        (M, N), (dgate, dup, h) = gate.shape, (gate.new_empty(gate.shape) for _ in range(3))
        self.native.gated_backward(
            type=TYPES[dy.dtype], activation=ACTIVATIONS[activation], M=M, N=N, K=dy.shape[1], R=dyb.shape[1],
            dy=dy.data_ptr(), stride_dy=dy.stride(0), w=data.data_ptr(), stride_w=data.stride(0), dyb=dyb.data_ptr(),
            stride_dyb=dyb.stride(0), a=a, stride_a=stride_a, gate=gate.data_ptr(),
            stride_gate=gate.stride(0), up=up.data_ptr(), stride_up=up.stride(0), dgate=dgate.data_ptr(),
            stride_dgate=N, dup=dup.data_ptr(), stride_dup=N, h=h.data_ptr(), stride_h=N, rounded=rounded,
            tiling=tiling(plan.config("matmul")), **mask(low.dropout), **self.by_ticket(dy.device),
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
        M, of, device, ranks = dys[0].shape[0], dys[0].dtype, dys[0].device, [b.shape[1] for b in bs]
        # of each layer the buffer of its part, and where it begins there
        buffers: list[Tensor] = []
        places: dict[int, tuple[int, int]] = {}
        for part in parts:
            first = 0
            for i in part:
                places[i] = len(buffers), first
                first += padded(ranks[i])
            buffers.append(dys[0].new_empty((M, first)))
        dbs: list[Tensor | None] = []
        dbiases: list[Tensor | None] = []
        # what the launch is given of each layer; operands that were copied for it
        given, kept = [], []
        for i, (dy, b, xa, scale) in enumerate(zip(dys, bs, xas, scales, strict=True)):
            N, R = b.shape
            (b, b_type), dyb, stride_dyb, db = adapter_of(b, of), 0, 0, None
            dbias = dy.new_empty(N) if need_dbias[i] else None
            if i in places:
                at, first = places[i]
                dyb, stride_dyb = buffers[at].data_ptr() + first * of.itemsize, buffers[at].shape[1]
            if xa is not None:
                xa, db = aligned_rows(xa), b.new_empty((N, R))
            dbs.append(db)
            dbiases.append(dbias)
            if dyb or db is not None or dbias is not None:
                dy = aligned_rows(dy)
                kept.append((dy, b, xa))
                operands = N, R, b_type, dy.data_ptr(), dy.stride(0), b.data_ptr(), R, scale, dyb, stride_dyb
                of_xa = (0, 0, 0) if xa is None or db is None else (xa.data_ptr(), xa.stride(0), db.data_ptr())
                given.append((*operands, *of_xa, address(dbias)))
        if given:
            reduced: dict[str, Any] = {"type": TYPES[of], "count": len(given), "M": M, **_fields(_REDUCED, given)}
            work = scratch(self.native.reduce_each_workspace(**reduced), device)
            self.native.reduce_each(**reduced, workspace=work.data_ptr(), **self.place(device))
        dybs = []
        for part, buffer in zip(parts, buffers, strict=True):
            total = sum(ranks[i] for i in part)
            if any(ranks[i] != padded(ranks[i]) for i in part[:-1]):
                columns = [(places[i][1], ranks[i]) for i in part]
                buffer = side_by_side([buffer[:, first : first + R] for first, R in columns])
            dybs.append(buffer if buffer.shape[1] == total else buffer[:, :total])
        likes = zip(dbs, bs, strict=True)
        return dybs, [db if db is None or db.dtype is b.dtype else db.to(b.dtype) for db, b in likes], dbiases

    def matmul_sum(
        self, terms: Sequence[tuple[Tensor, Weight]], lows: Sequence[LowRank], plan: Plan | None, *,
        wide: Tensor | None = None, likes: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        if not self.runs_siblings(plan):
            return super().matmul_sum(terms, lows, plan, wide=wide, likes=likes)
        assert plan is not None
        given, of_lows, kept = [], [], []
        for dy, w in terms:
            dy, data = aligned_rows(dy), contiguous_rows(w.data)
            kept.append((dy, data))
            given.append((dy.shape[1], dy.data_ptr(), dy.stride(0), data.data_ptr(), data.stride(0)))
        for low in lows:
            of_low, operands = _low_of(low, dy.dtype)
            drawn = mask(low.dropout)
            kept.append(operands)
            of_lows.append((*of_low, drawn.get("seed", 0), drawn.get("drop_below", 0)))
        (M, _), K = dy.shape, data.shape[1]
        dx = dy.new_empty((M, K))
        self.native.siblings_dx(
            type=TYPES[dx.dtype], count=len(given), M=M, K=K, **_fields(_TERMS, given), lows=len(of_lows),
            **_fields(_LOWS, of_lows), dx=dx.data_ptr(), stride_dx=K, tiling=tiling(plan.config("matmul")),
            **self.by_ticket(dx.device),
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


def _fields(names: Sequence[str], of_layers: Sequence[tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """A launch's fields of all layers, from the fields of each."""
    return dict(zip(names, zip(*of_layers, strict=True), strict=True)) if of_layers else {}


def _low_of(low: LowRank, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """The fields `_LOW`, and tensors that must live until their launch: the b that is rounded until then too."""
    xa, (of_b, operands) = aligned_rows(low.xa), _b_of(low, dtype)
    return (xa.shape[1], xa.data_ptr(), xa.stride(0), *of_b), (xa, *operands)


def _b_of(low: LowRank, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """Of those the last three, and the tensors they are about."""
    given, _ = adapter_of(low.b, dtype)
    b, rounded = rounding(given, dtype, low.scale)
    return (b.data_ptr(), b.stride(0), rounded), (given, b)


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
