"""The CUDA kernels of csrc, for Hopper: whole passes of a linear layer, and the products of ragged rows.

    plan kernel           launches, in order
    two_kernel            project_x: xa = drop(x) aᵀ, and scale · b rounded; linear: y
    xa_in_tiles           round_adapter: a; round_adapter: scale · b; linear: xa and y
    split_k               split_linear: y and xa, a and scale · b rounded
    fused_forward         fused_forward: the same, where nothing divides K
    one_pass_backward     reduce_dy: dyb, db, dbias from one read of dy, and a rounded; linear: dx; reduce_x: da
    concurrent_backward   reduce_dy: the same; linear: dx and da
      where plan.configs  round_adapter: scale · bᵀ; project_x: dyb, and a rounded; linear: dx, da and db
      hold "project"
    fused_backward        fused_backward: dx, da and db; dyb, and a and scale · bᵀ rounded
    siblings              layers of one x together: `lorafuse.backends.cuda_siblings`
    ragged                grouped_linear: y or dx; ATen computes everything else
    gathered              ragged rows where they lie: `lorafuse.backends.cuda_gathered`

A quantized weight is decoded by a launch of its own (decode_codebook, decode_fp8; both run from sm_80 on) before the
first one of a pass: linear may overlap the launch right before it, and reads w without waiting.

bfloat16 and float16 on devices of compute capability 9.0. `linear` reads adapters of x's dtype whose rows, like those
of xa and dyb, are padded to 16 bytes with zeros. Launches go to the current stream of x's device, nothing waits for it
and all memory is torch's, so that CUDA graphs capture it.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lorafuse.backends import native, problems, recorder
from lorafuse.backends.cuda_gathered import Gathered
from lorafuse.backends.cuda_grouped import INSTEAD, TYPES, GroupedLinear, tiling
from lorafuse.backends.cuda_operands import (
    adapter_of,
    address,
    aligned,
    aligned_rows,
    mask,
    padded,
    padded_rows,
    rounding,
    scratch,
)
from lorafuse.backends.protocol import Problems, device_guard
from lorafuse.operands import Dropout, Weight, contiguous_rows
from lorafuse.plan import DeviceSpec, KernelConfig, Plan, configs_cuda, select

__all__ = ["CAPTURED", "TYPES", "Cuda", "backend", "padded_rows"]

# launches in graphs that have a word of their own, 256 KiB a device: some hundred graphs of a large model's layers
CAPTURED = 2**16
# the numbers of types of scales in api_decode.hpp
_SCALES, _EXPONENT = {torch.bfloat16: 0, torch.float32: 2}, 3


class Cuda(Gathered):
    """See the module. `module` is what csrc was compiled to; the functions after it are about a device."""

    repeats = True
    multi = None  # type: ignore[assignment]
    # one launch of dx or h draws a mask, that of da again
    matmul_outer = None  # type: ignore[assignment]

    def __init__(
        self, name: str, module: ModuleType, spec: Callable[[torch.device], DeviceSpec | None],
        stream: Callable[[torch.device], int], is_capturing: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.name, self.native, self.spec, self.stream, self.is_capturing = name, module, spec, stream, is_capturing
        # zeros that every launch leaves zeroed, by device and stream: launches of one stream run one after the other
        self.flags: dict[tuple[torch.device, int], Tensor] = {}
        # the same for launches in graphs, by device: a word for each, and how many of the words are given away
        self.captured: dict[torch.device, tuple[Tensor, int]] = {}
        self.grouped_mm = GroupedLinear(self)

    def plan(self, operator: Problems, device: torch.device) -> Plan:
        spec, planned = self.spec(device), operator()
        for problem in planned if isinstance(planned, tuple) else (planned,):
            reason = f"runs on CUDA devices, x is on {device}" if spec is None else configs_cuda.refusal(problem, spec)
            if reason:
                error = TypeError if problem.dtype not in ("bfloat16", "float16") else ValueError
                raise error(f"backend={self.name!r}: {reason}; {INSTEAD}")
        return select(planned, spec, (("cuda", ""),))

    def guard(self, device: torch.device) -> AbstractContextManager[object]:
        return device_guard(device)

    def place(self, device: torch.device) -> dict[str, int]:
        """Where a launch goes: a device's current stream, and its index for the runtime of `module`, a static one."""
        return {"stream": self.stream(device), "device": -1 if device.index is None else device.index}

    def matrix(self, t: Tensor) -> Tensor:
        return contiguous_rows(t)

    def decode(self, w: Weight, dtype: torch.dtype, out: Tensor) -> Tensor:
        name, operands = w.kernel or ("", {})
        if not out.numel() or (name in _DECODERS and dtype in TYPES and _DECODERS[name](self, out, **operands)):
            return out
        # csrc has no kernel for it
        return super().decode(w, dtype, out)

    def linear_forward(  # type: ignore[override]
        self, x: Tensor, w: Weight, bias: Tensor | None, a: Tensor, b: Tensor, plan: Plan, scale: float,
        dropout: Dropout | None, xa: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`(y, xa)`, see `Backend`; x and w are not empty. Rows of xa begin on 16-byte boundaries, for any R."""
        (M, K), R, dtype, place = x.shape, a.shape[0], x.dtype, self.place(x.device)
        config, more = plan.config("matmul"), {}
        (given_a, a_type), (given_b, b_type) = adapter_of(a, dtype), adapter_of(b, dtype)
        bias = None if bias is None else aligned(bias)
        if xa is not None:
            b, round_b = rounding(given_b, dtype, scale)
            if round_b:
                self.native.round_adapter(**round_b, **place)
            more = {"R": R, "bias": address(bias), "overlap_previous": round_b is not None}
            return self._linear(x, w, False, padded_rows(xa), b, config, place, **more), xa
        xa = x.new_empty((M, padded(R)))
        if plan.kernel in ("split_k", "fused_forward"):
            data = contiguous_rows(w.data)
            y = x.new_empty((M, len(data)))
            operands = {
                "type": TYPES[dtype], "M": M, "N": len(data), "K": K, "R": R, "x": x.data_ptr(),
                "stride_x": x.stride(0), "w": data.data_ptr(), "stride_w": data.stride(0), "bias": address(bias),
                "xa": xa.data_ptr(), "stride_xa": xa.shape[1], "y": y.data_ptr(), "stride_y": len(data),
                "tiling": tiling(config), **place,
            }  # fmt: skip
            if plan.kernel == "split_k":
                self.native.split_linear(
                    **operands, a=given_a.data_ptr(), a_type=a_type, stride_a=K, b=given_b.data_ptr(), b_type=b_type,
                    stride_b=R, scale=scale, splits=config.splits,
                )  # fmt: skip
            else:
                (a, round_a), (b, round_b) = rounding(given_a, dtype, 1.0), rounding(given_b, dtype, scale)
                flags = self._flags(x.device, place["stream"], self.native.fused_forward_workspace(M=M))
                self.native.fused_forward(
                    **operands, a=a.data_ptr(), stride_a=a.stride(0), rounded_a=round_a, b=b.data_ptr(),
                    stride_b=b.stride(0), rounded_b=round_b, workspace=flags.data_ptr(),
                )  # fmt: skip
            return y, xa if xa.shape[1] == R else xa[:, :R]
        b, round_b = rounding(given_b, dtype, scale)
        more = {"overlap_previous": True}
        if config.xa_in_tiles:
            a, round_a = rounding(given_a, dtype, 1.0)
            for one in filter(None, (round_a, round_b)):
                self.native.round_adapter(**one, **place)
            flags = self._flags(x.device, place["stream"], self.native.xa_in_tiles_workspace(M=M))
            more = {"a": a.data_ptr(), "stride_a": a.stride(0), "workspace": flags.data_ptr()}
        else:
            self.native.project_x(
                type=TYPES[dtype], a_type=a_type, M=M, K=K, R=R, x=x.data_ptr(), stride_x=x.stride(0),
                a=given_a.data_ptr(), stride_a=K, xa=xa.data_ptr(), stride_xa=xa.shape[1], **mask(dropout),
                rounded=round_b, **place,
            )  # fmt: skip
        y = self._linear(x, w, False, xa, b, config, place, R=R, bias=address(bias), **more)
        return y, xa if xa.shape[1] == R else xa[:, :R]

    def linear_backward(  # type: ignore[override]
        self, dy: Tensor, x: Tensor | None, xa: Tensor | None, w: Weight, a: Tensor, b: Tensor, plan: Plan,
        scale: float, dropout: Dropout | None, needs: list[bool],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """`(dx, da, db, dbias)`, see `Backend`; dy and w are not empty, and something is needed."""
        need_dx, need_da, need_db, need_dbias = needs
        (M, N), (R, K), dtype, place = dy.shape, a.shape, dy.dtype, self.place(dy.device)
        # linear computes da, and db too where nothing but dyb has a launch before it
        concurrent = plan.kernel == "concurrent_backward"
        db_concurrent = concurrent and any(config.kernel == "project" for config in plan.configs)
        dx = da = db = dbias = dyb = round_a = None
        given_b, b_type = adapter_of(b, dtype)
        if need_dx or need_da:
            dyb = dy.new_empty((M, padded(R)))
            given_a, a_type = adapter_of(a, dtype)
        if need_dx:
            rounded_a, round_a = rounding(given_a, dtype, 1.0)
        if need_db:
            assert xa is not None
            xa, db = padded_rows(xa), given_b.new_empty(b.shape)
        if need_dbias:
            dbias = dy.new_empty((N,))
        if need_da:
            assert x is not None
            x, da = aligned_rows(x), given_a.new_empty(a.shape)
        if plan.kernel == "fused_backward":
            assert dyb is not None
            config, (rounded_b, round_b) = plan.config("matmul"), rounding(given_b, dtype, scale, transposed=True)
            data, dx = contiguous_rows(w.data), dy.new_empty((M, K))
            everything: dict[str, Any] = {
                "type": TYPES[dtype], "M": M, "N": N, "K": K, "R": R, "dy": dy.data_ptr(), "stride_dy": dy.stride(0),
                "w": data.data_ptr(), "stride_w": data.stride(0), "a": rounded_a.data_ptr(),
                "stride_a": rounded_a.stride(0), "rounded_a": round_a, "b": rounded_b.data_ptr(),
                "stride_b": rounded_b.stride(0), "rounded_b": round_b, "scale": scale, "dyb": dyb.data_ptr(),
                "stride_dyb": dyb.shape[1], "dx": dx.data_ptr(), "stride_dx": K, "tiling": tiling(config),
                "sum_rows": _chunk(M, config.splits), "workspace": 0,
            }  # fmt: skip
            if x is not None and need_da:
                everything |= {"x": x.data_ptr(), "stride_x": x.stride(0), "da": address(da), "da_type": a_type}
            if xa is not None and need_db:
                everything |= {"xa": xa.data_ptr(), "stride_xa": padded(R), "db": address(db), "db_type": b_type}
            partials = scratch(self.native.fused_backward_partials(**everything), dy.device)
            flags = self._flags(dy.device, place["stream"], self.native.fused_backward_workspace(M=M, N=N, K=K))
            everything |= {"partials": partials.data_ptr(), "workspace": flags.data_ptr()}
            self.native.fused_backward(**everything, **place)
            return dx, None if da is None else da.to(a.dtype), None if db is None else db.to(b.dtype), None
        if db_concurrent:
            assert dyb is not None
            transposed, round_b = rounding(given_b, dtype, scale, transposed=True)
            assert round_b is not None
            self.native.round_adapter(**round_b, **place)
            self.native.project_x(
                type=TYPES[dtype], a_type=TYPES[dtype], M=M, K=N, R=R, x=dy.data_ptr(), stride_x=dy.stride(0),
                a=transposed.data_ptr(), stride_a=transposed.shape[1], xa=dyb.data_ptr(), stride_xa=dyb.shape[1],
                rounded=round_a, **place,
            )  # fmt: skip
        else:
            reduced = {
                "type": TYPES[dtype], "b_type": b_type, "M": M, "N": N, "R": R, "dy": dy.data_ptr(),
                "stride_dy": dy.stride(0), "b": given_b.data_ptr(), "stride_b": R, "xa": address(xa) if need_db else 0,
                "stride_xa": padded(R), "scale": scale, "dyb": address(dyb), "stride_dyb": padded(R), "db": address(db),
                "dbias": address(dbias),
            }  # fmt: skip
            work = scratch(self.native.reduce_dy_workspace(**reduced), dy.device)
            self.native.reduce_dy(**reduced, workspace=work.data_ptr(), rounded=round_a, **place)
        if need_dx:
            assert dyb is not None
            config = plan.config("matmul")
            sums: dict[str, int] = {"sum_blocks": config.sum_blocks}
            if concurrent and need_da:
                assert x is not None
                sums |= {"layer_x": x.data_ptr(), "stride_layer_x": x.stride(0), "da": address(da), "da_type": a_type}
            if db_concurrent and need_db:
                sums |= {"layer_xa": address(xa), "stride_layer_xa": padded(R), "db": address(db), "db_type": b_type}
            dx = self._linear(
                dy, w, True, dyb, rounded_a, config, place, R=R, overlap_previous=True, **mask(dropout), **sums,
                scale=scale,
            )  # fmt: skip
        if need_da and not concurrent:
            assert x is not None
            assert dyb is not None
            reduced = {
                "type": TYPES[dtype], "a_type": a_type, "M": M, "K": K, "R": R, "x": x.data_ptr(),
                "stride_x": x.stride(0), "dyb": dyb.data_ptr(), "stride_dyb": dyb.shape[1], "da": address(da),
                **mask(dropout),
            }  # fmt: skip
            work = scratch(self.native.reduce_x_workspace(**reduced), dy.device)
            self.native.reduce_x(**reduced, workspace=work.data_ptr(), **place)
        return dx, None if da is None else da.to(a.dtype), None if db is None else db.to(b.dtype), dbias

    def _linear(
        self, x: Tensor, w: Weight, is_transposed: bool, xa: Tensor, b: Tensor, config: KernelConfig,
        place: dict[str, int],
        **more: Any,
    ) -> Tensor:  # fmt: skip
        """`x wᵀ + xa bᵀ`, or `x w + xa b` when `is_transposed`."""
        data = contiguous_rows(w.data)
        N, K = reversed(data.shape) if is_transposed else data.shape
        y = x.new_empty((x.shape[0], N))
        if "workspace" not in more:
            more["workspace"] = self.ticket(x.device, place["stream"]).data_ptr()
        self.native.linear(
            type=TYPES[x.dtype], M=x.shape[0], N=N, K=K, transposed=is_transposed, x=x.data_ptr(),
            stride_x=x.stride(0), w=data.data_ptr(), stride_w=data.stride(0), xa=xa.data_ptr(), stride_xa=xa.stride(0),
            b=b.data_ptr(), stride_b=b.stride(0), y=y.data_ptr(), stride_y=N, tiling=tiling(config), **place,
            **more,
        )  # fmt: skip
        return y

    def zeros(self, device: torch.device, stream: int, words: int) -> Tensor:
        """So many zero words that one launch of `stream` after the other uses and leaves zero."""
        return self.ticket(device, stream) if words == 1 else self._flags(device, stream, words)

    def ticket(self, device: torch.device, stream: int) -> Tensor:
        """A zero word from which the blocks of one launch draw their tiles, and which they leave zero."""
        return recorder.zeros(self._word(device, stream), 1)

    def _word(self, device: torch.device, stream: int) -> Tensor:
        if not self.is_capturing():
            if device not in self.captured:
                self.captured[device] = torch.zeros(CAPTURED, dtype=torch.int32, device=device), 0
        elif device in self.captured and (given := self.captured[device])[1] < CAPTURED:
            # of this launch alone, in every replay: to zero one there would be a launch in front of it
            self.captured[device] = given[0], given[1] + 1
            return given[0][given[1] :]
        return self._words(device, stream, 1)

    def _flags(self, device: torch.device, stream: int, words: int) -> Tensor:
        """Zeros through which the blocks of one launch draw work and signal that rows of xa or dyb are there."""
        return recorder.zeros(self._words(device, stream, words), words)

    def _words(self, device: torch.device, stream: int, words: int) -> Tensor:
        if self.is_capturing():
            # a graph has flags of its own, which it zeroes at every replay: the stream's may be in use by then
            return torch.zeros(words, dtype=torch.int32, device=device)
        flags = self.flags.get((device, stream))
        if flags is None or flags.numel() < words:
            flags = self.flags[device, stream] = torch.zeros(words, dtype=torch.int32, device=device)
        return flags


def _chunk(M: int, splits: int) -> int:
    """Rows of each of so many parts, about alike, in whole tiles."""
    return -(-M // (splits * 128)) * 128


def _codebook(
    run: Cuda, out: Tensor, *, code: Tensor, table: Tensor, scale: Tensor, block: int, first: int,
    rounded: torch.dtype, outer: tuple[Tensor, ...] | None = None,
) -> bool:  # fmt: skip
    """Decode 4 bits by a table of fp32, bitsandbytes'; nothing where each step is in another dtype."""
    if table.dtype is not torch.float32:
        return False
    data, absmax = aligned(code), scale if outer else scale.float()
    pointers = dict(zip(("nested_absmax", "nested_code", "nested_offset"), map(address, outer or ()), strict=False))
    run.native.decode_codebook(
        type=TYPES[out.dtype], count=out.numel(), first=first, block_size=block, data=data.data_ptr(),
        code=table.data_ptr(), absmax=absmax.data_ptr(), **pointers, rounded=TYPES[rounded], out=out.data_ptr(),
        **run.place(out.device),
    )  # fmt: skip
    return True


def _grid(
    run: Cuda, out: Tensor, *, code: Tensor, scale: Tensor, kind: str = "", scale_kind: str = "",
    block: tuple[int, int] = (1, 1), is_scale_rounded: bool = False, **_: object,
) -> bool:  # fmt: skip
    """Decode e4m3 with scales of blocks; nothing where its dtypes are others than those of the kernel."""
    scale_type = _EXPONENT if scale_kind == "e8m0" else _SCALES.get(scale.dtype)
    if kind != "e4m3" or scale_type is None:
        return False
    *groups, N, K = code.shape
    G, (rows, columns) = math.prod(groups), block
    if scale.numel() == 1:
        # of all matrices
        G, N, rows, columns = 1, G * N, G * N, K
    data = aligned(code)
    run.native.decode_fp8(
        type=TYPES[out.dtype], G=G, N=N, K=K, block_rows=rows, block_columns=columns, data=data.data_ptr(),
        scale=scale.data_ptr(), scale_type=scale_type,
        rounded_scale=TYPES[out.dtype if is_scale_rounded else torch.float32], out=out.data_ptr(),
        **run.place(out.device),
    )  # fmt: skip
    return True


# by what `lorafuse.formats` calls a kernel
_DECODERS: dict[str, Callable[..., bool]] = {"codebook": _codebook, "grid": _grid}


def _stream(device: torch.device) -> int:
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index)


@cache
def backend() -> Cuda:
    """The one instance. Raises ImportError where `lorafuse._cuda` was not built."""
    return Cuda("cuda", native.load("_cuda"), problems.device_spec, _stream, torch.cuda.is_current_stream_capturing)
