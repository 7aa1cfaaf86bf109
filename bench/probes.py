"""Six prices on which the design of the kernels depends, as bench/hopper.py --probes measures them.

columns   what sixteen more columns cost a tile of 128 x 256, as a share of its main loop
sums      what an SM without a tile streams while the others run tiles, and what that costs these
flags     from a release to an acquire by another SM
grouped   the bare product of experts' rows that lie together, as a share of cuBLAS's dense rate
gathered  the same with tiles by ticket; and of rows that lie anywhere, read where they are or copied together before;
          and with the columns as gate and up, whose activation the launch or torch computes
gradients the backward of such gates in the launch of dh, or by torch; dyb and db from one read of the rows where they
          lie, one after the other, and of a copy
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafuse.activation import gate_backward
from lorafuse.testing.numerics import relative_l2, tolerance
from lorafuse.testing.timing import measure_calls

__all__ = ["PROBES", "Call", "Sizes", "described", "measured"]

_BF16, _RANK = 0, 16
# experts of a token
_CHOICES = 8
_WORDS = 3


@dataclass(frozen=True)
class Sizes:
    """What is measured: a layer, numbers of SMs that sum, turns of the flag, and experts' `(rows, E, N, K)`."""

    layer: tuple[int, int, int] = (8192, 4096, 4096)
    sums: tuple[int, ...] = (1, 2, 4, 8)
    turns: int = 2000
    # Qwen3-30B-A3B, 8192 tokens and eight experts each: gate and up, then down
    experts: tuple[tuple[int, int, int, int], ...] = ((65536, 128, 1536, 2048), (65536, 128, 2048, 768))
    sms: int = 0


@dataclass(frozen=True)
class Call:
    """A launch, and every tensor that it writes with what belongs there."""

    run: Callable[[], object]
    expected: tuple[tuple[Tensor, Tensor], ...]

    def error(self) -> str:
        """What is wrong with the launch's results, "" where nothing is."""
        for out, _ in self.expected:
            out.fill_(float("nan") if out.is_floating_point() else 0)
        self.run()
        for i, (out, right) in enumerate(self.expected):
            if not out.is_floating_point():
                if not torch.equal(out, right):
                    return f"result {i} is {out.tolist()}, not {right.tolist()}"
            elif not (error := relative_l2(out, right)) <= tolerance(torch.bfloat16):
                return f"result {i} is wrong by {error:.2e} relative"
        return ""


class _Probes:
    """The launches of `PROBES` on a device."""

    def __init__(self, native: Any, sizes: Sizes, device: torch.device) -> None:
        self.native, self.sizes, self.device = native, sizes, device
        self.stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=self._generator, device=self.device) * scale).bfloat16()

    def columns(self) -> dict[str, Call]:
        M, N, K = self.sizes.layer
        x, w, a = self.normal(M, K), self.normal(N, K, scale=K**-0.5), self.normal(_RANK, K, scale=K**-0.5)
        y, xa = x.new_empty(M, N), x.new_empty(M, _RANK)
        wide = x.double()
        right, right_xa = wide @ w.double().t(), wide @ a.double().t()

        def run(**extra: int) -> None:
            self.native.probe_columns(
                M=M, N=N, K=K, x=x.data_ptr(), w=w.data_ptr(), y=y.data_ptr(), sms=self.sizes.sms, stream=self.stream,
                **extra,
            )  # fmt: skip

        return {
            "bare": Call(run, ((y, right),)),
            "16 more": Call(lambda: run(a=a.data_ptr(), xa=xa.data_ptr()), ((y, right), (xa, right_xa))),
        }

    def sums(self) -> dict[str, Call]:
        M, N, K = self.sizes.layer
        x, dy, w = self.normal(M, K), self.normal(M, N), self.normal(N, K, scale=K**-0.5)
        a, xa, dyb = (self.normal(rows, columns) for rows, columns in ((_RANK, K), (M, _RANK), (M, _RANK)))
        dx, da, db = x.new_empty(M, K), x.new_empty(_RANK, K), x.new_empty(N, _RANK)
        word = torch.zeros(1, dtype=torch.int32, device=self.device)
        right = dy.double() @ w.double() + dyb.double() @ a.double(), dyb.double().t() @ x.double()
        right_db = dy.double().t() @ xa.double()

        def run(blocks: int) -> None:
            summed = {
                "sum_blocks": blocks, "layer_x": x.data_ptr(), "stride_layer_x": K, "da": da.data_ptr(),
                "da_type": _BF16, "layer_xa": xa.data_ptr(), "stride_layer_xa": _RANK, "db": db.data_ptr(),
                "db_type": _BF16, "scale": 1.0,
            }  # fmt: skip
            self.native.linear(
                type=_BF16, M=M, N=K, K=N, R=_RANK, transposed=True, x=dy.data_ptr(), stride_x=N, w=w.data_ptr(),
                stride_w=K, xa=dyb.data_ptr(), stride_xa=_RANK, b=a.data_ptr(), stride_b=K, y=dx.data_ptr(),
                stride_y=K, tiling=(256, 3, 1, 16, self.sizes.sms), workspace=word.data_ptr(), stream=self.stream,
                **(summed if blocks else {}),
            )  # fmt: skip

        both = (dx, right[0]), (da, right[1]), (db, right_db)
        calls = {f"{blocks} sum": Call(lambda blocks=blocks: run(blocks), both) for blocks in self.sizes.sums}
        return {"tiles alone": Call(lambda: run(0), both[:1]), **calls}

    def flags(self) -> dict[str, Call]:
        turns, words = self.sizes.turns, torch.zeros(_WORDS, dtype=torch.int32, device=self.device)

        def run() -> None:
            words.zero_()
            self.native.probe_flags(rounds=turns, words=words.data_ptr(), stream=self.stream)

        return {
            "turns": Call(run, ((words, words.new_tensor([turns, turns, 2 * turns])),)),
            "zeroed": Call(words.zero_, ()),
        }

    def grouped(self) -> dict[str, Call]:
        M, N, K = self.sizes.layer
        dense, v, out = self.normal(M, K), self.normal(N, K, scale=K**-0.5), self.normal(M, N)
        calls = {
            "dense by cuBLAS": Call(lambda: torch.mm(dense, v.t(), out=out), ((out, dense.double() @ v.double().t()),))
        }
        for rows, E, n, k in self.sizes.experts:
            x, w = self.normal(rows, k), self.normal(E, n, k, scale=k**-0.5)
            ends = torch.arange(1, E + 1, device=self.device) * (rows // E)
            y, word = x.new_empty(rows, n), torch.zeros(1, dtype=torch.int32, device=self.device)
            right = torch.bmm(x.view(E, -1, k).float(), w.float().mT).view(rows, n)

            def run(x: Tensor = x, w: Tensor = w, ends: Tensor = ends, y: Tensor = y, word: Tensor = word) -> None:
                self.native.grouped_linear(
                    type=_BF16, rows=x.shape[0], groups=w.shape[0], N=w.shape[1], K=w.shape[2], offsets=ends.data_ptr(),
                    x=x.data_ptr(), stride_x=w.shape[2], w=w.data_ptr(), y=y.data_ptr(), stride_y=w.shape[1],
                    tiling=(256, 3, 1, 16, self.sizes.sms), workspace=word.data_ptr(), stream=self.stream,
                )  # fmt: skip

            calls[f"{E} experts, N {n}, K {k}"] = Call(run, ((y, right),))
        return calls

    def gradients(self) -> dict[str, Call]:
        # of a block's down projection: dout has k columns, h as many as gate
        rows, E, n, k = self.sizes.experts[0]
        inner = n // 2 // 8 * 8
        dout, w, u = self.normal(rows // _CHOICES, k), self.normal(E, inner, k, scale=k**-0.5), self.normal(rows, n)
        b, xa = self.normal(E, k, _RANK), self.normal(rows, _RANK)
        factor = torch.rand(rows, generator=self._generator, device=self.device)
        ends = torch.arange(1, E + 1, device=self.device) * (rows // E)
        order = torch.randperm(rows, generator=self._generator, device=self.device)
        word, token = torch.zeros(1, dtype=torch.int32, device=self.device), order // _CHOICES
        gate, up = u[:, :inner], u[:, inner : 2 * inner]
        dh, h, du = (dout.new_empty(rows, columns) for columns in (inner, inner, 2 * inner))
        shares, dyb, db = factor.new_empty(-(-inner // 256), rows), torch.empty_like(xa), factor.new_empty(b.shape)
        together = dout[token].view(E, -1, k).float()
        right = torch.bmm(together, w.float().mT).view(rows, inner)
        right_h = F.silu(gate.float()) * up.float()
        right_du = torch.cat(gate_backward("silu", right * factor.unsqueeze(1), gate.float(), up.float()), 1)
        right_shares = torch.stack([part.sum(1) for part in (right * right_h).split(256, 1)])
        right_dyb, right_db = torch.bmm(together, b.float()), torch.bmm(together.mT, xa.float().view(E, -1, _RANK))
        common = {
            "type": _BF16, "rows": rows, "groups": E, "offsets": ends.data_ptr(), "order": order.data_ptr(),
            "choices": _CHOICES,
        }  # fmt: skip
        product = common | {
            "N": inner, "K": k, "x": dout.data_ptr(), "stride_x": k, "w": w.data_ptr(), "workspace": word.data_ptr(),
            "tiling": (256, 3, 1, 16, self.sizes.sms), "stream": self.stream,
        }  # fmt: skip
        gates = {
            "y": du.data_ptr(), "stride_y": 2 * inner, "h": h.data_ptr(), "stride_h": inner, "u": u.data_ptr(),
            "stride_u": n, "row_scale": factor.data_ptr(), "products": shares.data_ptr(),
        }  # fmt: skip
        both = common | {
            "C": k, "R": _RANK, "wide": dout.data_ptr(), "stride_wide": k, "b": b.data_ptr(),
            "projected": dyb.data_ptr(), "stride_projected": _RANK, "narrow": xa.data_ptr(), "stride_narrow": _RANK,
            "outer": db.data_ptr(),
        }  # fmt: skip
        work = factor.new_empty(self.native.ragged_ranks_workspace(**both) // 4)
        both |= {"workspace": work.data_ptr(), "stream": self.stream}
        # read by address as long as the launches are there
        self._read = dout, w, u, b, xa, ends, order, word, work

        def apart() -> None:
            self.native.gathered_linear(**product, y=dh.data_ptr(), stride_y=inner)
            torch.mul(F.silu(gate), up, out=h)
            torch.sum(dh * h, 1, dtype=torch.float32, out=shares[0])
            dh.mul_(factor.bfloat16().unsqueeze(1))
            torch.cat(gate_backward("silu", dh, gate, up), 1, out=du)

        def in_turn() -> None:
            self.native.ragged_ranks(**both | {"outer": 0})
            self.native.ragged_ranks(**both | {"projected": 0})

        def of_a_copy() -> None:
            copy = dout.index_select(0, token)
            self.native.ragged_ranks(**both | {"wide": copy.data_ptr(), "order": 0, "choices": 1})

        of_gates = (du, right_du), (h, right_h), (shares, right_shares)
        of_ranks = (dyb, right_dyb.view(rows, _RANK)), (db, right_db)
        name = f"{E} experts, I {inner}, H {k}"
        return {
            f"{name}, du and h": Call(lambda: self.native.gathered_linear(**product, **gates), of_gates),
            f"{name}, du and h by torch": Call(apart, of_gates[:2]),
            f"{name}, dyb and db": Call(lambda: self.native.ragged_ranks(**both), of_ranks),
            f"{name}, dyb, then db": Call(in_turn, of_ranks),
            f"{name}, dyb and db of a copy": Call(of_a_copy, of_ranks),
        }

    def gathered(self) -> dict[str, Call]:
        calls: dict[str, Call] = {}
        for rows, E, n, k in self.sizes.experts:
            x, w = self.normal(rows // _CHOICES, k), self.normal(E, n, k, scale=k**-0.5)
            ends = torch.arange(1, E + 1, device=self.device) * (rows // E)
            order = torch.randperm(rows, generator=self._generator, device=self.device)
            y, word = x.new_empty(rows, n), torch.zeros(1, dtype=torch.int32, device=self.device)
            token = order // _CHOICES
            together = x[token]
            right = torch.bmm(together.view(E, -1, k).float(), w.float().mT).view(rows, n)

            def run(
                x: Tensor, order: Tensor | None = None, w: Tensor = w, ends: Tensor = ends, y: Tensor = y,
                word: Tensor = word, **more: int,
            ) -> None:  # fmt: skip
                if order is not None:
                    more |= {"order": order.data_ptr(), "choices": _CHOICES}
                self.native.gathered_linear(
                    type=_BF16, rows=y.shape[0], groups=w.shape[0], K=w.shape[2], offsets=ends.data_ptr(),
                    x=x.data_ptr(), stride_x=w.shape[2], w=w.data_ptr(), y=y.data_ptr(), stride_y=w.shape[1],
                    tiling=(256, 3, 1, 16, self.sizes.sms), workspace=word.data_ptr(), stream=self.stream,
                    **{"N": w.shape[1]} | more,
                )  # fmt: skip

            forms: dict[str, Callable[[], None]] = {
                "in order": partial(run, together),
                "through the order": partial(run, x, order),
                "copied before": lambda run=run, x=x, token=token: run(x.index_select(0, token)),
            }
            name, inner = f"{E} experts, N {n}, K {k}", n // 2
            calls |= {f"{name}, {form}": Call(one, ((y, right),)) for form, one in forms.items()}
            if inner % 8 == 0:
                h, gate, up = x.new_empty(rows, inner), y[:, :inner], y[:, inner:]
                both = (y, right), (h, F.silu(right[:, :inner]) * right[:, inner:])
                fused = {"N": inner, "h": h.data_ptr(), "stride_h": inner}

                def apart(run=run, x=x, order=order, h=h, gate=gate, up=up) -> None:
                    run(x, order)
                    torch.mul(F.silu(gate), up, out=h)

                calls[f"{name}, and h"] = Call(partial(run, x, order, **fused), both)
                calls[f"{name}, and h by torch"] = Call(apart, both)
        return calls


PROBES: dict[str, Callable[[_Probes], dict[str, Call]]] = {
    "columns": _Probes.columns, "sums": _Probes.sums, "flags": _Probes.flags, "grouped": _Probes.grouped,
    "gathered": _Probes.gathered, "gradients": _Probes.gradients,
}  # fmt: skip


def calls(native: Any, name: str, sizes: Sizes, device: torch.device) -> dict[str, Call]:
    """The launches of a probe."""
    return PROBES[name](_Probes(native, sizes, device))


def measured(native: Any, name: str, sizes: Sizes, rounds: int, device: torch.device) -> dict[str, Any] | str:
    """A probe's medians in seconds and what follows from them, or what is wrong."""
    launches = calls(native, name, sizes, device)
    for launch, call in launches.items():
        if error := call.error():
            return f"{launch}: {error}"
    seconds = measure_calls({n: call.run for n, call in launches.items()}, rounds, 10, device)
    medians = {n: statistics.median(values) for n, values in seconds.items()}
    return {"name": name, "rounds": rounds, "medians": medians, "figures": figures(name, sizes, medians)}


def figures(name: str, sizes: Sizes, medians: dict[str, float]) -> dict[str, float]:
    """The numbers that a probe is for, by what they are and their unit."""
    M, N, K = sizes.layer
    if name == "columns":
        return {"16 more columns, share of a tile": medians["16 more"] / medians["bare"] - 1}
    if name == "sums":
        rates = {}
        for blocks in sizes.sums:
            # each reads its columns of x and dy once; while they last longer than the tiles, all of it is theirs
            seconds = medians[f"{blocks} sum"]
            rates[f"{blocks} SMs sum, GB/s each at least"] = 2 * M * (N + K) / blocks / seconds / 1e9
            rates[f"{blocks} SMs sum, times the tiles alone"] = seconds / medians["tiles alone"]
        return rates
    if name == "flags":
        return {"a flag, us": (medians["turns"] - medians["zeroed"]) / (2 * sizes.turns) * 1e6}
    if name == "gradients":
        return {f"{n}, us": seconds * 1e6 for n, seconds in medians.items()}
    if name == "gathered":
        work = {f"{E} experts, N {n}, K {k}": 2 * rows * n * k for rows, E, n, k in sizes.experts}
        return {f"{n}, TFLOP/s": work[n.rpartition(", ")[0]] / seconds / 1e12 for n, seconds in medians.items()}
    dense = 2 * M * N * K / medians["dense by cuBLAS"]
    rates = {}
    for rows, E, n, k in sizes.experts:
        rate = 2 * rows * n * k / medians[f"{E} experts, N {n}, K {k}"]
        rates[f"{E} experts, N {n}, K {k}, TFLOP/s"] = rate / 1e12
        rates[f"{E} experts, N {n}, K {k}, of cuBLAS dense"] = rate / dense
    return rates


def described(result: dict[str, Any]) -> list[str]:
    """The figures of a probe, a line each."""
    return [f"  {result['name']:<8} {name:<48} {value:10.3f}" for name, value in result["figures"].items()]
