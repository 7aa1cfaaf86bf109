"""Which operands the operators accept; everything else is refused with what was passed, rule and fix."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorafuse.activation import ACTIVATIONS, GATES
from lorafuse.operands import Weight
from lorafuse.philox import draw_seed

__all__ = [
    "check_gate",
    "check_gathered",
    "check_projection",
    "check_scale",
    "check_statistics",
    "check_tensors",
    "seed_tensor",
]


def check_tensors(operator: str, x: object, required: dict[str, object], optional: dict[str, object]) -> None:
    """Raises TypeError for what is no tensor, NotImplementedError for a nested x, ValueError for several devices."""
    for name, t in {"x": x, **required, **{name: t for name, t in optional.items() if t is not None}}.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"lorafuse's {operator} got a {type(t).__name__} for {name}; it must be a torch.Tensor")
        if t.is_nested:
            raise NotImplementedError(
                f"lorafuse's {operator} got a nested {name}; its rows must be one matrix: pass {name}.values() and "
                "wrap the result again"
            )
        assert isinstance(x, Tensor)
        if t.device != x.device:
            raise ValueError(
                f"lorafuse's {operator} got x on {x.device} and {name} on {t.device}; all tensors must be on one "
                "device: move them with .to()"
            )


def check_gate(operator: str, activation: object) -> None:
    """Raises ValueError for what is no activation of a gate, with the known ones."""
    if not isinstance(activation, str) or (activation not in ACTIVATIONS and activation not in GATES):
        known = ", ".join((*ACTIVATIONS, *GATES))
        raise ValueError(f"{operator} got the activation {activation!r}; it must be one of {known}")


def check_gathered(operator: str, *weights: Tensor) -> None:
    """Raises RuntimeError for a saved weight that backward finds empty: ZeRO-3 has freed it."""
    for weight in weights:
        if weight.shape == (0,):
            raise RuntimeError(
                f"lorafuse's {operator} finds a weight empty in backward: DeepSpeed's ZeRO-3 freed it after forward "
                "and did not gather it again for this layer. Call lorafuse.integrations.prepare_zero3(model) before "
                "deepspeed.initialize; with activation checkpointing use the reentrant kind (use_reentrant=True)"
            )


def check_scale(name: str, scale: object) -> None:
    """Raises TypeError or ValueError for a scale that is no finite number."""
    if not isinstance(scale, int | float):
        raise TypeError(f"{name} is a {type(scale).__name__}; it must be a number, alpha / R")
    # no math.isfinite, which Dynamo cannot trace for a dynamic float
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{name}={scale} is not finite; it must be alpha / R of a finite alpha")


def check_projection(
    name: str, x: Tensor, in_features: int, weight: Weight, bias: Tensor | None, a: Tensor | None, b: Tensor | None
) -> None:
    """Raises what the public functions say for a stack of layers whose operands do not fit."""
    w, stored = weight.data, weight.stored
    if w.requires_grad or (bias is not None and bias.requires_grad):
        raise NotImplementedError(f"{name} or its bias requires a gradient, which is never computed: freeze it")
    if len(stored) == 3 and x.dim() == 2:
        groups, (n, k) = stored[0], weight.sizes
        low = a is None and b is None
        if a is not None and b is not None and a.dim() == b.dim() == 3:
            low = a.shape == (groups, b.shape[2], k) and b.shape[:2] == (groups, n) and b.shape[2] >= 1
        fits = in_features == k and low and (bias is None or bias.shape == (groups, n))
    else:
        fits = False
    if not fits:
        given = {"a": a, "b": b, "bias": bias}
        shapes = {name: stored, **{key: None if t is None else t.shape for key, t in given.items()}}
        shown = ", ".join(f"{key} {None if shape is None else list(shape)}" for key, shape in shapes.items())
        of_weight = "[E, K, N]" if weight.is_transposed else "[E, N, K]"
        rule = f"{name} {of_weight}, a [E, R, K], b [E, N, R], bias [E, N], x [rows, H]"
        raise ValueError(f"got {shown} for K = {in_features} and x {list(x.shape)}; the rule is {rule}")
    factors = {t.dtype for t in (a, b) if t is not None and not t.is_floating_point()}
    if factors:
        raise TypeError(f"{name}'s a or b is {factors.pop()}; adapters must be floating")
    # a quantized weight is decoded to x's dtype
    dtypes = {t.dtype for t in (x, w if weight.format == "dense" else x, bias) if t is not None}
    if len(dtypes) > 1 or not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}, {name} {w.dtype}: they and the bias must have one floating dtype")


def check_statistics(operator: str, x: Tensor, weight: Weight) -> None:
    """Raises ValueError for a quantized weight that is not where x is, with all that scales it."""
    device = x.device
    for t in (weight.data, *weight.statistics):
        if t.device != device:
            what = "data" if t is weight.data else "statistics"
            raise ValueError(
                f"{operator} got x on {device} and the {what} of a {weight.format} weight on {t.device}; all tensors "
                "must be on one device: move them with .to(), or load what was offloaded"
            )


def seed_tensor(seed: int | Tensor | None, device: torch.device, sizes: Sequence[int] = ()) -> Tensor:
    """The seed of a dropout mask, int64 `[1]` on the device, or the mask itself, bool of these sizes; None draws
    a seed.

    Raises ValueError for another.
    """
    if seed is None:
        return draw_seed(device)
    if not isinstance(seed, Tensor):
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed={seed!r} is not an int of 64 bits; the mask of dropout is drawn from one")
        return torch.tensor([seed], dtype=torch.int64, device=device)
    is_seed = seed.dtype is torch.int64 and seed.shape == (1,)
    is_mask = seed.dtype is torch.bool and seed.shape == tuple(sizes)
    if not (is_seed or is_mask) or seed.device != device:
        raise ValueError(
            f"seed is a {seed.dtype} tensor {list(seed.shape)} on {seed.device}; it must be int64, of shape [1], on "
            f"{device}" + f", or a mask, bool {list(sizes)}" * bool(sizes)
        )
    return seed
