"""PEFT's adapter files for models with `lorafuse.nn` modules: written for PEFT, vLLM and SGLang, and read.

| module | tensors, after `base_model.model.` |
|---|---|
| `LoRALinear` x | `x.lora_A.weight [r, in]`, `x.lora_B.weight [out, r]` |
| `LoRAExperts` x, first projection | `x.base_layer.lora_A.weight [E·r, H]`, `x.base_layer.lora_B.weight [2I, r·E]` |
| `LoRAExperts` x, down | `x.lora_A.weight [E·r, I]`, `x.lora_B.weight [H, r·E]` |

The factors of experts are packed as `lorafuse.nn.peft_layout` has it.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.errors import MissingDependency
from lorafuse.nn import LoRAExperts, LoRALinear
from lorafuse.nn.peft_layout import packed, target_modules, unpacked

__all__ = ["load_adapter", "save_adapter"]

_PREFIX = "base_model.model."
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingDependency("adapter files need safetensors: pip install safetensors") from error
    return safetensors.torch


def save_adapter(
    model: nn.Module, folder: str | Path, *, base_model: str = "", task_type: str | None = "CAUSAL_LM"
) -> None:
    """Write the adapters of every `LoRALinear` and `LoRAExperts` of a model as PEFT would.

    `PeftModel.from_pretrained(base, folder)` then computes what the model computes. Factors that are shared by all
    experts (`shared_outer`) are written once for each.

    Args:
        model: names of its modules must be those of the base model that loads the files.
        folder: made if it is not there; files in it are replaced.
        base_model: name or path of the base model, which vLLM and SGLang read.
        task_type: PEFT's, such as "CAUSAL_LM"; decides which of its classes loads the files. None is `PeftModel`, for a
            model that is called with tensors alone.

    Raises ValueError, writing nothing, for a model without such modules, and for experts whose rank, alpha or dropout
    PEFT's files cannot hold together with the others'.
    """
    linear = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    experts = {n: m for n, m in model.named_modules() if isinstance(m, LoRAExperts)}
    if not linear and not experts:
        raise ValueError(f"save_adapter got a {type(model).__name__} without lorafuse.nn.LoRALinear or LoRAExperts")
    if "" in linear | experts:
        raise ValueError(f"save_adapter got a {type(model).__name__}, which has no name: pass the model around it")
    # under any scaling scale = alpha / r, so this is the alpha of the plain one
    settings = {name: (m.r, m.scale * m.r) for name, m in (linear | experts).items()}
    r, alpha = Counter(settings[name] for name in experts or linear).most_common(1)[0][0]
    different = [name for name in experts if settings[name] != (r, alpha)]
    if different:
        raise ValueError(
            f"save_adapter: {different[0]} has r={settings[different[0]][0]}, alpha={settings[different[0]][1]:g}, "
            f"other experts r={r}, alpha={alpha:g}; PEFT's files hold one of each for all experts"
        )
    dropouts = {m.dropout for m in linear.values()} | ({0.0} if experts else set())
    if len(dropouts) > 1:
        raise ValueError(f"save_adapter: dropouts {sorted(dropouts)}; PEFT's files hold one (0 with experts)")
    tensors: dict[str, Tensor] = {}
    for name, module in linear.items():
        tensors[f"{name}.lora_A.weight"] = module.lora_A.weight
        tensors[f"{name}.lora_B.weight"] = module.lora_B.weight
    for name, block in experts.items():
        for inner, projection in ((".base_layer", "gate_up"), ("", "down")):
            a, b = getattr(block, f"{projection}_lora_A"), getattr(block, f"{projection}_lora_B")
            a, b = (t if t.dim() == 3 else t.expand(block.num_experts, *t.shape) for t in (a, b))
            for letter, t in zip("AB", packed(a, b), strict=True):
                tensors[f"{name}{inner}.lora_{letter}.weight"] = t
    parameters = {
        f"{name.rpartition('.')[2]}.{parameter}"
        for name, block in experts.items()
        for parameter in ("gate_up_proj" if block.has_gate else "up_proj", "down_proj")
    }
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _number(alpha),
        "lora_dropout": next(iter(dropouts)),
        "target_modules": target_modules(linear, (name for name, _ in model.named_modules(remove_duplicate=False))),
        "target_parameters": sorted(parameters) or None,
        # PEFT matches a pattern at the end of names too, where no ^ is
        "rank_pattern": {f"^{name}": m.r for name, m in linear.items() if m.r != r},
        "alpha_pattern": {f"^{name}": _number(settings[name][1]) for name in linear if settings[name][1] != alpha},
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    contents = {_PREFIX + key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    _safetensors().save_file(contents, str(Path(folder) / _TENSORS), metadata={"format": "pt"})
    (Path(folder) / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Read an adapter that PEFT, or `save_adapter`, wrote into the `LoRALinear` and `LoRAExperts` of a model.

    The scales become the file's too. Raises ValueError, changing nothing, when a tensor is missing, is not known, or
    has another shape, for a merged layer, and for experts with `shared_outer`, which PEFT's files cannot give.
    """
    config = json.loads((Path(folder) / _CONFIG).read_text())
    tensors = {
        key.removeprefix(_PREFIX): tensor
        for key, tensor in _safetensors().load_file(str(Path(folder) / _TENSORS)).items()
    }
    copies: list[tuple[Tensor, Tensor]] = []
    scales: dict[nn.Module, float] = {}

    def take(place: str, a: Tensor, b: Tensor) -> None:
        keys = [f"{place}.lora_{letter}.weight" for letter in "AB"]
        for key in keys:
            if key not in tensors:
                raise ValueError(f"load_adapter: {folder} has no {key}")
        given = [tensors.pop(key) for key in keys]
        if a.dim() == 3 and all(t.dim() == 2 and t.numel() == p.numel() for t, p in zip(given, (a, b), strict=True)):
            given = list(unpacked(given[0], given[1], len(a)))
        for key, tensor, parameter in zip(keys, given, (a, b), strict=True):
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"load_adapter: {key} is {list(tensor.shape)} in the file, {list(parameter.shape)} in the model"
                )
            copies.append((parameter, tensor))

    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            if module.merged:
                raise ValueError(
                    f"load_adapter: {name} is merged, and would unmerge the file's adapter: unmerge it before"
                )
            take(name, module.lora_A.weight, module.lora_B.weight)
        elif isinstance(module, LoRAExperts):
            if module.shared_outer:
                raise ValueError(f"load_adapter: {name} has shared_outer, and PEFT's files hold a factor an expert")
            for inner, projection in ((".base_layer", "gate_up"), ("", "down")):
                take(name + inner, *(getattr(module, f"{projection}_lora_{letter}") for letter in "AB"))
        else:
            continue
        alpha = _by_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
        scales[module] = alpha / (math.sqrt(module.r) if config.get("use_rslora") else module.r)
    if tensors:
        raise ValueError(f"load_adapter: {folder} has {sorted(tensors)[0]} and no module of the model takes it")
    with torch.no_grad():
        for parameter, tensor in copies:
            parameter.copy_(tensor)
    for module, scale in scales.items():
        module.scale = scale  # type: ignore[assignment]
        if isinstance(module, LoRALinear):
            module.alpha = scale * module.r


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that is, or ends, a module's name, as PEFT matches them."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)
