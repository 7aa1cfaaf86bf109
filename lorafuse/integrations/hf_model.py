"""Which adapted layers of a model lorafuse takes, and making them ours and PEFT's again."""

import sys
from typing import Any

from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lorafuse.backends import base as backends
from lorafuse.integrations import calls, gated_mlp, groups
from lorafuse.integrations.bypassed import bypassed
from lorafuse.integrations.hf_common import FSDP1, is_fsdp1, is_fsdp2, watched
from lorafuse.integrations.hf_experts import NOTHING_ACTIVE, FusedExperts, expert_parts, wrappers
from lorafuse.integrations.hf_mixed import lift, lower
from lorafuse.integrations.hf_peft import FusedLinear, FusedTorchaoLinear, FusedWeight, Member, why_not_fused
from lorafuse.integrations.hf_quantized import described_format, has_finite_scales, notes, stored
from lorafuse.integrations.report import Patched, PatchReport, Skipped
from lorafuse.operands import Weight

__all__ = ["adopt", "lift", "patched_layers", "regroup", "release", "survey"]

# our class: PEFT's
_SHIPPED: dict[type, type] = {
    FusedLinear: PeftLinear,
    FusedTorchaoLinear: TorchaoLoraLinear,
    FusedWeight: ParamWrapper,
    FusedExperts: ParamWrapper,
}
# PEFT's files of layers over weights in formats that lorafuse does not read
_FOREIGN = ("aqlm", "awq", "eetq", "gptq", "hqq", "inc")


def _shipped() -> dict[type, type]:
    """Our class: PEFT's. Those over bitsandbytes' layers are there where PEFT has imported its own."""
    if "peft.tuners.lora.bnb" not in sys.modules:
        return _SHIPPED
    from lorafuse.integrations import hf_bnb

    return _SHIPPED | hf_bnb.SHIPPED


def _kind(layer: BaseTunerLayer) -> str:
    if isinstance(layer, ParamWrapper):
        # of a weight as of a layer: "linear"
        return "linear" if isinstance(layer.get_base_layer(), nn.Linear) else "experts"
    return "linear" if isinstance(layer, tuple(_shipped().values())) else type(layer).__name__.lower()


def _full_name(layer: BaseTunerLayer) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _reason(layer: BaseTunerLayer, is_resting: bool, numerics: str) -> str:
    """Why a layer is left to PEFT, or "" if lorafuse takes it; `is_resting`: it lies in a module that FSDP2 shards."""
    if not isinstance(layer, LoraLayer):
        return f"{_full_name(layer)} is not a LoRA layer"
    # fully_shard changes the class of a layer passed to it to a subclass of its own, which still runs fused
    classes = _shipped()
    if type(layer) not in classes.values() and not isinstance(layer, tuple(classes)):
        reason = f"{_full_name(layer)} is not a LoRA layer over nn.Linear"
        package, _, file = type(layer).__module__.rpartition(".")
        if package == "peft.tuners.lora" and file in _FOREIGN:
            reason += f"; its base is quantized by {file.upper()}, which lorafuse does not read"
        return reason
    if type(layer) in classes.values() and "forward" in layer.__dict__:
        return _replaced_forward(layer)
    if reason := watched():
        return reason
    shipped: Any = next(kind for kind in type(layer).__mro__ if kind in classes.values())
    if _kind(layer) == "experts":
        if numerics != "fused":
            return f"numerics={numerics!r} is that of linear layers"
        parts = expert_parts(layer, is_resting)
        # experts whose adapters are merely off, merged or elsewhere run fused when they are on again
        return parts if isinstance(parts, str) and parts != NOTHING_ACTIVE else ""
    return why_not_fused(layer, shipped, is_resting, numerics)


def _replaced_forward(layer: nn.Module) -> str:
    """Who replaced the forward of a layer, so that its class no longer decides what runs."""
    if "_hf_hook" in layer.__dict__:
        return (
            f"accelerate's {type(layer._hf_hook).__name__} replaced its forward: patch before the hook is attached, or "
            "remove it (accelerate.hooks.remove_hook_from_module)"
        )
    owner = getattr(layer.__dict__["forward"], "__self__", layer)
    if owner is not layer:
        return f"its forward is that of a {type(owner).__module__}.{type(owner).__qualname__}"
    return "its forward was replaced before lorafuse.patch: patch before that, where the model allows it"


def survey(model: nn.Module, backend: str, numerics: str = "fused") -> tuple[PatchReport, list[LoraLayer]]:
    """The report on every adapted layer of the model, and the layers lorafuse takes. Changes and computes nothing."""
    report, layers = PatchReport(), []
    infinite: list[str] = []
    # what lies inside another module: wrappers of the same experts, and layers that are never called
    inner: set[nn.Module] = set()
    reasons: dict[nn.Module, str] = {}
    resting: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            reasons[module.out_proj] = (
                "nn.MultiheadAttention reads the weight of its out_proj and never calls it; PEFT merges the adapter "
                "into that weight when the whole attention is a target, and leaves it without effect when out_proj is"
            )
        elif is_fsdp1(module):
            reasons |= dict.fromkeys(module.modules(), FSDP1)
        elif is_fsdp2(module) and module not in resting:
            resting.update(module.modules())
        reasons |= bypassed(module)
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or layer in inner:
            continue
        if isinstance(layer, ParamWrapper):
            inner.update(wrappers(layer)[1:])
        reason = reasons.get(layer) or _reason(layer, layer in resting, numerics)
        if reason:
            report.skipped.append(Skipped(name, _kind(layer), reason))
            continue
        report.patched.append(Patched(name, _kind(layer), _shown_backend(layer, backend)))
        layers.append(layer)
        weight = None if isinstance(layer, ParamWrapper) else stored(layer.get_base_layer())
        if isinstance(weight, Weight):
            report.bases[name] = described_format(weight)
            if not has_finite_scales(weight):
                infinite.append(name)
    report.notes += notes(model)
    if infinite:
        report.notes.append(
            f"{len(infinite)} quantized weights have scales that are NaN or infinite, as outputs will be; the first is "
            f"{infinite[0]}: load the checkpoint again, or look for such values in what was quantized"
        )
    return report, layers


def _shown_backend(layer: LoraLayer, backend: str) -> str:
    """The backend that will run a layer, "auto" where that is decided at every call."""
    weight = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
    able = backends.candidates(weight.device.type)
    return able[0] if backend == "auto" and len(able) == 1 else backend


def adopt(layer: Any, backend: str, dropout_rng: str = "philox", numerics: str = "fused") -> None:
    """Make a layer that `survey` listed one of our classes."""
    if type(layer) is ParamWrapper:
        layer.__class__ = FusedWeight if _kind(layer) == "linear" else FusedExperts
    else:
        ours = {shipped: kind for kind, shipped in _shipped().items()}
        layer.__class__ = ours.get(type(layer), type(layer))
    # None follows lorafuse.use_backend at every call
    layer._lorafuse_backend = None if backend == "auto" else backend
    # absent from layers whose masks, or numerics, are lorafuse's own
    layer.__dict__.pop("_lorafuse_dropout_rng", None)
    if dropout_rng != "philox":
        layer._lorafuse_dropout_rng = dropout_rng
    layer.__dict__.pop("_lorafuse_numerics", None)
    if numerics != "fused":
        layer._lorafuse_numerics = numerics
    calls.begin(layer)


def regroup(model: nn.Module, layers: list[Any], report: PatchReport, has_groups: bool) -> None:
    """Make groups of adopted layers, into the report; without `has_groups` take them apart."""
    linear: list[Any] = [layer for layer in layers if isinstance(layer, Member)]
    gated_mlp.dissolve(model)
    if not has_groups:
        for layer in linear:
            groups.leave(layer)
        return
    report.groups, report.apart = groups.form(model, linear)
    mlps, apart = gated_mlp.form(model, layers)
    # gate and up of an MLP are siblings where its layers have to be called
    whole = {(mlp.name, name) for mlp in mlps for name in mlp.members}
    report.groups = [one for one in report.groups if not whole.issuperset((one.name, m) for m in one.members)] + mlps
    report.apart += apart


def patched_layers(model: nn.Module) -> list[Any]:
    """Every layer of the model that is one of our classes."""
    classes = tuple(_shipped())
    return [layer for layer in model.modules() if isinstance(layer, classes)]


def release(model: nn.Module) -> int:
    """Make every patched layer of the model PEFT's class again; returns how many."""
    classes, layers = _shipped(), patched_layers(model)
    for layer in (*layers, *gated_mlp.formed(model)):
        if type(layer) not in classes and not gated_mlp.is_ours(layer):
            raise RuntimeError(
                f"cannot unpatch a {type(layer).__name__}: its class was changed after lorafuse.patch (fully_shard "
                "does that to a layer passed to it); unpatch before it, or shard whole blocks"
            )
    lower(model)
    gated_mlp.dissolve(model)
    for layer in layers:
        layer.__class__ = classes[type(layer)]
        del layer._lorafuse_backend
        layer.__dict__.pop("_lorafuse_dropout_rng", None)
        layer.__dict__.pop("_lorafuse_numerics", None)
        layer.__dict__.pop("_lorafuse_mixed", None)
        calls.end(layer)
        groups.leave(layer)
    return len(layers)
