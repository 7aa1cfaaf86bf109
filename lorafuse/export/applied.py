"""Which adapters of a model change nothing: rollouts and evaluations that silently run the base are found by it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.activation import gate_differentiable
from lorafuse.nn import LoRAExperts, LoRAGatedMLP, LoRALinear, LoRALinearMulti, LoRAQKV
from lorafuse.nn.multi_experts import ExpertsMulti

__all__ = ["NoEffect", "check_applied"]

# our modules with adapters, and those that run such layers without calling them
_OWNED = LoRALinear, LoRAExperts, LoRALinearMulti, ExpertsMulti
_GROUPS = LoRAQKV, LoRAGatedMLP


@dataclass(frozen=True)
class NoEffect:
    """A layer whose adapter changes nothing, and why."""

    name: str
    reason: str


def check_applied(model: nn.Module, batch: Any) -> list[NoEffect]:
    """The adapted layers of a PEFT model, or of `lorafuse.nn`, whose adapter has no effect on this batch.

    Runs `model(**batch)` (or `model(batch)`) once without gradients, and the base of every adapted linear layer again.
    None is what to expect after some steps of training; before, every lora_B is zero, which is said. Of a pool's model
    call it within `AdapterPool.use_adapters`; what counts is any of the batch's adapters.

    Raises ValueError for a model without adapted layers.
    """
    layers = {
        name: module for name, module in model.named_modules()
        if isinstance(module, _OWNED) or (hasattr(module, "lora_A") and hasattr(module, "get_base_layer"))
    }  # fmt: skip
    if not layers:
        raise ValueError(f"check_applied got a {type(model).__name__} without adapted layers")
    called: dict[nn.Module, bool] = {}

    def watch(layer: Any, args: tuple[Any, ...], y: Any) -> None:
        called[layer] = called.get(layer, False) or _differs(layer, args, y)

    def watch_group(group: Any, args: tuple[Any, ...], y: Any) -> None:
        # the layers' hooks see these calls
        if isinstance(group, LoRAQKV):
            for layer in group.children():
                layer(*args)
        else:
            gate, up, down = group.children()
            down(gate_differentiable(group.activation, gate(*args), up(*args)))

    handles = [layer.register_forward_hook(watch) for layer in layers.values()]
    handles += [m.register_forward_hook(watch_group) for m in model.modules() if isinstance(m, _GROUPS)]
    try:
        with torch.no_grad():
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for handle in handles:
            handle.remove()
    out = []
    for name, layer in layers.items():
        reason = _idle(layer)
        if not reason and layer not in called:
            reason = "it was never called"
        elif not reason and not called[layer]:
            reason = "its result is that of its base: what it adds is lost in rounding, or is not computed"
        if reason:
            out.append(NoEffect(name, reason))
    return out


def _differs(layer: Any, args: tuple[Any, ...], y: Any) -> bool:
    """Whether y is not what the base alone gives; of layers that are not linear it is not known, and assumed."""
    if isinstance(layer, LoRALinear):
        return not torch.equal(y, nn.functional.linear(args[0], layer.weight, layer.bias))
    if isinstance(layer, LoRALinearMulti):
        return not torch.equal(y, layer.base(*args))
    if hasattr(layer, "parameter_name") or not isinstance(y, Tensor) or len(args) != 1:
        return True
    return not torch.equal(y, layer.base_layer(*args))


def _idle(layer: Any) -> str:
    """Why an adapter cannot have an effect in its present state, or ""."""
    if isinstance(layer, LoRALinear):
        if layer.merged:
            return "it is merged into its base"
        return _zero([(layer.lora_A.weight, layer.lora_B.weight)])
    if isinstance(layer, LoRALinearMulti | ExpertsMulti) and layer.rows is None:
        return "its rows have no adapters: call it within AdapterPool.use_adapters"
    if isinstance(layer, LoRALinearMulti):
        return _zero([(layer.a, layer.b)])
    if isinstance(layer, LoRAExperts):
        return _zero([(getattr(layer, f"{p}_lora_A"), getattr(layer, f"{p}_lora_B")) for p in ("gate_up", "down")])
    if isinstance(layer, ExpertsMulti):
        return _zero([(stack.a, stack.b) for stack in (layer.gate_up_adapters, layer.down_adapters)])
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return f"{', '.join(layer.merged_adapters)} is merged into its base"
    factors = [(layer.lora_A, layer.lora_B), (layer.lora_embedding_A, layer.lora_embedding_B)]
    pairs = [(a[name], b[name]) for a, b in factors for name in layer.active_adapters if name in b]
    if not pairs:
        return "it has no active adapter"
    return _zero([tuple(getattr(t, "weight", t) for t in pair) for pair in pairs])


def _zero(pairs: list[Any]) -> str:
    """The reason where of every `(a, b)` one is zero."""
    return "" if any(a.any() and b.any() for a, b in pairs) else "its lora_A or lora_B is zero"
