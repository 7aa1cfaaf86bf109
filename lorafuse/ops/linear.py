"""`lorafuse::lora_linear`: schema, shape rule, fake kernels, autograd.

    y = x wᵀ + bias + scale · (drop(x) aᵀ) bᵀ

`xa = drop(x) aᵀ`, `[M, R]` in x's dtype, where drop() masks and does not rescale; with x it is all that backward needs
besides the parameters. There is no gradient of w. The backend is an argument, so that backward runs where forward ran and a compiled
graph shows the choice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafuse.backends import base, eager
from lorafuse.ops._define import LIBRARY

__all__ = ["lora_linear", "output_shapes"]

LIBRARY.define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor? seed, float scale, float dropout_p,"
    " str backend) -> (Tensor y, Tensor xa)"
)
LIBRARY.define(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor? xa, Tensor weight, Tensor a, Tensor b, Tensor? seed, float scale,"
    " float dropout_p, bool[] needs, str backend) -> (Tensor dx, Tensor da, Tensor db, Tensor dbias)"
)


def output_shapes(
    x: Sequence[int], w: Sequence[int], a: Sequence[int], b: Sequence[int], bias: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Shapes of `y` and `xa` from those of the inputs: the one statement of what fits, for real and fake kernels.

    Raises ValueError with the shapes and the rule when they do not fit.
    """
    if (
        len(w) == len(a) == len(b) == 2
        and 1 <= len(x) <= 4
        and x[-1] == w[1] == a[1]
        and b[0] == w[0]
        and a[0] == b[1] >= 1
        and (bias is None or (len(bias) == 1 and bias[0] == w[0]))
    ):
        tokens = 1
        for size in x[:-1]:
            tokens *= size
        return (*x[:-1], w[0]), (tokens, a[0])
    shown = f"x {list(x)}, weight {list(w)}, a {list(a)}, b {list(b)}, bias {None if bias is None else list(bias)}"
    raise ValueError(
        f"lora_linear got {shown}; the rule is x [..., K] of 1 to 4 dimensions, weight [N, K], a [R, K], b [N, R], "
        "bias [N], R >= 1: weight is stored as nn.Linear stores it, a is lora_A.weight and b is lora_B.weight"
    )


def _forward(x, weight, bias, a, b, seed, scale, dropout_p, backend):
    output_shapes(x.shape, weight.shape, a.shape, b.shape, None if bias is None else bias.shape)
    run = eager if backend == "eager" else base.load(backend)
    return run.linear_forward(x, weight, bias, a, b, seed, scale, dropout_p)


def _fake_forward(x, weight, bias, a, b, seed, scale, dropout_p, backend):
    y, xa = output_shapes(x.shape, weight.shape, a.shape, b.shape, None if bias is None else bias.shape)
    return x.new_empty(y), x.new_empty(xa)


def _backward(dy, x, xa, weight, a, b, seed, scale, dropout_p, needs, backend):
    run = eager if backend == "eager" else base.load(backend)
    grads = run.linear_backward(dy, x, xa, weight, a, b, seed, scale, dropout_p, *needs)
    return tuple(dy.new_empty(0) if g is None else g for g in grads)


def _fake_backward(dy, x, xa, weight, a, b, seed, scale, dropout_p, needs, backend):
    shapes = ((*dy.shape[:-1], weight.shape[1]), a.shape, b.shape, (weight.shape[0],))
    dtypes = (dy.dtype, a.dtype, b.dtype, dy.dtype)
    return tuple(
        dy.new_empty(shape if need else (0,), dtype=dtype if need else dy.dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


_op = torch.ops.lorafuse.lora_linear.default
_op_backward = torch.ops.lorafuse.lora_linear_backward.default
_BelowAutograd = torch._C._AutoDispatchBelowAutograd


def _run_forward(ctx, x, weight, bias, a, b, seed, scale, dropout_p, backend):
    with _BelowAutograd():
        y, xa = _op(x, weight, bias, a, b, seed, scale, dropout_p, backend)
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[3] else None, xa if needs[4] else None, weight, a, b, seed)
    ctx.settings = scale, dropout_p, backend
    return y, xa


def _run_backward(ctx, dy):
    need_x, _, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
    needs = [need_x, need_a, need_b, need_bias]
    x, xa, weight, a, b, seed = ctx.saved_tensors
    grads = _op_backward(dy, x, xa, weight, a, b, seed, *ctx.settings[:2], needs, ctx.settings[2])
    dx, da, db, dbias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dx, None, dbias, da, db, None, None, None, None


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, b, seed, scale, dropout_p, backend):
        return _run_forward(ctx, x, weight, bias, a, b, seed, scale, dropout_p, backend)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _run_backward(ctx, dy)


class _LoRALinearWithXa(torch.autograd.Function):
    """The operator itself returns xa too; handing it through autograd costs 0.7 us, so eager calls do not."""

    @staticmethod
    def forward(ctx, *args):
        y, xa = _run_forward(ctx, *args)
        ctx.mark_non_differentiable(xa)
        return y, xa

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        return _run_backward(ctx, dy)


LIBRARY.impl("lora_linear", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("lora_linear", lambda *args: _LoRALinearWithXa.apply(*args), "Autograd")
LIBRARY.impl("lora_linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("lorafuse::lora_linear", _fake_forward, lib=LIBRARY)
torch.library.register_fake("lorafuse::lora_linear_backward", _fake_backward, lib=LIBRARY)


def lora_linear(x, weight, bias, a, b, seed, scale, dropout_p, backend):
    """y of the operator; see `lorafuse.functional.lora_linear` for the meaning. `backend` is a name, never "auto"."""
    if torch.compiler.is_compiling():
        return _op(x, weight, bias, a, b, seed, scale, dropout_p, backend)[0]
    return _LoRALinear.apply(x, weight, bias, a, b, seed, scale, dropout_p, backend)
