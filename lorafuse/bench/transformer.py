"""The models that `lorafuse bench model` trains: real, or of real sizes with random weights; their adapters."""

import copy
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorafuse.bench.limits import available_bytes
from lorafuse.bench.transformer_cost import Sizes

__all__ = [
    "MODELS", "Given", "Model", "Texts", "adapted", "build", "find", "free_bytes", "frozen", "set_adapters", "twin",
]  # fmt: skip

# standard deviation of B, transformers' own for weights: with scale 2 and rank 16 the delta of a layer is about a tenth
# of its output, so a missing or wrongly scaled adapter changes the loss
_B_STD = 0.02
# blocks of tokens that no variant is trained on
_HELD_OUT = 4


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


class Given:
    """What the `model` function of a baseline builds from: one frozen base, whose weights all but full share.

    `alone`: nothing else is built from the base, so that full fine-tuning may train it in place. `quant`: its linear
    layers are stored as that one of `lorafuse.demo.quantized.TYPES`.
    """

    def __init__(
        self, model: Model, sizes: Sizes, dtype: torch.dtype, device: torch.device, rank: int, sequence: int,
        checkpointing: bool, alone: bool = False, quant: str | None = None,
    ) -> None:  # fmt: skip
        self.dtype, self.device, self.rank, self.sequence = dtype, device, rank, sequence
        self.checkpointing, self.alone = checkpointing, alone
        self.base = build(model, sizes, dtype, device).requires_grad_(False)
        self.parameters = sum(p.numel() for p in self.base.parameters())
        if quant is not None:
            from lorafuse.demo.model import quantize

            quantize(self.base, quant)
        self.has_experts = bool(sizes.E)
        if checkpointing:
            # non-reentrant: inputs need no gradient for it
            self.base.gradient_checkpointing_enable({"use_reentrant": False})

    def frozen(self) -> Any:
        """The model without adapters, whose backward reaches the embedded tokens."""
        return frozen(self.base)

    def trainable(self) -> Any:
        """The model with every parameter trained."""
        return (self.base if self.alone else copy.deepcopy(self.base)).requires_grad_(True)

    def adapted(self, half: bool = False) -> Any:
        """The model with PEFT's adapters: in fp32 as shipped, or in the base's dtype."""
        return adapted(twin(self.base), self.rank, half=half)

    def save(self, folder: str) -> None:
        """The base as a directory for loaders of others, with SmolLM2's tokenizer, which they expect there."""
        from lorafuse.demo.model import load_tokenizer

        self.base.save_pretrained(folder)
        load_tokenizer(None).save_pretrained(folder)

    @property
    def targets(self) -> list[str]:
        """Names of the linear layers that get adapters."""
        return _linear_names(self.base)


def frozen(base: Any) -> Any:
    """The model without adapters, its weights frozen and shared, as one whose backward reaches the embedded tokens."""
    copied = twin(base.requires_grad_(False))
    copied.enable_input_require_grads()
    return copied


def adapted(base: Any, rank: int, seed: int = 0, half: bool = False) -> Any:
    """The model with PEFT's adapters, in place: on all linear layers, and on stacked experts; alpha is 2 · rank.

    As PEFT ships them in fp32, or with `autocast_adapter_dtype=False` in the base's dtype (`half`).
    """
    from peft import LoraConfig, get_peft_model

    targets: dict[str, Any] = {"target_modules": "all-linear"}
    if getattr(base.config, "num_experts", 0):
        # by name, because PEFT expands "all-linear" of such a model as in transformers 4: with the router,
        # and with twice the rank on gate_up_proj
        targets = {
            "target_modules": _linear_names(base),
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        }
    config = LoraConfig(r=rank, lora_alpha=2 * rank, **targets)
    model = get_peft_model(base, config, autocast_adapter_dtype=not half)
    if half:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(base.dtype)
    set_adapters(model, seed)
    return model.train()


def set_adapters(model: Any, seed: int = 0, b_std: float = _B_STD) -> None:
    """Values of all adapters: A uniform in ±1/sqrt(in) like PEFT's, B normal; the same in every process.

    `b_std` 0 is how training begins; the default is a size that counts, since a zero B hides the adapter.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                continue
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.partition("layers.")[2].encode()))
            value = torch.empty(parameter.shape)
            if "lora_A" in name:
                value.uniform_(-(parameter.shape[-1] ** -0.5), parameter.shape[-1] ** -0.5, generator=generator)
            else:
                value.normal_(std=b_std, generator=generator)
            parameter.copy_(value)


def _linear_names(base: Any) -> list[str]:
    head = base.get_output_embeddings()
    return sorted({n.rpartition(".")[2] for n, m in base.named_modules() if isinstance(m, nn.Linear) and m is not head})


def twin(model: Any) -> Any:
    """A copy that shares all frozen parameters and has trainable ones of its own: two variants hold one base."""
    shared = [p for p in model.parameters() if not p.requires_grad]
    # bitsandbytes' int8 layers hold their weight in a state as well
    states = [module.state for module in model.modules() if type(module).__name__ == "Linear8bitLt"]
    shared += [tensor for state in states for tensor in (state.CB, state.SCB)]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


class Texts:
    """Token ids of word problems (reasoning-gym's gsm_symbolic) for a real model: of each step, and held out."""

    def __init__(self, steps: int, size: tuple[int, int, int], device: torch.device) -> None:
        from lorafuse.demo.data import blocks, generate
        from lorafuse.demo.model import load_tokenizer

        tokenizer = load_tokenizer(None)
        accumulate, batch, tokens = size
        count = steps * accumulate * batch
        # a problem has about 150 tokens; those of the held-out blocks come first, and are not trained on
        held = generate(-(-_HELD_OUT * tokens // 100), seed=1)
        self.held_out = blocks(tokenizer, held, _HELD_OUT, tokens).to(device)
        examples = generate(-(-count * tokens // 100), seed=0)
        self._ids = blocks(tokenizer, examples, count, tokens).view(steps, *size).to(device)

    def __call__(self, step: int) -> torch.Tensor:
        """`[accumulate, batch, tokens]` of a step, beginning anew after the last one."""
        return self._ids[step % len(self._ids)]
