"""Layers that several baselines run, with a problem's numbers: the base alone, and PEFT's adapters on it.

All variants share one base weight.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorafuse.bench.problem import SCALE, numbered

if TYPE_CHECKING:
    from lorafuse.bench.linear import Inputs
    from lorafuse.bench.moe import ExpertsInputs
    from lorafuse.bench.multi import MultiInputs

__all__ = ["peft_experts", "peft_linear", "peft_multi", "plain_experts", "plain_linear"]


def plain_linear(given: "Inputs | MultiInputs", trainable: bool = False) -> nn.Linear:
    """`nn.Linear` that holds `given.w`."""
    layer = nn.Linear(given.w.shape[1], given.w.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(given.w, requires_grad=trainable)
    return layer


def peft_linear(
    given: "Inputs", autocast_adapter_dtype: bool = True, quantized: nn.Module | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's `lora.Linear` and its two factors: in fp32 as shipped, or in the base's dtype; over `quantized`, a layer
    in 4 or 8 bits, where given.
    """
    from peft import LoraConfig, get_peft_model

    rank = given.a.shape[0]
    config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=["0"])
    whole = nn.Sequential(quantized or plain_linear(given))
    # PEFT goes by them
    whole.is_loaded_in_4bit = type(quantized).__name__ == "Linear4bit"  # type: ignore[assignment]
    whole.is_loaded_in_8bit = type(quantized).__name__ == "Linear8bitLt"  # type: ignore[assignment]
    model = get_peft_model(whole, config, autocast_adapter_dtype=autocast_adapter_dtype)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if not autocast_adapter_dtype:
        a.data, b.data = a.data.to(given.w.dtype), b.data.to(given.w.dtype)
    with torch.no_grad():
        a.copy_(given.a)
        b.copy_(given.b)
    return layer, {"da": a, "db": b}


def peft_multi(given: "MultiInputs") -> tuple[Callable[[Tensor], Tensor], dict[str, Tensor]]:
    """PEFT's mixed batch: `lora.Linear` with every adapter, called with a name for each row, and their factors."""
    from peft import LoraConfig, get_peft_model

    model: Any = nn.Sequential(plain_linear(given))
    trained: list[dict[str, Tensor]] = []
    for i, rank in enumerate(given.ranks):
        config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=["0"])
        if i == 0:
            model = get_peft_model(model, config, "0")
        else:
            model.add_adapter(str(i), config)
    layer = model.base_model.model[0]
    names = [str(i) for i in range(len(given.ranks)) for _ in range(given.rows)]
    with torch.no_grad():
        for i, (own_a, own_b) in enumerate(zip(given.a, given.b, strict=True)):
            a, b = layer.lora_A[str(i)].weight, layer.lora_B[str(i)].weight
            a.requires_grad_().copy_(own_a)
            b.requires_grad_().copy_(own_b)
            trained.append({"da": a, "db": b})
    return lambda x: layer(x, adapter_names=names), numbered(trained)


def plain_experts(given: "ExpertsInputs", trainable: bool = False) -> nn.Module:
    """transformers' Qwen3-MoE experts with the problem's stacks, run by its "grouped_mm"."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    E, twice, H = given.gate_up.shape
    config = Qwen3MoeConfig(num_experts=E, hidden_size=H, moe_intermediate_size=twice // 2)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = nn.Parameter(given.gate_up, requires_grad=trainable)
    experts.down_proj = nn.Parameter(given.down, requires_grad=trainable)
    return experts


def peft_experts(given: "ExpertsInputs", autocast_adapter_dtype: bool = True) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's nested `target_parameters` wrappers on the experts, and their factors in PEFT's packing."""
    from peft import LoraConfig, get_peft_model

    rank = given.gate_up_a.shape[1]
    config = LoraConfig(
        r=rank,
        lora_alpha=int(SCALE * rank),
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    block = nn.ModuleDict({"experts": plain_experts(given)})
    model = get_peft_model(block, config, autocast_adapter_dtype=autocast_adapter_dtype)
    outer = model.base_model.model["experts"]
    trained: dict[str, Tensor] = {}
    with torch.no_grad():
        for wrapper, name in ((outer, "down"), (outer.base_layer, "gate_up")):
            a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
            if not autocast_adapter_dtype:
                a.data, b.data = a.data.to(given.x.dtype), b.data.to(given.x.dtype)
            # PEFT packs lora_A expert-slowest and lora_B expert-fastest
            a.copy_(getattr(given, f"{name}_a").flatten(0, 1))
            b.copy_(getattr(given, f"{name}_b").permute(1, 2, 0).flatten(1))
            trained |= {f"d_{name}_a": a, f"d_{name}_b": b}
    return outer, trained
