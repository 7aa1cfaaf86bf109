"""`LoRAExperts`: the frozen experts of a mixture-of-experts block with LoRA on both projections, one operator."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.activation import GateLayout, lookup
from lorafuse.functional import lora_experts
from lorafuse.operands import Weight

__all__ = ["LoRAExperts"]


class LoRAExperts(nn.Module):
    """`out[t] = Σ_j topk_weight[t, j] · down(act(gate_up(x[t])))`, each projection with an adapter for each expert.

    Parameters, by the names in the state dict: `gate_up_proj [E, 2I, H]` and `down_proj [E, H, I]` as transformers
    stores them, frozen; `gate_up_lora_A [E, r, H]`, `gate_up_lora_B [E, 2I, r]`, `down_lora_A [E, r, I]` and
    `down_lora_B [E, H, r]`. With `shared_outer` the factors at H, gate_up_lora_A and down_lora_B, are one for all
    experts and have no first dimension.

    Args:
        num_experts, hidden_size, intermediate_size: E, H, I.
        r: rank of each expert's adapters, at least 1.
        alpha: the paths are scaled by alpha / r.
        activation: a name of `lorafuse.activation.ACTIVATIONS`, or a function from `[rows, 2I]` to `[rows, I]`.
        has_gate: whether the first projection holds gate and up; without, gate_up_proj is `[E, I, H]`.
        shared_outer: see above.
        device, dtype: of the base.
        adapter_dtype: of the factors; None means fp32 on a half-precision base (as PEFT does), else the base's.

    Raises ValueError for a rank or size below 1, an alpha that is not finite, or an unknown activation.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        r: int,
        *,
        alpha: float | None = None,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        has_gate: bool = True,
        shared_outer: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"r={r} is not a rank; it must be at least 1")
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} is not a size; it must be at least 1")
        if alpha is not None and not math.isfinite(alpha):
            raise ValueError(f"alpha={alpha} is not finite; it must be a number, or None for alpha = r")
        if isinstance(activation, str):
            lookup(activation, GateLayout.of(has_gate, True))
        self.num_experts, self.hidden_size, self.intermediate_size, self.r = (
            num_experts, hidden_size, intermediate_size, r,
        )  # fmt: skip
        self.scale = float(r if alpha is None else alpha) / r
        self.activation, self.has_gate, self.shared_outer = activation, has_gate, shared_outer
        self.is_concatenated, self.is_transposed = True, False
        # stacks that are no parameters, by name
        self._quantized: dict[str, Weight] = {}
        self.register_parameter("gate_up_proj_bias", None)
        self.register_parameter("down_proj_bias", None)

        def empty(*shape: int, of: torch.dtype | None = dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=of))

        first = (2 if has_gate else 1) * intermediate_size
        self.gate_up_proj = empty(num_experts, first, hidden_size).requires_grad_(False)
        self.down_proj = empty(num_experts, hidden_size, intermediate_size).requires_grad_(False)
        if adapter_dtype is None:
            half = self.down_proj.dtype in (torch.bfloat16, torch.float16)
            adapter_dtype = torch.float32 if half else self.down_proj.dtype
        outer = () if shared_outer else (num_experts,)
        self.gate_up_lora_A = empty(*outer, r, hidden_size, of=adapter_dtype)
        self.gate_up_lora_B = empty(num_experts, first, r, of=adapter_dtype)
        self.down_lora_A = empty(num_experts, r, intermediate_size, of=adapter_dtype)
        self.down_lora_B = empty(*outer, hidden_size, r, of=adapter_dtype)
        self.reset_parameters()

    @classmethod
    def from_stacks(
        cls,
        gate_up: Tensor | Weight,
        down: Tensor | Weight,
        r: int,
        *,
        alpha: float | None = None,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        has_gate: bool = True,
        is_concatenated: bool = True,
        is_transposed: bool = False,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        shared_outer: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> "LoRAExperts":
        """Adapted experts over stacks that are there already, dense or quantized: shared, not copied, and frozen.

        Args:
            gate_up, down: `[E, 2I, H]` and `[E, H, I]`, or each with the last two exchanged when `is_transposed`. A
                quantized one is a `Weight`, as `lorafuse.formats.adopt` gives it: it stays out of the state dict, moves
                with the module, and keeps its dtypes whatever the module is cast to.
            is_concatenated, is_transposed: as in `lorafuse.functional.lora_experts`.
            gate_up_bias, down_bias: `[E, 2I]` and `[E, H]`, or None.
            r, alpha, activation, has_gate, shared_outer, adapter_dtype: as above; None is fp32 on a quantized base.

        Raises ValueError for stacks that do not fit each other, with their sizes and the rule.
        """
        sizes, weights = [], []
        for name, stack in (("gate_up", gate_up), ("down", down)):
            weight = stack if isinstance(stack, Weight) else Weight(stack, is_transposed)
            if weight.format != "dense" and weight.is_transposed is not is_transposed:
                weight = dataclasses.replace(weight, is_transposed=is_transposed)
            if len(weight.stored) != 3:
                raise ValueError(f"{name} is {list(weight.stored)}; it must be a stack, one matrix for each expert")
            weights.append(weight)
            sizes.append((weight.stored[0], *weight.sizes))
        (experts, first, hidden), (others, out, inner) = sizes
        if (experts, hidden, first) != (others, out, inner * (2 if has_gate else 1)):
            raise ValueError(
                f"gate_up maps {hidden} to {first} features in {experts} experts, down {inner} to {out} in {others}; "
                f"down must lead back from {'half of ' * has_gate}gate_up's features in as many experts"
            )
        is_dense = all(weight.format == "dense" for weight in weights)
        layer = cls(
            experts, hidden, inner, r, alpha=alpha, activation=activation, has_gate=has_gate, shared_outer=shared_outer,
            device="meta", dtype=weights[1].data.dtype if is_dense else torch.bfloat16, adapter_dtype=adapter_dtype,
        )  # fmt: skip
        layer.is_concatenated, layer.is_transposed = is_concatenated, is_transposed
        if isinstance(activation, str):
            lookup(activation, GateLayout.of(has_gate, is_concatenated))
        for name, weight, bias in zip(("gate_up_proj", "down_proj"), weights, (gate_up_bias, down_bias), strict=True):
            setattr(layer, f"{name}_bias", None if bias is None else _frozen(bias))
            if weight.format == "dense":
                setattr(layer, name, _frozen(weight.data))
            else:
                layer.register_parameter(name, None)
                layer._quantized[name] = weight
        for name in ("gate_up_lora_A", "gate_up_lora_B", "down_lora_A", "down_lora_B"):
            empty = torch.empty_like(getattr(layer, name), device=weights[0].data.device)
            setattr(layer, name, nn.Parameter(empty))
        layer.reset_lora_parameters()
        return layer

    def reset_parameters(self) -> None:
        """Base and A uniform with the bound of `nn.Linear`, B zero: the block starts as its base."""
        with torch.no_grad():
            for w in (self.gate_up_proj, self.down_proj):
                w.uniform_(-1 / math.sqrt(w.shape[-1]), 1 / math.sqrt(w.shape[-1]))
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """A uniform with the bound of `nn.Linear`, B zero."""
        with torch.no_grad():
            for a in (self.gate_up_lora_A, self.down_lora_A):
                a.uniform_(-1 / math.sqrt(a.shape[-1]), 1 / math.sqrt(a.shape[-1]))
            self.gate_up_lora_B.zero_()
            self.down_lora_B.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name, weight in self._quantized.items():
            # a quantized stack moves, but is never cast: its numbers are codes and their scales
            data, *statistics = (t.to(fn(t.new_empty(0)).device) for t in (weight.data, *weight.statistics))
            self._quantized[name] = dataclasses.replace(weight, data=data, statistics=tuple(statistics))
        return self

    def forward(self, x: Tensor, topk_index: Tensor, topk_weight: Tensor) -> Tensor:
        """`out [..., H]` of `x [..., H]`, `topk_index` and `topk_weight` `[tokens, k]`; see `lora_experts`."""
        out = lora_experts(
            # a nested x is refused there
            x if x.is_nested else x.reshape(-1, x.shape[-1]),
            topk_index,
            topk_weight,
            self._quantized.get("gate_up_proj", self.gate_up_proj),
            self._quantized.get("down_proj", self.down_proj),
            gate_up_a=self.gate_up_lora_A,
            gate_up_b=self.gate_up_lora_B,
            down_a=self.down_lora_A,
            down_b=self.down_lora_B,
            gate_up_scale=self.scale,
            down_scale=self.scale,
            gate_up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias,
            activation=self.activation,
            has_gate=self.has_gate,
            is_concatenated=self.is_concatenated,
            is_transposed=self.is_transposed,
        )
        # no view of out, as nn.Linear returns none: FSDP2 warns of views, and nobody else holds out
        return torch.ops.aten._unsafe_view(out, x.shape)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, r={self.r}, scale={self.scale:g}, "
            f"shared_outer={self.shared_outer}"
            + "".join(f", {name}={weight.format_name}" for name, weight in self._quantized.items())
        )


def _frozen(t: Tensor) -> nn.Parameter:
    """The parameter that t is, or one that shares its memory."""
    return (t if isinstance(t, nn.Parameter) else nn.Parameter(t, requires_grad=False)).requires_grad_(False)
