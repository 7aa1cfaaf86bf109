"""torchtune's `LoRALinear`, run by lorafuse: `lorafuse.integrations.torchtune.patch(model)` once the base is frozen."""

from typing import Any

from torch import Tensor, nn

from lorafuse import formats
from lorafuse.errors import MissingDependency
from lorafuse.integrations.hf_common import altered
from lorafuse.integrations.owned import Operands, factors_of, patch_owned, unpatch_owned
from lorafuse.integrations.report import PatchReport
from lorafuse.operands import Weight

__all__ = ["patch", "unpatch"]


def _layers() -> tuple[tuple[Any, ...], dict[type, str]]:
    """The class that lorafuse runs, and those that it leaves to torchtune, with the reason."""
    try:
        import torchtune.modules.peft as peft
    except ImportError as error:
        raise MissingDependency("torchtune is not installed here: pip install torchtune torchao") from error
    dora = getattr(peft, "DoRALinear", None)
    return (peft.LoRALinear,), {} if dora is None else {dora: "it is torchtune's DoRA"}


def patch(model: nn.Module, *, backend: str = "auto", strict: bool = False) -> PatchReport:
    """Run every `LoRALinear` of torchtune fused, in place; names, parameters and checkpoints stay torchtune's.

    Call it after the base parameters are frozen (`set_trainable_params`), before or after sharding by FSDP2. Args,
    raises and warnings are those of `lorafuse.patch`. Its dropout draws other masks than torchtune's.
    """
    kinds, others = _layers()
    return patch_owned(model, kinds, _operands, backend, strict, "torchtune", others=others)


def unpatch(model: nn.Module) -> int:
    """Give the layers back; returns how many there were."""
    return unpatch_owned(model)


def _operands(layer: Any) -> Operands:
    if layer.disabled or layer.merged:
        return ""
    factors = factors_of(layer, layer.lora_a, layer.lora_b)
    if isinstance(factors, str):
        return factors
    dropout, weight = layer.dropout, layer._parameters["weight"]
    if type(dropout) not in (nn.Dropout, nn.Identity) or altered(dropout):
        return "its dropout is not a plain nn.Dropout"
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    if layer._quantize_base:
        weight = formats.adopt(weight)
        if not isinstance(weight, Weight):
            return "its base is quantized in a format that lorafuse does not read"
    elif type(weight) not in (nn.Parameter, Tensor):
        return f"its base weight is a {type(weight).__name__}, not an ordinary parameter"
    return weight, *factors, layer.alpha / layer.rank, layer.bias, p
