"""What the LoRA loaders of vLLM and SGLang do with an adapter, as rules: names, shapes, what is refused.

Facts read in their sources (2026-11), written anew. vLLM: `lora/utils.py` (names), `lora/worker_manager.py` (packed
modules), `lora/lora_model.py` (files, unexpected modules, the vocabulary), `lora/peft_helper.py`,
the layers in `lora/layers` (buffers of the head and of embeddings). SGLang:
`srt/lora/lora.py` (stacking, w1 to gate_proj, what lies in no layer), `srt/lora/utils.py` (target modules),
`srt/lora/mem_pool.py` (buffers, shared outer factors, embeddings).
"""

import json
import re

import torch
from safetensors.torch import load_file

__all__ = ["sglang", "vllm"]

# the linear layers of Llama and Qwen in both servers, and what vLLM packs in them
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
MODULES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
# what the classes of these models list as `embedding_modules` in vLLM, and what SGLang knows outside of its layers
HEADS = ("embed_tokens", "lm_head")


def _files(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    for key in ("r", "lora_alpha", "target_modules"):
        assert key in config, f"missing configuration field {key}"
    assert not config.get("use_dora"), "DoRA is not supported"
    assert not config.get("modules_to_save"), "only modules_to_save None is supported"
    assert config.get("bias", "none") == "none", "adapter bias is not supported"
    return config, load_file(folder / "adapter_model.safetensors")


def vllm(
    folder, experts=0, projections=("gate_proj", "up_proj", "down_proj"), packed=PACKED, largest=64, heads=HEADS,
    vocabulary=64,
):  # fmt: skip
    """`{module: (A, B times the scale)}` as vLLM holds them; AssertionError or ValueError for what it refuses.

    `heads` are what the model's class lists: a model without any (Gemma) refuses adapters of them.
    """
    packed = dict(packed)
    if experts:
        packed["experts"] = [f"experts.{e}.{p}" for e in range(experts) for p in projections]
    modules = (*MODULES, *heads, "experts") if experts else (*MODULES, *heads)
    expected = {name for module in modules for name in packed.get(module, [module])}
    config, tensors = _files(folder)
    assert config["r"] <= largest, f"rank {config['r']} is above max_lora_rank"
    factors = {}
    for name, t in tensors.items():
        parts = name.split(".")
        of_embedding = parts[-1] in ("lora_embedding_A", "lora_embedding_B")
        if not of_embedding and (parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B")):
            raise ValueError(f"{name} is an unsupported LoRA weight")
        end, factor = (-1, "lora" + parts[-1][-2:]) if of_embedding else (-2, parts[-2])
        module = ".".join(parts[2 if "base_model.model." in name else 0 : end])
        suffix = module[module.find(".experts") + 1 :] if ".experts" in module else module.rpartition(".")[2]
        if suffix not in expected:
            raise ValueError(f"unexpected module {module}")
        # what is copied into a slice of a buffer of the largest rank
        assert t.dim() == 2
        assert t.shape[factor == "lora_B"] <= config["r"]
        if of_embedding and factor == "lora_A" and t.shape[1] != vocabulary:
            raise ValueError(f"{name} is for {t.shape[1]} tokens, the model has {vocabulary}")
        # the head has a buffer of the vocabulary's size, and so has the other side of an embedding
        assert module.rpartition(".")[2] != "lm_head" or factor == "lora_A" or t.shape[0] <= vocabulary
        factors.setdefault(module, {})[factor] = t
    scale = config["lora_alpha"] / config["r"]
    return {module: (pair["lora_A"], pair["lora_B"] * scale) for module, pair in factors.items()}


def _normalized(target_modules):
    known = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    known |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "output": "lm_head", "unembed_tokens": "lm_head"}
    known |= dict.fromkeys(("vocab_emb", "embeddings", "word_embeddings"), "embed_tokens")
    return {known.get(name.split(".")[-1], name.split(".")[-1]) for name in target_modules}


def sglang(folder, shared_outer=False, vocabulary=64):
    """`{layer: {module: (A, B times the scale)}}`, stacked as SGLang's buffers hold them, experts by their number, or
    as stacks, the embedding and the head in a layer None; AssertionError, KeyError or ValueError where it fails,
    ValueError for what it would drop.
    """
    config, tensors = _files(folder)
    targets, rank, layers, heads = _normalized(config["target_modules"]), config["r"], {}, {}
    assert targets <= {*MODULES, *HEADS}
    for given, t in tensors.items():
        name = given.replace("unembed_tokens", "lm_head")
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer is not None:
            layers.setdefault(int(layer[1]), {})[name] = t
            continue
        (module,) = [head for head in HEADS if head in name] or [None]
        if module is None or module not in targets:
            raise ValueError(f"{given} would be dropped: it lies in no layer")
        is_a = "lora_embedding_A" in name or "lora_A" in name
        # rows of A beyond the vocabulary are those of added tokens
        assert t.shape[not is_a] == rank, f"buffer of rank {rank} does not match {name} {list(t.shape)}"
        assert module == "lm_head" or not is_a or t.shape[1] == vocabulary
        heads.setdefault((module, None), {})["lora_A" if is_a else "lora_B"] = t
    buffers = {None: heads} if heads else {}
    for number, weights in layers.items():
        _stack(weights)
        held = buffers[number] = {}
        for name, t in weights.items():
            (module,) = [target for target in targets if target in name] or [None]
            if module is None:
                raise ValueError(f"{name} matches no target module")
            expert, of_expert = re.search(r"experts\.(\d+)\.", name), None
            if expert:
                module, of_expert = f"{module}_moe", int(expert[1])
            elif "experts" in name:
                assert t.dim() == 3
                module, is_a = f"{module}_moe", "lora_A" in name
                if shared_outer and module == ("gate_up_proj_moe" if is_a else "down_proj_moe"):
                    assert (t.shape[0] == 1) == (is_a == module.startswith("gate_up"))
            times = {"qkv_proj": 3, "gate_up_proj": 2}.get(module.removesuffix("_moe"), 1)
            if "lora_A" in name:
                assert t.shape[-2] == rank * times, f"buffer of rank {rank} does not match {name} {list(t.shape)}"
            else:
                assert t.shape[-1] == rank, f"buffer of rank {rank} does not match {name} {list(t.shape)}"
            held.setdefault((module, of_expert), {})["lora_A" if "lora_A" in name else "lora_B"] = t
    scale = config["lora_alpha"] / rank
    return {
        number: {key: (pair["lora_A"], pair["lora_B"] * scale) for key, pair in held.items()}
        for number, held in buffers.items()
    }


def _stack(weights):
    """Stack q, k and v, then gate and up, of one layer in place; KeyError for q without v."""
    has_k = any("k_proj" in name for name in weights)
    for name in [name for name in weights if "q_proj" in name]:
        v = weights.pop(name.replace("q_proj", "v_proj"))
        k = weights.pop(name.replace("q_proj", "k_proj")) if has_k else torch.zeros_like(v)
        weights[name.replace("q_proj", "qkv_proj")] = torch.cat((weights.pop(name), k, v))
    for w, projection in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        for name in [name for name in weights if f".{w}." in name]:
            weights[name.replace(f".{w}.", f".{projection}.")] = weights.pop(name)
    for name in [name for name in weights if "gate_proj" in name]:
        gate = weights.pop(name)
        up = weights.pop(name.replace("gate_proj", "up_proj"), torch.zeros_like(gate))
        weights[name.replace("gate_proj", "gate_up_proj")] = torch.cat((gate, up), gate.dim() - 2)
