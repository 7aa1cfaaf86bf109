"""LoRA linear layers of many groups over ragged rows: the experts of a layer, or the adapters of a batch.

    y[s] = x[s] wᵀ[g] + bias[g] + xa[s] (scale · b[g])ᵀ        xa[s] = x[s] aᵀ[g]        g the group of row s

Shapes: x [rows, K] with any row stride, rows s of it in the order of their groups or found by `source [S]`; w [G, N, K]
with any strides, bias [G, N], a [G, R, K] and b [G, N, R] with any strides, xa [S, R]. y is in the order of the groups;
rows of no group are not written. Tiles are those of `routing`.

One kernel is all main loops: with w and b read transposed it computes `dx = dy w + dyb a`. Three epilogues: bias; the
activation of an expert, which stores u and h; and its backward, which turns dh into du while u is read and h computed
again (`ragged_epilogue`). Gate and up of the same columns of h are in one tile: of gate and up one after the other, a
tile takes BLOCK_N / 2 rows of w from each half, so that x is read once and both are in the accumulator of one program.

In the TMA form w is read through a descriptor of the whole stack and as many programs as there are SMs walk the tiles;
x stays on pointers, because its rows are gathered.

Cost: 2SN(K + R) FLOPs and one pass over x, w and y for a main loop.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafuse.kernels.common import launch_with_scratch, options, precision, rank_steps, tile_of
from lorafuse.kernels.ragged_epilogue import (
    ACTIVATIONS,
    GATES,
    activate_columns,
    activate_halves,
    backward_of_columns,
    split_gate,
)
from lorafuse.kernels.routing import Tiles, source_rows
from lorafuse.plan import KernelConfig

__all__ = ["ACTIVATIONS", "GATES", "ragged_activated", "ragged_activation_backward", "ragged_linear"]


# accumulators of a thread that an activation takes at a time: u, h and the slopes of more do not fit beside those that
# wait (Triton 3.6, 2026-11-25)
_PART = 16


@triton.jit
def _stack_descriptor(
    p_w, G, N, K, stride_wg, stride_wn, stride_wk, WEIGHT: tl.constexpr, HALVES: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A descriptor of `[1, BLOCK_N, BLOCK_K]` boxes of the stack ("nk"), or transposed ("kn") where N is contiguous."""
    HALF: tl.constexpr = BLOCK_N // 2
    if HALVES:
        half = (N // 2).to(tl.int64)
        if WEIGHT == "nk":
            return tl.make_tensor_descriptor(
                p_w, [G, 2, N // 2, K], [stride_wg, half * stride_wn, stride_wn, 1], [1, 2, HALF, BLOCK_K]
            )
        else:
            return tl.make_tensor_descriptor(
                p_w, [G, K, 2, N // 2], [stride_wg, stride_wk, half, 1], [1, BLOCK_K, 2, HALF]
            )
    elif WEIGHT == "nk":
        return tl.make_tensor_descriptor(p_w, [G, N, K], [stride_wg, stride_wn, 1], [1, BLOCK_N, BLOCK_K])
    else:
        return tl.make_tensor_descriptor(p_w, [G, K, N], [stride_wg, stride_wk, 1], [1, BLOCK_K, BLOCK_N])


@triton.jit
def _load_weight(d_w, group, first, i_k, WEIGHT: tl.constexpr, HALVES: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """`wᵀ [K, N]` of one box, `first` its first row of w, or of either half of w."""
    if WEIGHT == "nk":
        box = d_w.load([group, 0, first, i_k]) if HALVES else d_w.load([group, first, i_k])
        return box.reshape((N, K)).T
    else:
        box = d_w.load([group, i_k, 0, first]) if HALVES else d_w.load([group, i_k, first])
        return box.reshape((K, N))


@triton.jit
def _add_low_rank(
    acc, p_xa, p_b, o_s, o_n, rows, columns, group, i_r, R, stride_bg, stride_bn, stride_br, scale,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc + xa (scale · b)ᵀ` for BLOCK_R ranks from `i_r`."""
    o_r = i_r + tl.arange(0, BLOCK_R)
    b_xa = tl.load(p_xa + o_s * R + o_r[None, :], mask=rows & (o_r < R)[None, :], other=0.0)
    p_br = p_b + group * stride_bg + o_n[None, :] * stride_bn + o_r.to(tl.int64)[:, None] * stride_br
    b_b = tl.load(p_br, mask=(o_r < R)[:, None] & columns, other=0.0)
    b_b = (b_b.to(tl.float32) * scale).to(p_xa.dtype.element_ty)
    return tl.dot(b_xa, b_b, acc, input_precision=PRECISION)


@triton.jit
def _ragged_kernel(
    p_x,
    p_w,
    p_bias,
    p_xa,
    p_b,
    p_y,
    p_h,
    p_u,
    p_share,
    p_source,
    p_factor,
    p_tiles,
    capacity,
    G,
    N,
    K,
    R,
    S,
    stride_xm,
    stride_wg,
    stride_wn,
    stride_wk,
    stride_bg,
    stride_bn,
    stride_br,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACT: tl.constexpr,
    LAYOUT: tl.constexpr,
    PARTS: tl.constexpr,
    WEIGHT: tl.constexpr,
):
    """N rows of w; for an activation those of gate and up together. p_y is y, u or du."""
    dtype: tl.constexpr = p_x.dtype.element_ty
    HALVES: tl.constexpr = EPILOGUE == "activation" and LAYOUT == "halves"
    COLUMNS: tl.constexpr = BLOCK_N // 2 if HALVES else BLOCK_N
    limit = N // 2 if HALVES else N
    tiles_m = tl.load(p_tiles + capacity * 3 + 1)
    tiles_n = tl.cdiv(limit, COLUMNS)
    if WEIGHT != "pointer":
        d_w = _stack_descriptor(
            p_w, G, N, K, stride_wg, stride_wn, stride_wk, WEIGHT, HALVES, BLOCK_N, BLOCK_K
        )  # fmt: skip
    for t in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        i_m, i_n = tile_of(t, tiles_m, tiles_n, GROUP_M)
        group = tl.load(p_tiles + i_m * 3)
        row = tl.load(p_tiles + i_m * 3 + 1)
        end = tl.load(p_tiles + i_m * 3 + 2)
        o_m = row + tl.arange(0, BLOCK_M)
        o_x = source_rows(p_source, o_m, row, end)
        # columns of y, and which exist; where gate and up are halves of w, those of the second are N / 2 further on
        o_n = i_n * COLUMNS + tl.arange(0, BLOCK_N) % COLUMNS
        inside = o_n < limit
        if HALVES:
            o_n += tl.arange(0, BLOCK_N) // COLUMNS * limit
        o_nw, group_w = o_n.to(tl.int64), group.to(tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        o_k = tl.arange(0, BLOCK_K)
        p_xk = p_x + o_x[:, None] * stride_xm + o_k[None, :]
        if WEIGHT != "pointer":
            for i_k in range(0, K, BLOCK_K):
                b_x = tl.load(p_xk, mask=(o_k < K - i_k)[None, :], other=0.0)
                b_w = _load_weight(d_w, group, i_n * COLUMNS, i_k, WEIGHT, HALVES, BLOCK_N, BLOCK_K)
                acc = tl.dot(b_x, b_w, acc)
                p_xk += BLOCK_K
        else:
            p_wk = p_w + group_w * stride_wg + o_nw[None, :] * stride_wn + o_k.to(tl.int64)[:, None] * stride_wk
            step_w = tl.cast(stride_wk, tl.int64) * BLOCK_K
            for i_k in range(0, K, BLOCK_K):
                b_x = tl.load(p_xk, mask=(o_k < K - i_k)[None, :], other=0.0)
                b_w = tl.load(p_wk, mask=(o_k < K - i_k)[:, None] & inside[None, :], other=0.0)
                acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
                p_xk += BLOCK_K
                p_wk += step_w
        o_s = o_m.to(tl.int64)[:, None]
        rows = (o_m < end)[:, None]
        if p_xa is not None:
            if RANK_STEPS == 1:
                acc = _add_low_rank(
                    acc, p_xa, p_b, o_s, o_nw, rows, inside[None, :], group_w, 0, R, stride_bg, stride_bn, stride_br,
                    scale, BLOCK_R, PRECISION,
                )  # fmt: skip
            else:
                # a loop and not unrolled, or the tiles of all ranks are in registers at once
                for i_r in tl.range(0, R, BLOCK_R, num_stages=1):
                    acc = _add_low_rank(
                        acc, p_xa, p_b, o_s, o_nw, rows, inside[None, :], group_w, i_r, R, stride_bg, stride_bn,
                        stride_br, scale, BLOCK_R, PRECISION,
                    )  # fmt: skip
        if p_bias is not None:
            acc += tl.load(p_bias + group_w * N + o_n, mask=inside, other=0.0).to(tl.float32)[None, :]

        if EPILOGUE == "activation_backward":
            factor = tl.load(p_factor + o_m, mask=o_m < end, other=0.0).to(tl.float32)[:, None]
            share = backward_of_columns(
                acc, i_n * BLOCK_N, o_s, rows, factor, p_u, p_y, p_h, N, ACT, LAYOUT, PARTS
            )  # fmt: skip
            if p_share is not None:
                tl.store(p_share + i_n.to(tl.int64) * S + o_m, share, mask=o_m < end)
        elif EPILOGUE == "linear":
            tl.store(p_y + o_s * N + o_n[None, :], acc.to(dtype), mask=rows & inside[None, :])
        elif HALVES:
            gate, up = split_gate(acc, LAYOUT)
            activate_halves(gate, up, i_n * COLUMNS, o_s, rows, p_y, p_h, limit, ACT, PARTS // 2)
        else:
            activate_columns(acc, i_n * BLOCK_N, o_s, rows, p_y, p_h, N, ACT, LAYOUT, PARTS)


def _launch(
    epilogue: str,
    tiles: Tiles,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    xa: Tensor | None,
    b: Tensor | None,
    scale: float,
    y: Tensor,
    programs: int,
    config: KernelConfig,
    *,
    source: Tensor | None = None,
    factor: Tensor | None = None,
    h: Tensor | None = None,
    u: Tensor | None = None,
    share: Tensor | None = None,
    activation: str = "",
    layout: str = "",
) -> None:
    table, N = tiles.of(config.block_m), w.shape[1]
    capacity = table.shape[0] - 1
    tma = config.form == "tma"
    halves = 2 if epilogue == "activation" and layout == "halves" else 1
    # the most there can be
    count = capacity * triton.cdiv(N // halves, config.block_n // halves)

    def launch() -> None:
        _ragged_kernel[(min(programs, count) if tma else count,)](
            x,
            w,
            bias,
            xa,
            b,
            y,
            h,
            u,
            share,
            source,
            factor,
            table,
            capacity,
            tiles.groups,
            N,
            w.shape[2],
            0 if xa is None else xa.shape[1],
            tiles.rows,
            x.stride(0),
            *w.stride(),
            *((0, 0, 0) if b is None else b.stride()),
            scale,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_R=config.block_r,
            RANK_STEPS=0 if xa is None else rank_steps(xa.shape[1], config),
            GROUP_M=config.group_m,
            PRECISION=precision(x.dtype),
            EPILOGUE=epilogue,
            ACT=activation,
            LAYOUT=layout,
            PARTS=max(1, config.block_m * config.block_n // (32 * config.warps * _PART)),
            WEIGHT="pointer" if not tma else "nk" if w.stride(2) == 1 else "kn",
            **options(config),
        )

    if tma:
        launch_with_scratch(launch, x.device)
    else:
        launch()


def ragged_linear(
    tiles: Tiles,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    xa: Tensor | None,
    b: Tensor | None,
    scale: float,
    programs: int,
    config: KernelConfig,
    *,
    source: Tensor | None = None,
) -> Tensor:
    """`y [S, N]`; rows of no group are not written. `programs` is how many run at a time, the number of SMs."""
    y = x.new_empty((tiles.rows, w.shape[1]))
    _launch("linear", tiles, x, w, bias, xa, b, scale, y, programs, config, source=source)
    return y


def ragged_activated(
    tiles: Tiles,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    xa: Tensor | None,
    b: Tensor | None,
    scale: float,
    activation: str,
    layout: str,
    programs: int,
    config: KernelConfig,
    *,
    source: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(u [S, N], h [S, I])`; `layout` says how u holds gate and up: "halves", "pairs", or "" without a gate."""
    columns = w.shape[1] // 2 if layout else w.shape[1]
    u, h = x.new_empty((tiles.rows, w.shape[1])), x.new_empty((tiles.rows, columns))
    _launch(
        "activation", tiles, x, w, bias, xa, b, scale, u, programs, config,
        source=source, h=h, activation=activation, layout=layout,
    )  # fmt: skip
    return u, h


def ragged_activation_backward(
    tiles: Tiles,
    g: Tensor,
    w: Tensor,
    gb: Tensor | None,
    a: Tensor | None,
    scale: float,
    u: Tensor,
    activation: str,
    layout: str,
    share: bool,
    programs: int,
    config: KernelConfig,
    *,
    source: Tensor,
    factor: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(du [S, U], h [S, I], ⟨dh, h⟩ [S])` for dh = g wᵀ + gb (scale · a)ᵀ; du is that of `factor · dh`.

    w `[G, I, H]` and a `[G, I, R]` are those of the down projection, read transposed.
    """
    columns = w.shape[1]
    du, h = torch.empty_like(u), u.new_empty((tiles.rows, columns))
    parts = triton.cdiv(columns, config.block_n)
    shares = torch.empty((parts, tiles.rows), dtype=torch.float32, device=u.device) if share else None
    _launch(
        "activation_backward", tiles, g, w, None, gb, a, scale, du, programs, config, source=source, factor=factor,
        h=h, u=u, share=shares, activation=activation, layout=layout,
    )  # fmt: skip
    return du, h, None if shares is None else shares.sum(0)
