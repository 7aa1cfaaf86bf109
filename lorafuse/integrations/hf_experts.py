"""PEFT's `target_parameters` adapters on the experts of transformers' MoE models, run by lorafuse.

PEFT wraps an experts module once for each adapted parameter, one `ParamWrapper` in another, and on every forward puts
W + ΔW in the place of each parameter. A patched outermost wrapper is the same object with its class changed to
`FusedExperts`, which hands the parameters and the factors of all its wrappers to one operator. Nothing is materialized.
"""

from typing import Any

import peft
import torch
from peft.tuners.lora import ParamWrapper
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from torch.nn.modules import module as _hooks
from torch.nn.utils.parametrize import ParametrizationList

from lorafuse.functional import lora_experts
from lorafuse.integrations import calls
from lorafuse.integrations.hf_common import (
    FSDP1,
    ZERO3,
    altered,
    interception,
    is_called_otherwise,
    is_fsdp1,
    is_zero3,
    original,
    warn_once,
)
from lorafuse.integrations.hf_expert_parallel import experts_here, implementation_of, running
from lorafuse.integrations.hf_transformers import base_stacks, block_operands, first_projection, is_dispatched
from lorafuse.nn.peft_layout import unpacked
from lorafuse.operands import Weight
from lorafuse.versions import EXPERTS, is_older

__all__ = ["NOTHING_ACTIVE", "FusedExperts", "expert_parts", "why_not_wrapped", "wrappers"]

NOTHING_ACTIVE = "no adapter is active"


# the modules through which a wrapper puts W + ΔW in place, by PEFT's version
_PROXIES = ("_LoraFactorsProxy", "_LoraParameterProxy")
# what an unpatched wrapper runs in every forward, besides its base
_FORWARDS = {
    kind: original(kind, "forward")
    for kind in (
        ParamWrapper, ParametrizationList, *(vars(peft_layer)[name] for name in _PROXIES if hasattr(peft_layer, name))
    )
}  # fmt: skip
TOO_OLD = ""
if is_older(peft.__version__, EXPERTS["peft"]):
    TOO_OLD = (
        f"adapted parameters need peft >= {EXPERTS['peft']}; this is {peft.__version__}, which lays out their factors "
        "otherwise"
    )

# lora_A.weight, lora_B.weight, scale
_Factors = tuple[Tensor, Tensor, float]


class FusedExperts(ParamWrapper):
    """The outermost `ParamWrapper` of an experts module, run fused; created by `lorafuse.patch`, not by hand."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # who kept this method (accelerate's hooks) calls it after unpatch too
        if type(self) is ParamWrapper:
            return ParamWrapper.forward(self, x, *args, **kwargs)
        parts: Any = "its experts are called with other arguments than transformers' own blocks give them"
        if len(args) == 2 and not kwargs and x.dim() == 2:
            parts = interception(x)
            if parts is None:
                parts = expert_parts(self)
            if isinstance(parts, tuple):
                index, weight = args
                if (implementation := implementation_of(self.get_base_layer())) is not None:
                    return self._dispatched(implementation, x, index, weight, *parts[1:])
                operands = _operands(*parts)
                out = lora_experts(x, index.long(), weight, **operands, backend=self._lorafuse_backend)
                calls.ran(self)
                return out
            if parts not in ("", NOTHING_ACTIVE) and not torch.compiler.is_compiling():
                warn_once("a patched experts layer runs as PEFT ships it", parts)
        calls.fell_back(self, parts or calls.OFF)
        return ParamWrapper.forward(self, x, *args, **kwargs)

    def _dispatched(
        self, implementation: Any, x: Tensor, index: Tensor, weight: Tensor, experts: int,
        factors: dict[str, list[_Factors]],
    ) -> Tensor:  # fmt: skip
        """The result of experts that lie on several devices: those of this one run fused."""
        base = self.get_base_layer()
        adapters = {
            key: experts_here(implementation, value) if isinstance(value, Tensor) else value
            for key, value in _operands({}, experts, factors).items()
        }

        def run(rows: Tensor, local: Tensor, weights: Tensor) -> Tensor:
            # the stacks are this rank's plain tensors inside the call
            operands = block_operands(base, base_stacks(base))
            if isinstance(operands, str):
                raise RuntimeError(f"experts that were patched cannot run: {operands}")
            operands |= adapters
            return lora_experts(rows, local.long(), weights, **operands, backend=self._lorafuse_backend)

        with running(implementation, run):
            out = base(x, index, weight)
        calls.ran(self)
        return out


# PEFT's reports, and PEFT itself, know a wrapper by this name; pickle goes by __module__ and __qualname__
FusedExperts.__name__ = ParamWrapper.__name__


def wrappers(layer: ParamWrapper) -> list[ParamWrapper]:
    """The wrappers of one experts module, outermost first."""
    layers = [layer]
    while isinstance(layers[-1].base_layer, ParamWrapper):
        layers.append(layers[-1].base_layer)
    return layers


def why_not_wrapped() -> str:
    """Why no `ParamWrapper` of this process runs fused at present, or ""."""
    if TOO_OLD:
        return TOO_OLD
    for kind, forward in _FORWARDS.items():
        if kind.forward is not forward:
            return f"the forward of {kind.__name__} was replaced"
    # PEFT registers a parametrization in every forward
    if _hooks._global_module_registration_hooks or _hooks._global_parameter_registration_hooks:
        return "global registration hooks are registered"
    return ""


def expert_parts(
    layer: ParamWrapper, is_resting: bool = False
) -> tuple[dict[str, Any], int, dict[str, list[_Factors]]] | str:
    """The present state of an outermost wrapper, or why it does not run fused; nothing is computed.

    The state: keyword arguments of `lora_experts` for the base, the number of experts, and the factors of the active
    adapters of "gate_up" and "down" as PEFT packs them. "" means that adapters are disabled or merged, PEFT's own
    paths. The one statement of which experts lorafuse takes: the report and every forward ask here. Experts that are
    `is_resting` lie in a module that FSDP2 shards.
    """
    if reason := why_not_wrapped():
        return reason
    chain = wrappers(layer)
    if any(wrapper.disable_adapters or wrapper.merged for wrapper in chain):
        return ""
    base = layer.get_base_layer()
    is_spread = implementation_of(base) is not None
    # what spreads experts over devices replaces their forward and may have FSDP's hooks there
    if altered(*chain[1:]) or (altered(base) and not is_spread):
        return ZERO3 if is_zero3(base) else "an inner wrapper or its base has hooks or a replaced forward"
    if is_called_otherwise(ParamWrapper) or is_called_otherwise(type(base)):
        return "the call of nn.Module was replaced"
    operands = block_operands(base, base_stacks(base), is_resting or is_spread)
    if isinstance(operands, str):
        return operands
    if not is_dispatched(type(base)):
        return f"its base {type(base).__name__} has a forward of its own"
    names = {first_projection(base): "gate_up", "down_proj": "down"}
    factors: dict[str, list[_Factors]] = {}
    for wrapper in chain:
        if wrapper.parameter_name not in names:
            return f"it adapts {wrapper.parameter_name}, not one of {', '.join(names)}"
        packed = _factors(wrapper, base, operands[names[wrapper.parameter_name]])
        if isinstance(packed, str):
            return packed
        if packed:
            factors[names[wrapper.parameter_name]] = packed
    return (operands, chain[0].num_experts, factors) if factors else NOTHING_ACTIVE


def _factors(wrapper: ParamWrapper, base: nn.Module, stack: Tensor | Weight) -> list[_Factors] | str:
    """The factors of a wrapper's active adapters over a stack, as PEFT packs them."""
    factors = []
    experts = wrapper.num_experts
    outs, ins = stack.sizes if isinstance(stack, Weight) else Weight(stack, base.is_transposed).sizes
    for name in wrapper.active_adapters:
        if name not in wrapper.lora_A:
            continue
        lora_a, lora_b = wrapper.lora_A[name], wrapper.lora_B[name]
        if is_fsdp1(lora_a) or is_fsdp1(lora_b):
            return FSDP1
        if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear or lora_b._parameters["bias"] is not None:
            return "its lora_A or lora_B is not a plain nn.Linear"
        if wrapper.num_experts == 1 and base.is_transposed:
            return "a single expert stored transposed, which PEFT adapts in another layout"
        a, b = lora_a.weight, lora_b.weight
        # PEFT up to 0.19.0 exchanged in and out features, and no call may fail for what another version does
        if a.shape[1:] != (ins,) or b.shape != (outs, *a.shape[:1]) or a.shape[0] % experts:
            return (
                f"its lora_A {list(a.shape)} and lora_B {list(b.shape)} are not [{experts}·R, {ins}] and "
                f"[{outs}, R·{experts}]"
            )
        factors.append((a, b, wrapper.scaling[name]))
    return factors


def _operands(operands: dict[str, Any], experts: int, factors: dict[str, list[_Factors]]) -> dict[str, Any]:
    """Keyword arguments of `lora_experts`: a [E, R, in] and b [E, out, R] are views of PEFT's packed weights."""
    for name, packed in factors.items():
        stacks = [(*unpacked(a, b, experts), scale) for a, b, scale in packed]
        a, b, scale = stacks[0]
        if len(stacks) > 1:
            # active adapters add up, so together they are one adapter of the summed rank
            a = torch.cat([a for a, *_ in stacks], 1)
            b, scale = torch.cat([b * scale for _, b, scale in stacks], 2), 1.0
        operands |= {f"{name}_a": a, f"{name}_b": b, f"{name}_scale": scale}
    return operands
