"""Which adapters of a model change nothing: rollouts and evaluations that silently run the base are found by it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.nn import LoRALinear

__all__ = ["NoEffect", "check_applied"]


@dataclass(frozen=True)
class NoEffect:
    """A layer whose adapter changes nothing, and why."""

    name: str
    reason: str


def check_applied(model: nn.Module, batch: Any) -> list[NoEffect]:
    """The adapted layers of a PEFT model, or of `lorafuse.nn.LoRALinear`, whose adapter has no effect on this batch.

    Runs `model(**batch)` (or `model(batch)`) once without gradients, and the base of every adapted linear layer again.
    None is what to expect after some steps of training; before, every lora_B is zero, which is said.

    Raises ValueError for a model without adapted layers.
    """
    layers = {
        name: module for name, module in model.named_modules()
        if isinstance(module, LoRALinear) or (hasattr(module, "lora_A") and hasattr(module, "get_base_layer"))
    }  # fmt: skip
    if not layers:
        raise ValueError(f"check_applied got a {type(model).__name__} without adapted layers")
    called: dict[str, bool] = {}

    def watching(name: str, layer: Any) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            called[name] = called.get(name, False) or _differs(layer, args, y)

        return layer.register_forward_hook(hook)

    handles = [watching(name, layer) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(**batch) if isinstance(batch, dict) else model(batch)
    finally:
        for handle in handles:
            handle.remove()
    out = []
    for name, layer in layers.items():
        reason = _idle(layer)
        if not reason and name not in called:
            reason = "it was never called"
        elif not reason and not called[name]:
            reason = "its result is that of its base: what it adds is lost in rounding, or is not computed"
        if reason:
            out.append(NoEffect(name, reason))
    return out


def _differs(layer: Any, args: tuple[Any, ...], y: Any) -> bool:
    """Whether y is not what the base alone gives; of layers that are not linear it is not known, and assumed."""
    if isinstance(layer, LoRALinear):
        return not torch.equal(y, nn.functional.linear(args[0], layer.weight, layer.bias))
    if hasattr(layer, "parameter_name") or not isinstance(y, Tensor) or len(args) != 1:
        return True
    return not torch.equal(y, layer.base_layer(*args))


def _idle(layer: Any) -> str:
    """Why an adapter cannot have an effect in its present state, or ""."""
    if isinstance(layer, LoRALinear):
        if layer.merged:
            return "it is merged into its base"
        return "" if layer.lora_B.weight.any() and layer.lora_A.weight.any() else "its lora_A or lora_B is zero"
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return f"{', '.join(layer.merged_adapters)} is merged into its base"
    factors = [(layer.lora_A, layer.lora_B), (layer.lora_embedding_A, layer.lora_embedding_B)]
    pairs = [(a[name], b[name]) for a, b in factors for name in layer.active_adapters if name in b]
    if not pairs:
        return "it has no active adapter"
    if not any(all(getattr(t, "weight", t).any() for t in pair) for pair in pairs):
        return "its lora_A or lora_B is zero"
    return ""
