"""Tiny models whose linear layers a library quantized, with PEFT's adapters, and the same in fp64."""

import copy

import peft
import pytest
import tiny_families
import torch
from torch import nn

__all__ = ["FORMATS", "adapted", "exact", "family", "quantize"]

# how layers are quantized: what a report says of it
FORMATS = {
    "nf4": "NF4, block 64, nested",
    "nf4 plain": "NF4, block 64",
    "fp4": "FP4, block 64, nested",
    "int8": "INT8",
    "torchao int8": "INT8",
    "torchao fp8": "FP8, block 1x128",
    "torchao int4": "INTX, block 1x32",
}
# K of every layer is a multiple of the block: otherwise bitsandbytes 0.50 decodes on CPUs with AVX512 with the scales
# of other blocks
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "word_embed_proj_dim": 64, "ffn_dim": 128, "head_dim": 32,
    "num_attention_heads": 2, "num_key_value_heads": 2, "dropout": 0.0,
}  # fmt: skip


def quantize(model, how="nf4", compute_dtype=None, skip=("lm_head", "embed_out"), storage=torch.uint8):
    """The model with every `nn.Linear` quantized, as loading it would do, except those named in `skip`."""
    if how.startswith("torchao"):
        quantization = pytest.importorskip("torchao.quantization")
        config = {
            "torchao int8": quantization.Int8WeightOnlyConfig,
            "torchao fp8": quantization.Float8WeightOnlyConfig,
            "torchao int4": lambda: quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32)),
        }[how]()

        def chosen(module, name):
            return type(module) is nn.Linear and not name.endswith(skip)

        quantization.quantize_(model, config, filter_fn=chosen)
        return model
    bnb = pytest.importorskip("bitsandbytes")
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or name.endswith(skip):
            continue
        assert layer.in_features % 64 == 0, f"{name} has K = {layer.in_features}"
        sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
        if how == "int8":
            quantized = bnb.nn.Linear8bitLt(*sizes, bias, has_fp16_weights=False)
        else:
            nested = not how.endswith("plain")
            quantized = bnb.nn.Linear4bit(*sizes, bias, compute_dtype, nested, how.split()[0], storage)
        quantized.load_state_dict(layer.state_dict())
        # this quantizes the weight
        quantized = quantized.to("cpu").requires_grad_(False)
        if bias:
            quantized.bias.data = layer.bias.data.clone()
        model.set_submodule(name, quantized)
    # by these PEFT chooses its classes
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = how == "int8", how != "int8"
    return model


def adapted(model, **settings):
    """The model with adapters on all its quantized layers, lora_B not zero, in training mode without dropout."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | settings
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).train()


def family(name, how="nf4", dtype=torch.float32, compute_dtype=None, **settings):
    """An adapted causal language model of a family; its input embeddings are trained too."""
    model_class = tiny_families.model_classes(name)[0]
    config = model_class.config_class
    sizes = {k: v for k, v in SIZES.items() if hasattr(tiny_families.tiny_config(config), k)}
    model = adapted(quantize(tiny_families.tiny_model(model_class, **sizes).to(dtype), how, compute_dtype), **settings)
    model.get_input_embeddings().weight.requires_grad_()
    return model


def exact(model):
    """A copy in fp64 over what the quantized weights decode to, in their library's own words."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        base = getattr(layer, "base_layer", None)
        if base is None:
            continue
        dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, dtype=torch.float64)
        dense.weight.data = _dequantized(base).double()
        if base.bias is not None:
            dense.bias.data = base.bias.data.double()
        layer.base_layer = dense.requires_grad_(False)
    return model.double()


def _dequantized(base):
    if "torchao" in type(base.weight).__module__:
        is_nf4 = hasattr(base.weight, "get_original_weight")
        return base.weight.get_original_weight() if is_nf4 else base.weight.dequantize()
    import bitsandbytes.functional as F

    if hasattr(base, "state"):
        state = base.weight if base.weight.CB is not None else base.state
        return state.CB.double() * state.SCB.double().unsqueeze(1) / 127
    return F.dequantize_4bit(base.weight.data, base.weight.quant_state)
