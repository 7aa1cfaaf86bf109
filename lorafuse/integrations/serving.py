"""What the LoRA loaders of vLLM and SGLang do with PEFT's adapter files, checked where an adapter is saved.

Read in their sources: vLLM's `lora/peft_helper.py` and `lora/lora_model.py`, SGLang's `srt/lora/lora.py` and
`srt/lora/mem_pool.py` (2026-11). Nothing here was loaded into a running server. `lorafuse.export` writes adapters
without these problems, where the servers have what they compute.
"""

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["LOADERS", "check_for_serving"]

LOADERS = ("vllm", "sglang")
_REQUIRED = ("r", "lora_alpha", "target_modules")


def check_for_serving(
    adapter: str | Path | nn.Module, loader: str = "vllm", adapter_name: str = "default"
) -> list[str]:
    """What a server's loader would refuse in an adapter, or read wrongly; a sentence each, none when all is well.

    Args:
        adapter: a folder that `save_pretrained` or `lorafuse.integrations.save_adapter` wrote, or a `PeftModel`.
        loader: "vllm" or "sglang".
        adapter_name: which adapter of a `PeftModel`.

    Raises ValueError for another loader, FileNotFoundError for a folder without an adapter's two files.
    """
    if loader not in LOADERS:
        raise ValueError(f"loader={loader!r} is not known; use one of {', '.join(map(repr, LOADERS))}")
    if isinstance(adapter, nn.Module):
        from peft import get_peft_model_state_dict

        config = adapter.peft_config[adapter_name].to_dict()  # type: ignore[index,union-attr]
        shapes = {k: tuple(t.shape) for k, t in get_peft_model_state_dict(adapter, adapter_name=adapter_name).items()}
    else:
        config = json.loads((Path(adapter) / "adapter_config.json").read_text())
        shapes = _shapes(Path(adapter) / "adapter_model.safetensors")
    stacked = _stacked(shapes) if loader == "sglang" else []
    return [*_configuration(config, loader), *_experts(config, shapes, loader), *stacked]


def _configuration(config: dict[str, Any], loader: str) -> Iterable[str]:
    for key in _REQUIRED:
        if config.get(key) is None:
            yield f"{loader} needs {key} in adapter_config.json, which has none"
    if config.get("use_dora"):
        yield f"{loader} has no DoRA: merge the adapter into the model instead"
    if config.get("modules_to_save"):
        yield f"{loader} loads no modules_to_save ({', '.join(config['modules_to_save'])}): merge them into the base"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        yield f"{loader} loads no biases of an adapter"
    # both have one lora_alpha / r for all layers
    patterns = sorted((config.get("rank_pattern") or {}) | (config.get("alpha_pattern") or {}))
    if patterns:
        yield (
            f"{loader} scales every layer by the one lora_alpha / r of adapter_config.json, and so wrongly those with "
            f"others in rank_pattern or alpha_pattern: {', '.join(patterns)}"
        )


def _experts(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], loader: str) -> Iterable[str]:
    if not config.get("target_parameters"):
        return
    modules = {key.rpartition(".lora_")[0] for key in shapes}
    inner = {name.removesuffix(".base_layer") for name in modules if name.endswith(".base_layer")}
    projections = {name.rpartition(".")[2] for name in config["target_parameters"]}
    outer = {name for name in modules if name.endswith(".experts")}
    if len(projections) == 1:
        (projection,) = projections
        yield (
            f"only {projection} of the experts is adapted: PEFT writes it as experts.lora_A whichever it is, and "
            f"{loader} takes that for down_proj (it expects gate_up_proj in experts.base_layer): adapt both"
        )
    elif outer - inner:
        yield f"{sorted(outer - inner)[0]} has one stack of factors, {loader} expects one in experts.base_layer too"
    if loader == "vllm":
        yield (
            "experts are in PEFT's 3-D layout, which vllm does not detect: the model's class must declare it, or the "
            "request (is_3d_lora_weight: true, with enable_mixed_moe_lora_format)"
        )
    else:
        yield (
            "experts are in PEFT's 3-D layout, whose names sglang matches with no module of its own: "
            "lorafuse.export.to_sglang writes them one by one, or as its shared-outer stacks"
        )


def _stacked(shapes: dict[str, tuple[int, ...]]) -> Iterable[str]:
    """What SGLang stacks and an adapter has in part; gate alone it completes itself."""
    modules = {key.rpartition(".lora_")[0] for key in shapes}
    for name in sorted(modules):
        parent, _, last = name.rpartition(".")
        needed = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(last)
        if needed and f"{parent}.{needed}" not in modules and ".experts." not in name:
            yield f"sglang stacks {last} with {needed}, which has no adapter: lorafuse.export.to_sglang writes zeros"
            return


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """`{tensor: shape}` from the header of a safetensors file: its length in 8 bytes, then JSON."""
    with file.open("rb") as content:
        (length,) = struct.unpack("<Q", content.read(8))
        header = json.loads(content.read(length))
    return {key: tuple(value["shape"]) for key, value in header.items() if key != "__metadata__"}
