"""PEFT's `target_parameters` adapters on the experts of transformers' MoE models, run by lorafuse.

PEFT wraps an experts module once for each adapted parameter, one `ParamWrapper` in another, and on every forward puts
W + ΔW in the place of each parameter. A patched outermost wrapper is the same object with its class changed to
`FusedExperts`, which hands the parameters and the factors of all its wrappers to one operator. Nothing is materialized.
"""

from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

from lorafuse.functional import lora_experts
from lorafuse.integrations.hf_common import altered, warn_once
from lorafuse.integrations.hf_transformers import block_operands, first_projection

__all__ = ["NOTHING_ACTIVE", "FusedExperts", "expert_operands", "wrappers"]

NOTHING_ACTIVE = "no adapter is active"


class FusedExperts(ParamWrapper):
    """The outermost `ParamWrapper` of an experts module, run fused; created by `lorafuse.patch`, not by hand."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 2 and not kwargs and x.dim() == 2:
            operands = expert_operands(self)
            if isinstance(operands, dict):
                index, weight = args
                return lora_experts(x, index.long(), weight, **operands, backend=self._lorafuse_backend)
            if operands not in ("", NOTHING_ACTIVE) and not torch.compiler.is_compiling():
                warn_once(operands)
        return super().forward(x, *args, **kwargs)


def wrappers(layer: ParamWrapper) -> list[ParamWrapper]:
    """The wrappers of one experts module, outermost first."""
    found = [layer]
    while isinstance(found[-1].base_layer, ParamWrapper):
        found.append(found[-1].base_layer)
    return found


def expert_operands(layer: ParamWrapper) -> dict[str, Any] | str:
    """Keyword arguments of `lora_experts` for the present state of an outermost wrapper, or why there are none.

    "" means that adapters are disabled or merged, PEFT's own paths. The one statement of which experts lorafuse takes.
    """
    chain = wrappers(layer)
    if any(wrapper.disable_adapters or wrapper.merged for wrapper in chain):
        return ""
    base = layer.get_base_layer()
    if any(altered(module) for module in (*chain[1:], base)):
        return "an inner wrapper or its base has hooks or a replaced forward"
    operands = block_operands(base, base._parameters)
    if isinstance(operands, str):
        return operands
    names = {first_projection(base): "gate_up", "down_proj": "down"}
    adapted = False
    for wrapper in chain:
        if wrapper.parameter_name not in names:
            return f"it adapts {wrapper.parameter_name}, not one of {', '.join(names)}"
        factors = _factors(wrapper, base)
        if isinstance(factors, str):
            return factors
        if factors is not None:
            adapted = True
            name = names[wrapper.parameter_name]
            operands |= {f"{name}_a": factors[0], f"{name}_b": factors[1], f"{name}_scale": factors[2]}
    return operands if adapted else NOTHING_ACTIVE


def _factors(wrapper: ParamWrapper, base: nn.Module) -> tuple[Tensor, Tensor, float] | str | None:
    """`(a [E, R, in], b [E, out, R], scale)` of a wrapper's active adapters, as views of PEFT's packed weights."""
    experts = wrapper.num_experts
    found = []
    for name in wrapper.active_adapters:
        if name not in wrapper.lora_A:
            continue
        lora_a, lora_b = wrapper.lora_A[name], wrapper.lora_B[name]
        if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear or lora_b.bias is not None:
            return "its lora_A or lora_B is not a plain nn.Linear"
        if experts == 1 and base.is_transposed:
            return "a single expert stored transposed, which PEFT adapts in another layout"
        # PEFT packs lora_A expert-slowest and lora_B expert-fastest
        a = lora_a.weight.reshape(experts, -1, lora_a.weight.shape[1])
        b = lora_b.weight.reshape(lora_b.weight.shape[0], -1, experts).permute(2, 0, 1)
        found.append((a, b, wrapper.scaling[name]))
    if not found:
        return None
    if len(found) == 1:
        return found[0]
    # active adapters add up, so together they are one adapter of the summed rank
    return torch.cat([a for a, *_ in found], 1), torch.cat([b * scale for _, b, scale in found], 2), 1.0
