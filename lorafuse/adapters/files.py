"""PEFT's adapter files: what `AdapterPool.export` writes, and what `AdapterPool.load` reads."""

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["changes_base", "read", "write"]

_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# settings of PEFT's configuration that change what an adapter computes, and their values that are plain LoRA
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA", "use_dora": False, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None,
    "alpha_pattern": {}, "target_parameters": None, "alora_invocation_tokens": None, "lora_bias": False,
    "use_qalora": False, "use_bdlora": None, "arrow_config": None, "kasa_config": None, "monteclora_config": None,
    "layer_replication": None,
}  # fmt: skip
# initializations that take what the adapter starts with out of the base: PEFT does that again where it loads one
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")


def write(
    folder: Path, factors: dict[str, tuple[Tensor, Tensor]], rank: int, alpha: float, dropout: float, base: str | None
) -> None:
    """The files of an adapter: `factors` are a `[R, K]` and b `[N, R]` by the names of the layers."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (a, b) in factors.items():
        for letter, t in (("A", a), ("B", b)):
            tensors[f"{_PREFIX}{name}.lora_{letter}.weight"] = t.detach().cpu().clone().contiguous()
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": alpha, "lora_dropout": dropout, "modules_to_save": None,
        "peft_type": "LORA", "r": rank, "target_modules": sorted(factors), "task_type": None, "use_dora": False,
        "use_rslora": False,
    }  # fmt: skip
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def changes_base(init_lora_weights: Any) -> str:
    """Why an adapter that PEFT initialized so does not fit the base of before, as the end of a sentence; or ""."""
    if not isinstance(init_lora_weights, str) or not init_lora_weights.lower().startswith(_RESIDUAL):
        return ""
    return (
        f"was initialized by {init_lora_weights!r}, which changed the base: convert it by PEFT's save_pretrained with "
        "path_initial_model_for_weight_conversion, or set init_lora_weights=True where it is for the changed base"
    )


def read(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], float, float]:
    """`(factors, scale, dropout)` of an adapter's files, as `write` takes factors; scale is alpha / R.

    Raises ValueError for an adapter that is no plain LoRA of one rank over the base as it is, with what it is.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / _CONFIG).read_text())
    for key, plain in _PLAIN.items():
        value = config.get(key, plain)
        if value != plain and not (value in (None, [], {}) and plain in (None, [], {})):
            raise ValueError(f"{folder} has {key}={value!r}; a pool holds plain LoRA adapters, {key}={plain!r}")
    if reason := changes_base(config.get("init_lora_weights")):
        raise ValueError(f"{folder} {reason}")
    tensors, factors = load_file(folder / _WEIGHTS), {}
    for key in sorted(tensors):
        name, marker, rest = key.removeprefix(_PREFIX).partition(".lora_A.")
        if marker:
            if rest != "weight":
                raise ValueError(f"{folder} has {key}; of lora_A a pool knows the weight alone")
            other = key.replace(".lora_A.", ".lora_B.")
            if other not in tensors:
                raise ValueError(f"{folder} has {key} without {other}")
            factors[name] = tensors.pop(key), tensors.pop(other)
    ranks = {a.shape[0] for a, _ in factors.values()}
    if tensors or len(ranks) != 1:
        raise ValueError(f"{folder} has {sorted(tensors)[:3]} beside LoRA, and ranks {sorted(ranks)}; it needs one")
    rank = ranks.pop()
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return factors, scale, config.get("lora_dropout", 0.0)
