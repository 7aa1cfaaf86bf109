"""Stateless operators: they check what was passed, apply autocast, choose a backend and call the operator."""

import torch
from torch import Tensor

from lorafuse.backends import base
from lorafuse.backends.probe import linear_problem
from lorafuse.ops import linear as _linear
from lorafuse.ops.linear import plan_problem
from lorafuse.philox import draw_seed
from lorafuse.plan import Plan

__all__ = ["lora_linear", "plan_linear", "run_linear"]

_AUTO = {"cpu": base.candidates("cpu")[-1]}


def lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A frozen linear layer with a LoRA adapter: `y = x·weightᵀ + bias + scale · (drop(x)·aᵀ)·bᵀ`.

    Args:
        x: `[..., K]`, 1-D to 4-D, any strides, any number of tokens including none.
        weight: `[N, K]`, frozen, of x's dtype; it gets no gradient.
        a: `[R, K]`, PEFT's `lora_A.weight`, R >= 1. fp32 adapters on a half-precision base are rounded inside.
        b: `[N, R]`, PEFT's `lora_B.weight`.
        scale: alpha / R (or alpha / sqrt(R) for rsLoRA).
        bias: `[N]` or None.
        dropout_p: probability with which elements of x are dropped in the low-rank path, in [0, 1]. 0 disables it.
        seed: of the dropout mask (`lorafuse.philox`): an int, or an int64 tensor `[1]` on x's device; None draws one
            from torch's default generator.
        backend: "eager", "triton", "cuda" or "auto"; None takes that of `lorafuse.use_backend`.

    Returns:
        y `[..., N]` in x's dtype; under autocast in autocast's dtype. Gradients reach x, a, b and bias, each in its
        own dtype.

    Raises:
        ValueError: shapes, devices, dropout_p or the backend name do not fit; the message shows them and the rule.
        TypeError: dtypes do not fit.
        NotImplementedError: weight requires a gradient.
        BackendUnavailable: the backend asked for cannot run here.
    """
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
    if backend is not None:
        base.require(backend)
    return run_linear(x, weight, a, b, scale, bias, dropout_p, seed, backend)


def run_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: int | Tensor | None,
    backend: str | None,
) -> Tensor:
    """`lora_linear` for callers that already know that the parameters fit each other and the backend can run here."""
    kind = x.device.type
    # torch knows no autocast for meta tensors and raises when asked
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.dtype is not weight.dtype or not x.is_floating_point():
        raise TypeError(
            f"lora_linear got x {x.dtype} and weight {weight.dtype}; they must have one floating dtype: cast x, or run "
            "under torch.autocast"
        )
    if bias is not None and bias.dtype is not x.dtype:
        raise TypeError(f"lora_linear got x {x.dtype} and bias {bias.dtype}; they must have one dtype: cast the bias")
    if backend is None:
        backend = base.current()
    if backend == "auto" and kind in _AUTO:
        backend = _AUTO[kind]
    seed = _seed_tensor(seed, x.device) if dropout_p else None
    return _linear.lora_linear(x, weight, bias, a, b, seed, scale, dropout_p, backend)


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return draw_seed(device)
    if not isinstance(seed, Tensor):
        return torch.tensor([seed], dtype=torch.int64, device=device)
    if seed.dtype is not torch.int64 or seed.shape != (1,) or seed.device != device:
        raise ValueError(
            f"seed is a {seed.dtype} tensor {list(seed.shape)} on {seed.device}; it must be int64, of shape [1], on "
            f"{device}"
        )
    return seed


def plan_linear(
    x: Tensor,
    weight: Tensor,
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
    problem = linear_problem(x, weight, a, bias is not None, dropout_p > 0.0, gradients)
    return plan_problem(problem, x.device)
