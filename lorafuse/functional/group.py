"""Layers that read one x as one operator each: siblings, and the gated MLP of a transformer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafuse.operands import Weight
from lorafuse.ops import gated_mlp as _gated_mlp
from lorafuse.ops import group as _group
from lorafuse.ops.autocast import autocast_is_on
from lorafuse.ops.checks import check_gate, check_scale, check_statistics, seed_tensor
from lorafuse.ops.choose import for_masks, requested_backend
from lorafuse.ops.layers import Layer
from lorafuse.ops.transforms import is_transformed

__all__ = ["Projection", "lora_gated_mlp", "lora_linears", "lora_qkv", "run_gated_mlp", "run_linears"]

# of a projection, in the order in which they are checked
_OPERANDS = ("weight", "a", "b", "bias")


class Projection(NamedTuple):
    """One frozen linear layer of a group, with a LoRA adapter or without.

    `y = x·weightᵀ + bias + scale · (drop(x)·aᵀ)·bᵀ`, as `lora_linear` has it.

    Attributes:
        weight: `[N, K]`, frozen, of x's dtype, or a quantized `Weight` of `lorafuse.formats.adopt`.
        a, b: `[R, K]` and `[N, R]`, PEFT's `lora_A.weight` and `lora_B.weight`; both None for a layer without adapter.
        scale: alpha / R.
        bias: `[N]` or None; it may be trained.
        dropout_p: probability with which elements of x are dropped in the low-rank path, in [0, 1].
        seed: of this layer's own mask: an int, an int64 tensor `[1]`, None to draw one, or the mask, bool `[..., K]`.
    """

    weight: Tensor | Weight
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    bias: Tensor | None = None
    dropout_p: float = 0.0
    seed: int | Tensor | None = None


def lora_linears(x: Tensor, projections: Sequence[Projection], *, backend: str | None = None) -> tuple[Tensor, ...]:
    """Linear layers of one x, each with its own adapter or none, as one operator: `y_i = projections[i](x)`.

    Forward reads x once for the `xa` of all layers without dropout; backward computes one dx, in one sum over all
    layers, and reads x once for the gradients of their a. The results are those of `lora_linear` on each layer, up to
    rounding, and are independent of which y are used.

    Args:
        x: `[..., K]`, 1-D to 4-D, any strides, any number of tokens including none.
        projections: at least one, all with K in features.
        backend: "eager", "triton", "cuda" or "auto"; None takes that of `lorafuse.use_backend`.

    Returns:
        one y `[..., N_i]` for each layer, in x's dtype, under autocast in autocast's. Gradients reach x, every a, b and
        bias, each in its own dtype; what is saved for backward is x and the xa `[tokens, R_i]`.

    Raises:
        ValueError: shapes, devices, a scale, dropout_p, seed or the backend do not fit; the message names the layer.
        TypeError: an operand is no tensor, or dtypes do not fit.
        NotImplementedError: a weight requires a gradient; or a nested x with dropout.
        BackendUnavailable: the backend asked for cannot run here.
    """
    if not len(projections):
        raise ValueError("lora_linears got no projection; it runs one or more layers of one x")
    named = {f"projection {i}": one for i, one in enumerate(projections)}
    return _siblings("lora_linears", x, named, backend)


def run_linears(
    x: Tensor, projections: Sequence[Projection], backend: str | None, wide: bool = False
) -> tuple[Tensor, ...]:
    """`lora_linears` for callers that know that operands fit each other and x, which no transform sees.

    `wide` computes low-rank paths in fp32, over bf16 too.
    """
    x, arguments = _prepared("lora_linears", x, projections, None, backend, wide)
    return tuple(_group.lora_linears(x, *arguments))


def run_gated_mlp(
    x: Tensor, layers: Sequence[Projection], activation: str, backend: str | None, wide: bool = False
) -> Tensor:
    """`lora_gated_mlp` of gate, up and down for the same callers, up being kept."""
    x, arguments = _prepared("lora_gated_mlp", x, layers, ("gate", "up", "down"), backend, wide)
    return _gated_mlp.lora_gated_mlp(x, *arguments, activation, False)


def lora_qkv(
    x: Tensor, q: Projection, k: Projection, v: Projection, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections of an attention block as one operator: `(q, k, v)` of `lora_linears`, in this order.

    q `[..., N_q]`, k and v `[..., N_kv]`: with grouped-query attention their out features differ.
    """
    of_q, of_k, of_v = _siblings("lora_qkv", x, {"q": q, "k": k, "v": v}, backend)
    return of_q, of_k, of_v


def lora_gated_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    activation: str = "silu",
    recompute_up: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A gated MLP as one operator: `y = down(act(gate(x)) · up(x))`, each layer with an adapter or none.

    Saved for backward are x, gate `[tokens, I]`, up `[tokens, I]` and each layer's xa `[tokens, R]`; autograd keeps
    `act(gate)` and h as well, which backward computes again here.

    Args:
        x: `[..., H]`, 1-D to 4-D, any strides, any number of tokens including none.
        gate, up: I out features and H in features each.
        down: I in features.
        activation: of the gate, a name of `lorafuse.activation.ACTIVATIONS` ("silu" is SwiGLU, "gelu" and "gelu_tanh"
            are GeGLU), or of `GATES`, which are functions of gate and up.
        recompute_up: do not keep up either: backward multiplies x by its weight once more.
        backend: "eager", "triton", "cuda" or "auto"; None takes that of `lorafuse.use_backend`.

    Returns:
        y `[..., N]`, N being down's out features, in x's dtype, under autocast in autocast's. Gradients reach x, every
        a, b and bias, each in its own dtype.

    Raises as `lora_linears`, and ValueError for an unknown activation.
    """
    check_gate("lora_gated_mlp", activation)
    x, arguments = _arguments("lora_gated_mlp", x, {"gate": gate, "up": up, "down": down}, backend)
    run: Any = _gated_mlp.plain_lora_gated_mlp if is_transformed(x) else _gated_mlp.lora_gated_mlp
    return run(x, *arguments, activation, recompute_up)


def _siblings(
    operator: str, x: Tensor, named: Mapping[str, Projection], backend: str | None
) -> tuple[Tensor, ...]:  # fmt: skip
    x, arguments = _arguments(operator, x, named, backend)
    run: Any = _group.plain_lora_linears if is_transformed(x) else _group.lora_linears
    return tuple(run(x, *arguments))


def _arguments(
    operator: str, x: Tensor, named: Mapping[str, Projection], backend: str | None
) -> tuple[Tensor, tuple]:  # fmt: skip
    """x as the operator reads it, and the operator's arguments after it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{operator} got a {type(x).__name__} for x; it must be a tensor")
    inner = None
    for name, one in named.items():
        _check(operator, x, name, one)
        features = inner if name == "down" and inner is not None else x.size(-1) if x.dim() else 0
        _check_shapes(operator, x, name, one, features)
        if name in ("gate", "up"):
            N = _stored(one)[0]
            if inner is not None and inner != N:
                raise ValueError(
                    f"{operator} got a gate of {inner} out features and an up of {N}; they must be as many"
                )
            inner = N
    return _prepared(operator, x, [_unwrapped(one) for one in named.values()], list(named), backend)


def _prepared(
    operator: str,
    x: Tensor,
    every: Sequence[Projection],
    names: Sequence[str] | None,
    backend: str | None,
    wide: bool = False,
) -> tuple[Tensor, tuple]:
    """The same without checks of shapes and devices."""
    autocast, dtype = autocast_is_on(x), x.dtype
    if autocast and x.is_floating_point() and x.dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        every = [_cast(one, dtype) for one in every]
    layers, backend, is_floating = [], requested_backend(backend), x.is_floating_point()
    weight: Any
    # every call of a group runs this loop
    for i, (weight, a, b, scale, bias, dropout_p, seed) in enumerate(every):
        is_stored = isinstance(weight, Weight)
        of_weight, of_bias = dtype if is_stored else weight.dtype, dtype if bias is None else bias.dtype
        if of_weight is not dtype or of_bias is not dtype or not is_floating:
            raise _misfit(operator, f"projection {i}" if names is None else names[i], dtype, of_weight, of_bias)
        if is_stored:
            check_statistics(operator, x, weight)
        mask = None
        if dropout_p and a is not None:
            mask = seed_tensor(seed, x.device, (*x.shape[:-1], a.shape[1]) if isinstance(seed, Tensor) else ())
            backend = for_masks(backend, [mask])
        w = weight if is_stored else Weight(weight)
        layers.append(Layer(w, bias, a, b, mask, float(scale), float(dropout_p)))
        # PEFT computes the low-rank path in the adapters' dtype; of those only fp16 is short of range
        if dtype is torch.float16 and not autocast and a is not None and b is not None:
            wide |= a.dtype is not dtype or b.dtype is not dtype
    return x, (layers, backend, wide)


def _check(operator: str, x: Tensor, name: str, one: Projection) -> None:
    """Raises for what is no projection, no tensor, elsewhere or not frozen, and for numbers that do not fit."""
    if not isinstance(one, Projection):
        raise TypeError(
            f"{operator} got a {type(one).__name__} for {name}; it must be a lorafuse.functional.Projection"
        )
    weight, a, b, scale, bias, dropout_p, _ = one
    if (a is None) != (b is None):
        raise ValueError(
            f"{operator} got only one of a and b for {name}; an adapter has both, a layer without one none"
        )
    data, device = weight.data if isinstance(weight, Weight) else weight, x.device
    # by place and not by name: the names are for messages
    for i, t in enumerate((data, a, b, bias)):
        if t is None and i:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{operator} got a {type(t).__name__} for {name}'s {_OPERANDS[i]}; it must be a tensor")
        if t.device != device:
            raise ValueError(
                f"{operator} got x on {device} and {name}'s {_OPERANDS[i]} on {t.device}; all tensors must be on one "
                "device: move them with .to()"
            )
        if i in (1, 2) and not t.is_floating_point():
            raise TypeError(f"{operator} got {t.dtype} for {name}'s {_OPERANDS[i]}; adapters must be floating")
    if data.requires_grad:
        raise NotImplementedError(
            f"{operator} got a weight {list(data.shape)} of {name} that requires a gradient; it never computes one: "
            "freeze it with weight.requires_grad_(False)"
        )
    if isinstance(weight, Weight) and weight.is_transposed:
        raise ValueError(f"{operator} got a transposed weight for {name}; it reads [N, K], as nn.Linear stores it")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{name}'s dropout_p={dropout_p} is not a probability; it must be between 0 and 1")
    check_scale(f"{name}'s scale", scale)


def _stored(one: Projection) -> tuple[int, ...]:
    return one.weight.stored if isinstance(one.weight, Weight) else one.weight.shape


def _check_shapes(operator: str, x: Tensor, name: str, one: Projection, features: int) -> None:
    w, a, b, bias = _stored(one), one.a, one.b, one.bias
    fits = len(w) == 2 and 1 <= x.dim() <= 4 and w[1] == features and (bias is None or bias.shape == w[:1])
    if fits and a is not None and b is not None:
        fits = a.dim() == 2 and a.shape[1] == features and a.shape[0] >= 1 and b.shape == (w[0], a.shape[0])
    if not fits:
        given = {"x": x.shape, "weight": w, "a": a, "b": b, "bias": bias}
        shapes = {key: t.shape if isinstance(t, Tensor) else t for key, t in given.items()}
        shown = ", ".join(f"{key} {None if shape is None else list(shape)}" for key, shape in shapes.items())
        raise ValueError(
            f"{operator} got {shown} for {name}; with K = {features} the rule is x of 1 to 4 dimensions, "
            "weight [N, K], a [R, K], b [N, R], bias [N], R >= 1"
        )


def _unwrapped(one: Projection) -> Projection:
    """With a dense weight as a tensor."""
    is_dense = isinstance(one.weight, Weight) and one.weight.format == "dense"
    return one._replace(weight=one.weight.data) if is_dense else one


def _cast(one: Projection, dtype: torch.dtype) -> Projection:
    """As autocast casts a layer: weight and bias, where they are not quantized."""
    weight = one.weight.to(dtype) if isinstance(one.weight, Tensor) and one.weight.is_floating_point() else one.weight
    return one._replace(weight=weight, bias=None if one.bias is None else one.bias.to(dtype))


def _misfit(
    operator: str, name: str, dtype: torch.dtype, of_weight: torch.dtype, of_bias: torch.dtype
) -> TypeError:  # fmt: skip
    """The error for dtypes of a projection that are not x's, or for an x that is not floating."""
    key, other = ("weight", of_weight) if of_weight is not dtype or of_bias is dtype else ("bias", of_bias)
    return TypeError(
        f"{operator} got x {dtype} and {other} for {name}'s {key}; they must have one floating dtype: cast "
        f"{'x' if key == 'weight' else 'the bias'}, or run under torch.autocast"
    )
