"""Activations between two products whose epilogues compute none: rows in any order, forward and backward.

    h = act(u), act(gate) · up or a function of both        du = row_scale · dh · ∂h/∂u
    dots[s] = ⟨dh[s], h[s]⟩ + ⟨dy[s], bias[e]⟩               e the expert of row s

Shapes: gate, up, their gradients and h [S, I] with any strides; without a gate u stands for gate, and up is None. dots
[S] in fp32, row_scale [S], dy [S, H] with any row stride, row s of it the s-th or `source[s]`, bias [E, H] and
`experts [S]`, the expert of each row.

What a row gives depends on nothing but the row: every program has whole rows, and sums over columns have one order.

Bytes: one read of gate, up, dh (and dy) and one write of the rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafuse.kernels.epilogues import _activation, _gated
from lorafuse.kernels.rows import source_rows

__all__ = ["activate", "activate_backward"]

# rows and columns of a tile, and warps: what is read and written bounds them (not measured on a GPU)
_BLOCK_M, _BLOCK_N, _WARPS = 4, 512, 4


@triton.jit
def _activate_kernel(
    p_gate, p_up, p_h, M, N, stride_g, stride_h, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (o_m < M)[:, None] & (o_n < N)[None, :]
    o_g = o_m[:, None] * stride_g[0] + o_n[None, :] * stride_g[1]
    gate = tl.load(p_gate + o_g, mask=mask, other=0.0).to(tl.float32)
    if p_up is None:
        h, _ = _activation(gate, ACT)
    else:
        h, _, _ = _gated(gate, tl.load(p_up + o_g, mask=mask, other=0.0).to(tl.float32), ACT)
    tl.store(p_h + o_m[:, None] * stride_h + o_n[None, :], h.to(p_h.dtype.element_ty), mask=mask)


@triton.jit
def _activate_backward_kernel(
    p_dh,
    p_gate,
    p_up,
    p_dgate,
    p_dup,
    p_h,
    p_row_scale,
    p_dots,
    p_dy,
    p_bias,
    p_experts,
    p_source,
    M,
    N,
    H,
    stride_dy,
    stride_g,
    stride_h,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    dtype: tl.constexpr = p_h.dtype.element_ty
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = o_m < M
    row_scale = 1.0
    if p_row_scale is not None:
        row_scale = tl.load(p_row_scale + o_m, mask=rows, other=0.0).to(tl.float32)[:, None]
    dots = tl.zeros((BLOCK_M,), tl.float32)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        mask = rows[:, None] & (o_n < N)[None, :]
        o_g = o_m[:, None] * stride_g[0] + o_n[None, :] * stride_g[1]
        o_h = o_m[:, None] * stride_h + o_n[None, :]
        dh = tl.load(p_dh + o_h, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(p_gate + o_g, mask=mask, other=0.0).to(tl.float32)
        if p_up is None:
            h, slope = _activation(gate, ACT)
        else:
            h, slope, d_up = _gated(gate, tl.load(p_up + o_g, mask=mask, other=0.0).to(tl.float32), ACT)
            tl.store(p_dup + o_g, (dh * row_scale * d_up).to(dtype), mask=mask)
        tl.store(p_dgate + o_g, (dh * row_scale * slope).to(dtype), mask=mask)
        tl.store(p_h + o_h, h.to(dtype), mask=mask)
        dots += tl.sum(tl.where(mask, dh * h, 0.0), 1)
    if p_dots is not None:
        if p_bias is not None:
            expert = tl.load(p_experts + o_m, mask=rows, other=0).to(tl.int64)
            p_dym = p_dy + source_rows(p_source, o_m, 0, M)[:, None] * stride_dy
            for i_n in range(0, H, BLOCK_N):
                o_n = i_n + tl.arange(0, BLOCK_N)
                mask = rows[:, None] & (o_n < H)[None, :]
                dy = tl.load(p_dym + o_n[None, :], mask=mask, other=0.0).to(tl.float32)
                bias = tl.load(p_bias + expert[:, None] * H + o_n[None, :], mask=mask, other=0.0).to(tl.float32)
                dots += tl.sum(dy * bias, 1)
        tl.store(p_dots + o_m, dots, mask=rows)


def activate(name: str, gate: Tensor, up: Tensor | None) -> Tensor:
    """h `[S, I]`, contiguous, of the activation `name`; gate and up have the same strides."""
    (S, I), h = gate.shape, torch.empty_like(gate, memory_format=torch.contiguous_format)  # noqa: E741
    _activate_kernel[(triton.cdiv(S, _BLOCK_M), triton.cdiv(I, _BLOCK_N))](
        gate, up, h, S, I, gate.stride(), I, ACT=name, BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, num_warps=_WARPS
    )
    return h


def activate_backward(
    name: str, dh: Tensor, gate: Tensor, up: Tensor | None, dgate: Tensor, dup: Tensor | None, *,
    row_scale: Tensor | None = None, need_dots: bool = False, dy: Tensor | None = None, bias: Tensor | None = None,
    experts: Tensor | None = None, source: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`(h, dots)`; the gradients are written into dgate and dup, which have gate's strides. dh is contiguous.

    dots are None unless needed; `dy`, `bias` (contiguous) and `experts` are there for their second term.
    """
    (S, I), h = gate.shape, torch.empty_like(dh)  # noqa: E741
    dots = torch.empty(S, dtype=torch.float32, device=dh.device) if need_dots else None
    _activate_backward_kernel[(triton.cdiv(S, _BLOCK_M),)](
        dh,
        gate,
        up,
        dgate,
        dup,
        h,
        row_scale,
        dots,
        dy,
        bias,
        experts,
        source,
        S,
        I,
        0 if dy is None else dy.shape[1],
        0 if dy is None else dy.stride(0),
        gate.stride(),
        I,
        ACT=name,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        num_warps=_WARPS,
    )
    return h, dots
