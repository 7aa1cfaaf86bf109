"""Tiny mixture-of-experts models of transformers with PEFT's `target_parameters` adapters."""

import peft
import torch
import transformers as tf

HIDDEN, VOCABULARY = 16, 64
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_QWEN = _COMMON | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
_DEEPSEEK = _COMMON | {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_LOCAL = _COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2}

# name: (model, configuration, its arguments)
FAMILIES = {
    "qwen2_moe": (tf.Qwen2MoeForCausalLM, tf.Qwen2MoeConfig, _QWEN | {"shared_expert_intermediate_size": 8}),
    "qwen3_moe": (tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig, _QWEN),
    "mixtral": (tf.MixtralForCausalLM, tf.MixtralConfig, _LOCAL),
    "olmoe": (tf.OlmoeForCausalLM, tf.OlmoeConfig, _COMMON | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (tf.GptOssForCausalLM, tf.GptOssConfig, _LOCAL | {"layer_types": ["full_attention"] * 2}),
    "deepseek_v3": (tf.DeepseekV3ForCausalLM, tf.DeepseekV3Config, _DEEPSEEK | _LATENT),
    "glm4_moe": (tf.Glm4MoeForCausalLM, tf.Glm4MoeConfig, _DEEPSEEK),
    "granitemoe": (tf.GraniteMoeForCausalLM, tf.GraniteMoeConfig, _LOCAL),
    "phimoe": (tf.PhimoeForCausalLM, tf.PhimoeConfig, _LOCAL),
    "minimax": (tf.MiniMaxForCausalLM, tf.MiniMaxConfig, _LOCAL | {"layer_types": ["full_attention"] * 2}),
    "nemotron_h": (
        tf.NemotronHForCausalLM,
        tf.NemotronHConfig,
        _DEEPSEEK | {"layers_block_type": ["attention", "moe"], "moe_shared_expert_intermediate_size": 8},
    ),
}


def targets(name):
    return ["experts.up_proj" if name == "nemotron_h" else "experts.gate_up_proj", "experts.down_proj"]


def base(name, **changes):
    """An untrained model of a family; every number its initialization sets to 0 or 1 is moved away from it."""
    model, config, arguments = FAMILIES[name]
    torch.manual_seed(0)
    arguments = {k: v for k, v in (arguments | changes).items() if k != "num_hidden_layers" or name != "nemotron_h"}
    built = model(config(**arguments)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def adapted(name, R=4, parameters=None, dtype=torch.float32, **changes):
    """The model with an adapter on its experts, lora_B not zero."""
    config = peft.LoraConfig(
        r=R, lora_alpha=2 * R, target_modules=[], target_parameters=parameters or targets(name), init_lora_weights=False
    )
    model = peft.get_peft_model(base(name, **changes).to(dtype), config, autocast_adapter_dtype=False)
    return model.train()


def token_ids(rows=3, length=7):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
