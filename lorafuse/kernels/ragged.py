"""LoRA linear layers of many groups over ragged rows: the experts of a layer, or the adapters of a batch.

    y[s] = x[s] wᵀ[g] + bias[g] + xa[s] (scale · b[g])ᵀ        xa[s] = x[s] aᵀ[g]        g the group of row s

Shapes: x [rows, K] with any row stride, rows s of it in the order of their groups or found by `source [S]`; w [G, N, K]
with any strides, bias [G, N], a [G, R, K] and b [G, N, R] with any strides, xa [S, R]. y is in the order of the groups;
rows of no group are not written. Tiles are those of `routing`.

One kernel is all main loops: with w and b read transposed it computes `dx = dy w + dyb a`. Three epilogues: bias; the
activation of an expert, which stores u and h = act(u); and its backward, which turns dh into du while u is read and h
computed again. In the last two a program owns the same columns of gate and up, whose products follow one another.

Cost: 2SN(K + R) FLOPs and one pass over x, w and y for a main loop.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafuse.kernels.common import options, precision, tile_of
from lorafuse.kernels.routing import Tiles, source_rows
from lorafuse.plan import KernelConfig

__all__ = ["ACTIVATIONS", "ragged_activated", "ragged_activation_backward", "ragged_linear"]

# those that an epilogue computes
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@triton.jit
def _activate(x, ACT: tl.constexpr):
    """`(act(x), act'(x))` in fp32."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    elif ACT == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        t = 2 * tl.sigmoid(2 * inner) - 1
        slope = 0.7978845608028654 * (1 + 0.134145 * x * x)
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope
    elif ACT == "relu":
        return tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)
    else:
        positive = tl.maximum(x, 0.0)
        return positive * positive, 2 * positive


@triton.jit
def _accumulate(
    p_x,
    p_w,
    p_xa,
    p_b,
    o_x,
    o_m,
    o_n,
    group,
    end,
    N,
    K,
    R,
    stride_xm,
    stride_wg,
    stride_wn,
    stride_wk,
    stride_bg,
    stride_bn,
    stride_br,
    scale,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`x wᵀ + xa (scale · b)ᵀ` of one tile, fp32; o_n outside N must be masked by the caller's store."""
    dtype: tl.constexpr = p_x.dtype.element_ty
    acc = tl.zeros((o_m.shape[0], o_n.shape[0]), tl.float32)
    o_k = tl.arange(0, BLOCK_K)
    o_nw = tl.where(o_n < N, o_n, 0).to(tl.int64)
    p_xk = p_x + o_x[:, None] * stride_xm + o_k[None, :]
    p_wk = p_w + group * stride_wg + o_nw[None, :] * stride_wn + o_k.to(tl.int64)[:, None] * stride_wk
    step_w = tl.cast(stride_wk, tl.int64) * BLOCK_K
    for i_k in range(0, K, BLOCK_K):
        b_x = tl.load(p_xk, mask=(o_k < K - i_k)[None, :], other=0.0)
        b_w = tl.load(p_wk, mask=(o_k < K - i_k)[:, None], other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
        p_xk += BLOCK_K
        p_wk += step_w
    if p_xa is not None:
        # a loop and not unrolled, or the tiles of all ranks are in registers at once
        for i_r in tl.range(0, R, BLOCK_R, num_stages=1):
            o_r = i_r + tl.arange(0, BLOCK_R)
            mask = (o_m < end)[:, None] & (o_r < R)[None, :]
            b_xa = tl.load(p_xa + o_m.to(tl.int64)[:, None] * R + o_r[None, :], mask=mask, other=0.0)
            p_br = p_b + group * stride_bg + o_nw[None, :] * stride_bn + o_r.to(tl.int64)[:, None] * stride_br
            b_b = tl.load(p_br, mask=(o_r < R)[:, None], other=0.0)
            b_b = (b_b.to(tl.float32) * scale).to(dtype)
            acc = tl.dot(b_xa, b_b, acc, input_precision=PRECISION)
    return acc


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
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
):
    """One tile of BLOCK_M rows; `N` columns of w are what a row of tiles covers, twice that if gate and up are."""
    dtype: tl.constexpr = p_x.dtype.element_ty
    i_m, i_n = tile_of(tl.program_id(0), capacity, tl.cdiv(N, BLOCK_N), GROUP_M)
    group = tl.load(p_tiles + i_m * 3).to(tl.int64)
    if group == G:
        return
    row = tl.load(p_tiles + i_m * 3 + 1)
    end = tl.load(p_tiles + i_m * 3 + 2)
    o_m = row + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_x = source_rows(p_source, o_m, row, end)
    mask = (o_m < end)[:, None] & (o_n < N)[None, :]
    o_s = o_m.to(tl.int64)[:, None]
    acc = _accumulate(
        p_x, p_w, p_xa, p_b, o_x, o_m, o_n, group, end, N, K, R, stride_xm, stride_wg, stride_wn, stride_wk,
        stride_bg, stride_bn, stride_br, scale, BLOCK_K, BLOCK_R, PRECISION,
    )  # fmt: skip

    if EPILOGUE == "linear":
        if p_bias is not None:
            acc += tl.load(p_bias + group * N + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(p_y + o_s * N + o_n[None, :], acc.to(dtype), mask=mask)

    elif EPILOGUE == "activation":
        columns = 2 * N if GATED else N
        if p_bias is not None:
            acc += tl.load(p_bias + group * columns + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
        gate = acc.to(dtype)
        tl.store(p_y + o_s * columns + o_n[None, :], gate, mask=mask)
        h, _ = _activate(gate.to(tl.float32), ACT)
        if GATED:
            half_w = tl.cast(N, tl.int64) * stride_wn
            half_b = tl.cast(N, tl.int64) * stride_bn
            p_b_up = p_b
            if p_b is not None:
                p_b_up = p_b + half_b
            acc = _accumulate(
                p_x, p_w + half_w, p_xa, p_b_up, o_x, o_m, o_n, group, end, N, K, R, stride_xm, stride_wg, stride_wn,
                stride_wk, stride_bg, stride_bn, stride_br, scale, BLOCK_K, BLOCK_R, PRECISION,
            )  # fmt: skip
            if p_bias is not None:
                acc += tl.load(p_bias + group * columns + N + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
            up = acc.to(dtype)
            tl.store(p_y + o_s * columns + N + o_n[None, :], up, mask=mask)
            h *= up.to(tl.float32)
        tl.store(p_h + o_s * N + o_n[None, :], h.to(dtype), mask=mask)

    else:
        columns = 2 * N if GATED else N
        gate = tl.load(p_u + o_s * columns + o_n[None, :], mask=mask, other=0.0).to(tl.float32)
        h, slope = _activate(gate, ACT)
        factor = tl.load(p_factor + o_m, mask=o_m < end, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up = tl.load(p_u + o_s * columns + N + o_n[None, :], mask=mask, other=0.0).to(tl.float32)
            d_up = acc * factor * h
            tl.store(p_y + o_s * columns + N + o_n[None, :], d_up.to(dtype), mask=mask)
            h *= up
            slope *= up
        tl.store(p_h + o_s * N + o_n[None, :], h.to(dtype), mask=mask)
        tl.store(p_y + o_s * columns + o_n[None, :], (acc * factor * slope).to(dtype), mask=mask)
        if p_share is not None:
            share = tl.sum(tl.where(mask, acc * h, 0.0), 1)
            tl.store(p_share + i_n.to(tl.int64) * S + o_m, share, mask=o_m < end)


def _launch(
    epilogue: str,
    tiles: Tiles,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    xa: Tensor | None,
    b: Tensor | None,
    scale: float,
    columns: int,
    y: Tensor,
    config: KernelConfig,
    *,
    source: Tensor | None = None,
    factor: Tensor | None = None,
    h: Tensor | None = None,
    u: Tensor | None = None,
    share: Tensor | None = None,
    activation: str = "",
    gated: bool = False,
) -> None:
    table = tiles.of(config.block_m)
    _ragged_kernel[(table.shape[0] * triton.cdiv(columns, config.block_n),)](
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
        table.shape[0],
        tiles.groups,
        columns,
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
        GROUP_M=config.group_m,
        PRECISION=precision(x.dtype),
        EPILOGUE=epilogue,
        ACT=activation,
        GATED=gated,
        **options(config),
    )


def ragged_linear(
    tiles: Tiles,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    xa: Tensor | None,
    b: Tensor | None,
    scale: float,
    config: KernelConfig,
    *,
    source: Tensor | None = None,
) -> Tensor:
    """`y [S, N]`; rows of no group are not written."""
    y = x.new_empty((tiles.rows, w.shape[1]))
    _launch("linear", tiles, x, w, bias, xa, b, scale, w.shape[1], y, config, source=source)
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
    gated: bool,
    config: KernelConfig,
    *,
    source: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(u [S, N], h [S, I])` with h = act(u), or act(first half) · second half when gated."""
    columns = w.shape[1] // 2 if gated else w.shape[1]
    u, h = x.new_empty((tiles.rows, w.shape[1])), x.new_empty((tiles.rows, columns))
    _launch(
        "activation", tiles, x, w, bias, xa, b, scale, columns, u, config,
        source=source, h=h, activation=activation, gated=gated,
    )  # fmt: skip
    return u, h


def ragged_activation_backward(
    tiles: Tiles,
    g: Tensor,
    w: Tensor,
    gb: Tensor | None,
    a: Tensor | None,
    u: Tensor,
    activation: str,
    gated: bool,
    share: bool,
    config: KernelConfig,
    *,
    source: Tensor,
    factor: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(du [S, U], h [S, I], ⟨dh, h⟩ [S])` for dh = g wᵀ + gb aᵀ; du is that of `factor · dh`.

    w `[G, I, H]` and a `[G, I, R]` are those of the down projection, read transposed.
    """
    columns = w.shape[1]
    du, h = torch.empty_like(u), u.new_empty((tiles.rows, columns))
    parts = triton.cdiv(columns, config.block_n)
    shares = torch.empty((parts, tiles.rows), dtype=torch.float32, device=u.device) if share else None
    _launch(
        "activation_backward", tiles, g, w, None, gb, a, 1.0, columns, du, config, source=source, factor=factor,
        h=h, u=u, share=shares, activation=activation, gated=gated,
    )  # fmt: skip
    return du, h, None if shares is None else shares.sum(0)
