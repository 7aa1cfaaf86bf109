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

__all__ = ["NOTHING_ACTIVE", "FusedExperts", "expert_operands", "wrappers"]

# what transformers' `use_experts_implementation` says of an experts module
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")
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
    name = type(base).__name__
    if not all(hasattr(base, flag) for flag in _FLAGS):
        return f"its base {name} is not an experts module of transformers >= 5.7"
    if getattr(base, "has_post_expert_norm", False):
        return f"its base {name} normalizes what each expert gives"
    if any(altered(module) for module in (*chain[1:], base)):
        return "an inner wrapper or its base has hooks or a replaced forward"
    up = "gate_up_proj" if base.has_gate else "up_proj"
    unknown = {wrapper.parameter_name for wrapper in chain} - {up, "down_proj"}
    if unknown:
        return f"it adapts {', '.join(sorted(unknown))}, not {up} or down_proj"
    operands: dict[str, Any] = {"is_transposed": base.is_transposed, "has_gate": base.has_gate}
    for argument, parameter in (("gate_up", up), ("down", "down_proj")):
        weight = base._parameters.get(parameter)
        bias = base._parameters.get(f"{parameter}_bias") if base.has_bias else None
        for tensor in (weight, bias):
            if tensor is not None and tensor.requires_grad:
                return f"its base {parameter} is trainable; lorafuse computes no gradient for it"
        if type(weight) is not nn.Parameter or weight.dim() != 3 or (base.has_bias and bias is None):
            return f"its base {parameter} is not an ordinary stack [experts, …] of parameters"
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            return f"its base {parameter} is {weight.dtype}"
        operands |= {argument: weight, f"{argument}_bias": bias}
    adapted = False
    for wrapper in chain:
        argument = "down" if wrapper.parameter_name == "down_proj" else "gate_up"
        factors = _factors(wrapper, base)
        if isinstance(factors, str):
            return factors
        if factors is not None:
            adapted = True
            operands |= dict(zip((f"{argument}_a", f"{argument}_b", f"{argument}_scale"), factors, strict=True))
    if not adapted:
        return NOTHING_ACTIVE
    return operands | _activation(base)


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


def _activation(base: nn.Module) -> dict[str, Any]:
    """The activation by name where it is known, as the module's own function where not."""
    from transformers import activations
    from transformers.integrations.moe import _default_apply_gate

    known = {
        nn.SiLU: "silu",
        activations.SiLUActivation: "silu",
        nn.ReLU: "relu",
        activations.GELUActivation: "gelu",
        activations.GELUTanh: "gelu_tanh",
        activations.ReLUSquaredActivation: "relu2",
    }
    name = known.get(type(base.act_fn)) if hasattr(base, "act_fn") else None
    if base.has_gate and type(base)._apply_gate is not _default_apply_gate:
        return {"activation": base._apply_gate}
    if name is None:
        return {"activation": base._apply_gate if base.has_gate else base.act_fn}
    # the default gate splits its input in halves, whatever the layout of the weights is called
    return {"activation": name, "is_concatenated": True}
