"""The layers that "all-linear" LoRA adapts in a model, from its configuration: no weights are read, none are made."""

import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from lorafuse.advise.configuration import load_config, on_meta
from lorafuse.testing.cases import Case

__all__ = ["linear_layers"]


def linear_layers(path: Path) -> tuple[dict[Case, int], int]:
    """`({shape: how many layers have it}, number of experts modules)` of a model, in the order in which they come.

    `path` is a Hugging Face model directory or its config.json. PEFT itself says which layers it adapts, on a model on
    the meta device; those that are no nn.Linear are left out, as `lorafuse.patch` leaves them to PEFT. Raises
    FileNotFoundError without a configuration, ValueError for one that transformers cannot build or without such layers,
    ImportError without peft and transformers.
    """
    import peft
    from peft.tuners.lora import Linear as PeftLinear

    base = _model(path)
    experts = sum(_is_experts(module) for module in base.modules())
    config = peft.LoraConfig(target_modules="all-linear")
    # PEFT warns of experts and of Conv1D, which are left out below
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(base, config, low_cpu_mem_usage=True)
    counts: Counter[tuple[int, int]] = Counter()
    names: dict[tuple[int, int], dict[str, None]] = {}
    for name, module in adapted.named_modules():
        if isinstance(module, PeftLinear) and type(module.base_layer) is nn.Linear:
            shape = module.base_layer.out_features, module.base_layer.in_features
            counts[shape] += 1
            names.setdefault(shape, {})[name.rpartition(".")[2]] = None
    if not counts:
        raise ValueError(f"{path}: {type(base).__name__} has no linear layers that PEFT adapts and lorafuse runs")
    return {Case(", ".join(names[shape]), *shape): count for shape, count in counts.items()}, experts


def _model(path: Path) -> nn.Module:
    """The model that a configuration describes, on the meta device."""
    config = load_config(path)
    model = on_meta(config, path)
    if model is None:
        raise ValueError(f"{path}: transformers has no model for {config.model_type!r}")
    return model


def _is_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of experts, stacked as transformers stacks them."""
    down = module._parameters.get("down_proj")
    return down is not None and down.dim() == 3
