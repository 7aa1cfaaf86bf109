"""NeMo Automodel's `LinearLoRA`, run by lorafuse: `lorafuse.integrations.automodel.patch(model)` after `apply_lora`."""

from typing import Any

from torch import Tensor, nn

from lorafuse.errors import MissingDependency
from lorafuse.integrations.owned import Operands, factors_of, patch_owned, unpatch_owned
from lorafuse.integrations.report import PatchReport

__all__ = ["patch", "unpatch"]


# NeMo's memory-efficient forward of an MLP reads the weights of layers for which this is on, and never calls them
_SWITCHES = {"use_memory_efficient_lora": False}
_EXPERTS = "adapted experts run as NeMo ships them"


def _layers() -> tuple[tuple[Any, ...], dict[type, str]]:
    """The classes that lorafuse runs, and those that it leaves to NeMo, with the reason."""
    try:
        from nemo_automodel.components._peft import lora
    except ImportError as error:
        raise MissingDependency("NeMo Automodel is not installed here: pip install nemo-automodel") from error
    names = "GroupedExpertsLoRA", "GroupedExpertsDeepEPLoRA"
    return (lora.LinearLoRA, lora.TritonLinearLoRA), {getattr(lora, n): _EXPERTS for n in names if hasattr(lora, n)}


def patch(model: nn.Module, *, backend: str = "auto", strict: bool = False) -> PatchReport:
    """Run every `LinearLoRA` of NeMo Automodel fused, in place; names, parameters and checkpoints stay NeMo's.

    Its own Triton kernels (`use_triton`) and its function for a whole MLP (`use_memory_efficient_lora`) are replaced
    with it; adapted experts stay NeMo's. Args, raises and warnings are those of `lorafuse.patch`. Dropout before the
    adapter (`dropout_position="pre"`) draws other masks than NeMo's; after it, NeMo's own path runs.
    """
    kinds, others = _layers()
    return patch_owned(model, kinds, _operands, backend, strict, "NeMo Automodel", others=others, switches=_SWITCHES)


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
