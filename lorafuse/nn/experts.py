"""`LoRAExperts`: the frozen experts of a mixture-of-experts block with LoRA on both projections, one operator."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lorafuse.activation import GateLayout, lookup
from lorafuse.functional import lora_experts

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

    def reset_parameters(self) -> None:
        """Base and A uniform with the bound of `nn.Linear`, B zero: the block starts as its base."""
        with torch.no_grad():
            for w in (self.gate_up_proj, self.down_proj, self.gate_up_lora_A, self.down_lora_A):
                w.uniform_(-1 / math.sqrt(w.shape[-1]), 1 / math.sqrt(w.shape[-1]))
            self.gate_up_lora_B.zero_()
            self.down_lora_B.zero_()

    def forward(self, x: Tensor, topk_index: Tensor, topk_weight: Tensor) -> Tensor:
        """`out [..., H]` of `x [..., H]`, `topk_index` and `topk_weight` `[tokens, k]`; see `lora_experts`."""
        out = lora_experts(
            # a nested x is refused there
            x if x.is_nested else x.reshape(-1, x.shape[-1]),
            topk_index,
            topk_weight,
            self.gate_up_proj,
            self.down_proj,
            gate_up_a=self.gate_up_lora_A,
            gate_up_b=self.gate_up_lora_B,
            down_a=self.down_lora_A,
            down_b=self.down_lora_B,
            gate_up_scale=self.scale,
            down_scale=self.scale,
            activation=self.activation,
            has_gate=self.has_gate,
        )
        # no view of out, as nn.Linear returns none: FSDP2 warns of views, and nobody else holds out
        return torch.ops.aten._unsafe_view(out, x.shape)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, r={self.r}, scale={self.scale:g}, "
            f"shared_outer={self.shared_outer}"
        )
