"""PEFT's LoRA layers, run by lorafuse.

A patched layer is the same object with its class changed from `peft.tuners.lora.Linear` to `FusedLinear`, a subclass
that replaces `forward` only. PEFT stays the owner of everything else. Each forward reads the layer's present state,
so adapters may be switched, scaled, added, deleted, merged or disabled at any time.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorafuse.backends import base as backends
from lorafuse.functional import run_linear
from lorafuse.integrations.hf_common import altered, warn_once
from lorafuse.integrations.hf_experts import NOTHING_ACTIVE, FusedExperts, expert_operands, wrappers
from lorafuse.integrations.report import Patched, PatchReport, Skipped

__all__ = ["FusedLinear", "adopt", "release", "survey"]


# weight, a, b, scale, bias, dropout_p
_Operands = tuple[Tensor, Tensor, Tensor, float, Tensor | None, float]


class FusedLinear(PeftLinear):
    """`peft.tuners.lora.Linear` whose forward is one lorafuse operator; created by `lorafuse.patch`, not by hand."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        # per-sample adapters (kwargs), disabled and merged adapters are PEFT's own paths and cost no more there
        if not (args or kwargs or self._disable_adapters or self.merged_adapters):
            operands = _operands(self)
            if isinstance(operands, tuple):
                if x.dim() > 4:
                    y = run_linear(x.flatten(0, -4), *operands, None, self._lorafuse_backend)
                    return y.unflatten(0, x.shape[:-3])
                return run_linear(x, *operands, None, self._lorafuse_backend)
            if operands is not None and not torch.compiler.is_compiling():
                warn_once(operands)
        return super().forward(x, *args, **kwargs)


def _operands(layer: PeftLinear) -> _Operands | str | None:
    """`(weight, a, b, scale, bias, dropout_p)` of the layer's present state.

    None when no adapter is active in this layer, so that there is nothing to fuse; a str, the reason, when there is
    but it cannot be fused. The one statement of which layers lorafuse takes: the report and every forward ask here.
    """
    modules = layer._modules
    lora_a, lora_b = modules["lora_A"]._modules, modules["lora_B"]._modules
    active = layer._active_adapter
    names = [active] if type(active) is str else active
    if len(names) != 1 or names[0] not in lora_a:
        names = [name for name in names if name in lora_a]
        if not names:
            return None
    base = modules["base_layer"]
    if type(base).forward is not nn.Linear.forward:
        return f"its base is a {type(base).__name__}, not an nn.Linear"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out: its base stores the weight transposed"
    weight = base._parameters.get("weight")
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return f"its base weight is a {type(weight).__name__}, not an ordinary parameter"
    if weight.requires_grad:
        return "its base weight is trainable; lorafuse computes no gradient for it"
    if "bias" not in base._parameters:
        return "its base bias is not an ordinary parameter"
    bias = base._parameters["bias"]
    if altered(base):
        return "its base layer has hooks or a replaced forward"
    factors = []
    for name in names:
        if name in layer.lora_variant:
            variant = type(layer.lora_variant[name]).__name__.removesuffix("LinearVariant")
            return f"its adapter is a variant of LoRA ({variant})"
        a, b = lora_a[name], lora_b[name]
        if type(a) is not nn.Linear or type(b) is not nn.Linear or altered(a) or altered(b):
            return "its lora_A or lora_B is not a plain nn.Linear without hooks"
        if a._parameters["bias"] is not None:
            return "its lora_A has a bias"
        dropout = modules["lora_dropout"]._modules[name]
        if altered(dropout):
            return "its dropout has hooks or a replaced forward"
        if type(dropout) is nn.Identity:
            p = 0.0
        elif type(dropout) is nn.Dropout:
            p = dropout.p if dropout.training else 0.0
        else:
            return f"its dropout is a {type(dropout).__name__}, not nn.Dropout"
        scale = layer.scaling[name]
        b_bias = b._parameters["bias"]
        if b_bias is not None:
            b_bias = (b_bias * scale).to(weight.dtype)
            bias = b_bias if bias is None else bias + b_bias
        b_weight = b._parameters["weight"]
        # hot swapping keeps scales in tensors, so that a new one needs no compilation; the operator takes floats
        if isinstance(scale, Tensor):
            b_weight, scale = b_weight * scale, 1.0
        factors.append((a._parameters["weight"], b_weight, scale, p))
    if len(factors) == 1:
        a, b, scale, p = factors[0]
        return weight, a, b, scale, bias, p
    if any(p for *_, p in factors):
        return "several active adapters with dropout; PEFT draws a mask for each"
    # active adapters add up, so together they are one adapter of the summed rank
    a = torch.cat([a for a, *_ in factors])
    b = torch.cat([b * scale for _, b, scale, _ in factors], dim=1)
    return weight, a, b, 1.0, bias, 0.0


# PEFT's class: ours
_FUSED = {PeftLinear: FusedLinear, ParamWrapper: FusedExperts}


def _kind(layer: BaseTunerLayer) -> str:
    if isinstance(layer, ParamWrapper):
        return "experts"
    return "linear" if isinstance(layer, PeftLinear) else type(layer).__name__.lower()


def _full_name(layer: BaseTunerLayer) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _reason(layer: BaseTunerLayer) -> str:
    """Why a layer is left to PEFT, or "" if lorafuse takes it."""
    if not isinstance(layer, LoraLayer):
        return f"{_full_name(layer)} is not a LoRA layer"
    # fully_shard changes the class of a layer passed to it to a subclass of its own, which still runs fused
    if type(layer) not in _FUSED and not isinstance(layer, tuple(_FUSED.values())):
        return f"{_full_name(layer)} is not a LoRA layer over nn.Linear"
    if type(layer) in _FUSED and "forward" in layer.__dict__:
        return "its forward was replaced before lorafuse.patch (accelerate's hooks do that): patch first"
    with torch.no_grad():
        operands = expert_operands(layer) if isinstance(layer, ParamWrapper) else _operands(layer)
    # experts whose adapters are merely off, merged or elsewhere run fused when they are on again
    return operands if isinstance(operands, str) and operands != NOTHING_ACTIVE else ""


def survey(model: nn.Module, backend: str) -> tuple[PatchReport, list[LoraLayer]]:
    """The report on every adapted layer of the model, and the layers lorafuse takes. Changes nothing."""
    report, layers, inner = PatchReport(), [], set()
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or layer in inner:
            continue
        if isinstance(layer, ParamWrapper):
            inner.update(wrappers(layer)[1:])
        reason = _reason(layer)
        if reason:
            report.skipped.append(Skipped(name, _kind(layer), reason))
            continue
        report.patched.append(Patched(name, _kind(layer), _shown_backend(layer, backend)))
        layers.append(layer)
    return report, layers


def _shown_backend(layer: LoraLayer, backend: str) -> str:
    """The backend that will run a layer, "auto" where that is decided at every call."""
    weight = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
    able = backends.candidates(weight.device.type)
    return able[0] if backend == "auto" and len(able) == 1 else backend


def adopt(layer: Any, backend: str) -> None:
    """Make a layer that `survey` listed a `FusedLinear` or `FusedExperts`."""
    if type(layer) in _FUSED:
        layer.__class__ = _FUSED[type(layer)]
    # None follows lorafuse.use_backend at every call
    layer._lorafuse_backend = None if backend == "auto" else backend


def release(model: nn.Module) -> int:
    """Make every patched layer of the model PEFT's class again; returns how many."""
    originals = {fused: peft for peft, fused in _FUSED.items()}
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, tuple(originals))]
    for layer in layers:
        if type(layer) not in originals:
            raise RuntimeError(
                f"cannot unpatch a {type(layer).__name__}: its class was changed after lorafuse.patch (fully_shard "
                "does that to a layer passed to it); unpatch before it, or shard whole blocks"
            )
    for layer in layers:
        layer.__class__ = originals[type(layer)]
        del layer._lorafuse_backend
    return len(layers)
