"""Activations of experts on tiles, forward and backward, as the epilogues of `ragged` compute them.

    h = act(u), act(gate) · up or a function of both            du = factor · dh · ∂h/∂u            share = ⟨dh, h⟩

A tile of u holds gate and up "halves" (BLOCK_N / 2 columns of gate, then the matching ones of up) or in "pairs" (column
2i gate, 2i + 1 up); "" is an activation without a gate. Everything is fp32 in registers; u is what was rounded and
stored, so that backward computes from the numbers that forward used.
"""

import triton
import triton.language as tl

__all__ = ["ACTIVATIONS", "GATES", "activate_columns", "activate_halves", "backward_of_columns", "split_gate"]

# act(x), which a gate multiplies by up
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
# functions of gate and up
GATES = ("clamped_swiglu",)


@triton.jit
def _activate(x, ACT: tl.constexpr):
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
def _gate(gate, up, ACT: tl.constexpr):
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
        h, slope = _activate(gate, ACT)
        return h * up, slope * up, h


@triton.jit
def split_gate(u, LAYOUT: tl.constexpr):
    """Gate and up of a tile that holds both."""
    HALF: tl.constexpr = u.shape[1] // 2
    if LAYOUT == "halves":
        gate, up = tl.split(u.reshape((u.shape[0], 2, HALF)).permute((0, 2, 1)))
    else:
        gate, up = tl.split(u.reshape((u.shape[0], HALF, 2)))
    return gate, up


@triton.jit
def activate_columns(
    acc, first, o_s, rows, p_u, p_h, N, ACT: tl.constexpr, LAYOUT: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Store u, rounded from `acc`, and h of the columns of u from `first`: without a gate, or with one in "pairs"."""
    dtype: tl.constexpr = p_u.dtype.element_ty
    WIDTH: tl.constexpr = acc.shape[1]
    if PARTS <= 1:
        o_n = first + tl.arange(0, WIDTH)
        u = acc.to(dtype)
        tl.store(p_u + o_s * N + o_n[None, :], u, mask=rows & (o_n < N)[None, :])
        if LAYOUT == "":
            h, _ = _activate(u.to(tl.float32), ACT)
            tl.store(p_h + o_s * N + o_n[None, :], h.to(dtype), mask=rows & (o_n < N)[None, :])
        else:
            gate, up = split_gate(u, LAYOUT)
            h, _, _ = _gate(gate.to(tl.float32), up.to(tl.float32), ACT)
            o_h = first // 2 + tl.arange(0, WIDTH // 2)
            tl.store(p_h + o_s * (N // 2) + o_h[None, :], h.to(dtype), mask=rows & (o_h < N // 2)[None, :])
    else:
        left, right = split_gate(acc, "halves")
        activate_columns(left, first, o_s, rows, p_u, p_h, N, ACT, LAYOUT, PARTS // 2)
        activate_columns(right, first + WIDTH // 2, o_s, rows, p_u, p_h, N, ACT, LAYOUT, PARTS // 2)


@triton.jit
def activate_halves(
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
        h, _, _ = _gate(gate.to(tl.float32), up.to(tl.float32), ACT)
        tl.store(p_h + o_s * half + o_n[None, :], h.to(dtype), mask=mask)
    else:
        left, right = split_gate(gate, "halves")
        left_up, right_up = split_gate(up, "halves")
        activate_halves(left, left_up, first, o_s, rows, p_u, p_h, half, ACT, PARTS // 2)
        activate_halves(right, right_up, first + WIDTH // 2, o_s, rows, p_u, p_h, half, ACT, PARTS // 2)


@triton.jit
def _backward_of_part(
    dh, first, o_s, rows, factor, p_u, p_du, p_h, N, ACT: tl.constexpr, LAYOUT: tl.constexpr
):  # fmt: skip
    """Store du and h of dh's columns, those of h from `first`; `⟨dh, h⟩` over them."""
    dtype: tl.constexpr = p_u.dtype.element_ty
    WIDTH: tl.constexpr = dh.shape[1]
    o_n = first + tl.arange(0, WIDTH)
    mask = rows & (o_n < N)[None, :]
    if LAYOUT == "":
        o_u = o_s * N + o_n[None, :]
        h, slope = _activate(tl.load(p_u + o_u, mask=mask, other=0.0).to(tl.float32), ACT)
        tl.store(p_du + o_u, (dh * factor * slope).to(dtype), mask=mask)
    elif LAYOUT == "halves":
        o_u = o_s * (2 * N) + o_n[None, :]
        gate = tl.load(p_u + o_u, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(p_u + o_u + N, mask=mask, other=0.0).to(tl.float32)
        h, d_gate, d_up = _gate(gate, up, ACT)
        tl.store(p_du + o_u, (dh * factor * d_gate).to(dtype), mask=mask)
        tl.store(p_du + o_u + N, (dh * factor * d_up).to(dtype), mask=mask)
    else:
        o_2 = 2 * first + tl.arange(0, 2 * WIDTH)
        o_u = o_s * (2 * N) + o_2[None, :]
        both = rows & (o_2 < 2 * N)[None, :]
        gate, up = split_gate(tl.load(p_u + o_u, mask=both, other=0.0), LAYOUT)
        h, d_gate, d_up = _gate(gate.to(tl.float32), up.to(tl.float32), ACT)
        du = tl.join((dh * factor * d_gate).to(dtype), (dh * factor * d_up).to(dtype))
        tl.store(p_du + o_u, du.reshape((dh.shape[0], 2 * WIDTH)), mask=both)
    tl.store(p_h + o_s * N + o_n[None, :], h.to(dtype), mask=mask)
    return tl.sum(tl.where(mask, dh * h, 0.0), 1)


@triton.jit
def backward_of_columns(
    dh, first, o_s, rows, factor, p_u, p_du, p_h, N, ACT: tl.constexpr, LAYOUT: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """The same in PARTS narrower parts one after the other, so that u, h and slopes of one part are in registers."""
    if PARTS <= 1:
        return _backward_of_part(dh, first, o_s, rows, factor, p_u, p_du, p_h, N, ACT, LAYOUT)
    else:
        HALF: tl.constexpr = dh.shape[1] // 2
        left, right = split_gate(dh, "halves")
        share = backward_of_columns(left, first, o_s, rows, factor, p_u, p_du, p_h, N, ACT, LAYOUT, PARTS // 2)
        return share + backward_of_columns(
            right, first + HALF, o_s, rows, factor, p_u, p_du, p_h, N, ACT, LAYOUT, PARTS // 2
        )
