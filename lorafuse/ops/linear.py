"""`lorafuse::lora_linear`: schema, shape rule, fake kernels, autograd.

    y = x wᵀ + bias + scale · (drop(x) aᵀ) bᵀ

`xa = drop(x) aᵀ`, `[M, R]` in x's dtype, where drop() masks and does not rescale; with x it is all that backward needs
besides the parameters. There is no gradient of w. The backend is an argument, so that backward runs where forward ran
and a compiled graph shows the choice; "auto" is resolved by the plan when the operator runs, for each direction.

Where nobody else would see the call (`_is_unseen`), autograd calls the kernels past torch's dispatcher, which costs as
much as a small product.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafuse.backends import base, eager
from lorafuse.backends.probe import device_spec, linear_problem
from lorafuse.ops._define import LIBRARY
from lorafuse.plan import Plan, Problem, select

__all__ = ["check_shapes", "lora_linear", "plan_problem"]

_GRADIENTS = ("dx", "da", "db", "dbias")

LIBRARY.define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor? seed, float scale, float dropout_p,"
    " str backend) -> (Tensor y, Tensor xa)"
)
LIBRARY.define(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor? xa, Tensor weight, Tensor a, Tensor b, Tensor? seed,"
    " float scale, float dropout_p, bool[] needs, str backend) -> (Tensor dx, Tensor da, Tensor db, Tensor dbias)"
)


def check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> None:
    """The one statement of which shapes fit, for real and fake kernels. Raises ValueError with shapes and rule."""
    w_shape, a_shape, b_shape = weight.shape, a.shape, b.shape
    if (
        len(w_shape) == len(a_shape) == len(b_shape) == 2
        and 1 <= x.dim() <= 4
        and x.shape[-1] == w_shape[1] == a_shape[1]
        and b_shape[0] == w_shape[0]
        and b_shape[1] == a_shape[0] >= 1
        and (bias is None or (bias.dim() == 1 and bias.shape[0] == w_shape[0]))
    ):
        return
    shown = ", ".join(
        f"{name} {None if tensor is None else list(tensor.shape)}"
        for name, tensor in (("x", x), ("weight", weight), ("a", a), ("b", b), ("bias", bias))
    )
    raise ValueError(
        f"lora_linear got {shown}; the rule is x [..., K] of 1 to 4 dimensions, weight [N, K], a [R, K], b [N, R], "
        "bias [N], R >= 1: weight is stored as nn.Linear stores it, a is lora_A.weight and b is lora_B.weight"
    )


def plan_problem(problem: Problem, device: torch.device) -> Plan:
    """The plan that backend "auto" follows on a device of this machine."""
    available = tuple((name, base.availability(name).reason) for name in base.BACKENDS)
    return select(problem, device_spec(device) if ("triton", "") in available else None, available)


def _forward(x, weight, bias, a, b, seed, scale, dropout_p, backend):
    check_shapes(x, weight, bias, a, b)
    if backend == "auto":
        problem = linear_problem(x, weight, a, bias is not None, seed is not None)
        backend = plan_problem(problem, x.device).backend
    run = eager if backend == "eager" else base.load(backend)
    return run.linear_forward(x, weight, bias, a, b, seed, scale, dropout_p)


def _fake_forward(x, weight, bias, a, b, seed, scale, dropout_p, backend):
    check_shapes(x, weight, bias, a, b)
    tokens = math.prod(x.shape[:-1])
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((tokens, a.shape[0]))


def _gradients(dy, x, xa, weight, a, b, seed, scale, dropout_p, needs, backend):
    """`(dx, da, db, dbias)`, None where not needed."""
    if backend == "auto":
        wanted = tuple(name for name, need in zip(_GRADIENTS, needs, strict=True) if need)
        problem = linear_problem(dy, weight, a, False, seed is not None, wanted)
        backend = plan_problem(problem, dy.device).backend
    run = eager if backend == "eager" else base.load(backend)
    return run.linear_backward(dy, x, xa, weight, a, b, seed, scale, dropout_p, *needs)


def _backward(dy, *rest):
    # None is no tensor, which the schema wants
    return tuple(dy.new_empty(0) if g is None else g for g in _gradients(dy, *rest))


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
_PLAIN = (Tensor, torch.nn.Parameter)


def _is_unseen(*tensors):
    """Whether nothing wants to see the operator itself: no mode, no transform, no profiler, no subclass of Tensor."""
    return (
        not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch.autograd._profiler_enabled()
        and all(t is None or (type(t) in _PLAIN and not t.is_meta) for t in tensors)
    )


def _run_forward(ctx, x, weight, bias, a, b, seed, scale, dropout_p, backend):
    if _is_unseen(x, weight, bias, a, b):
        y, xa = _forward(x, weight, bias, a, b, seed, scale, dropout_p, backend)
    else:
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
    run = _gradients if _is_unseen(dy, x, weight, a, b) else _op_backward
    grads = run(dy, x, xa, weight, a, b, seed, *ctx.settings[:2], needs, ctx.settings[2])
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


# autograd.Function.apply spends 2.2 of its 6.0 us (torch 2.13, Xeon, 2026-11-23) on what only functorch needs
_apply = super(torch.autograd.Function, _LoRALinear).apply


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
    """y of the operator; see `lorafuse.functional.lora_linear` for the meaning."""
    if torch.compiler.is_compiling():
        return _op(x, weight, bias, a, b, seed, scale, dropout_p, backend)[0]
    apply = _LoRALinear.apply if torch._C._are_functorch_transforms_active() else _apply
    return apply(x, weight, bias, a, b, seed, scale, dropout_p, backend)
