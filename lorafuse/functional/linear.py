"""The public operator of a dense layer, the same for callers that have checked their operands, and its plan."""

import torch
from torch import Tensor

from lorafuse.backends import base
from lorafuse.backends.problems import linear_problem
from lorafuse.operands import Weight, matrix
from lorafuse.ops import linear as _linear
from lorafuse.ops.autocast import autocast_is_on
from lorafuse.ops.checks import check_scale, check_statistics, seed_tensor
from lorafuse.ops.choose import current_backend, for_masks, plan_for
from lorafuse.ops.served import check_numerics, served_lora_linear
from lorafuse.ops.transforms import is_transformed
from lorafuse.plan import Plan

__all__ = ["lora_linear", "plan_linear", "run_linear"]


def lora_linear(
    x: Tensor,
    weight: Tensor | Weight,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
    numerics: str = "fused",
) -> Tensor:
    """A frozen linear layer with a LoRA adapter: `y = x·weightᵀ + bias + scale · (drop(x)·aᵀ)·bᵀ`.

    Args:
        x: `[..., K]`, 1-D to 4-D, any strides, any number of tokens including none.
        weight: `[N, K]`, frozen, of x's dtype; it gets no gradient. Or a quantized one, as `lorafuse.formats.adopt`
            gives it of a library's layer: it is decoded to x's dtype for each product.
        a: `[R, K]`, PEFT's `lora_A.weight`, R >= 1. fp32 adapters on a half-precision base are rounded inside.
        b: `[N, R]`, PEFT's `lora_B.weight`.
        scale: alpha / R (or alpha / sqrt(R) for rsLoRA).
        bias: `[N]` or None.
        dropout_p: probability with which elements of x are dropped in the low-rank path, in [0, 1]. 0 disables it.
        seed: of the dropout mask (`lorafuse.philox`): an int, or an int64 tensor `[1]` on x's device; None draws one
            from torch's default generator. A bool tensor of x's sizes is the mask itself, True for what is kept: it is
            saved for backward, and backend "eager" runs it (`lorafuse.philox.draw_mask` draws nn.Dropout's).
        backend: "eager", "triton", "cuda" or "auto"; None takes that of `lorafuse.use_backend`.
        numerics: "fused" adds the low-rank path to the sum of the base product, which is rounded once. "vllm" and
            "sglang" round as the kernels of those servers do, in three products of torch and a sum: xa, the low-rank
            path and the frozen layer's y are rounded to x's dtype, then their sum. Backward is the same. Neither has
            dropout.

    Returns:
        y `[..., N]` in x's dtype; under autocast in autocast's dtype. Gradients reach x, a, b and bias, each in its
        own dtype.

    Raises:
        ValueError: shapes, devices, scale, dropout_p, seed, the backend's name or numerics do not fit; the message
            shows them and the rule.
        TypeError: an operand is no tensor, or dtypes do not fit.
        NotImplementedError: weight requires a gradient.
        BackendUnavailable: the backend asked for cannot run here.
    """
    stored, weight = weight, weight.data if isinstance(weight, Weight) else weight
    given = {"x": x, "weight": weight, "a": a, "b": b, "bias": bias}
    for name, operand in given.items():
        if not isinstance(operand, Tensor) and (name != "bias" or operand is not None):
            raise TypeError(f"lora_linear got a {type(operand).__name__} for {name}; it must be a tensor")
    device = x.device
    if weight.device != device or a.device != device or b.device != device:
        raise ValueError(
            f"lora_linear got x on {device}, weight on {weight.device}, a on {a.device}, b on {b.device}; all tensors "
            "must be on one device: move them with .to()"
        )
    if bias is not None and bias.device != device:
        raise ValueError(
            f"lora_linear got x on {device}, bias on {bias.device}; all tensors must be on one device: move the bias "
            "with .to()"
        )
    if not (a.is_floating_point() and b.is_floating_point()):
        raise TypeError(f"lora_linear got a {a.dtype} and b {b.dtype}; adapters must be floating")
    if weight.requires_grad:
        raise NotImplementedError(
            f"lora_linear got a weight {list(weight.shape)} that requires a gradient; it never computes one: freeze it "
            "with weight.requires_grad_(False), or use torch.nn.functional.linear to train it"
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p={dropout_p} is not a probability; it must be between 0 and 1")
    check_scale("scale", scale)
    check_numerics(numerics)
    if backend is not None:
        base.require(backend)
    transformed = is_transformed(x)
    if not transformed:
        w = stored if isinstance(stored, Weight) else Weight(stored)
        _refuse_transposed(w)
        _linear.check_shapes(x, w, bias, a, b)
    return run_linear(x, stored, a, b, scale, bias, dropout_p, seed, backend, transformed, numerics=numerics)


def run_linear(
    x: Tensor, weight: Tensor | Weight, a: Tensor, b: Tensor, scale: float, bias: Tensor | None, dropout_p: float,
    seed: int | Tensor | None, backend: str | None, transformed: bool = False, wide: bool = False,
    numerics: str = "fused",
) -> Tensor:  # fmt: skip
    """`lora_linear` for callers that already know that the parameters fit each other and the backend can run here.

    What depends on x is checked; torch's products refuse other sizes, and the message is that of `lora_linear`.

    `transformed` is the result of `is_transformed(x)`. `wide` computes the low-rank path in fp32, over bf16 too, but
    for the numerics of servers.
    """
    format, statistics = "dense", None
    if isinstance(weight, Weight):
        check_statistics("lora_linear", x, weight)
        _refuse_transposed(weight)
        format, statistics, weight = weight.format, list(weight.statistics) or None, weight.data
    autocast, is_dense, dtype = autocast_is_on(x), format == "dense", x.dtype
    is_cast = autocast and dtype is not torch.float64 and x.is_floating_point()
    if is_cast and (weight.is_floating_point() or not is_dense):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        weight = weight.to(dtype) if is_dense else weight
    if not x.is_floating_point() or (is_dense and dtype is not weight.dtype):
        raise TypeError(
            f"lora_linear got x {dtype} and weight {weight.dtype}; they must have one floating dtype: cast x, or run "
            "under torch.autocast"
        )
    if bias is not None and bias.dtype is not dtype:
        raise TypeError(f"lora_linear got x {dtype} and bias {bias.dtype}; they must have one dtype: cast the bias")
    if backend is None:
        backend = current_backend()
    if dropout_p:
        seed = seed_tensor(seed, x.device, x.shape if isinstance(seed, Tensor) else ())
        backend = for_masks(backend, [seed])
    else:
        seed = None
    # PEFT computes the low-rank path in the adapters' dtype; of those only fp16 is short of range
    if dtype is torch.float16 and not autocast:
        wide |= a.dtype is not dtype or b.dtype is not dtype
    if numerics != "fused":
        if dropout_p:
            raise ValueError(f"numerics={numerics!r} is what a server computes, without dropout; got {dropout_p}")
        return served_lora_linear(x, weight, bias, a, b, scale, backend, wide, numerics, format, statistics)
    run = _linear.plain_lora_linear if transformed else _linear.lora_linear
    return run(x, weight, bias, a, b, seed, scale, dropout_p, backend, wide, format, statistics)


def _refuse_transposed(weight: Weight) -> None:
    if weight.is_transposed:
        raise ValueError("lora_linear got a transposed weight; it reads [N, K], as nn.Linear stores it")


def plan_linear(
    x: Tensor,
    weight: Tensor | Weight,
    a: Tensor,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    gradients: tuple[str, ...] | None = None,
) -> Plan:
    """The plan that backend "auto" follows for these operands, with its reasons; nothing runs.

    `gradients` names those that backward will compute, of "dx", "da", "db" and "dbias"; None takes those of a training
    step: da, db, and dx where x requires a gradient.
    """
    if gradients is None:
        gradients = (("dx",) if x.requires_grad else ()) + ("da", "db")
    stored = weight if isinstance(weight, Weight) else Weight(weight)
    problem = linear_problem(matrix(x), stored, a, bias is not None, dropout_p > 0.0, gradients)
    return plan_for(problem, x.device)
