"""What happens to a tile of accumulators before it is stored: activations of experts, forward and backward.

    h = act(u), act(gate) · up or a function of both        du = row_scale · dh · ∂h/∂u        router_grad = ⟨dh, h⟩

An epilogue is a function of `acc`, fp32 `[BLOCK_M, BLOCK_N]`, of where it lies, and of what else it reads and writes
(`operands`). `matmul` calls it by name. One more is a function here and a line there.

The gate layout says how u holds gate and up: "concatenated" (columns of gate, then those of up), "interleaved" (column
2i is gate, 2i + 1 is up), "apart" (two matrices, of a gated MLP's two layers), or "" without a gate. Everything is fp32
in registers; u is what was rounded and stored, so that backward computes from the numbers that forward used. Tiles are
processed in PARTS narrower ones, one after the other, so that u, h and the slopes of one part are in registers.
"""

import triton
import triton.language as tl

from lorafuse.kernels.common import split_columns

__all__ = ["ACTIVATIONS", "GATES", "activate", "activate_apart", "activate_backward"]

# act(x), which a gate multiplies by up
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
# functions of gate and up
GATES = ("clamped_swiglu",)


@triton.jit
def _activation(x, ACT: tl.constexpr):
    """`(act(x), act'(x))`."""
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
        tl.static_assert(ACT == "relu2")
        positive = tl.maximum(x, 0.0)
        return positive * positive, 2 * positive


@triton.jit
def _gated(gate, up, ACT: tl.constexpr):
    """`(h, ∂h/∂gate, ∂h/∂up)`."""
    if ACT == "clamped_swiglu":
        # as torch.clamp: NaN stays, and at the limit itself the gradient passes
        low = tl.where(gate > 7.0, 7.0, gate)
        raised = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1
        s = tl.sigmoid(1.702 * low)
        d_gate = tl.where(gate <= 7.0, raised * s * (1 + 1.702 * low * (1 - s)), 0.0)
        d_up = tl.where((up >= -7.0) & (up <= 7.0), low * s, 0.0)
        return raised * low * s, d_gate, d_up
    else:
        h, slope = _activation(gate, ACT)
        return h * up, slope * up, h


@triton.jit
def _split_gate(u, GATE: tl.constexpr):
    """Gate and up of a tile that holds both."""
    if GATE == "concatenated":
        gate, up = split_columns(u)
    else:
        gate, up = tl.split(u.reshape((u.shape[0], u.shape[1] // 2, 2)))
    return gate, up


@triton.jit
def _activate_columns(
    acc, first, o_s, rows, p_u, p_h, N, ACT: tl.constexpr, GATE: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Store u, rounded from `acc`, and h of N columns of u from `first`: without a gate, or with one interleaved."""
    dtype: tl.constexpr = p_u.dtype.element_ty
    WIDTH: tl.constexpr = acc.shape[1]
    if PARTS <= 1:
        o_n = first + tl.arange(0, WIDTH)
        u = acc.to(dtype)
        tl.store(p_u + o_s * N + o_n[None, :], u, mask=rows & (o_n < N)[None, :])
        if GATE == "":
            h, _ = _activation(u.to(tl.float32), ACT)
            tl.store(p_h + o_s * N + o_n[None, :], h.to(dtype), mask=rows & (o_n < N)[None, :])
        else:
            gate, up = _split_gate(u, GATE)
            h, _, _ = _gated(gate.to(tl.float32), up.to(tl.float32), ACT)
            o_h = first // 2 + tl.arange(0, WIDTH // 2)
            tl.store(p_h + o_s * (N // 2) + o_h[None, :], h.to(dtype), mask=rows & (o_h < N // 2)[None, :])
    else:
        left, right = split_columns(acc)
        _activate_columns(left, first, o_s, rows, p_u, p_h, N, ACT, GATE, PARTS // 2)
        _activate_columns(right, first + WIDTH // 2, o_s, rows, p_u, p_h, N, ACT, GATE, PARTS // 2)


@triton.jit
def _activate_concatenated(
    gate, up, first, o_s, rows, p_u, p_h, half, ACT: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """The same of gate and the matching columns of up, from `first` of `half` each."""
    dtype: tl.constexpr = p_u.dtype.element_ty
    WIDTH: tl.constexpr = gate.shape[1]
    if PARTS <= 1:
        o_n = first + tl.arange(0, WIDTH)
        mask = rows & (o_n < half)[None, :]
        gate, up = gate.to(dtype), up.to(dtype)
        p_gate = p_u + o_s * (2 * half) + o_n[None, :]
        tl.store(p_gate, gate, mask=mask)
        tl.store(p_gate + half, up, mask=mask)
        h, _, _ = _gated(gate.to(tl.float32), up.to(tl.float32), ACT)
        tl.store(p_h + o_s * half + o_n[None, :], h.to(dtype), mask=mask)
    else:
        left, right = split_columns(gate)
        left_up, right_up = split_columns(up)
        _activate_concatenated(left, left_up, first, o_s, rows, p_u, p_h, half, ACT, PARTS // 2)
        _activate_concatenated(right, right_up, first + WIDTH // 2, o_s, rows, p_u, p_h, half, ACT, PARTS // 2)


@triton.jit
def activate_apart(
    gate, up, first, o_s, rows, p_gate, p_up, p_h, N, ACT: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Store gate and up, `[…, N]` each, and h of the same columns, from `first` on."""
    dtype: tl.constexpr = p_h.dtype.element_ty
    WIDTH: tl.constexpr = gate.shape[1]
    if PARTS <= 1:
        o_n = first + tl.arange(0, WIDTH)
        mask = rows & (o_n < N)[None, :]
        o_u = o_s * N + o_n[None, :]
        gate, up = gate.to(dtype), up.to(dtype)
        tl.store(p_gate + o_u, gate, mask=mask)
        tl.store(p_up + o_u, up, mask=mask)
        h, _, _ = _gated(gate.to(tl.float32), up.to(tl.float32), ACT)
        tl.store(p_h + o_u, h.to(dtype), mask=mask)
    else:
        left, right = split_columns(gate)
        left_up, right_up = split_columns(up)
        activate_apart(left, left_up, first, o_s, rows, p_gate, p_up, p_h, N, ACT, PARTS // 2)
        activate_apart(right, right_up, first + WIDTH // 2, o_s, rows, p_gate, p_up, p_h, N, ACT, PARTS // 2)


@triton.jit
def activate(acc, first, o_s, rows, p_u, operands, N, EPILOGUE: tl.constexpr):
    """Store u and h. `first` is the tile's first column of u, of gate where gate and up are concatenated.

    operands: h.
    """
    ACT: tl.constexpr = EPILOGUE[1]
    GATE: tl.constexpr = EPILOGUE[2]
    PARTS: tl.constexpr = EPILOGUE[3]
    if GATE == "concatenated":
        gate, up = _split_gate(acc, GATE)
        _activate_concatenated(gate, up, first, o_s, rows, p_u, operands[0], N // 2, ACT, PARTS // 2)
    else:
        _activate_columns(acc, first, o_s, rows, p_u, operands[0], N, ACT, GATE, PARTS)


@triton.jit
def _backward_of_part(
    dh, first, o_s, rows, row_scale, p_u, p_du, p_h, N, ACT: tl.constexpr, GATE: tl.constexpr
):  # fmt: skip
    """Store du and h of dh's columns, those of h from `first`; `⟨dh, h⟩` over them."""
    dtype: tl.constexpr = p_h.dtype.element_ty
    WIDTH: tl.constexpr = dh.shape[1]
    o_n = first + tl.arange(0, WIDTH)
    mask = rows & (o_n < N)[None, :]
    if GATE == "":
        o_u = o_s * N + o_n[None, :]
        h, slope = _activation(tl.load(p_u + o_u, mask=mask, other=0.0).to(tl.float32), ACT)
        tl.store(p_du + o_u, (dh * row_scale * slope).to(dtype), mask=mask)
    elif GATE == "concatenated":
        o_u = o_s * (2 * N) + o_n[None, :]
        gate = tl.load(p_u + o_u, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(p_u + o_u + N, mask=mask, other=0.0).to(tl.float32)
        h, d_gate, d_up = _gated(gate, up, ACT)
        tl.store(p_du + o_u, (dh * row_scale * d_gate).to(dtype), mask=mask)
        tl.store(p_du + o_u + N, (dh * row_scale * d_up).to(dtype), mask=mask)
    elif GATE == "apart":
        o_u = o_s * N + o_n[None, :]
        gate = tl.load(p_u[0] + o_u, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(p_u[1] + o_u, mask=mask, other=0.0).to(tl.float32)
        h, d_gate, d_up = _gated(gate, up, ACT)
        tl.store(p_du[0] + o_u, (dh * row_scale * d_gate).to(dtype), mask=mask)
        tl.store(p_du[1] + o_u, (dh * row_scale * d_up).to(dtype), mask=mask)
    else:
        o_2 = 2 * first + tl.arange(0, 2 * WIDTH)
        o_u = o_s * (2 * N) + o_2[None, :]
        both = rows & (o_2 < 2 * N)[None, :]
        gate, up = _split_gate(tl.load(p_u + o_u, mask=both, other=0.0), GATE)
        h, d_gate, d_up = _gated(gate.to(tl.float32), up.to(tl.float32), ACT)
        du = tl.join((dh * row_scale * d_gate).to(dtype), (dh * row_scale * d_up).to(dtype))
        tl.store(p_du + o_u, du.reshape((dh.shape[0], 2 * WIDTH)), mask=both)
    tl.store(p_h + o_s * N + o_n[None, :], h.to(dtype), mask=mask)
    return tl.sum(tl.where(mask, dh * h, 0.0), 1)


@triton.jit
def _backward_of_columns(
    dh, first, o_s, rows, row_scale, p_u, p_du, p_h, N, ACT: tl.constexpr, GATE: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """The same in PARTS narrower parts."""
    if PARTS <= 1:
        return _backward_of_part(dh, first, o_s, rows, row_scale, p_u, p_du, p_h, N, ACT, GATE)
    else:
        HALF: tl.constexpr = dh.shape[1] // 2
        left, right = split_columns(dh)
        of_left = _backward_of_columns(left, first, o_s, rows, row_scale, p_u, p_du, p_h, N, ACT, GATE, PARTS // 2)
        return of_left + _backward_of_columns(
            right, first + HALF, o_s, rows, row_scale, p_u, p_du, p_h, N, ACT, GATE, PARTS // 2
        )


@triton.jit
def activate_backward(dh, i_n, o_m, end, p_du, operands, M, N, EPILOGUE: tl.constexpr):
    """Store du and h of the tile's columns of h, and ⟨dh, h⟩ over them as row `i_n` of its partial sums `[…, M]`.

    operands: u, h, row_scale `[M]` or None, and the partial sums of ⟨dh, h⟩ or None. Of gate and up apart, u and du are
    pairs.
    """
    ACT: tl.constexpr = EPILOGUE[1]
    GATE: tl.constexpr = EPILOGUE[2]
    PARTS: tl.constexpr = EPILOGUE[3]
    p_u, p_h, p_row_scale, p_router_grad = operands
    row_scale = 1.0
    if p_row_scale is not None:
        row_scale = tl.load(p_row_scale + o_m, mask=o_m < end, other=0.0).to(tl.float32)[:, None]
    o_s, rows = o_m.to(tl.int64)[:, None], (o_m < end)[:, None]
    router_grad = _backward_of_columns(dh, i_n * dh.shape[1], o_s, rows, row_scale, p_u, p_du, p_h, N, ACT, GATE, PARTS)
    if p_router_grad is not None:
        tl.store(p_router_grad + i_n.to(tl.int64) * M + o_m, router_grad, mask=o_m < end)
