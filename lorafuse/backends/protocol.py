"""The primitives: what a backend implements once, and what every operator of `lorafuse.ops` is made of.

    project         xa = scale · drop(x) aᵀ                         to the rank: xa, and dyb = dy b
    matmul          y = epilogue(x wᵀ + bias + scale · xa bᵀ)        the one main loop: y, dx, (u, h), (du, h)
    outer           scale · Σ_s narrow[s]ᵀ (row_scale[s] · wide[s])  sums over rows in a fixed order: da, db
    project_outer   dyb, db and dbias from one read of dy           default: project and outer
    project_outers  the same of several layers                      default: project_outer for each
    project_outer_rows                                              the same of ragged rows, without dbias
    matmuls         y_i = x w_iᵀ + bias_i + low_i                    of layers of one x; default: matmul for each
    matmul_gated    gate and up as of matmuls, h = act(gate) · up    default: matmuls, and the activation
    gated_backward  dgate, dup, h of dh = x wᵀ + low                 default: matmul, and the activation's backward
    matmul_sum      Σ_i x_i w_iᵀ + Σ_j scale_j · xa_j b_jᵀ          dx of layers of one x; default: matmul and sums
    combine         out[t] = Σ_j weight[t, j] · y of choice j       the weighted sum over a token's choices
    row_norms, columns_backward                                     DoRA's (`lorafuse.backends.columns`)

Operands are values (`lorafuse.operands`). `x` is a matrix `[rows, K]` as `Backend.matrix` gives it, of float dtype;
adapters may be of another dtype and any strides, and are rounded to x's dtype inside. `rows` is None for a dense layer.
`plan` is the plan of the projection (`lorafuse.plan`), asked once by the operator, which runs the primitives within
`guard`. A primitive writes into no operand, does not wait for the device where offsets lie on one, and computes no
gradient of w. `matmul` reads a w of any format: a quantized one is decoded into the workspace (`workspace`), right
before the product that reads it, and never kept; a backend may override `decode`.

A backend may offer composites, several primitives in one launch, under the names below; an operator asks for them first
and composes otherwise. They are None where a backend has none. The plan of a backend with composites of a linear layer
refuses problems whose xa is fp32 over 16-bit operands: these do not learn of it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lorafuse.activation import gate_backward, gate_forward
from lorafuse.backends import columns, workspace
from lorafuse.backends.multi import Multi
from lorafuse.operands import ActivateBackward, Dropout, Epilogue, LowRank, Rows, Weight, route
from lorafuse.plan import Plan, Problem

__all__ = ["NO_GUARD", "Backend", "Problems", "device_guard", "finish", "side_by_side"]

# of an operator, made only where somebody plans
Problems = Callable[[], Problem | tuple[Problem, ...]]
NO_GUARD = contextlib.nullcontext()


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a CUDA device current; nothing for any other."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return NO_GUARD


class Backend:
    """What the backends have in common; each overrides the primitives. `name` is that of `lorafuse.use_backend`."""

    name: str
    # whether passes are recorded and repeated (`lorafuse.backends.recorder`)
    repeats = False

    # (x [M, K], w, bias, a, b, plan, scale, dropout) → (y [M, N], xa [M, R]) of a dense layer; xa follows them where
    # `matmul_gated` gave it
    linear_forward: Callable[..., tuple[Tensor, Tensor]] | None = None
    # (dy [M, N], x or None, xa or None, w, a, b, plan, scale, dropout, needs) → (dx, da, db, dbias), None where not
    # needed
    linear_backward: Callable[..., tuple[Tensor | None, ...]] | None = None
    # (dy, w.t, plan, low, x, like) → (dx, da) of a dense layer with dropout, from one draw of its mask
    matmul_outer: Callable[..., tuple[Tensor, Tensor]] | None = None

    # the primitives over rows of many adapters (`lorafuse.backends.multi`); None where a backend has none
    multi: Multi | None = None

    def runs_siblings(self, plan: Plan | None) -> bool:
        """Whether a plan's layers run by the primitives, those of one x together, and not each by composites."""
        return self.linear_forward is None

    def plan(self, operator: Problems, device: torch.device) -> Plan | None:
        """The plan of an operator among this backend's own kernels; None where there is nothing to choose.

        Raises ValueError or TypeError, with the way out, where none can run.
        """
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        """Raises TypeError or ValueError, with the way out, for a tensor whose kind this backend cannot run."""

    def guard(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Makes the device current for launches."""
        return NO_GUARD

    def matrix(self, t: Tensor) -> Tensor:
        """`t [rows, K]` with the strides that the primitives read; copies only where they cannot read t's."""
        return t

    def in_order(self, x: Tensor, rows: Rows, plan: Plan | None) -> tuple[Tensor, Rows]:
        """x `[T, …]` and the rows by which the primitives read it: gathered here unless the plan's kernels do that."""
        return x.index_select(0, rows.token), rows

    def route(self, index: Tensor, groups: int) -> Rows:
        """The rows of choices `index [T, k]` among `groups`: `lorafuse.operands.route`."""
        return route(index, groups)

    def decode(self, w: Weight, dtype: torch.dtype, out: Tensor) -> Tensor:
        """The matrices of a quantized w, as stored, in `dtype`: written into `out`, contiguous, of sizes `w.stored`.

        Bit for bit what the codec of its format gives.
        """
        return w.decoded(dtype, out).data

    def dense(self, w: Weight, dtype: torch.dtype) -> contextlib.AbstractContextManager[Weight]:
        """w in the dense format, for the products within the block: no result may alias it."""
        return contextlib.nullcontext(w) if w.format == "dense" else self._decoded(w, dtype)

    @contextlib.contextmanager
    def _decoded(self, w: Weight, dtype: torch.dtype) -> Iterator[Weight]:
        with workspace.buffer(w.stored, dtype, w.data.device) as out:
            yield Weight(self.decode(w, dtype, out), w.is_transposed)

    def parts(self, w: Weight, dtype: torch.dtype, is_whole: bool = False) -> Iterator[tuple[slice, Weight]]:
        """Which groups of a stack, and their matrices in the dense format: all of a dense one, of a quantized one as
        many at a time as the workspace's budget holds, unless `is_whole`. Each part is overwritten by the next.
        """
        G, *sizes = w.stored
        if w.format == "dense":
            yield slice(0, G), w
            return
        fitting = workspace.budget() // max(1, math.prod(sizes) * dtype.itemsize)
        step = max(1, G if is_whole else min(G, fitting))
        with workspace.buffer((step, *sizes), dtype, w.data.device) as out:
            for start in range(0, G, step):
                stop = min(G, start + step)
                some = w if step == G else w.select(start, stop)
                yield slice(start, stop), Weight(self.decode(some, dtype, out[: stop - start]), w.is_transposed)

    def project(
        self, x: Tensor, a: Tensor, rows: Rows | None, plan: Plan | None, *, is_transposed: bool = False,
        scale: float = 1.0, dropout: Dropout | None = None, dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """`scale · drop(x) aᵀ`, `[S, R]` in `dtype` (x's); a `[(G,) R, K]`, or `[(G,) K, R]` when `is_transposed`.

        Rows of no group hold anything.
        """
        raise NotImplementedError

    def matmul(
        self, x: Tensor, w: Weight, rows: Rows | None, plan: Plan | None, *, low: LowRank | None = None,
        bias: Tensor | None = None, epilogue: Epilogue | None = None,
    ) -> Any:  # fmt: skip
        """`x wᵀ + bias + low`, `[S, N]` in x's dtype, bias `[(G,) N]`; with an epilogue, its results.

        Rows of no group hold anything.
        """
        raise NotImplementedError

    def matmuls(
        self, x: Tensor, weights: Sequence[Weight], plan: Plan | None, *, lows: Sequence[LowRank | None],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:  # fmt: skip
        """`[x w_iᵀ + bias_i + low_i]`, `[S, N_i]` each, of layers that read one x; rows are dense."""
        each = zip(weights, lows, biases, strict=True)
        return [self.matmul(x, w, None, plan, low=low, bias=bias) for w, low, bias in each]

    def matmul_gated(
        self, x: Tensor, weights: Sequence[Weight], plan: Plan | None, *, lows: Sequence[LowRank | None],
        biases: Sequence[Tensor | None], activation: str, need_up: bool = True,
        down: tuple[Tensor, Tensor, float] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, LowRank | None]:  # fmt: skip
        """`(gate, up, h, low)`: the `matmuls` of two layers and their activation, by name, `[S, I]` each, and the
        low-rank product of the layer that reads h, `down` = (a `[R, I]`, b `[N, R]`, scale), where the backend computes
        its xa = h aᵀ along with h; b may be rounded and scaled then.

        Unless `need_up`, up may be None; low may be None always.
        """
        gate, up = self.matmuls(x, weights, plan, lows=lows, biases=biases)
        return gate, up, gate_forward(activation, gate, up), None

    def gated_backward(
        self, dy: Tensor, w: Weight, plan: Plan | None, *, low: LowRank, gate: Tensor, up: Tensor, activation: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(dgate, dup, h)`, `[S, I]` each, for dh = dy wᵀ + low; rows are dense."""
        dh, h = self.matmul(dy, w, None, plan, low=low), torch.empty_like(gate)
        return *gate_backward(activation, dh, gate, up, h), h

    def matmul_sum(
        self, terms: Sequence[tuple[Tensor, Weight]], lows: Sequence[LowRank], plan: Plan | None, *,
        wide: Tensor | None = None, likes: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """`(Σ_i x_i w_iᵀ + Σ_j low_j, [xa_jᵀ drop_j(wide)])`: dx `[S, K]` of layers that read one x, and each da.

        Rows are dense; terms are at least one, and as many as lows or more. `likes` are the parameters whose gradients
        the second are, those of the lows, or none.
        """
        rest, total = list(lows), None
        for x, w in terms:
            if total is not None and not rest:
                # torch's product accumulates, where one of a backend's own would be added in a pass over dx
                with self.dense(w, x.dtype) as dense:
                    total.addmm_(x, dense.right())
                continue
            product = self.matmul(x, w, None, plan, low=rest.pop(0) if rest else None)
            total = product if total is None else total.add_(product)
        assert total is not None
        return total, self.outers(lows, wide, plan, likes)

    def outers(
        self, lows: Sequence[LowRank], wide: Tensor | None, plan: Plan | None, likes: Sequence[Tensor]
    ) -> list[Tensor]:
        """The gradients that `matmul_sum` returns, each by `outer`."""
        if not likes:
            return []
        assert wide is not None
        return [
            self.outer(low.xa, wide, None, plan, like=like, dropout=low.dropout)
            for low, like in zip(lows, likes, strict=True)
        ]

    def outer(
        self, narrow: Tensor, wide: Tensor, rows: Rows | None, plan: Plan | None, *, like: Tensor,
        is_transposed: bool = False, scale: float = 1.0, row_scale: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:  # fmt: skip
        """`scale · Σ_s (row_scale[s] · narrow[s])ᵀ drop(wide[s])`, `[(G,) R, C]`, or `[(G,) C, R]` if `is_transposed`.

        Shape, dtype and packing are those of `like`, the parameter; zero for a group without rows. narrow `[S, R]` is
        in order, `rows` may gather wide.
        """
        raise NotImplementedError

    def project_outer(
        self, dy: Tensor, b: Tensor, xa: Tensor | None, plan: Plan | None, *, scale: float, need_dyb: bool,
        need_dbias: bool, dtype: torch.dtype | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """`(dyb = scale · dy b [M, R] in dtype, db = scale · dyᵀ xa, dbias = Σ dy)` of a dense layer, None where not
        needed; db needs `xa`.
        """
        # next to each other: both read dy
        db = None if xa is None else self.outer(xa, dy, None, plan, like=b, is_transposed=True, scale=scale)
        dyb = self.project(dy, b, None, plan, is_transposed=True, scale=scale, dtype=dtype) if need_dyb else None
        return dyb, db, dy.sum(0) if need_dbias else None

    def project_outers(
        self, dys: Sequence[Tensor], bs: Sequence[Tensor], xas: Sequence[Tensor | None], plan: Plan | None, *,
        scales: Sequence[float], need_dbias: Sequence[bool], parts: Sequence[Sequence[int]],
        dtype: torch.dtype | None = None,
    ) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:  # fmt: skip
        """`project_outer` of layers with as many rows: `(dybs, dbs, dbiases)`, a dyb `[M, ΣR]` for each of `parts`.

        A part lists layers whose dyb lie side by side in it; no dyb is needed of layers in none.
        """
        dyb: dict[int, Tensor] = {}
        dbs, dbiases, needed = [], [], {i for part in parts for i in part}
        for i, (dy, b, xa) in enumerate(zip(dys, bs, xas, strict=True)):
            own, db, dbias = self.project_outer(
                dy, b, xa, plan, scale=scales[i], need_dyb=i in needed, need_dbias=need_dbias[i], dtype=dtype
            )
            if own is not None:
                dyb[i] = own
            dbs.append(db)
            dbiases.append(dbias)
        return [side_by_side([dyb[i] for i in part]) for part in parts], dbs, dbiases

    def project_outer_rows(
        self, dy: Tensor, b: Tensor, xa: Tensor | None, rows: Rows, plan: Plan | None, *, scale: float,
        row_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """`(dyb = dy b [S, R], db = scale · Σ (row_scale[s] · dy[s])ᵀ xa[s])` of ragged rows, db None without `xa`.

        b is `[G, N, R]`, and db like it; `rows` may gather dy.
        """
        # next to each other: both read dy
        db = None
        if xa is not None:
            db = self.outer(xa, dy, rows, plan, like=b, is_transposed=True, scale=scale, row_scale=row_scale)
        return self.project(dy, b, rows, plan, is_transposed=True), db

    def combine(self, y: Tensor, rows: Rows, weight: Tensor | None) -> Tensor:
        """`Σ_j weight[t, j] · y`, `[T, H]`, over the rows of y `[S, H]` that belong to a group, in a fixed order.

        `rows` have an order; `weight` `[T, k]` is 1 where it is None. y may be written into.
        """
        raise NotImplementedError

    def row_norms(self, w: Weight, a: Tensor, b: Tensor, scale: float, place: int | None = None) -> Tensor:
        """`‖w[n] + scale · b[n] a‖`, `[N]` in fp32 at least, of a dense w; a `[R, K]`, b `[N, R]`.

        `place` is the address of what w was decoded from, None for that of w itself.
        """
        return columns.row_norms(w, a, b, scale, place)

    def columns_backward(
        self, dy: Tensor, z: Tensor | None, factor: Tensor, need_dz: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """`(dz = dy ⊙ factor, dfactor = Σ dy ⊙ z)` of contiguous dy and z `[M, N]`, factor `[N]` in fp32 at least; dz
        None unless needed, dfactor without z.
        """
        return columns.columns_backward(dy, z, factor, need_dz)


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """`[M, ΣR]` of one or several `[M, R]`."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def finish(product: Tensor, epilogue: Epilogue | None) -> Any:
    """The results of an epilogue that no kernel fuses, from the product, which is written into."""
    if epilogue is None:
        return product
    act = epilogue.activation
    if not isinstance(epilogue, ActivateBackward):
        return product, act.forward(product)
    h, grad = act.forward(epilogue.u), None
    if epilogue.need_router_grad:
        grad = (product * h).sum(1, dtype=torch.promote_types(h.dtype, torch.float32))
    return act.backward(epilogue.u, product.mul_(epilogue.row_scale.to(product.dtype).unsqueeze(1))), h, grad
