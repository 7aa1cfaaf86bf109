"""The experts modules of transformers' mixture-of-experts models: what they hold, and an implementation of them."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrize import ParametrizationList

from lorafuse import formats
from lorafuse.activation import GATE_ALPHA, GATE_LIMIT
from lorafuse.errors import MissingDependency
from lorafuse.functional import lora_experts
from lorafuse.integrations.hf_common import (
    altered,
    described,
    interception,
    is_called_otherwise,
    original,
    trainable,
    warn_once,
)
from lorafuse.operands import Weight
from lorafuse.versions import EXPERTS, is_older

__all__ = [
    "FLAGS",
    "adopted_stack",
    "base_stacks",
    "block_operands",
    "experts_forward",
    "first_projection",
    "is_dispatched",
    "register_experts",
]

# what transformers' `use_experts_implementation` says of an experts module
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALF = (torch.bfloat16, torch.float16)


def register_experts(name: str = "lorafuse") -> None:
    """Let transformers run experts by lorafuse: `model.set_experts_implementation("lorafuse")`, or the argument
    `experts_implementation="lorafuse"` of `from_pretrained`.

    Frozen experts, with PEFT's `target_parameters` adapters or without, then run as one operator. Experts that are
    trained themselves run as transformers' own "grouped_mm". Under an unpatched PEFT model its wrappers still check
    each parametrization once a forward; `lorafuse.patch` saves that too.

    Raises MissingDependency without transformers >= 5.7.
    """
    try:
        import transformers
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise MissingDependency("experts need transformers >= 5.7: pip install 'transformers>=5.7'") from error
    # before 5.7 the names of experts implementations were a fixed list
    if is_older(transformers.__version__, EXPERTS["transformers"]):
        raise MissingDependency(
            f"experts need transformers >= 5.7, found {transformers.__version__}: pip install -U it"
        )
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' signature of an experts implementation; `self` is the experts module."""
    weights, adapters = _weights_and_adapters(self)
    reason = interception(hidden_states)
    if reason is None and original(ParametrizationList, "forward") is None:
        reason = "the forward of ParametrizationList was replaced"
    operands = block_operands(self, weights)
    if reason is not None or isinstance(operands, str) or adapters is None:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        if reason and not torch.compiler.is_compiling():
            warn_once("registered experts run as transformers ships them", reason)
        # torch's grouped product has no forward mode
        own = "grouped_mm" if forward_ad._current_level < 0 else "batched_mm"
        return ALL_EXPERTS_FUNCTIONS[own](self, hidden_states, top_k_index, top_k_weights)
    return lora_experts(hidden_states, top_k_index.long(), top_k_weights, **operands, **adapters)


def _weights_and_adapters(experts: nn.Module) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The module's stacks by name, and the factors that PEFT has put over them; None where those are no factors."""
    weights: dict[str, Any] = dict(experts._parameters)
    adapters: dict[str, Any] = {}
    for argument, parameter in (("gate_up", first_projection(experts)), ("down", "down_proj")):
        parametrized = getattr(experts, "parametrizations", {})
        if parameter not in parametrized:
            continue
        over = parametrized[parameter]
        weights[parameter] = over.original
        # what is PEFT's has brought its file
        peft_layer = sys.modules.get("peft.tuners.lora.layer")
        if (
            peft_layer is not None
            and len(over) == 1
            and type(over[0]) is getattr(peft_layer, "_LoraFactorsProxy", None)
        ):
            # the delta is scaling * lhs @ rhs, in the layout of the weight
            lhs, rhs = over[0].lhs, over[0].rhs
            a, b = (lhs.mT, rhs.mT) if experts.is_transposed else (rhs, lhs)
            adapters |= {f"{argument}_a": a, f"{argument}_b": b, f"{argument}_scale": over[0].scaling}
            continue
        # bitsandbytes parametrizes experts too, without PEFT
        stack = adopted_stack(experts, parameter)
        if stack is None:
            return weights, None
        weights[parameter] = stack
    return weights, adapters


def adopted_stack(base: nn.Module, parameter: str) -> Weight | str | None:
    """The quantized stack of a module; a str, the reason, for one that cannot be held; None for a dense one."""
    try:
        return formats.adopt(base, parameter)
    except ValueError as error:
        return f"cannot be adopted: {error}"


def base_stacks(base: nn.Module) -> dict[str, Any]:
    """The two stacks of an experts module by their names: parameters, or what quantizes them."""
    stacks: dict[str, Any] = dict(base._parameters)
    if not hasattr(base, "has_gate"):
        return stacks
    for parameter in (first_projection(base), "down_proj"):
        dense = stacks.get(parameter)
        # the dtype first, since this runs in every forward
        if (dense is None or dense.dtype not in _DTYPES) and (stack := adopted_stack(base, parameter)) is not None:
            stacks[parameter] = stack
    return stacks


def first_projection(base: nn.Module) -> str:
    """The name of the parameter that an experts module applies first."""
    return "gate_up_proj" if base.has_gate else "up_proj"


def is_dispatched(kind: type) -> bool:
    """Whether an experts class has the forward that transformers' decorator gives it, and nobody replaced it."""
    from transformers.integrations import moe

    return getattr(kind.forward, "__globals__", None) is vars(moe)  # type: ignore[attr-defined]


def block_operands(base: nn.Module, weights: Mapping[str, Any]) -> dict[str, Any] | str:
    """Keyword arguments of `lora_experts` for a frozen experts module without adapters, or why there are none.

    `weights` holds its two stacks by their names (`base_stacks`); biases are read from the module.
    """
    name = type(base).__name__
    if not all(hasattr(base, flag) for flag in FLAGS):
        return f"its base {name} is not an experts module of transformers >= 5.7"
    if getattr(base, "has_post_expert_norm", False):
        return f"its base {name} normalizes what each expert gives"
    act = getattr(base, "act_fn", None)
    if isinstance(act, nn.Module) and (
        altered(act) or is_called_otherwise(type(act)) or original(type(act), "forward") is None
    ):
        return f"its activation {type(act).__name__} has hooks or a replaced forward"
    if getattr(base, "activation_scheme", "dynamic") != "dynamic":
        return f"its base {name} clips x by a calibrated scale (activation_scheme={base.activation_scheme!r})"
    operands: dict[str, Any] = {"is_transposed": base.is_transposed, "has_gate": base.has_gate}
    for argument, parameter in (("gate_up", first_projection(base)), ("down", "down_proj")):
        weight = weights.get(parameter)
        bias = base._parameters.get(f"{parameter}_bias") if base.has_bias else None
        if isinstance(weight, str):
            return f"its base {parameter} {weight}"
        for tensor in (weight.data if isinstance(weight, Weight) else weight, bias):
            if tensor is not None and tensor.requires_grad:
                return trainable(base, parameter)
        if weight is None:
            return f"its base {parameter} {described(base, parameter)}"
        if isinstance(weight, Weight) and len(weight.stored) == 3 and not (base.has_bias and bias is None):
            weight = dataclasses.replace(weight, is_transposed=base.is_transposed)
            operands |= {argument: weight, f"{argument}_bias": bias}
            continue
        if type(weight) not in (nn.Parameter, Tensor) or weight.dim() != 3 or (base.has_bias and bias is None):  # type: ignore[union-attr]
            return f"its base {parameter} is not an ordinary stack [experts, …] of parameters"
        if weight.dtype not in _DTYPES:  # type: ignore[union-attr]
            return f"its base {parameter} is {weight.dtype}"  # type: ignore[union-attr]
        if weight.dtype in _HALF and _computes_in_fp32(base):  # type: ignore[union-attr]
            return f"its base {name} computes in float32 from {weight.dtype} weights, lorafuse in their dtype"  # type: ignore[union-attr]
        operands |= {argument: weight, f"{argument}_bias": bias}
    return operands | _activation(base)


def _computes_in_fp32(base: nn.Module) -> bool:
    """Whether a module runs its model's own forward ("eager") and that casts to fp32 (openai_privacy_filter)."""
    own = getattr(type(base).forward, "__wrapped__", None)
    return base.config._experts_implementation == "eager" and "float" in own.__code__.co_names  # type: ignore[union-attr]


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
        if _is_gpt_oss(base):
            return {"activation": "clamped_swiglu", "is_concatenated": False}
        return {"activation": base._apply_gate}
    if name is None:
        return {"activation": base._apply_gate if base.has_gate else base.act_fn}
    # the default gate splits its input in halves, whatever the layout of the weights is called
    return {"activation": name, "is_concatenated": True}


def _is_gpt_oss(base: nn.Module) -> bool:
    """Whether a module gates as GptOssExperts itself does, with the constants of its published models."""
    # a module of that class has brought its file; nobody else needs it
    modeling = sys.modules.get("transformers.models.gpt_oss.modeling_gpt_oss")
    own = modeling is not None and type(base)._apply_gate is modeling.GptOssExperts._apply_gate
    return own and "_apply_gate" not in vars(base) and (base.alpha, base.limit) == (GATE_ALPHA, GATE_LIMIT)
