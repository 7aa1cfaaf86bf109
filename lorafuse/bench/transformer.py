"""The models that `lorafuse bench model` trains: real, or of real sizes with random weights; their adapters."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorafuse.bench.limits import available_bytes
from lorafuse.bench.transformer_cost import Sizes

__all__ = ["MODELS", "Model", "adapted", "build", "find", "free_bytes", "frozen", "twin"]

# standard deviation of B, transformers' own for weights: with scale 2 and rank 16 the delta of a layer is about a tenth
# of its output, so a missing or wrongly scaled adapter changes the loss
_B_STD = 0.02


@dataclass(frozen=True)
class Model:
    """A configuration class of transformers and its arguments; `real`: SmolLM2 with its own weights."""

    name: str
    config_class: str
    arguments: dict[str, Any]
    real: bool = False

    def config(self, **changes: Any) -> Any:
        """The configuration, with changes."""
        import transformers

        return getattr(transformers, self.config_class)(**self.arguments | changes)


_LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# from the models' published configurations
MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model(
            "smollm2-135m",
            "LlamaConfig",
            {
                "vocab_size": 49152,
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "tie_word_embeddings": True,
            },
            real=True,
        ),
        Model(
            "llama-3.1-8b",
            "LlamaConfig",
            {
                "vocab_size": 128256,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 131072,
                "rope_parameters": _LLAMA_ROPE,
                "tie_word_embeddings": False,
            },
        ),
        Model(
            "qwen3-30b-a3b",
            "Qwen3MoeConfig",
            {
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "norm_topk_prob": True,
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 40960,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
                "tie_word_embeddings": False,
            },
        ),
    )
}


def find(name: str) -> Model:
    """The model of that name. Raises ValueError that lists the known names."""
    if name not in MODELS:
        raise ValueError(f"--case {name}: no such model; the known ones: {', '.join(MODELS)}")
    return MODELS[name]


def free_bytes(device: torch.device) -> int:
    """Free bytes of the device; of a CPU, of the machine and its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes()


def build(model: Model, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """The model without adapters, in training mode, every parameter trained; the same weights for the same seed.

    `sizes` gives layers and vocabulary of one with random weights. Raises MissingDependency without SmolLM2's weights.
    """
    if model.real:
        from lorafuse.demo.model import load

        built, _ = load(None, dtype, device)
        assert Sizes.of(built.config) == sizes, f"{model.name} is {Sizes.of(built.config)}, not {sizes}"
    else:
        from transformers import AutoModelForCausalLM

        config = model.config(num_hidden_layers=sizes.layers, vocab_size=sizes.vocabulary)
        torch.manual_seed(seed)
        with torch.device(device):
            built = AutoModelForCausalLM.from_config(config, dtype=dtype)
    built.config.use_cache = False
    return built.train()


def frozen(base: Any) -> Any:
    """The model without adapters, its weights frozen and shared, as one whose backward reaches the embedded tokens."""
    copied = twin(base.requires_grad_(False))
    copied.enable_input_require_grads()
    return copied


def adapted(base: Any, rank: int, seed: int = 0) -> Any:
    """The model with PEFT's adapters as it ships them, in place: on all linear layers, and on stacked experts.

    alpha is 2 · rank; B is normal of a size that counts, and not zero.
    """
    from peft import LoraConfig, get_peft_model

    targets: dict[str, Any] = {"target_modules": "all-linear"}
    if getattr(base.config, "num_experts", 0):
        # by name, because PEFT expands "all-linear" of such a model as in transformers 4: with the router,
        # and with twice the rank on gate_up_proj
        head = base.get_output_embeddings()
        linear = {n.rpartition(".")[2] for n, m in base.named_modules() if isinstance(m, nn.Linear) and m is not head}
        targets = {
            "target_modules": sorted(linear),
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        }
    config = LoraConfig(r=rank, lora_alpha=2 * rank, **targets)
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    generator = torch.Generator(base.device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=_B_STD, generator=generator)
    return model.train()


def twin(model: Any) -> Any:
    """A copy that shares all frozen parameters and has trainable ones of its own: two variants hold one base."""
    shared = [p for p in model.parameters() if not p.requires_grad]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
