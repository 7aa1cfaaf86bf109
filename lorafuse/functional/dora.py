"""The public operator of a dense layer with DoRA: a LoRA adapter, and a magnitude for each row of the weight."""

from collections.abc import Callable

import torch
from torch import Tensor

from lorafuse.functional.group import Projection, run_linears
from lorafuse.functional.linear import lora_linear, run_linear
from lorafuse.operands import Weight
from lorafuse.ops.choose import current_backend
from lorafuse.ops.dora import row_norms, scale_columns
from lorafuse.philox import rescaled

__all__ = ["dora_linear", "run_dora"]


def dora_linear(
    x: Tensor,
    weight: Tensor | Weight,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """A frozen linear layer with DoRA: `y = c ⊙ (x·weightᵀ + scale · (x·aᵀ)·bᵀ) + bias`, `c = magnitude / ‖W + sBA‖`.

    The norm is that of each row of `weight + scale · b·a`, which is never built; it has no gradient, as in PEFT and in
    DoRA's paper. With dropout the base is computed of x and of drop(x), as PEFT does: two products with the weight.

    Args:
        x, weight, a, b, scale, bias, backend: as of `lora_linear`.
        magnitude: `[N]`, PEFT's `lora_magnitude_vector.weight`; it starts as the norm of the rows of weight.
        dropout_p: probability with which elements of x are dropped, in [0, 1]; the mask is drawn from torch's default
            generator.

    Returns:
        y `[..., N]` in x's dtype; under autocast in autocast's dtype. Gradients reach x, a, b, magnitude and bias. What
        is saved for backward is what `lora_linear` saves, and its y without bias.

    Raises as `lora_linear`; ValueError or TypeError for a magnitude that does not fit.
    """
    if not isinstance(magnitude, Tensor) or not magnitude.is_floating_point():
        kind = magnitude.dtype if isinstance(magnitude, Tensor) else type(magnitude).__name__
        raise TypeError(f"dora_linear got a {kind} for magnitude; it must be a floating tensor")
    if isinstance(b, Tensor) and (magnitude.shape != b.shape[:1] or magnitude.device != b.device):
        raise ValueError(
            f"dora_linear got a magnitude {list(magnitude.shape)} on {magnitude.device} for b {list(b.shape)} on "
            f"{b.device}; it must be [N], on b's device"
        )
    if bias is not None and (bias.shape != magnitude.shape or bias.device != magnitude.device):
        raise ValueError(f"dora_linear got a bias {list(bias.shape)} on {bias.device}; it must be as magnitude is")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p={dropout_p} is not a probability; it must be between 0 and 1")

    def run(x: Tensor, *operands, wide: bool) -> Tensor:
        weight, a, b, scale, bias, _, _, backend = operands
        return lora_linear(x, weight, a, b, scale=scale, bias=bias, backend=backend)

    return run_dora(x, weight, a, b, scale, bias, dropout_p, None, backend, magnitude=magnitude, run=run)


def run_dora(
    x: Tensor, weight: Tensor | Weight, a: Tensor, b: Tensor, scale: float, bias: Tensor | None, dropout_p: float,
    seed: None, backend: str | None, wide: bool = False, *, magnitude: Tensor, run: Callable[..., Tensor] = run_linear,
) -> Tensor:  # fmt: skip
    """`dora_linear` of operands that fit; its arguments are those of `run_linear`, which it runs.

        y = x·wᵀ + bias + (c - 1) ⊙ d·wᵀ + c ⊙ s·(d·aᵀ)·bᵀ = (x - d)·wᵀ + bias + c ⊙ lora_linear(d),   d = drop(x)

    is PEFT's formula with dropout. d is not rounded: what is kept of x is multiplied, the rescaling is in c.
    """
    current = current_backend() if backend is None else backend
    stored = weight if isinstance(weight, Weight) else Weight(weight)
    kept, rest, again = x, None, 1.0
    if dropout_p:
        keep, again = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout_p), rescaled(1.0, dropout_p)
        kept, rest = x * keep, torch.where(keep, x * (1 - again), x)
    # first, because it checks the operands
    z, addend = run(kept, weight, a, b, scale, None, 0.0, None, backend, wide=wide), bias
    if rest is not None:
        (addend,) = run_linears(rest, [Projection(weight, bias=bias)], backend)
    norms = row_norms(stored.data, a, b, scale, z.dtype, current, stored.format, list(stored.statistics) or None)
    return scale_columns(z, magnitude.to(norms.dtype) * again / norms, addend, current)
