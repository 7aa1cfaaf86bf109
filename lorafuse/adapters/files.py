"""PEFT's adapter files: what `AdapterPool.export` writes, and what `AdapterPool.load` reads."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.adapters.experts import PooledExperts
from lorafuse.nn.peft_layout import packed, target_modules, unpacked

__all__ = ["changes_base", "read", "write"]

# a and b of one adapter, as the stacks hold them: rank first
_Factors = tuple[Tensor, Tensor]
_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# settings of PEFT's configuration that change what an adapter computes, and their values that are plain LoRA
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA", "use_dora": False, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None,
    "alpha_pattern": {}, "alora_invocation_tokens": None, "lora_bias": False,
    "use_qalora": False, "use_bdlora": None, "arrow_config": None, "kasa_config": None, "monteclora_config": None,
    "layer_replication": None,
}  # fmt: skip
# initializations that take what the adapter starts with out of the base: PEFT does that again where it loads one
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")


def write(
    folder: Path, factors: Mapping[str, _Factors], experts: Mapping[str, PooledExperts], rank: int, alpha: float,
    dropout: float, model: nn.Module, others: Mapping[str, str],
) -> None:  # fmt: skip
    """The files of an adapter: `factors` are a `[R, K]` and b `[R, N]` by the names of layers, of experts a `[R, E, K]`
    and b `[R, E, N]` by those of their parameters. `others` are further names of some modules, by which they are
    written too, and the first name of each.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    parameters = [name for name in factors if name.rpartition(".")[0] in experts]
    places = {stack: place for place, stack in _places(parameters, experts).items()}
    tensors = {}
    for name, pair in factors.items():
        a, b = pair
        pair = (a, b.t()) if a.dim() == 2 else packed(a.transpose(0, 1), b.permute(1, 2, 0))
        for letter, t in zip("AB", pair, strict=True):
            key = f"{_PREFIX}{places.get(name, name)}.lora_{letter}.weight"
            for one in (key, *(_moved(key, first, other) for other, first in others.items())):
                tensors[one] = t.cpu().clone().contiguous()
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    every = [name for name, _ in model.named_modules(remove_duplicate=False)]
    config = {
        "base_model_name_or_path": getattr(model, "name_or_path", None),
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": alpha, "lora_dropout": dropout, "modules_to_save": None,
        "peft_type": "LORA", "r": rank, "target_modules": target_modules(set(factors) - set(parameters), every),
        "target_parameters": sorted(parameters) or None, "task_type": None, "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _moved(key: str, module: str, other: str) -> str:
    """A tensor's name with another module's name in the place of its own; that of another module stays."""
    prefix = f"{_PREFIX}{module}."
    return f"{_PREFIX}{other}.{key.removeprefix(prefix)}" if key.startswith(prefix) else key


def _places(parameters: Iterable[str], experts: Mapping[str, PooledExperts]) -> dict[str, str]:
    """By the names that PEFT's files have for adapted parameters of experts, those parameters: PEFT wraps a module once
    for each, the first one innermost.
    """
    given, places = set(parameters), {}
    for module, one in experts.items():
        adapted = [name for stack in one.stacks if (name := f"{module}.{stack}") in given]
        for i, name in enumerate(reversed(adapted)):
            places[module + ".base_layer" * i] = name
    return places


def changes_base(init_lora_weights: Any) -> str:
    """Why an adapter that PEFT initialized so does not fit the base of before, as the end of a sentence; or ""."""
    if not isinstance(init_lora_weights, str) or not init_lora_weights.lower().startswith(_RESIDUAL):
        return ""
    return (
        f"was initialized by {init_lora_weights!r}, which changed the base: convert it by PEFT's save_pretrained with "
        "path_initial_model_for_weight_conversion, or set init_lora_weights=True where it is for the changed base"
    )


def read(
    folder: Path, experts: Mapping[str, PooledExperts], others: Mapping[str, str]
) -> tuple[dict[str, _Factors], float, float]:
    """`(factors, scale, dropout)` of an adapter's files, as `write` takes them; scale is alpha / R.

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
    targets = tuple(config.get("target_parameters") or ())
    stacks = [f"{module}.{stack}" for module, one in experts.items() for stack in one.stacks]
    # PEFT matches them at the end of names
    adapted = [name for name in stacks if any(f".{name}".endswith(f".{target}") for target in targets)]
    places = _places(adapted, experts)
    tensors: dict[str, Tensor] = {}
    for key, t in load_file(folder / _WEIGHTS).items():
        first = next((_moved(key, *pair) for pair in others.items() if _moved(key, *pair) != key), key)
        if not torch.equal(tensors.setdefault(first, t), t):
            raise ValueError(f"{folder} has another {key} than {first}, which are of one layer of the pool")
    factors, E = {}, 0
    for key in sorted(tensors):
        name, marker, rest = key.removeprefix(_PREFIX).partition(".lora_A.")
        if marker:
            if rest != "weight":
                raise ValueError(f"{folder} has {key}; of lora_A a pool knows the weight alone")
            other = key.replace(".lora_A.", ".lora_B.")
            if other not in tensors:
                raise ValueError(f"{folder} has {key} without {other}")
            pair, stack = (tensors.pop(key), tensors.pop(other)), places.get(name)
            if stack is None:
                factors[name] = pair[0], pair[1].t()
                continue
            E = next(iter(experts[stack.rpartition(".")[0]].stacks.values())).b.shape[1]
            if pair[0].shape[0] % E or pair[1].shape[1] % E:
                raise ValueError(f"{folder} has {list(pair[0].shape)} for {name}; its first size is {E} experts' ranks")
            a, b = unpacked(*pair, E)
            factors[stack] = a.transpose(0, 1), b.permute(2, 0, 1)
    ranks = {t.shape[0] for pair in factors.values() for t in pair}
    if tensors or len(ranks) != 1:
        raise ValueError(f"{folder} has {sorted(tensors)[:3]} beside LoRA, and ranks {sorted(ranks)}; it needs one")
    rank = ranks.pop()
    if places and not config.get("rank_pattern") and config.get("r", rank) != rank:
        raise ValueError(
            f"{folder} has r={config['r']} and {rank} ranks for each of {E} experts; it is of another number of experts"
        )
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return factors, scale, config.get("lora_dropout", 0.0)
