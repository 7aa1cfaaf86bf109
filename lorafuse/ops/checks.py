"""Which operands the operators of `experts` accept; everything else is refused with what was passed, rule and fix."""

import math

from torch import Tensor

from lorafuse.operands import Weight

__all__ = ["check_projection", "check_scale", "check_tensors"]


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
