"""What training costs (T1): memory and step time against a measured run and autograd's own hooks, and what fits."""

import json
import math
import tempfile
import warnings
import weakref
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
import transformers
from advised import configured
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lorafuse
from lorafuse import advise
from lorafuse.plan import DEVICES, find

LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
RESULTS = Path(__file__).parents[2] / "bench" / "results"
# ways of the run, and of the model; memory within 2%, a step within 10%
MEMORY, STEP = 0.02, 0.10
VARIANTS = {"full": ("full", "full fine-tuning"), "lorafuse": ("lora", "lorafuse")}
# passes over the parameters of AdamW without fused=True, with which the run was made
FOREACH = 18


def on_meta(config):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def shapes():
    return advise.shapes_of(on_meta(transformers.LlamaConfig(**LLAMA)))


@pytest.fixture(scope="module")
def measured():
    (result,) = json.loads((RESULTS / "h200-2026-11-26-model.json").read_text())["results"]
    assert (result["layers"], result["tokens"], result["accumulate"], result["R"]) == (8, 4096, 1, 16)
    return result["variants"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_is_what_an_h200_took(variant, shapes, measured):
    # the run's layers ran one by one
    given = {"checkpointing": False, "accumulates": False, "groups": False}
    modelled = advise.memory(shapes, VARIANTS[variant][0], 16, 4096, **given).total
    elapsed = measured[variant]["peak_bytes"]
    assert modelled == pytest.approx(elapsed, rel=MEMORY), f"{modelled / 2**20:.0f} MiB against {elapsed / 2**20:.0f}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_what_an_h200_took(variant, shapes, measured):
    name = VARIANTS[variant][1]
    modelled = advise.micro_step_seconds(shapes, 16, 4096, 4096, find("H200"))[name]
    modelled += advise.update_seconds(shapes, name, 16, find("H200"), passes=FOREACH)
    elapsed = measured[variant]["step"]["median"]
    assert modelled == pytest.approx(elapsed, rel=STEP), f"{modelled * 1e3:.1f} ms against {elapsed * 1e3:.1f}"


SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "use_cache": False,
}
EXPERTS = {"moe_intermediate_size": 96, "num_experts": 16, "num_experts_per_tok": 4, "head_dim": 32}
CONFIGS = {
    "llama": transformers.LlamaConfig(intermediate_size=896, **SMALL),
    "qwen3": transformers.Qwen3Config(intermediate_size=896, head_dim=32, **SMALL),
    "phi3": transformers.Phi3Config(intermediate_size=896, pad_token_id=0, **SMALL),
    "qwen3_moe": transformers.Qwen3MoeConfig(**EXPERTS, **SMALL),
}
# softmax in fp32, with sinks in bf16, with capped scores
EAGER = {
    "llama": CONFIGS["llama"],
    "gpt_oss": transformers.GptOssConfig(
        intermediate_size=96, num_local_experts=16, num_experts_per_tok=4, head_dim=32, **SMALL
    ),
    "gemma2": transformers.Gemma2Config(intermediate_size=896, head_dim=32, **SMALL),
}


@pytest.mark.no_poison
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", CONFIGS)
def test_activations_are_what_autograd_saves(family, method):
    tokens, rank = 256, 8
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.bfloat16)
    shapes = advise.shapes_of(model)
    assert shapes.scores.heads == 0
    if method == "lora":
        with warnings.catch_warnings():
            # of PEFT, about ranks of experts, which it applies all the same
            warnings.simplefilter("ignore")
            config, _ = configured(advise.plan_adapter(model, tokens=1000, rank=rank).snippet)
            model = peft.get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        assert not lorafuse.patch(model).skipped
    saved = saved_bytes(model, torch.randint(2000, (1, tokens)))
    modelled = advise.memory(shapes, method, rank, tokens, checkpointing=False)
    # one of three copies of the logits is there after forward: log-probabilities
    assert modelled.activations + modelled.logits / 3 == pytest.approx(saved, rel=0.1)


def saved_bytes(model, ids):
    """Bytes of all storages that autograd saves in forward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    actual = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # kept, so that its address is not another's later on
            actual[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(input_ids=ids, labels=ids)
    assert output.loss.requires_grad
    return sum(storage.nbytes() for storage in actual.values())


def eager(family, heads=8):
    config = EAGER[family].to_dict() | {"num_attention_heads": heads}
    config = type(EAGER[family])(**config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    shapes = advise.shapes_of(model)
    assert shapes.scores.heads == 2 * heads
    model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    return model, shapes


def growth(of, step=128):
    """The coefficient of the square of the length, by differences of what `of` counts of three lengths."""
    short, middle, long = (of(torch.randint(2000, (1, n * step))) for n in (1, 2, 3))
    return (long - 2 * middle + short) / 2 / step**2


@pytest.mark.no_poison
@pytest.mark.parametrize("family", EAGER)
def test_scores_of_eager_attention_are_what_autograd_saves(family):
    model, shapes = eager(family)
    saved = growth(lambda ids: saved_bytes(model, ids))
    assert shapes.scores.kept * shapes.scores.heads == pytest.approx(saved, rel=0.02)
    whole, half = (
        advise.memory(shapes, "lora", 8, 512, checkpointing=False, length=length).activations for length in (512, 256)
    )
    assert whole - half == shapes.scores.kept * shapes.scores.heads * 512 * 256


# a fake tensor is asked for its device
FREE = ("aten::_unsafe_view", "aten::detach", "prim::device")


class Moved(TorchDispatchMode):
    """Bytes that operators read and write, as memory holds them: views move nothing, expanded tensors are one."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function._schema.name not in FREE:
            for tensor in filter(torch.is_tensor, tree_leaves((args, kwargs, result))):
                sizes = zip(tensor.shape, tensor.stride(), strict=True)
                self.bytes += math.prod(size for size, stride in sizes if stride) * tensor.element_size()
        return result


@pytest.mark.no_poison
@pytest.mark.parametrize("family", EAGER)
def test_passes_over_scores_are_what_operators_move(family):
    """Of twice the heads, so that the mask, which they share, is no part of it; bytes are counted, nothing computed."""

    def moved(model, ids):
        with Moved() as mode:
            model.train()(input_ids=ids, labels=ids).loss.backward()
        return mode.bytes

    with FakeTensorMode():
        few, many = (eager(family, heads) for heads in (8, 16))
        result = growth(lambda ids: moved(many[0], ids)) - growth(lambda ids: moved(few[0], ids))
    assert few[1].scores.moved * few[1].scores.heads == pytest.approx(result, rel=0.01)


class Live(TorchDispatchMode):
    """Bytes of all storages that operators made and that still live, and their peak."""

    def __init__(self):
        super().__init__()
        self.bytes, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        actual = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(actual)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known[storage._cdata] = storage.nbytes()
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self.free, storage._cdata)
        return actual

    def free(self, key):
        self.bytes -= self.known.pop(key)


@pytest.mark.no_poison
@pytest.mark.parametrize("vocabulary", [512, 8192])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_step_is_the_modelled_one(checkpointing, vocabulary):
    tokens, config = 512, CONFIGS["llama"].to_dict() | {"num_hidden_layers": 4, "vocab_size": vocabulary}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(torch.bfloat16)
    shapes = advise.shapes_of(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")).train()
    assert not lorafuse.patch(model).skipped
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    ids = torch.randint(500, (1, tokens))
    # as while they accumulate
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with Live() as live:
        model(input_ids=ids, labels=ids).loss.backward()
    modelled = advise.memory(shapes, "lora", 8, tokens, checkpointing=checkpointing)
    assert modelled.total - modelled.frozen - modelled.trained == pytest.approx(live.peak, rel=0.1)


@pytest.mark.no_poison
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_with_scores_is_the_modelled_one(checkpointing):
    # bytes are counted, nothing is computed
    fake = FakeTensorMode()
    with fake:
        model, shapes = eager("llama")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def peak(ids):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        with Live() as live:
            model(input_ids=ids, labels=ids).loss.backward()
        return live.peak

    def held(ids):
        modelled = advise.memory(shapes, "lora", 8, ids.shape[1], checkpointing=checkpointing)
        return modelled.total - modelled.frozen - modelled.trained

    with fake:
        measured = growth(peak, 512)
    assert growth(held, 512) == pytest.approx(measured, rel=0.06)


def test_eager_attention_takes_longer():
    model, shapes = eager("llama")
    fused = advise.shapes_of(transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.bfloat16))
    assert fused.scores.heads == 0
    for saved in (False, True):
        slow, fast = (
            advise.micro_step_seconds(one, 8, 4096, 4096, find("H200"), checkpointing=saved) for one in (shapes, fused)
        )
        assert all(slow[one] > fast[one] for one in slow)
        passes = 16 * 68 * 4096**2 * (4 / 3 if saved else 1) / find("H200").sustained_bandwidth
        assert slow["frozen"] - fast["frozen"] == pytest.approx(passes, rel=0.2)


class Named(TorchDispatchMode):
    """How often operators are called, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_quantized_weights_are_decoded_before_each_product(checkpointing):
    """As often as the step of QLoRA is modelled: in forward, in backward, and in the second forward."""
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes: pip install --no-deps bitsandbytes")
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaForCausalLM(CONFIGS["llama"]).save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, dtype=torch.bfloat16
        )
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear")).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    ids = torch.randint(2000, (1, 16))
    with Named() as mode:
        model(input_ids=ids, labels=ids).loss.backward()
    # a product of packed weights decodes them itself
    decoded = sum(mode.calls[f"bitsandbytes::{name}"] for name in ("gemm_4bit", "dequantize_4bit"))
    assert decoded == (3 if checkpointing else 2) * 14


def test_a_step_of_qlora_decodes_what_lora_reads(shapes):
    packed = sum(x.weights for x in shapes.adapted)
    for tokens in (512, 8192):
        result = advise.micro_step_seconds(shapes, 16, tokens, 512, find("H100"))
        decoding = 2 * packed * (4.127 / 8 + 2) / find("H100").sustained_bandwidth
        assert result["QLoRA"] > result["frozen"] + decoding
        assert result["QLoRA"] >= result["lorafuse"] + decoding


def test_memory_adds_up(shapes):
    tokens = 8192
    full, master = (advise.memory(shapes, variant, 16, tokens, checkpointing=True) for variant in ("full", "master"))
    lora, qlora = (advise.memory(shapes, variant, 16, tokens, checkpointing=True) for variant in ("lora", "qlora"))
    assert (full.trained, master.trained) == (8 * shapes.parameters, 16 * shapes.parameters)
    assert lora.frozen == 2 * shapes.parameters
    assert lora.trained == 16 * advise.trainable(shapes, 16)
    packed = sum(x.weights for x in shapes.adapted)
    assert qlora.frozen == round(2 * (shapes.parameters - packed) + packed * (0.5 + (1 + 4 / 256) / 64))
    without = advise.memory(shapes, "lora", 16, tokens, checkpointing=False)
    assert without.activations > 4 * lora.activations
    assert without.total == without.frozen + without.trained + without.activations + without.logits
    # with checkpointing the logits are gone before a block runs again
    inputs = 2 * shapes.hidden * shapes.layers * tokens
    block = round(1.5 * (lora.activations - inputs))
    assert lora.total == lora.frozen + lora.trained + inputs + max(lora.logits, block)
    with pytest.raises(ValueError, match="'dora' is not one of full, master, lora, qlora"):
        advise.memory(shapes, "dora", 16, tokens, checkpointing=False)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_step_of_a_batch_is_that_of_its_micro_batches(family):
    model = on_meta(CONFIGS[family])
    once, twice = (
        advise.plan_adapter(model, tokens=10**6, rank=8, gpu="h200", length=512, batch=batch).step_seconds
        for batch in (32, 64)
    )
    assert list(once) == ["frozen", "full fine-tuning", "lorafuse"]
    shapes = advise.shapes_of(model)
    for variant, seconds in once.items():
        update = advise.update_seconds(shapes, variant, 8, find("H200"))
        assert (update > 0) == (variant != "frozen")
        assert twice[variant] - update == pytest.approx(2 * (seconds - update))
    assert once["full fine-tuning"] > once["frozen"]
    saved = advise.micro_step_seconds(shapes, 8, 2048, 512, find("H200"), checkpointing=True)
    plain = advise.micro_step_seconds(shapes, 8, 2048, 512, find("H200"))
    assert all(saved[variant] > plain[variant] for variant in saved)


def test_what_fits_is_the_first_of_the_settings_that_do(shapes):
    whole = advise.fit(shapes, 16, 2048, 4, None)
    assert (whole.method, whole.checkpointing, whole.micro_batch, whole.fits) == ("lora", False, 4, None)
    actual = {name: advise.fit(shapes, 16, 2048, 4, device) for name, device in DEVICES.items()}
    settings = {name: (f.method, f.checkpointing, f.micro_batch, f.fits) for name, f in actual.items()}
    assert settings["H200"] == ("lora", False, 4, True)
    assert settings["L40S"] == ("lora", False, 4, True)
    assert settings["L4"] == ("lora", True, 4, True)
    assert settings["T4"] == ("lora", True, 2, True)
    for name, device in DEVICES.items():
        assert actual[name].total <= 0.95 * device.memory_bytes


def test_no_step_time_for_what_does_not_fit_but_where_it_does():
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    large = on_meta(transformers.LlamaConfig(**LLAMA | sizes))
    advice = advise.plan_adapter(large, tokens=10**7, gpu="RTX 4090")
    assert (advice.fit.fits, advice.step_seconds) == (False, {})
    assert "does not fit on RTX 4090" in str(advice)
    assert advice.fit.elsewhere == "LoRA fits on B200, QLoRA fits on A100"
    assert "step on" not in str(advice)
    packed = advise.plan_adapter(large, tokens=10**7, gpu="H100")
    assert (packed.fit.method, packed.fit.fits, list(packed.step_seconds)) == ("qlora", True, ["QLoRA"])
    assert "load_in_4bit=True" in packed.snippet
    assert packed.accumulation * packed.fit.micro_batch == packed.request.batch == 32
    # full fine-tuning of 8 G parameters does not fit where LoRA does
    whole = on_meta(transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": 32}))
    assert list(advise.plan_adapter(whole, tokens=10**7, gpu="A100").step_seconds) == ["frozen", "lorafuse"]
