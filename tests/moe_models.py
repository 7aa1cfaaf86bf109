"""Tiny mixture-of-experts models of transformers with PEFT's `target_parameters` adapters."""

import peft
import tiny_families
import torch
from tiny_families import HIDDEN, VOCABULARY

__all__ = ["FAMILIES", "HIDDEN", "VOCABULARY", "adapted", "base", "targets", "token_ids"]

# name: its settings beside `tiny_families.SIZES`; all other families: tests/integrations/test_every_experts_family.py
_FULL_ATTENTION = {"layer_types": ["full_attention"] * 2}
FAMILIES = {
    "qwen2_moe": {},
    "qwen3_moe": {},
    "mixtral": {},
    "olmoe": {},
    "gpt_oss": _FULL_ATTENTION,
    "deepseek_v3": {},
    "glm4_moe": {},
    "granitemoe": {},
    "phimoe": {},
    "minimax": _FULL_ATTENTION,
    "nemotron_h": {"layers_block_type": ["attention", "moe"]},
}


def targets(name):
    return ["experts.up_proj" if name == "nemotron_h" else "experts.gate_up_proj", "experts.down_proj"]


def base(name, **changes):
    """The causal language model of a family."""
    return tiny_families.tiny_model(tiny_families.model_classes(name)[0], **FAMILIES[name], **changes)


def adapted(name, R=4, parameters=None, dtype=torch.float32, **changes):
    """The model with an adapter on its experts, lora_B not zero."""
    config = peft.LoraConfig(
        r=R, lora_alpha=2 * R, target_modules=[], target_parameters=parameters or targets(name), init_lora_weights=False
    )
    model = peft.get_peft_model(base(name, **changes).to(dtype), config, autocast_adapter_dtype=False)
    return model.train()


def token_ids(rows=3, length=7):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
