"""The LoRA linear in the CUDA kernels of csrc, step by step, on a GPU or in their emulator (`Runner`).

Forward: xa = drop(x) aᵀ, and b rounded with the scale inside, then y = x wᵀ + bias + xa bᵀ; or both adapters rounded,
and xa and y in one launch. Backward: dyb, db and dbias from one read of dy, and a rounded, dx = dy w + mask ⊙ (dyb a),
then da; or da in dx's launch; or bᵀ rounded with the scale inside, dyb alone, and a rounded, then dx, da and db in one
launch. The products take adapters of x's dtype whose rows, like those of xa and dyb, are padded to 16 bytes with zeros.
Nothing waits for the device, and all memory is torch's, so that CUDA graphs capture it.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from lorafuse.backends import eager, probe
from lorafuse.backends.rows import contiguous_rows, shaped_like
from lorafuse.philox import rescaled
from lorafuse.plan import DeviceSpec, KernelConfig, Plan, Problem, configs_cuda, select

__all__ = ["TYPES", "Runner", "backward", "forward"]

# the numbers of Type in api.hpp
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# elements of 16 bits in 16 bytes
_ALIGN = 8


@dataclass(frozen=True)
class Runner:
    """Where the kernels run: the backend's name, its module, and what the module needs to know of a device."""

    name: str
    native: ModuleType
    spec: Callable[[torch.device], DeviceSpec | None]
    stream: Callable[[torch.device], int]
    guard: Callable[[torch.device], contextlib.AbstractContextManager[object]]
    capturing: Callable[[], bool]
    # zeros that every launch leaves as they were, by device and stream: launches of one stream run one after the other
    flags: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict)


def _plan(run: Runner, problem: Problem, device: torch.device) -> Plan:
    """The plan among the CUDA kernels. Raises ValueError or TypeError, with the way out, where none can run."""
    spec = run.spec(device)
    reason = f"runs on CUDA devices, x is on {device}" if spec is None else configs_cuda.refusal(problem, spec)
    if reason:
        error = TypeError if problem.dtype not in ("bfloat16", "float16") else ValueError
        raise error(f"backend={run.name!r}: {reason}; use 'triton', 'eager' or 'auto'")
    return select(problem, spec, (("cuda", ""),))


def forward(
    run: Runner, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, seed: Tensor | None, scale: float,
    p: float, wide: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`linear_forward` of a backend."""
    if x.numel() == 0 or w.numel() == 0:
        # nothing to launch over
        return eager.linear_forward(x, w, bias, a, b, seed, scale, p, wide)
    flat, w = contiguous_rows(x), contiguous_rows(w)
    M, (N, K), R = flat.shape[0], w.shape, a.shape[0]
    plan = _plan(run, probe.linear_problem(flat, w, a, bias is not None, seed is not None, wide=wide), x.device)
    config, scale = plan.config("matmul"), scale if seed is None else rescaled(scale, p)
    with run.guard(x.device):
        stream = run.stream(x.device)
        (given_a, a_type), (given_b, _) = _adapter(a, x.dtype), _adapter(b, x.dtype)
        b, round_b = _rounding(given_b, x.dtype, scale)
        xa = x.new_empty((M, _padded(R)))
        fused_xa: dict[str, int] = {}
        if config.single:
            a, round_a = _rounding(given_a, x.dtype, 1.0)
            for one in filter(None, (round_a, round_b)):
                run.native.round_adapter(**one, stream=stream)
            flags = _flags(run, x.device, stream, M)
            fused_xa = {"a": a.data_ptr(), "stride_a": a.stride(0), "workspace": flags.data_ptr()}
        else:
            run.native.project_x(
                type=TYPES[x.dtype], a_type=a_type, M=M, K=K, R=R, x=flat.data_ptr(), stride_x=flat.stride(0),
                a=given_a.data_ptr(), stride_a=K, xa=xa.data_ptr(), stride_xa=xa.shape[1], **_mask(seed, p),
                rounded=round_b, stream=stream,
            )  # fmt: skip
        bias = None if bias is None else _aligned(bias)
        y = x.new_empty((M, N))
        run.native.linear(
            type=TYPES[x.dtype], M=M, N=N, K=K, R=R, x=flat.data_ptr(), stride_x=flat.stride(0), w=w.data_ptr(),
            stride_w=w.stride(0), bias=0 if bias is None else bias.data_ptr(), xa=xa.data_ptr(), stride_xa=xa.shape[1],
            b=b.data_ptr(), stride_b=b.shape[1], y=y.data_ptr(), stride_y=N, overlap_previous=not config.single,
            tiling=_tiling(config), stream=stream, **fused_xa,
        )  # fmt: skip
        if xa.shape[1] != R:
            xa = xa[:, :R].contiguous()
    return shaped_like(y, x), xa


def backward(
    run: Runner, dy: Tensor, x: Tensor | None, xa: Tensor | None, w: Tensor, a: Tensor, b: Tensor, seed: Tensor | None,
    scale: float, p: float, need_dx: bool, need_da: bool, need_db: bool, need_dbias: bool,
    wide: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`linear_backward` of a backend."""
    needs = need_dx, need_da, need_db, need_dbias
    if dy.numel() == 0 or w.numel() == 0 or not any(needs):
        return eager.linear_backward(dy, x, xa, w, a, b, seed, scale, p, *needs, wide)
    flat, w = contiguous_rows(dy), contiguous_rows(w)
    M, (N, K), R = flat.shape[0], w.shape, a.shape[0]
    wanted = tuple(name for name, need in zip(("dx", "da", "db", "dbias"), needs, strict=True) if need)
    plan = _plan(run, probe.linear_problem(flat, w, a, False, seed is not None, wanted, wide), dy.device)
    scale = scale if seed is None else rescaled(scale, p)
    # in dx's launch da is summed, and db too where nothing but dyb has a pass before
    concurrent = plan.kernel == "concurrent_backward"
    db_concurrent = concurrent and any(config.kernel == "project" for config in plan.configs)
    dx = da = db = dbias = dyb = round_a = None
    with run.guard(dy.device):
        stream = run.stream(dy.device)
        given_b, b_type = _adapter(b, dy.dtype)
        if need_dx or need_da:
            dyb = dy.new_empty((M, _padded(R)))
            given_a, a_type = _adapter(a, dy.dtype)
        if need_dx:
            rounded_a, round_a = _rounding(given_a, dy.dtype, 1.0)
        if need_db:
            assert xa is not None
            xa, db = _padded_rows(xa), given_b.new_empty(b.shape)
        if need_dbias:
            dbias = dy.new_empty((N,))
        if need_da:
            assert x is not None
            x, da = _aligned_rows(contiguous_rows(x)), given_a.new_empty(a.shape)
        if db_concurrent:
            assert dyb is not None
            transposed, round_b = _rounding(given_b, dy.dtype, scale, transposed=True)
            assert round_b is not None
            run.native.round_adapter(**round_b, stream=stream)
            run.native.project_x(
                type=TYPES[dy.dtype], a_type=TYPES[dy.dtype], M=M, K=N, R=R, x=flat.data_ptr(),
                stride_x=flat.stride(0), a=transposed.data_ptr(), stride_a=transposed.shape[1], xa=dyb.data_ptr(),
                stride_xa=dyb.shape[1], rounded=round_a, stream=stream,
            )  # fmt: skip
        else:
            reduced = {
                "type": TYPES[dy.dtype], "b_type": b_type, "M": M, "N": N, "R": R, "dy": flat.data_ptr(),
                "stride_dy": flat.stride(0), "b": given_b.data_ptr(), "stride_b": R, "xa": _at(xa) if need_db else 0,
                "stride_xa": _padded(R), "scale": scale, "dyb": _at(dyb), "stride_dyb": _padded(R), "db": _at(db),
                "dbias": _at(dbias),
            }  # fmt: skip
            work = torch.empty(run.native.reduce_dy_workspace(**reduced), dtype=torch.uint8, device=dy.device)
            run.native.reduce_dy(**reduced, workspace=work.data_ptr(), rounded=round_a, stream=stream)
        if need_dx:
            assert dyb is not None
            dx = dy.new_empty((M, K))
            sums: dict[str, int] = {"sum_blocks": plan.config("matmul").beside}
            if concurrent and need_da:
                assert x is not None
                sums |= {"layer_x": x.data_ptr(), "stride_layer_x": x.stride(0)}
                sums |= {"da": _at(da), "da_type": a_type}
            if db_concurrent and need_db:
                sums |= {"layer_xa": _at(xa), "stride_layer_xa": _padded(R), "db": _at(db), "db_type": b_type}
            run.native.linear(
                type=TYPES[dy.dtype], M=M, N=K, K=N, R=R, transposed=True, x=flat.data_ptr(), stride_x=flat.stride(0),
                w=w.data_ptr(), stride_w=w.stride(0), xa=dyb.data_ptr(), stride_xa=dyb.shape[1],
                b=rounded_a.data_ptr(), stride_b=rounded_a.stride(0), y=dx.data_ptr(), stride_y=K,
                overlap_previous=True, tiling=_tiling(plan.config("matmul")), **_mask(seed, p), **sums, scale=scale,
                stream=stream,
            )  # fmt: skip
            dx = shaped_like(dx, dy)
        if need_da and not concurrent:
            assert x is not None
            assert dyb is not None
            reduced = {
                "type": TYPES[dy.dtype], "a_type": a_type, "M": M, "K": K, "R": R, "x": x.data_ptr(),
                "stride_x": x.stride(0), "dyb": dyb.data_ptr(), "stride_dyb": dyb.shape[1], "da": _at(da),
                **_mask(seed, p),
            }  # fmt: skip
            work = torch.empty(run.native.reduce_x_workspace(**reduced), dtype=torch.uint8, device=dy.device)
            run.native.reduce_x(**reduced, workspace=work.data_ptr(), stream=stream)
    return dx, None if da is None else da.to(a.dtype), None if db is None else db.to(b.dtype), dbias


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _tiling(config: KernelConfig) -> tuple[int, int, int, int, int]:
    # the last: as many programs as the device has multiprocessors
    return config.block_n, config.stages, config.cluster, config.group_m, 0


def _mask(seed: Tensor | None, p: float) -> dict[str, int]:
    if seed is None:
        return {}
    # at p = 1 one draw of 2^32 is kept, in a term whose scale is 0
    return {"seed": seed.data_ptr(), "drop_below": min(int(p * 2**32), 2**32 - 1)}


def _padded(R: int) -> int:
    return -(-R // _ALIGN) * _ALIGN


def _aligned(t: Tensor) -> Tensor:
    """`t`, contiguous and on a 16-byte boundary."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _adapter(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """An adapter, and its type, as the memory-bound passes take it: of x's dtype or fp32."""
    return (t := _aligned(t if t.dtype in (dtype, torch.float32) else t.float())), TYPES[t.dtype]


def _rounding(
    t: Tensor, dtype: torch.dtype, scale: float, transposed: bool = False
) -> tuple[Tensor, dict[str, int | float] | None]:
    """`scale · t`, or its transpose, in x's dtype with rows padded to 16 bytes; and what its launch is told.

    None where `t` itself is that. `t` is of `_adapter`, and must live until that launch: what is allocated before it
    may otherwise have t's memory, and be written by the same launch.
    """
    rows, columns = reversed(t.shape) if transposed else t.shape
    if scale == 1.0 and t.dtype is dtype and columns % _ALIGN == 0 and not transposed:
        return t, None
    out = t.new_empty((rows, _padded(columns)), dtype=dtype)
    return out, {
        "in_type": TYPES[t.dtype], "type": TYPES[dtype], "transposed": transposed, "rows": rows, "columns": columns,
        "in": t.data_ptr(), "stride_in": t.shape[1], "scale": scale, "out": out.data_ptr(), "stride_out": out.shape[1],
    }  # fmt: skip


def _padded_rows(xa: Tensor) -> Tensor:
    """xa `[M, R]` in a buffer whose rows start on 16-byte boundaries."""
    R = xa.shape[1]
    if R % _ALIGN == 0:
        return _aligned(xa)
    out = xa.new_zeros((xa.shape[0], _padded(R)))
    out[:, :R] = xa
    return out


def _aligned_rows(t: Tensor) -> Tensor:
    """The same with rows on 16-byte boundaries: of x in backward, which another backend may have run forward."""
    return t if t.data_ptr() % 16 == 0 and t.stride(0) % _ALIGN == 0 else t.clone(memory_format=torch.contiguous_format)


def _flags(run: Runner, device: torch.device, stream: int, M: int) -> Tensor:
    """Zeros through which the blocks of one launch tell each other that rows of xa are there."""
    words = run.native.fused_xa_workspace(M=M)
    if run.capturing():
        # zeros of the graph's own, written at every replay: the stream's may be busy, or not zero before the first one
        return torch.zeros(words, dtype=torch.int32, device=device)
    found = run.flags.get((device, stream))
    if found is None or found.numel() < words:
        found = run.flags[device, stream] = torch.zeros(words, dtype=torch.int32, device=device)
    return found
