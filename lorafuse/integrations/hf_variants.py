"""PEFT's variants of LoRA that lorafuse runs: DoRA, aLoRA, and those that are LoRA with other factors (MiCA, KaSA).

The rest stays with PEFT. Each is known by its class, whose forward must be PEFT's own.
"""

from functools import partial
from typing import Any, NamedTuple

from peft.tuners.lora import dora, variants
from torch import Tensor, nn

from lorafuse.functional import run_dora
from lorafuse.integrations.hf_common import altered, original
from lorafuse.integrations.hf_quantized import run_quantized
from lorafuse.operands import Weight

__all__ = ["Dora", "Masked", "column_factor", "magnitude_of", "run_dora_layer", "variant_of"]


class Dora(NamedTuple):
    """The operands of a layer with one DoRA adapter."""

    weight: Tensor | Weight
    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None
    dropout_p: float
    magnitude: Tensor


class Masked(NamedTuple):
    """The operands of a layer with one aLoRA adapter, which the last tokens of a sample have."""

    weight: Tensor | Weight
    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None
    dropout_p: float


_DORA_FORWARD = original(dora.DoraLinearLayer, "forward")
# variants of linear layers, by what lorafuse computes of them; older versions of PEFT lack some
_KNOWN: dict[str, str] = {
    "ALoraLinearVariant": "alora", "DoraLinearVariant": "dora", "MiCALinearVariant": "lora", "KasaLinearVariant": "kasa"
}  # fmt: skip
_FORWARDS = {
    kind: original(kind, "forward") for name in _KNOWN if (kind := getattr(variants, name, None)) is not None
}  # fmt: skip


def variant_of(layer: Any, name: str) -> tuple[str, str]:
    """`(kind, reason)` of an adapter: kind "lora", "alora", "dora" or "kasa", or "" and the reason why PEFT runs it."""
    variant = layer.lora_variant.get(name)
    if variant is None:
        return "lora", ""
    kind = type(variant)
    shown = kind.__name__.removesuffix("LinearVariant")
    if kind not in _FORWARDS:
        return "", f"its adapter is a variant of LoRA ({shown})"
    if _FORWARDS[kind] is None or kind.forward is not _FORWARDS[kind] or "forward" in vars(variant):
        return "", f"the forward of PEFT's {kind.__name__} was replaced"
    if name in getattr(layer, "_lora_kasa_truncation_deferred", ()):
        return "", "KaSA truncates the base weight in the first forward"
    return _KNOWN[kind.__name__], ""


def column_factor(layer: Any, name: str) -> Tensor:
    """KaSA's diagonal, `[R]`: a factor for each column of b."""
    return layer.lora_diag[name]


def magnitude_of(layer: Any, name: str, device: Any) -> Tensor | str:
    """DoRA's magnitude `[N]`, or why lorafuse cannot read it."""
    module = layer.lora_magnitude_vector[name]
    if type(module) is not dora.DoraLinearLayer or altered(module) or type(module).forward is not _DORA_FORWARD:
        return "its magnitude vector has hooks or a replaced forward"
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.device != device:
        return "its magnitude vector is no ordinary parameter on the base's device"
    return weight


def run_dora_layer(layer: Any, x: Tensor, parts: Dora) -> Tensor:
    """y of a layer with DoRA."""
    weight, a, b, scale, bias, p, magnitude = parts
    if isinstance(weight, Weight):
        run = partial(run_dora, magnitude=magnitude)
        operands = weight, a, b, scale, bias, p
        return run_quantized(layer._modules["base_layer"], x, operands, layer._lorafuse_backend, run)
    return run_dora(x, weight, a, b, scale, bias, p, None, layer._lorafuse_backend, magnitude=magnitude)
