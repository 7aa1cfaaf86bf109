"""`LoRAExpertsMulti`: the frozen experts of a mixture-of-experts block with many LoRA adapters."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.activation import GateLayout, lookup
from lorafuse.functional import MultiProjection, lora_experts, lora_experts_multi
from lorafuse.nn.multi import AdapterRows, AdapterStack
from lorafuse.operands import Weight

__all__ = ["ExpertsMulti", "LoRAExpertsMulti"]

_FACTORS = "gate_up_a", "gate_up_b", "down_a", "down_b"


class ExpertsMulti(nn.Module):
    """Experts with many adapters over what `operands` gives: weights, biases and flags of
    `lorafuse.functional.lora_experts`.

    The factors of both projections are in `gate_up_adapters` and `down_adapters`. `rows` says which adapter a token of
    the next calls has; None is the base alone.
    """

    def __init__(
        self, gate_up: Weight, down: Weight, shared_outer: bool, adapter_dtype: torch.dtype
    ) -> None:  # fmt: skip
        super().__init__()
        self.rows: AdapterRows | None = None
        E, device = gate_up.stored[0], gate_up.data.device
        (N, K), (H, I) = gate_up.sizes, down.sizes  # noqa: E741
        outer = () if shared_outer else (E,)
        self.gate_up_adapters = AdapterStack((*outer, K), (E, N), adapter_dtype, device)
        self.down_adapters = AdapterStack((E, I), (*outer, H), adapter_dtype, device)

    def operands(self) -> dict[str, Any]:
        """Keyword arguments of `lora_experts`, without adapters."""
        raise NotImplementedError

    def forward(self, x: Tensor, topk_index: Tensor, topk_weight: Tensor) -> Tensor:
        """out `[T, H]` for x `[T, H]`, index and weight `[T, k]`, the tokens of each sample of `rows` after each other.

        Raises ValueError for a T that is no multiple of the samples or tokens there.
        """
        operands, rows = self.operands(), self.rows
        # without any adapter there is the base alone
        if rows is None or not rows.count:
            return lora_experts(x, topk_index, topk_weight, **operands)
        samples = rows.index.numel()
        if samples == 0 or x.shape[0] % samples:
            raise ValueError(f"adapters are given for {samples} samples or tokens, experts got {x.shape[0]} tokens")
        offsets, order, place = rows.of((*rows.index.shape, x.shape[0] // samples))
        if order is not None:
            x, topk_index, topk_weight = (t.index_select(0, order) for t in (x, topk_index, topk_weight))
        projections = []
        for name, stack in (("gate_up", self.gate_up_adapters), ("down", self.down_adapters)):
            weight, bias = operands.pop(name), operands.pop(f"{name}_bias")
            a, b, buffers = stack.operands()
            projections.append(
                MultiProjection(weight, a, b, stack.ranks, stack.scales, bias, grad_buffers=buffers)
            )  # fmt: skip
        out = lora_experts_multi(x, offsets, topk_index, topk_weight, *projections, **operands)
        return out if place is None else out.index_select(0, place)


class LoRAExpertsMulti(ExpertsMulti):
    """`out[t] = Σ_j topk_weight[t, j] · down(act(gate_up(x[t])))`, each token with the factors of its adapter.

    The factors of all adapters are stacked, `gate_up_adapters` and `down_adapters` (`lorafuse.nn.multi.AdapterStack`).
    Backward adds their gradients up there, for the adapters with tokens alone, until somebody zeroes them. `rows` says
    which adapter a token of the next calls has; None is the base alone. `lorafuse.adapters.AdapterPool` does all that
    for the experts of transformers' models.

    Args:
        gate_up, down: `[E, 2I, H]` and `[E, H, I]`, or each with the last two exchanged when `is_transposed`; shared,
            not copied, and frozen. A quantized one is a `Weight`, which stays out of the state dict and where it is.
        activation, has_gate, is_concatenated, is_transposed: those of `lorafuse.functional.lora_experts_multi`.
        gate_up_bias, down_bias: `[E, 2I]` and `[E, H]`, or None.
        shared_outer: whether gate_up's a and down's b, those at H, are one for all experts.
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
        lookup(activation, GateLayout.of(has_gate, is_concatenated))
        up, back = (t if isinstance(t, Weight) else Weight(t, is_transposed) for t in (gate_up, down))
        super().__init__(up, back, shared_outer, adapter_dtype)
        self.flags: dict[str, Any] = {
            "activation": activation, "has_gate": has_gate, "is_concatenated": is_concatenated,
            "is_transposed": is_transposed,
        }  # fmt: skip
        self.shared_outer = shared_outer
        self._quantized: dict[str, Weight] = {}
        given = {"gate_up": gate_up, "down": down, "gate_up_bias": gate_up_bias, "down_bias": down_bias}
        for name, t in given.items():
            if isinstance(t, Weight):
                self._quantized[name] = t
            else:
                self.register_parameter(name, None if t is None else nn.Parameter(t.detach(), requires_grad=False))

    def operands(self) -> dict[str, Any]:
        """Keyword arguments of `lora_experts`, without adapters."""
        return {**self._parameters, **self._quantized, **self.flags}

    @torch.no_grad()
    def fill(self, adapters: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], scales: Sequence[float]) -> None:
        """Stack adapters: of each gate_up's a `[E, R, H]` and b `[E, 2I, R]`, down's a `[E, R, I]` and b `[E, H, R]`,
        the shared ones without E; scales are alpha / R. Gradients start from zero. Raises ValueError for other shapes,
        and for another number of scales.
        """
        if len(scales) != len(adapters):
            raise ValueError(f"got {len(scales)} scales for {len(adapters)} adapters; each has one")
        stacks = self.gate_up_adapters, self.down_adapters
        for g, one in enumerate(adapters):
            for i, (name, t) in enumerate(zip(_FACTORS, one, strict=True)):
                held, R = (stacks[i // 2].b if i % 2 else stacks[i // 2].a), one[i // 2 * 2].shape[-2]
                sizes = [*held.shape[1:-1], *((held.shape[-1], R) if i % 2 else (R, held.shape[-1]))]
                if list(t.shape) != sizes:
                    raise ValueError(f"adapter {g} has {name} {list(t.shape)}; with its rank {R} it is {sizes}")
        for stack, i in zip(stacks, (0, 2), strict=True):
            stack.fill([(_stacked(one[i]), _stacked(one[i + 1].mT)) for one in adapters])
            stack.scales = tuple(map(float, scales))

    def gradients(self, g: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The sums of the gradients of adapter g since they were last zeroed: views, as `fill` takes factors."""
        up, down = (
            [_stacked(t[stack.of(g)]) for t in (stack.a_grad, stack.b_grad)]
            for stack in (self.gate_up_adapters, self.down_adapters)
        )
        return up[0], up[1].mT, down[0], down[1].mT


def _stacked(t: Tensor) -> Tensor:
    """`[E, R, C]` as `[R, E, C]`, and back; `[R, C]` as it is."""
    return t if t.dim() == 2 else t.transpose(0, 1)
