"""Ragged rows by the CUDA kernels that read them where they lie: the primitives of plans of the kernel "gathered".

    project              ragged_ranks: xa or dyb
    matmul               gathered_linear: y or dx; u and h, or du, h and the router's gradient, of an activation that it
                         has, where u holds all of gate before up
    outer                ragged_ranks: da or db
    project_outer_rows   ragged_ranks: dyb and db from one read of dy

Rows of tokens are read through the order of the groups, so that nothing copies them. Ranks that are no multiples of 8
cost copies of xa and dyb. Under any other plan these primitives are those of `lorafuse.backends.cuda_siblings`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafuse.activation import Activation, GateLayout
from lorafuse.backends.cuda_grouped import TYPES, is_stored_by_columns, tiling
from lorafuse.backends.cuda_operands import address, aligned, aligned_rows, padded, scratch
from lorafuse.backends.cuda_siblings import ACTIVATIONS, Siblings
from lorafuse.backends.protocol import finish
from lorafuse.operands import ActivateBackward, Dropout, Epilogue, LowRank, Rows, Weight
from lorafuse.plan import Plan

__all__ = ["Gathered"]

# columns of a tile of dh, whose rows have a part of the router's gradient each
_TILE_N = 256


class Gathered(Siblings):
    """See the module; `_flags` is that of `lorafuse.backends.cuda.Cuda`."""

    def _flags(self, device: torch.device, stream: int, words: int) -> Tensor:
        """Words of 0 that a launch leaves zeroed."""
        raise NotImplementedError

    def reads_gathered(self, plan: Plan | None) -> bool:
        """Whether a plan's products of ragged rows run here."""
        return plan is not None and plan.kernel == "gathered"

    def in_order(self, x: Tensor, rows: Rows, plan: Plan | None) -> tuple[Tensor, Rows]:
        return (x, rows.gathered) if self.reads_gathered(plan) else super().in_order(x, rows, plan)

    def project(
        self, x: Tensor, a: Tensor, rows: Rows | None, plan: Plan | None, *, is_transposed: bool = False,
        scale: float = 1.0, dropout: Dropout | None = None, dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        if rows is None or not self.reads_gathered(plan):
            of_a = {"is_transposed": is_transposed, "scale": scale, "dropout": dropout, "dtype": dtype}
            return super().project(x, a, rows, plan, **of_a)  # type: ignore[arg-type]
        xa, _ = self._ranks(x, rows, a if is_transposed else a.mT, scale=scale)
        assert xa is not None
        return xa

    def outer(
        self, narrow: Tensor, wide: Tensor, rows: Rows | None, plan: Plan | None, *, like: Tensor,
        is_transposed: bool = False, scale: float = 1.0, row_scale: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:  # fmt: skip
        if rows is None or not self.reads_gathered(plan):
            of_like = {"like": like, "is_transposed": is_transposed, "scale": scale, "row_scale": row_scale}
            return super().outer(narrow, wide, rows, plan, dropout=dropout, **of_like)  # type: ignore[arg-type]
        summed = narrow, like, is_transposed, scale, row_scale
        _, grad = self._ranks(wide, rows, None, summed)
        assert grad is not None
        return grad

    def project_outer_rows(
        self, dy: Tensor, b: Tensor, xa: Tensor | None, rows: Rows, plan: Plan | None, *, scale: float,
        row_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if not self.reads_gathered(plan):
            return super().project_outer_rows(dy, b, xa, rows, plan, scale=scale, row_scale=row_scale)
        dyb, db = self._ranks(dy, rows, b, None if xa is None else (xa, b, True, scale, row_scale))
        assert dyb is not None
        return dyb, db

    def matmul(
        self, x: Tensor, w: Weight, rows: Rows | None, plan: Plan | None, *, low: LowRank | None = None,
        bias: Tensor | None = None, epilogue: Epilogue | None = None,
    ) -> Any:  # fmt: skip
        if rows is None or not self.reads_gathered(plan):
            return super().matmul(x, w, rows, plan, low=low, bias=bias, epilogue=epilogue)
        assert plan is not None
        with self.dense(w, x.dtype) as dense:
            return self._matmul(x, dense.right(), rows, plan, low, bias, epilogue)

    def _matmul(
        self, x: Tensor, w: Tensor, rows: Rows, plan: Plan, low: LowRank | None, bias: Tensor | None,
        epilogue: Epilogue | None,
    ) -> Any:  # fmt: skip
        """`matmul` for w `[G, K, N]`."""
        (G, K, N), S, place, x = w.shape, rows.count, self.place(x.device), aligned_rows(x)
        is_transposed = is_stored_by_columns(w, self.name)
        given: dict[str, Any] = {"N": N, "bias": address(bias := None if bias is None else aligned(bias.to(x.dtype)))}
        if low is not None:
            xa, b = _padded_low(low, x.dtype, is_transposed)
            given |= {"R": xa.shape[1], "xa": xa.data_ptr(), "stride_xa": xa.stride(0), "b": b.data_ptr()}
        act = _known(epilogue)
        is_backward = act is not None and isinstance(epilogue, ActivateBackward)
        inner = N if is_backward else N // 2
        h = shares = None
        y = x.new_empty((S, 2 * N if is_backward else N))
        if act is not None:
            h = x.new_empty((S, inner))
            given |= {"N": inner, "activation": ACTIVATIONS[act.name], "h": h.data_ptr(), "stride_h": inner}
        if is_backward:
            assert isinstance(epilogue, ActivateBackward)
            u, factor = aligned_rows(epilogue.u), epilogue.row_scale.float()
            if epilogue.need_router_grad:
                shares = factor.new_empty((-(-N // _TILE_N), S))
            given |= {
                "u": u.data_ptr(), "stride_u": u.stride(0), "row_scale": factor.data_ptr(), "products": address(shares)
            }  # fmt: skip
        self.native.gathered_linear(
            type=TYPES[x.dtype], rows=S, groups=G, K=K, transposed=is_transposed, x=x.data_ptr(), stride_x=x.stride(0),
            w=w.data_ptr(), y=y.data_ptr(), stride_y=y.shape[1], tiling=tiling(plan.config("matmul")),
            workspace=self._flags(x.device, place["stream"], 1).data_ptr(), **_places(rows), **given, **place,
        )  # fmt: skip
        if act is None:
            return finish(y, epilogue)
        return (y, h, None if shares is None else shares.sum(0)) if is_backward else (y, h)

    def _ranks(
        self, wide: Tensor, rows: Rows, b: Tensor | None,
        summed: tuple[Tensor, Tensor, bool, float, Tensor | None] | None = None, scale: float = 1.0,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """`(scale · wide b [S, R], outer(*summed))` of one read of wide; None where b `[G, C, R]` or `summed` is.

        `summed` is narrow, like, is_transposed, scale and row_scale.
        """
        (_, C), dtype, S = wide.shape, wide.dtype, rows.count
        R = b.shape[2] if b is not None else summed[0].shape[1]  # type: ignore[index]
        P, wide, place = padded(R), aligned_rows(wide), self.place(wide.device)
        projected = outer = factors = narrow = None
        given: dict[str, Any] = {
            "type": TYPES[dtype], "rows": S, "groups": rows.groups, "C": C, "R": P, "wide": wide.data_ptr(),
            "stride_wide": wide.stride(0), **_places(rows),
        }  # fmt: skip
        if b is not None:
            factors, projected = _padded(b, dtype, scale), wide.new_empty((S, P))
            given |= {"b": factors.data_ptr(), "projected": projected.data_ptr(), "stride_projected": P}
        if summed is not None:
            narrow, like, is_transposed, factor, row_scale = summed
            if row_scale is not None:
                narrow = narrow * row_scale.to(narrow.dtype).unsqueeze(1)
            narrow = aligned_rows(F.pad(narrow, (0, P - R)) if P > R else narrow)
            shape = (rows.groups, C, P) if is_transposed else (rows.groups, P, C)
            outer = like.new_empty(shape, dtype=like.dtype if like.dtype is dtype else torch.float32)
            given |= {
                "narrow": narrow.data_ptr(), "stride_narrow": narrow.stride(0), "outer": outer.data_ptr(),
                "outer_type": TYPES[outer.dtype], "transposed": not is_transposed, "scale": factor,
            }  # fmt: skip
        work = scratch(self.native.ragged_ranks_workspace(**given), wide.device)
        self.native.ragged_ranks(**given, workspace=work.data_ptr(), **place)
        if outer is not None and not (P == R and outer.dtype is like.dtype and like.is_contiguous()):
            outer = torch.empty_like(like).copy_(outer[..., :R] if is_transposed else outer[:, :R])
        return projected if projected is None or P == R else projected[:, :R].contiguous(), outer


def _places(rows: Rows) -> dict[str, int]:
    """Where rows end, and where those of tokens lie."""
    if "int64" not in rows.cache:
        rows.cache["int64"] = rows.offsets.long()
    places = {"offsets": rows.cache["int64"].data_ptr()}
    if rows.gathers:
        places |= {"order": address(rows.order), "choices": rows.choices}
    return places


def _known(epilogue: Epilogue | None) -> Activation | None:
    """The activation of an epilogue that the kernel has: of gate and up, one behind the other."""
    act = None if epilogue is None else epilogue.activation
    is_known = isinstance(act, Activation) and act.gated and act.layout is GateLayout.CONCATENATED
    return act if is_known and act.name in ACTIVATIONS else None  # type: ignore[union-attr, return-value]


def _padded(b: Tensor, dtype: torch.dtype, scale: float, is_transposed: bool = False) -> Tensor:
    """`scale · b`, b `[G, C, R]`, in `dtype`, ranks of 0 up to a multiple of 8; `[G, R, C]` when `is_transposed`."""
    G, C, R = b.shape
    if R % 8 == 0 and scale == 1.0:
        return aligned((b.mT if is_transposed else b).to(dtype))
    out = b.new_zeros((G, padded(R), C) if is_transposed else (G, C, padded(R)), dtype=dtype)
    torch.mul(b, scale, out=out[:, :R].mT if is_transposed else out[..., :R])
    return out


def _padded_low(low: LowRank, dtype: torch.dtype, is_transposed: bool) -> tuple[Tensor, Tensor]:
    """xa `[S, R]` and the other factor as the product reads them, with ranks of 0 up to a multiple of 8."""
    xa, R = low.xa, low.xa.shape[1]
    xa = aligned_rows(xa if R % 8 == 0 else F.pad(xa, (0, padded(R) - R)))
    return xa, _padded(low.b.mT if low.is_transposed else low.b, dtype, low.scale, is_transposed)
