"""The public operator of experts whose tokens are of many adapters."""

import torch
from torch import Tensor

from lorafuse.activation import GateLayout, lookup
from lorafuse.functional.multi import MultiProjection, prepared, weight_of
from lorafuse.operands import Weight
from lorafuse.ops import multi as _multi
from lorafuse.ops import multi_experts  # noqa: F401 (registers the form)
from lorafuse.ops.autocast import autocast_is_on

__all__ = ["lora_experts_multi"]


def lora_experts_multi(
    x: Tensor,
    offsets: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    gate_up: MultiProjection,
    down: MultiProjection,
    *,
    activation: str = "silu",
    has_gate: bool = True,
    is_concatenated: bool = True,
    is_transposed: bool = False,
    batch_invariant: bool = True,
    backend: str | None = None,
    wide: bool = False,
) -> Tensor:
    """A frozen mixture-of-experts block over tokens of L adapters: `out[t] = Σ_j topk_weight[t, j] · expert(x[t])`.

    Every adapter has factors for every expert, `+ scale[g] · b[e, g] (a[e, g] ·)` on both projections, or shares
    gate_up's a and down's b, those at H, among all experts. What an adapter's tokens give and its gradients are bit for
    bit those of a call with this adapter alone, as `lora_linear_multi` promises it.

    Args:
        x: `[T, H]`, the tokens of adapter 0, then those of adapter 1, …
        offsets: int32 `[L]` on x's device: where the tokens of each adapter end; tokens after the last have none.
        topk_index, topk_weight: `[T, k]`, those of `lora_experts`; the gradient of the second is computed.
        gate_up, down: weights `[E, 2I, H]` (`[E, I, H]` without a gate) and `[E, H, I]`, or with the last two exchanged
            when `is_transposed`; a `[E, ΣR, in]`, b `[E, out, ΣR]`, any strides. gate_up's a may be `[ΣR, H]` and
            down's b `[H, ΣR]`: shared. Ranks of the two may differ. There is no dropout, as PEFT has none in experts.
        activation: a name of `lorafuse.activation.ACTIVATIONS`, or of `GATES` with a gate.
        has_gate, is_concatenated, is_transposed: those of `lora_experts`.
        batch_invariant, backend, wide: those of `lora_linear_multi`.

    Returns out `[T, H]` in x's dtype; gradients reach x, topk_weight and the factors, or their `grad_buffers`. Under
    autocast the block is computed in its weights' dtype, as transformers computes experts.

    Raises ValueError or TypeError for operands that do not fit, with the rule; NotImplementedError as
    `lora_linear_multi` does.
    """
    layout = GateLayout.of(has_gate, is_concatenated)
    lookup(activation, layout)
    given, named = x.dtype, {"gate_up": gate_up, "down": down}
    stacks = {name: weight_of(one, is_transposed) for name, one in named.items()}
    first = stacks["gate_up"]
    if x.is_floating_point() and autocast_is_on(x):
        x = x.to(first.data.dtype if first.format == "dense" else torch.get_autocast_dtype(x.device.type))
    if first.is_transposed is not stacks["down"].is_transposed:
        raise ValueError("gate_up and down of lora_experts_multi must be stored alike, as [E, out, in] or transposed")
    operands = prepared(
        "lora_experts_multi", x, offsets, named, batch_invariant, backend, wide, True, first.is_transposed
    )
    inner = first.sizes[0] // (2 if has_gate else 1)
    if has_gate and first.sizes[0] % 2:
        raise ValueError(f"gate_up {list(first.stored)} has {first.sizes[0]} out features; gate and up are as many")
    for name, one, features, outer in (("gate_up", gate_up, x.shape[-1], "a"), ("down", down, inner, "b")):
        _check(name, one, stacks[name], x, features, outer, first.stored[0])
    if stacks["down"].sizes[0] != x.shape[-1]:
        raise ValueError(f"down {list(stacks['down'].stored)} does not lead back to x {list(x.shape)}")
    if topk_index.shape != topk_weight.shape or topk_index.dim() != 2 or topk_index.shape[0] != x.shape[0]:
        raise ValueError(
            f"topk_index {list(topk_index.shape)} and topk_weight {list(topk_weight.shape)} must both be [T, k] for x "
            f"{list(x.shape)}"
        )
    if topk_index.dtype is not torch.int64 or not topk_weight.is_floating_point():
        raise TypeError(
            f"topk_index is {topk_index.dtype}, topk_weight {topk_weight.dtype}; they must be int64 and floating"
        )
    x, settings, tensors, buffers = operands
    options = activation, layout.value
    out = _multi.apply("experts", options, x, offsets, settings, tensors, buffers, topk_index, topk_weight)[0]
    return out.to(given)


def _check(name: str, one: MultiProjection, w: Weight, x: Tensor, features: int, outer: str, experts: int) -> None:
    """Raises for shapes and dtypes that do not fit, and for dropout; the factor `outer` may be shared."""
    if one.dropout_p is not None and any(one.dropout_p):
        raise ValueError(f"{name} got dropout_p={tuple(one.dropout_p)}; experts have no dropout, as in PEFT")
    E, (N, K), total = w.stored[0], w.sizes, sum(one.ranks)
    rules = {"a": (total, K), "b": (N, total)}
    factors: dict[str, Tensor] = {} if one.a is None or one.b is None else {"a": one.a, "b": one.b}
    fits = features == K and experts == E and x.dim() == 2 and (one.bias is None or one.bias.shape == (E, N))
    for letter, t in factors.items():
        shared = letter == outer and t.shape == rules[letter]
        fits = fits and (shared or t.shape == (E, *rules[letter]))
    if not fits:
        shown = ", ".join(f"{letter} {list(t.shape)}" for letter, t in factors.items())
        raise ValueError(
            f"lora_experts_multi got {name} {list(w.stored)}, {shown}, bias "
            f"{None if one.bias is None else list(one.bias.shape)} and ranks that sum to {total} for x "
            f"{list(x.shape)}; the rule is weight [E, N, K], a [E, ΣR, K], b [E, N, ΣR], bias [E, N], and {outer} may "
            "be 2-D"
        )
    if any(not t.is_floating_point() for t in factors.values()):
        raise TypeError(f"lora_experts_multi got factors of {name} that are not floating")
    dtypes = {t.dtype for t in (x, w.data if w.format == "dense" else x, one.bias) if t is not None}
    if len(dtypes) > 1 or not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}, {name} {w.data.dtype}: they and the bias must have one floating dtype")
