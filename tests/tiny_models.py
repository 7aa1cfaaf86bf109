"""Tiny transformers models with adapters, and how a patched one is compared with what PEFT ships."""

import contextlib
import copy
from unittest import mock

import peft
import pytest
import torch
import transformers
from torch import nn

import lorafuse
from lorafuse.integrations import gated_mlp, groups, hf_peft
from lorafuse.testing.numerics import relative_l2, tolerance

_VOCABULARY, _HIDDEN, _TOKENS = 64, 32, 7
_DECODER = {
    "vocab_size": _VOCABULARY,
    "hidden_size": _HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# No dropout of their own, so that training mode differs from evaluation by the adapters' dropout only.
FAMILIES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, _DECODER),
    "llama with biases": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        {**_DECODER, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, _DECODER),
    "gemma3": (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig,
        {**_DECODER, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, {**_DECODER, "sliding_window": 4}),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        {
            "vocab_size": _VOCABULARY,
            "n_embd": _HIDDEN,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bert": (
        transformers.BertForMaskedLM,
        transformers.BertConfig,
        {
            "vocab_size": _VOCABULARY,
            "hidden_size": _HIDDEN,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
    "t5": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config,
        {
            "vocab_size": _VOCABULARY,
            "d_model": _HIDDEN,
            "d_kv": 8,
            "d_ff": 40,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
        },
    ),
}


def tiny(family="llama", dtype=torch.float32):
    """A model of the family in evaluation mode; the same weights every time."""
    model_class, config_class, settings = FAMILIES[family]
    torch.manual_seed(11)
    model = model_class(config_class(**settings)).eval()
    with torch.no_grad():
        # weights of a trained size, so that base and delta both count
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or name.endswith("bias"):
                parameter.normal_(std=0.7 / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else 0.4)
    return model.to(dtype)


def lora_config(**settings):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | settings)


def train_away_from_zero(model, names="lora_", size=0.7):
    """Give every adapter parameter a value as after training: B is never zero, the delta is as large as the base."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if names in name:
                parameter.normal_(std=size / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.5)
    return model


def adapted(family="llama", dtype=torch.float32, size=0.7, **settings):
    """A PEFT model of the family, adapter "default"; settings go to `LoraConfig`."""
    return train_away_from_zero(peft.get_peft_model(tiny(family, dtype), lora_config(**settings)).eval(), size=size)


def adapted_twice(family="llama", **settings):
    """The same with a second adapter, "other", of another rank, scale and set of targets; "default" is active."""
    model = adapted(family, **settings)
    model.add_adapter("other", lora_config(**{"r": 3, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"]}))
    return train_away_from_zero(model.eval(), "other")


def patched_copy(model, **options):
    """A patched copy of the model, and the report."""
    twin = copy.deepcopy(model)
    return twin, lorafuse.patch(twin, **options)


def reason_to_patch_nothing(model):
    """The one reason for which every layer of a model is left to PEFT."""
    with pytest.warns(UserWarning, match="patched nothing"):
        report = lorafuse.patch(model)
    (reason,) = {skipped.reason for skipped in report.skipped}
    return reason


def inputs_of(model, batch=2, dtype=None):
    """Keyword arguments of a forward pass: embeddings, so that there is an input gradient."""
    generator = torch.Generator().manual_seed(5)
    config = model.config if hasattr(model, "config") else model
    dtype = dtype or next(p for n, p in model.named_parameters() if "lora_" not in n).dtype
    size = (batch, _TOKENS, _HIDDEN)
    inputs = {"inputs_embeds": torch.randn(size, generator=generator).to(dtype)}
    if config.is_encoder_decoder:
        inputs["decoder_inputs_embeds"] = torch.randn(size, generator=generator).to(dtype)
    return inputs


def token_ids(batch=2, tokens=_TOKENS, seed=5):
    return torch.randint(3, _VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def run(model, inputs=None, seed=1):
    """`{name: tensor}` of one step: the logits, the gradient of each float input and of each trainable parameter."""
    inputs = inputs_of(model) if inputs is None else inputs
    inputs = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    logits = model(**inputs).logits
    dy = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits.double() * dy).sum().backward()
    results = {"logits": logits.detach()}
    results |= {f"d {k}": v.grad for k, v in inputs.items() if v.is_floating_point()}
    return results | {f"d {name}": p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_close(actual, expected, bound=None):
    """Every tensor of `run` within relative L2 1e-5, and none of them zero or missing."""
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        assert reference is not None, f"{name} has no gradient"
        assert reference.any(), f"{name} is zero: the comparison would say nothing"
        assert actual[name] is not None, f"{name} has no gradient when patched"
        assert actual[name].dtype is reference.dtype, f"{name} is {actual[name].dtype}, PEFT gives {reference.dtype}"
        error = relative_l2(actual[name], reference)
        assert error <= (tolerance(torch.float32) if bound is None else bound), f"{name}: error {error:.2e}"


def assert_same_model(patched, stock, inputs=None):
    """One step of each gives the same output and gradients."""
    assert_close(run(patched, inputs), run(stock, inputs))


@contextlib.contextmanager
def counting_fused():
    """A mock that counts the layers that ran fused inside the block."""
    with mock.patch.object(hf_peft, "run_linear", wraps=hf_peft.run_linear) as calls:
        yield calls


@contextlib.contextmanager
def counting_groups():
    """A mock that counts the siblings that ran as one operator inside the block, where x may be small."""
    with (
        mock.patch.object(groups, "SMALL", 0),
        mock.patch.object(groups, "run_linears", wraps=groups.run_linears) as calls,
    ):
        yield calls


@contextlib.contextmanager
def counting_mlps():
    """A mock that counts the gated MLPs that ran as one operator inside the block, where x may be small."""
    with (
        mock.patch.object(groups, "SMALL", 0),
        mock.patch.object(gated_mlp, "run_gated_mlp", wraps=gated_mlp.run_gated_mlp) as calls,
    ):
        yield calls


class Mlp(nn.Module):
    """Layers of other kinds around two linear ones, for targets that the language models do not have."""

    def __init__(self, linear=nn.Linear):
        super().__init__()
        self.embedding = nn.Embedding(16, 20)
        self.convolution = nn.Conv2d(1, 1, 3, padding=1)
        self.sequence = nn.Conv1d(20, 20, 1)
        self.first = linear(20, 24)
        self.second = nn.Linear(24, 12, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + self.convolution(x[:, None])[:, 0]
        x = x + self.sequence(x.transpose(1, 2)).transpose(1, 2)
        return self.second(torch.tanh(self.first(x)))
