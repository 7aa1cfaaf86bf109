"""NeMo Automodel's `LinearLoRA`, run by lorafuse: `lorafuse.integrations.automodel.patch(model)` after `apply_lora`."""

from typing import Any

from torch import Tensor, nn

from lorafuse.errors import MissingDependency
from lorafuse.integrations.owned import Operands, factors_of, patch_owned, unpatch_owned
from lorafuse.integrations.report import PatchReport

__all__ = ["patch", "unpatch"]


def _layers() -> tuple[Any, ...]:
    try:
        from nemo_automodel.components._peft import lora
    except ImportError as error:
        raise MissingDependency("NeMo Automodel is not installed here: pip install nemo-automodel") from error
    return lora.LinearLoRA, lora.TritonLinearLoRA


def patch(model: nn.Module, *, backend: str = "auto", strict: bool = False) -> PatchReport:
    """Run every `LinearLoRA` of NeMo Automodel fused, in place; names, parameters and checkpoints stay NeMo's.

    Its own Triton kernels (`use_triton`) are replaced with it. Args, raises and warnings are those of `lorafuse.patch`.
    Dropout before the adapter (`dropout_position="pre"`) draws other masks than NeMo's; after it, NeMo's own path runs.
    """
    return patch_owned(model, _layers(), _operands, backend, strict)


def unpatch(model: nn.Module) -> int:
    """Give the layers back; returns how many there were."""
    return unpatch_owned(model)


def _operands(layer: Any) -> Operands:
    if layer.use_dora:
        return "its adapter is a variant of LoRA (DoRA)"
    if getattr(layer, "super_fwd", None) is not None:
        return "its base layer has a forward of its own (a quantized one, or Transformer Engine's)"
    factors = factors_of(layer, layer.lora_A, layer.lora_B)
    if isinstance(factors, str):
        return factors
    weight, p = layer._parameters["weight"], layer.dropout_p if layer.training else 0.0
    if type(weight) not in (nn.Parameter, Tensor):
        return f"its base weight is a {type(weight).__name__}, not an ordinary parameter"
    if p and layer.dropout_position != "pre":
        return "its dropout comes after the adapter"
    bias = layer._parameters.get("bias")
    return weight, *factors, layer.scale, None if bias is None or not bias.numel() else bias, p
