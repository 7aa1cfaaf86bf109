"""`LoRAExpertsMulti`: the frozen experts of a mixture-of-experts block with many LoRA adapters."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.activation import GateLayout, lookup
from lorafuse.functional import MultiProjection, lora_experts, lora_experts_multi
from lorafuse.nn.multi import AdapterRows
from lorafuse.operands import Weight

__all__ = ["LoRAExpertsMulti"]

_FACTORS = "gate_up_a", "gate_up_b", "down_a", "down_b"


class LoRAExpertsMulti(nn.Module):
    """`out[t] = Σ_j topk_weight[t, j] · down(act(gate_up(x[t])))`, each token with the factors of its adapter.

    The adapters are stacked: parameters `gate_up_a [E, ΣR, H]`, `gate_up_b [E, ΣR, 2I]`, `down_a [E, ΣR, I]` and
    `down_b [E, ΣR, H]`, b transposed; with `shared_outer` gate_up_a and down_b are one for all experts, without their
    first dimension. Backward adds their gradients to buffers of these names with `_grad`, for the adapters with tokens
    alone, until somebody zeroes them. `rows` says which adapter a token of the next calls has; None is the base alone.

    Args:
        gate_up, down: `[E, 2I, H]` and `[E, H, I]`, or each with the last two exchanged when `is_transposed`; shared,
            not copied, and frozen. A quantized one is a `Weight`, which stays out of the state dict and where it is.
        activation, has_gate, is_concatenated, is_transposed: those of `lorafuse.functional.lora_experts_multi`.
        gate_up_bias, down_bias: `[E, 2I]` and `[E, H]`, or None.
        shared_outer: see above.
        adapter_dtype: of the factors.
    """

    def __init__(
        self,
        gate_up: Tensor | Weight,
        down: Tensor | Weight,
        *,
        activation: str = "silu",
        has_gate: bool = True,
        is_concatenated: bool = True,
        is_transposed: bool = False,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        shared_outer: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        lookup(activation, GateLayout.of(has_gate, is_concatenated))
        self.flags: dict[str, Any] = {
            "activation": activation, "has_gate": has_gate, "is_concatenated": is_concatenated,
            "is_transposed": is_transposed,
        }  # fmt: skip
        self.shared_outer, self.adapter_dtype = shared_outer, adapter_dtype
        self.rows: AdapterRows | None = None
        self.ranks: tuple[int, ...] = ()
        self.scales: tuple[float, ...] = ()
        self._quantized: dict[str, Weight] = {}
        named = {"gate_up": gate_up, "down": down, "gate_up_bias": gate_up_bias, "down_bias": down_bias}
        for name, t in named.items():
            if isinstance(t, Weight):
                self._quantized[name] = t
            else:
                self.register_parameter(name, None if t is None else nn.Parameter(t.detach(), requires_grad=False))
        self.fill([], [])

    def _weight(self, name: str) -> Weight:
        return self._quantized.get(name) or Weight(getattr(self, name), self.flags["is_transposed"])

    @torch.no_grad()
    def fill(self, adapters: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], scales: Sequence[float]) -> None:
        """Stack adapters: of each gate_up's a `[E, R, H]` and b `[E, 2I, R]`, down's a `[E, R, I]` and b `[E, H, R]`,
        the shared ones without E; scales are alpha / R. Gradients start from zero. Raises ValueError for other shapes.
        """
        weights = [self._weight(name) for name in ("gate_up", "down")]
        E, device = weights[0].stored[0], weights[0].data.device
        columns = [size for w in weights for size in (w.sizes[1], w.sizes[0])]
        for i, (name, C) in enumerate(zip(_FACTORS, columns, strict=True)):
            groups = () if self.shared_outer and i in (0, 3) else (E,)
            # of b the transposed, so that an adapter's part is rows too
            parts = [one[i].mT if i % 2 else one[i] for one in adapters]
            for g, part in enumerate(parts):
                if part.shape != (*groups, part.shape[-2], C):
                    raise ValueError(
                        f"adapter {g} has {name} {list(adapters[g][i].shape)}; stacked, its sizes are "
                        f"{[*groups, part.shape[-2], C]}"
                    )
            nothing = torch.empty(*groups, 0, C, dtype=self.adapter_dtype, device=device)
            stacked = torch.cat([nothing, *(part.to(nothing) for part in parts)], -2)
            self.register_parameter(name, nn.Parameter(stacked))
            self.register_buffer(f"{name}_grad", torch.zeros_like(stacked), persistent=False)
        self.ranks, self.scales = tuple(one[0].shape[-2] for one in adapters), tuple(map(float, scales))

    def gradients(self, g: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The sums of the gradients of adapter g since they were last zeroed: views, as `fill` takes factors."""
        first = sum(self.ranks[:g])
        some = [getattr(self, f"{name}_grad")[..., first : first + self.ranks[g], :] for name in _FACTORS]
        return some[0], some[1].mT, some[2], some[3].mT

    def forward(self, x: Tensor, topk_index: Tensor, topk_weight: Tensor) -> Tensor:
        """out `[T, H]` for x `[T, H]`, index and weight `[T, k]`, the tokens of each sample of `rows` after each other.

        Raises ValueError for a T that is no multiple of the samples or tokens there.
        """
        up, down, rows = self._weight("gate_up"), self._weight("down"), self.rows
        up_bias, down_bias = self._parameters["gate_up_bias"], self._parameters["down_bias"]
        # without any adapter there is the base alone
        if rows is None or not rows.count:
            biases = {"gate_up_bias": up_bias, "down_bias": down_bias}
            return lora_experts(x, topk_index, topk_weight, up, down, **biases, **self.flags)
        samples = rows.index.numel()
        if samples == 0 or x.shape[0] % samples:
            raise ValueError(f"adapters are given for {samples} samples or tokens, experts got {x.shape[0]} tokens")
        offsets, order, place = rows.of((*rows.index.shape, x.shape[0] // samples))
        if order is not None:
            x, topk_index, topk_weight = (t.index_select(0, order) for t in (x, topk_index, topk_weight))
        projections = [
            MultiProjection(
                w,
                self._parameters[f"{name}_a"],
                self._parameters[f"{name}_b"].mT,  # type: ignore[union-attr]
                self.ranks,
                self.scales,
                bias,
                grad_buffers=(self._buffers[f"{name}_a_grad"], self._buffers[f"{name}_b_grad"].mT),  # type: ignore
            )
            for name, w, bias in (("gate_up", up, up_bias), ("down", down, down_bias))
        ]
        out = lora_experts_multi(x, offsets, topk_index, topk_weight, *projections, **self.flags)
        return out if place is None else out.index_select(0, place)
