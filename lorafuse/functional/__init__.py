"""Stateless operators: they check what was passed, apply autocast, choose a backend and call the operator."""

from collections.abc import Callable

import torch
from torch import Tensor

from lorafuse.activation import GateLayout, lookup
from lorafuse.backends.problems import experts_problems
from lorafuse.functional.dora import dora_linear, run_dora
from lorafuse.functional.group import Projection, lora_gated_mlp, lora_linears, lora_qkv, run_gated_mlp, run_linears
from lorafuse.functional.linear import lora_linear, plan_linear, run_linear
from lorafuse.functional.multi import MultiProjection, lora_gated_mlp_multi, lora_linear_multi, lora_linears_multi
from lorafuse.functional.multi_experts import lora_experts_multi
from lorafuse.operands import Weight
from lorafuse.ops import experts as _experts
from lorafuse.ops import flops  # noqa: F401 (registers the formulas)
from lorafuse.ops import grouped as _grouped
from lorafuse.ops.autocast import autocast_is_on
from lorafuse.ops.checks import check_projection, check_scale, check_statistics, check_tensors
from lorafuse.ops.choose import plan_for, requested_backend
from lorafuse.plan import Plan

__all__ = [
    "MultiProjection",
    "Projection",
    "dora_linear",
    "lora_experts",
    "lora_experts_multi",
    "lora_gated_mlp",
    "lora_gated_mlp_multi",
    "lora_grouped_linear",
    "lora_linear",
    "lora_linear_multi",
    "lora_linears",
    "lora_linears_multi",
    "lora_qkv",
    "plan_experts",
    "plan_linear",
    "run_dora",
    "run_gated_mlp",
    "run_linear",
    "run_linears",
]


def lora_grouped_linear(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor | Weight,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    is_transposed: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Frozen linear layers with LoRA over groups of rows: `y = x·weight[e]ᵀ + bias[e] + scale · (x·a[e]ᵀ)·b[e]ᵀ`.

    Args:
        x: `[S, K]`, the rows of group 0, then those of group 1, …
        offsets: `[E]`, int32 or int64: where each group's rows end, ascending; groups may be empty. Rows after the last
            end are zero in y and have no gradient. Their values are checked on CPUs only, where they need not be
            waited for.
        weight: `[E, N, K]`, or `[E, K, N]` with `is_transposed`; frozen, of x's dtype. Or a quantized `Weight`.
        a, b: `[E, R, K]` and `[E, N, R]`, or `[R, K]` and `[N, R]` to be shared by all groups; both None for none.
        scale: alpha / R.
        bias: `[E, N]`, frozen, or None.
        backend: "eager", "triton" or "auto"; None takes that of `lorafuse.use_backend`.

    Returns y `[S, N]` in x's dtype; gradients reach x, a and b.

    Raises ValueError or TypeError for operands that do not fit, with their shapes, dtypes or devices and the rule;
    NotImplementedError for a weight or bias that requires a gradient, for nested tensors, and under `torch.func.vmap`
    over offsets. Second derivatives and other transforms of torch run plain torch, which is slower.
    """
    w = _weight(weight, is_transposed)
    check_tensors("lora_grouped_linear", x, {"offsets": offsets, "weight": w.data}, {"a": a, "b": b, "bias": bias})
    check_statistics("lora_grouped_linear", x, w)
    check_scale("scale", scale)
    x = _in_weights_dtype(x, w)
    groups = w.stored[0] if len(w.stored) == 3 else 0
    a, b = _stacked(a, groups), _stacked(b, groups)
    check_projection("weight", x, x.shape[-1] if x.dim() else 0, w, bias, a, b)
    if offsets.shape != (groups,) or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"offsets is {offsets.dtype} {list(offsets.shape)}; it must hold the end of each of {groups} groups, as "
            "int32 or int64"
        )
    operands = x, offsets, w.data, bias, a, b, scale, w.is_transposed, requested_backend(backend)
    return _grouped.lora_grouped_linear(*operands, w.format, list(w.statistics) or None)


def lora_experts(
    x: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    gate_up: Tensor | Weight,
    down: Tensor | Weight,
    *,
    gate_up_a: Tensor | None = None,
    gate_up_b: Tensor | None = None,
    down_a: Tensor | None = None,
    down_b: Tensor | None = None,
    gate_up_scale: float = 1.0,
    down_scale: float = 1.0,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str | Callable[[Tensor], Tensor] = "silu",
    has_gate: bool = True,
    is_concatenated: bool = True,
    is_transposed: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A frozen mixture-of-experts block with LoRA on its stacks: `out[t] = Σ_j topk_weight[t, j] · expert(x[t])`.

    Each expert is `down(act(gate_up(x)))`, both projections with `+ scale · b[e] (a[e] ·)`. The layout is given by the
    flags that transformers gives its experts modules and never guessed from shapes.

    Args:
        x: `[T, H]`, any number of tokens including none.
        topk_index: `[T, k]`, int64, at least 0. An index of E or more is a sentinel: that choice adds nothing, whatever
            its weight is. A negative index is a ValueError on CPUs; on GPUs nothing waits for the values, and a
            device-side assertion says "topk_index holds a negative expert".
        topk_weight: `[T, k]`, any floating dtype; its gradient is computed, 0 at a sentinel.
        gate_up: `[E, 2I, H]`, or `[E, I, H]` without a gate, or with the last two exchanged when `is_transposed`;
            frozen, of x's dtype, any strides. Or a quantized `Weight`.
        down: `[E, H, I]`, or `[E, I, H]` when `is_transposed`; likewise.
        gate_up_a, gate_up_b: `[E, R, H]` and `[E, 2I, R]`; down_a, down_b: `[E, R', I]` and `[E, H, R']`. A 2-D one is
            shared by all experts; both of a pair None is no adapter. PEFT's packed `lora_A.weight [E·R, in]` is
            `.reshape(E, R, in)`, its `lora_B.weight [out, R·E]` is `.reshape(out, R, E).permute(2, 0, 1)`.
        gate_up_scale, down_scale: alpha / R of each pair.
        gate_up_bias, down_bias: `[E, 2I]` and `[E, H]`, frozen, or None.
        activation: a name of `lorafuse.activation.ACTIVATIONS`, of the gate when there is one; or a function from
            `[rows, 2I]` to `[rows, I]`, which backward runs again.
        has_gate: whether the first projection holds gate and up.
        is_concatenated: gate and up one after the other; False: alternating.
        is_transposed: weights stored as `[E, in, out]`.
        backend: "eager", "triton" or "auto"; None takes that of `lorafuse.use_backend`.

    Returns out `[T, H]` in x's dtype; gradients reach x, topk_weight and the adapters. Under autocast the block is
    computed in its weights' dtype, as transformers computes experts.

    Raises ValueError or TypeError for operands that do not fit, with their shapes, dtypes or devices and the rule;
    NotImplementedError for weights or biases that require a gradient, for nested tensors, and under `torch.func.vmap`
    over topk_index. Second derivatives and other transforms of torch run plain torch, which is slower.
    """
    up, down_w = _weight(gate_up, is_transposed), _weight(down, is_transposed)
    check_tensors(
        "lora_experts",
        x,
        {"topk_index": topk_index, "topk_weight": topk_weight, "gate_up": up.data, "down": down_w.data},
        {"gate_up_a": gate_up_a, "gate_up_b": gate_up_b, "down_a": down_a, "down_b": down_b,
         "gate_up_bias": gate_up_bias, "down_bias": down_bias},
    )  # fmt: skip
    for w in (up, down_w):
        check_statistics("lora_experts", x, w)
    if up.is_transposed is not down_w.is_transposed:
        raise ValueError(
            f"gate_up is_transposed={up.is_transposed}, down is_transposed={down_w.is_transposed}; both stacks must be "
            "stored alike, as [E, out, in] or transposed"
        )
    check_scale("gate_up_scale", gate_up_scale)
    check_scale("down_scale", down_scale)
    given, x = x.dtype, _in_weights_dtype(x, up)
    experts = up.stored[0] if len(up.stored) == 3 else 0
    gate_up_a, gate_up_b, down_a, down_b = (_stacked(t, experts) for t in (gate_up_a, gate_up_b, down_a, down_b))
    check_projection("gate_up", x, x.shape[-1] if x.dim() else 0, up, gate_up_bias, gate_up_a, gate_up_b)
    first = up.sizes[0]
    if has_gate and first % 2:
        raise ValueError(f"gate_up {list(up.stored)} has {first} out features; gate and up must be as many")
    inner = first // (2 if has_gate else 1)
    check_projection("down", x, inner, down_w, down_bias, down_a, down_b)
    if down_w.stored[0] != experts or down_w.sizes[0] != x.shape[1]:
        raise ValueError(f"down {list(down_w.stored)} does not lead from {experts} experts back to x {list(x.shape)}")
    shape = topk_index.shape
    if shape != topk_weight.shape or len(shape) != 2 or shape[0] != x.shape[0] or shape[1] < 1:
        raise ValueError(
            f"topk_index {list(shape)} and topk_weight {list(topk_weight.shape)} must both be [T, k], k >= 1, for x "
            f"{list(x.shape)}"
        )
    if topk_index.dtype is not torch.int64 or not topk_weight.is_floating_point():
        raise TypeError(
            f"topk_index is {topk_index.dtype}, topk_weight {topk_weight.dtype}; they must be int64 and floating"
        )
    operands = (
        x, topk_index, topk_weight, up.data, down_w.data, gate_up_bias, down_bias, gate_up_a, gate_up_b, down_a, down_b,
        gate_up_scale, down_scale, up.is_transposed,
    )  # fmt: skip
    stored = up.format, down_w.format, list(up.statistics) or None, list(down_w.statistics) or None
    backend = requested_backend(backend)
    if not callable(activation):
        layout = GateLayout.of(has_gate, is_concatenated)
        lookup(activation, layout)
        out = _experts.lora_experts(*operands, activation, layout.value, backend, *stored)
    else:
        checked = _checked(activation, inner)
        out = _experts.lora_experts_recomputed(*operands, activation=checked, backend=backend, stored=stored)
    return out.to(given)


def _weight(w: Tensor | Weight, is_transposed: bool) -> Weight:
    return w if isinstance(w, Weight) else Weight(w, is_transposed)


def plan_experts(
    x: Tensor,
    topk_index: Tensor,
    gate_up: Tensor | Weight,
    down: Tensor | Weight,
    *,
    gate_up_a: Tensor | None = None,
    down_a: Tensor | None = None,
    is_transposed: bool = False,
    backward: bool = False,
) -> Plan:
    """The plan that backend "auto" follows for these operands of `lora_experts`, with its reasons; nothing runs.

    Forward and backward are planned apart; `backward` asks for the gradients of a training step. Where rows go is not
    read: the model spreads them evenly over the experts.
    """
    up, down_w = _weight(gate_up, is_transposed), _weight(down, is_transposed)
    factors = _stacked(gate_up_a, up.stored[0]), _stacked(down_a, up.stored[0])
    x, gated = _in_weights_dtype(x, up), up.sizes[0] != down_w.sizes[1]
    problems = experts_problems(x, topk_index.shape[1], up, down_w, *factors, gated, backward)
    return plan_for(problems, x.device)


def _checked(activation: Callable[[Tensor], Tensor], inner: int) -> Callable[[Tensor], Tensor]:
    """`activation`, which raises ValueError for a result that is not `[rows, inner]`."""

    def run(u: Tensor) -> Tensor:
        h = activation(u)
        if h.shape != (u.shape[0], inner):
            raise ValueError(f"activation gave {list(h.shape)} of {list(u.shape)}; down needs [rows, {inner}]")
        return h

    return run


def _in_weights_dtype(x: Tensor, w: Weight) -> Tensor:
    """x as it is; under autocast in the weights' dtype, as transformers runs experts, or autocast's if quantized."""
    if not x.is_floating_point() or not autocast_is_on(x):
        return x
    return x.to(w.data.dtype if w.format == "dense" else torch.get_autocast_dtype(x.device.type))


def _stacked(t: Tensor | None, groups: int) -> Tensor | None:
    """A factor for every group; one that is shared is read, not copied, for each."""
    return t.unsqueeze(0).expand(groups, -1, -1) if t is not None and t.dim() == 2 else t
