"""Tiny models of any family of transformers: its classes by introspection, its sizes by the names of its settings."""

import importlib
import inspect
import re
from pathlib import Path

import torch
import transformers

VOCABULARY, HIDDEN, TOKENS = 64, 16, 7
# A model above this has a size that no table below names.
MAX_PARAMETERS = 5_000_000

# Families name these alike, in the configurations of all their parts.
SIZES = {
    # tokens
    "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0,
    "max_position_embeddings": 32, "max_source_positions": 16, "use_cache": False,
    # the model
    "hidden_size": HIDDEN, "d_model": HIDDEN, "dim": HIDDEN, "embedding_size": HIDDEN, "word_embed_proj_dim": HIDDEN,
    "intermediate_size": 24, "ffn_hidden_size": 24, "hidden_dim": 24, "ffn_dim": 24, "d_ff": 24,
    "decoder_ffn_dim": 24, "encoder_ffn_dim": 24,
    "num_hidden_layers": 2, "num_layers": 2, "n_layers": 2, "depth": 2, "num_decoder_layers": 2,
    "encoder_layers": 2, "decoder_layers": 2,
    # attention
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_heads": 2, "n_heads": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2,
    "head_dim": 8, "d_kv": 8, "kv_channels": 8, "swa_head_dim": 8, "sliding_window": 4,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4,
    # linear attention and state-space layers
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_head_dim": 8, "linear_num_heads": 2, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_num_heads": 2,
    "mamba_head_dim": 8, "mamba_d_state": 8, "ssm_state_size": 8, "n_groups": 1,
    # experts in every layer
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "moe_top_k": 2, "top_k_experts": 2,
    "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "shared_intermediate_size": 8,
    "n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 0, "num_dense_layers": 0,
    "decoder_sparse_step": 1, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["sparse", "sparse"],
    # images and sounds
    "image_size": 16, "patch_size": 8, "num_mel_bins": 8, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip

_WAVE = {"conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# what `SIZES` cannot know, by configuration class
SETTINGS = {
    "ASTConfig": {"max_length": 16, "frequency_stride": 4, "time_stride": 4},
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "DeepseekV4Config": {"mlp_layer_types": ["moe", "hash_moe"]},
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [8, 8],
        "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]},
    },
    "FlintConfig": {"mlp_only_layers": []},
    # since transformers 5.24
    "HYV4VLTextConfig": {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}},
    "Gemma4TextConfig": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    },
    "Glm4vMoeTextConfig": {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 0]}},
    "Glm5NextTextConfig": {"index_kpool": 2, "qk_rope_head_dim": 0},
    "HubertConfig": _WAVE,
    "Lfm2MoeConfig": {"layer_types": ["full_attention", "conv"]},
    "LongcatFlashConfig": {"expert_ffn_hidden_size": 8, "zero_expert_num": 2},
    "MiMoV2FlashConfig": {"num_key_value_heads": 1},
    "Qwen3NextConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "SwinConfig": {"num_heads": [2, 2], "depths": [1, 1], "embed_dim": HIDDEN, "window_size": 2, "patch_size": 4},
    "SwitchTransformersConfig": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "Wav2Vec2Config": _WAVE,
    "WavLMConfig": _WAVE,
    "ZayaConfig": {"num_experts_per_tok": 1},
}


def _module(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def families_with_experts():
    """Every family of the installed transformers whose file defines experts, dispatched by transformers or not."""
    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    defines = re.compile(r"^(@use_experts_implementation|class \w*Experts\()", re.MULTILINE)
    return sorted({file.parent.name for file in files if defines.search(file.read_text())})


def model_classes(family):
    """The models of a family, language models first, then those for text alone."""
    module = _module(family)
    ends = "ForCausalLM", "ForTokenClassification", "TextModel", "ForConditionalGeneration", "Model"
    classes = [one for one in vars(module).values() if inspect.isclass(one) and one.__module__ == module.__name__]
    models = [one for one in classes if issubclass(one, transformers.PreTrainedModel) and one.config_class]
    models = [one for one in models if not one.__name__.endswith("PreTrainedModel")]
    return [one for end in ends for one in models if one.__name__.endswith(end)]


def tiny_config(config_class, **settings):
    """An instance of a configuration class, of the sizes above in all its parts."""
    parameters = inspect.signature(config_class.__init__).parameters
    known = {k: v for k, v in SIZES.items() if k in parameters} | SETTINGS.get(config_class.__name__, {}) | settings
    for name, part in config_class.sub_configs.items():
        if isinstance(part, type) and issubclass(part, transformers.PreTrainedConfig):
            known.setdefault(name, tiny_config(part))
    return config_class(**known)


def tiny_model(model_class, **settings):
    """An untrained model in evaluation mode, no number of which is 0 or 1 by its initialization."""
    torch.manual_seed(0)
    model = model_class(tiny_config(model_class.config_class, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def skeleton(model_class):
    """The same model on the meta device: what it holds, at no cost."""
    with torch.device("meta"):
        return model_class(tiny_config(model_class.config_class))


def inputs_of(model):
    """What the model takes: token ids, an image or a sound, the same every time."""
    generator = torch.Generator().manual_seed(1)
    config, name = model.config, model.main_input_name
    ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=generator)
    samples = hasattr(config, "conv_dim")
    sizes = {
        "pixel_values": lambda: (2, config.num_channels, config.image_size, config.image_size),
        "input_features": lambda: (2, config.num_mel_bins, 2 * config.max_source_positions),
        "input_values": lambda: (2, 64) if samples else (2, config.max_length, config.num_mel_bins),
    }
    inputs = {name: torch.randn(sizes[name](), generator=generator) if name in sizes else ids}
    return inputs | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


def step(model):
    """`{name: tensor}` of one step: outputs, the loss of a causal language model, and every gradient by its name."""
    model.zero_grad()
    base = model.get_base_model()
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs_of(base).items()}
    if type(base).__name__.endswith("ForCausalLM"):
        inputs["labels"] = inputs["input_ids"]
    given = model(**inputs)
    names = [name for name in ("logits", "last_hidden_state", "pooler_output", "loss") if given.get(name) is not None]
    generator = torch.Generator().manual_seed(2)
    weights = {name: torch.randn(given[name].shape, generator=generator).to(given[name].dtype) for name in names}
    sum((given[name] * weights[name]).sum() for name in names).backward()
    gradients = {f"d {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {name: given[name].detach() for name in names} | gradients
