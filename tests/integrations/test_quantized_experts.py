"""Experts over quantized stacks (T1): adapted, what PEFT gives on their decoded weights; frozen, what they are."""

import copy
import sys
import warnings
from unittest import mock

import moe_models
import peft
import pytest
import tiny_families
import torch
import transformers
from quantized_models import quantize
from torch import nn
from torch.nn.utils import parametrize
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import lorafuse
from lorafuse import formats
from lorafuse.integrations import adapt_experts, hf_experts, hf_transformers, register_experts
from lorafuse.nn import LoRAExperts
from lorafuse.testing.numerics import assert_three_way, relative_l2, tolerance

quantization = pytest.importorskip("bitsandbytes.nn.parametrize")

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::RuntimeWarning:peft", "ignore::DeprecationWarning"
)

# K of every stack is a multiple of the block, as in quantized_models.py
SIZES = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
# the common layout; transposed, interleaved and with biases; with shared experts; without a gate
FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h")
R = 4


def experts_of(model):
    return [m for m in model.modules() if hasattr(m, "has_gate") and not isinstance(m, (LoRAExperts, nn.ModuleList))]


def quantized(name, nested=True, dtype=torch.float32):
    """A frozen model whose stacks of experts are NF4; its input embeddings are trained."""
    model = moe_models.base(name, **SIZES).to(dtype)
    for experts in experts_of(model):
        for parameter in (hf_transformers.first_projection(experts), "down_proj"):
            quantization.replace_parameter_4bit(experts, parameter, compress_statistics=nested)
    model.requires_grad_(False).get_input_embeddings().weight.requires_grad_()
    return model


def adapted(model, **settings):
    """The same with our adapters, of which none is zero."""
    model = copy.deepcopy(model)
    adapt_experts(model, R, alpha=2 * R, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def adapted_by_peft(name, model, ours):
    """PEFT's adapters with our numbers, over what the stacks decode to."""
    model = copy.deepcopy(model)
    for experts in experts_of(model):
        for parameter in (hf_transformers.first_projection(experts), "down_proj"):
            decoded = getattr(experts, parameter).detach()
            parametrize.remove_parametrizations(experts, parameter, leave_parametrized=False)
            setattr(experts, parameter, nn.Parameter(decoded, requires_grad=False))
    config = peft.LoraConfig(
        r=R, lora_alpha=2 * R, target_modules=[], target_parameters=moe_models.targets(name), init_lora_weights=False
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    for layer, factors in zip(outermost(model), ours, strict=True):
        for wrapper in hf_experts.wrappers(layer):
            kind = "down" if wrapper.parameter_name == "down_proj" else "gate_up"
            a, b = getattr(factors, f"{kind}_lora_A"), getattr(factors, f"{kind}_lora_B")
            wrapper.lora_A["default"].weight.data = a.detach().flatten(0, 1).to(model.dtype)
            wrapper.lora_B["default"].weight.data = b.detach().permute(1, 2, 0).flatten(1).to(model.dtype)
    model.get_input_embeddings().weight.requires_grad_()
    return model


def outermost(model):
    wrappers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.ParamWrapper)]
    inner = {w for wrapper in wrappers for w in hf_experts.wrappers(wrapper)[1:]}
    return [w for w in wrappers if w not in inner]


def step(model):
    """Logits, and gradients by name of embeddings and factors as our layers hold them."""
    model.zero_grad()
    logits = model(moe_models.token_ids()).logits
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.dtype))
    results = {"logits": logits.detach(), "embeddings": model.get_input_embeddings().weight.grad}
    for i, layer in enumerate(m for m in model.modules() if isinstance(m, LoRAExperts)):
        results |= {f"{i} {name}": p.grad for name, p in layer.named_parameters() if "lora_" in name}
    for i, layer in enumerate(outermost(model)):
        for wrapper in hf_experts.wrappers(layer):
            kind = "down" if wrapper.parameter_name == "down_proj" else "gate_up"
            a, b = (of["default"].weight.grad for of in (wrapper.lora_A, wrapper.lora_B))
            experts = wrapper.num_experts
            results[f"{i} {kind}_lora_A"] = a.unflatten(0, (experts, R))
            results[f"{i} {kind}_lora_B"] = b.unflatten(1, (R, experts)).permute(2, 0, 1)
    return results


class TestAdapted:
    @pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
    @pytest.mark.parametrize("name", FAMILIES)
    def test_what_peft_gives_on_the_decoded_weights(self, name, nested):
        base = quantized(name, nested)
        model = adapted(base)
        layers = [m for m in model.modules() if isinstance(m, LoRAExperts)]
        expected, actual = step(adapted_by_peft(name, base, layers)), step(model)
        assert actual.keys() == expected.keys()
        assert len(actual) == 2 + 4 * len(layers) > 2
        assert all(t.any() for t in expected.values())
        errors = {name: relative_l2(actual[name], tensor) for name, tensor in expected.items()}
        assert {name: error for name, error in errors.items() if error > tolerance(torch.float32)} == {}

    @pytest.mark.parametrize("name", FAMILIES)
    def test_bf16_is_as_near_as_peft(self, name):
        base = quantized(name, dtype=torch.bfloat16)
        model = adapted(base, adapter_dtype=torch.bfloat16)
        layers = [m for m in model.modules() if isinstance(m, LoRAExperts)]
        theirs = adapted_by_peft(name, base, layers)
        exact = copy.deepcopy(theirs).double()
        exact.get_base_model().set_experts_implementation("eager")
        x = torch.randn(12, SIZES["hidden_size"]).to(torch.bfloat16)
        experts = layers[0].num_experts
        index, weight = torch.rand(12, experts).topk(2).indices, torch.rand(12, 2)
        results = []
        for layer, dtype in ((layers[0], torch.bfloat16), (outermost(theirs)[0], torch.bfloat16),
                             (outermost(exact)[0], torch.float64)):  # fmt: skip
            one = x.to(dtype).clone().requires_grad_()
            y = layer(one, index, weight.to(dtype))
            y.backward(x.to(dtype).cos())
            results.append({"y": y.detach(), "dx": one.grad})
        for key, reference in results[2].items():
            assert reference.any()
            assert_three_way(key, results[0][key], results[1][key], reference)

    def test_it_starts_as_its_base_and_holds_the_same_memory(self):
        base = quantized("gpt_oss")
        model = copy.deepcopy(base)
        stacks = [e.parametrizations.down_proj.original.data_ptr() for e in experts_of(model)]
        names = adapt_experts(model, R)
        assert names == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
        layers = [model.get_submodule(name) for name in names]
        assert [layer._quantized["down_proj"].data.data_ptr() for layer in layers] == stacks
        assert {p.requires_grad for n, p in layers[0].named_parameters() if "lora_" in n} == {True}
        assert not layers[0].gate_up_proj_bias.requires_grad
        assert "gate_up_proj=nf4, down_proj=nf4" in repr(layers[0])
        assert {key for key in layers[0].state_dict() if "lora" not in key} == {"gate_up_proj_bias", "down_proj_bias"}
        got, expected = (one(moe_models.token_ids()).logits for one in (model, base))
        assert relative_l2(got, expected) <= tolerance(torch.float32)

    def test_moves_and_casts_leave_codes_and_scales(self):
        model = adapted(quantized("qwen3_moe"))
        layer = next(m for m in model.modules() if isinstance(m, LoRAExperts))
        before = {name: (w.data.clone(), *(s.clone() for s in w.statistics)) for name, w in layer._quantized.items()}
        layer.to(torch.bfloat16)
        assert layer.gate_up_lora_A.dtype is torch.bfloat16
        for name, tensors in before.items():
            weight = layer._quantized[name]
            after = weight.data, *weight.statistics
            assert all(torch.equal(one, other) for one, other in zip(tensors, after, strict=True))
        assert {t.device.type for t in (layer.to("meta")._quantized["down_proj"].statistics)} == {"meta"}

    def test_peft_beside_it(self):
        """PEFT adapts the linear layers."""
        config = peft.LoraConfig(r=R, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        model = adapted(peft.get_peft_model(quantized("qwen3_moe"), config)).train()
        assert lorafuse.patch(model, strict=True).skipped == []
        tiny_families.step(model)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len([n for n in trained if "gate_up_lora" in n or "down_lora" in n]) == 8
        assert all(p.grad.any() for p in model.parameters() if p.requires_grad)

    def test_fp8_experts(self):
        """Over transformers' FP8Experts, whose own forward needs a GPU: what PEFT gives over the decoded stacks."""
        fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
        dense = moe_models.base("qwen3_moe", **SIZES).requires_grad_(False)
        model = copy.deepcopy(dense)
        settings = transformers.FineGrainedFP8Config(weight_block_size=(32, 64))
        skipped = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        model = fp8.replace_with_fp8_linear(model, skipped, settings)
        for quantized, experts in zip(experts_of(model), experts_of(dense), strict=True):
            assert type(quantized) is fp8.FP8Experts
            quantized.to_empty(device="cpu").requires_grad_(False)
            for name in ("gate_up_proj", "down_proj"):
                stack, scale = getattr(quantized, name), getattr(quantized, f"{name}_scale_inv")
                stack.data = getattr(experts, name).data.mul(64).to(torch.float8_e4m3fn)
                scale.data = torch.rand(scale.shape) / 64
                decoded = fp8._dequantize_fp8_weight(stack.data, scale.data, (32, 64), torch.float32)
                setattr(experts, name, nn.Parameter(decoded, requires_grad=False))
        ours, theirs = adapted(model), adapted(dense)
        for one in (ours, theirs):
            one.get_input_embeddings().weight.requires_grad_()
        # both layers, which repr folds
        assert repr(ours).count("gate_up_proj=fp8, down_proj=fp8") == 1
        factors = [{n: p for n, p in one.named_parameters() if "lora_" in n} for one in (ours, theirs)]
        for name, p in factors[0].items():
            p.data.copy_(factors[1][name].data)
        actual, expected = step(ours), step(theirs)
        errors = {name: relative_l2(actual[name], tensor) for name, tensor in expected.items()}
        assert {name: error for name, error in errors.items() if error > tolerance(torch.float32)} == {}

    def test_mxfp4_from_blocks_and_scales(self):
        """gpt-oss as its checkpoint stores it, against its experts over transformers' decoded stacks."""
        mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
        model = moe_models.base("gpt_oss", **SIZES).requires_grad_(False)
        experts = experts_of(model)[0]
        stacks = {}
        for name in ("gate_up_proj", "down_proj"):
            E, K, N = getattr(experts, name).shape
            blocks = torch.randint(256, (E, N, K // 32, 16), dtype=torch.uint8)
            scales = torch.randint(119, 123, (E, N, K // 32), dtype=torch.uint8)
            decoded = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            setattr(experts, name, nn.Parameter(decoded.contiguous(), requires_grad=False))
            stacks[name] = formats.load("mxfp4").weight(blocks, scales)
        layer = LoRAExperts.from_stacks(
            stacks["gate_up_proj"], stacks["down_proj"], R, activation="clamped_swiglu", is_concatenated=False,
            gate_up_bias=experts.gate_up_proj_bias, down_bias=experts.down_proj_bias,
        )  # fmt: skip
        x, index, weight = torch.randn(9, 64), torch.rand(9, 4).topk(2).indices, torch.rand(9, 2)
        assert relative_l2(layer(x, index, weight), experts(x, index, weight)) <= tolerance(torch.float32)
        nn.init.normal_(layer.gate_up_lora_B)
        assert relative_l2(layer(x, index, weight), experts(x, index, weight)) > 0.1

    def test_stacks_in_the_order_of_a_librarys_kernels(self):
        mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
        model = moe_models.base("gpt_oss", **SIZES)
        loaded = mxfp4.Mxfp4GptOssExperts(model.config)
        model.model.layers[1].mlp.experts = loaded
        with pytest.raises(ValueError, match=r"layers.1.mlp.experts: its down_proj cannot be adopted.*dequantize=True"):
            adapt_experts(model, R)
        assert model.model.layers[1].mlp.experts is loaded
        assert not any(isinstance(m, LoRAExperts) for m in model.modules())

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"got a Linear without experts modules of transformers >= 5\.7"):
            adapt_experts(nn.Linear(3, 3), 2)
        model = moe_models.base("qwen3_moe", **SIZES)
        first = experts_of(model)[0]
        first.down_proj = nn.Parameter(first.down_proj.data.to(torch.complex64))
        with pytest.raises(ValueError, match=r"changed nothing: model.layers.0.mlp.experts: .*complex64"):
            adapt_experts(model, 2)
        assert all(p.requires_grad for p in model.parameters())
        stack, other = torch.randn(3, 16, 8), torch.randn(3, 8, 4)
        with pytest.raises(ValueError, match="maps 8 to 16 features in 3 experts, down 4 to 8 in 3.*half of gate_up's"):
            LoRAExperts.from_stacks(stack, other, 2)
        with pytest.raises(ValueError, match=r"down is \[8, 4\]; it must be a stack"):
            LoRAExperts.from_stacks(stack, other[0], 2)


@pytest.fixture
def registered():
    register_experts()
    yield
    ALL_EXPERTS_FUNCTIONS._global_mapping.pop("lorafuse")


@pytest.mark.parametrize("with_peft", [True, False], ids=["", "PEFT is not installed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_registered_experts_run_fused(name, with_peft, registered, monkeypatch):
    model = quantized(name)
    expected = step(model)
    if not with_peft:
        monkeypatch.delitem(sys.modules, "peft.tuners.lora.layer")
    model.set_experts_implementation("lorafuse")
    with mock.patch.object(hf_transformers, "lora_experts", wraps=hf_transformers.lora_experts) as fused:
        actual = step(model)
    assert fused.call_count == len(experts_of(model))
    assert all(call.kwargs["down"].format_name == "nf4" for call in fused.call_args_list)
    errors = {name: relative_l2(actual[name], tensor) for name, tensor in expected.items()}
    assert {name: error for name, error in errors.items() if error > tolerance(torch.float32)} == {}


def test_a_stack_that_cannot_be_held_runs_as_transformers_ships_it(registered):
    model = quantized("qwen3_moe")
    expected = step(model)
    model.set_experts_implementation("lorafuse")
    for experts in experts_of(model):
        # a second parametrization on top
        parametrize.register_parametrization(experts, "down_proj", nn.Identity())
        with pytest.raises(ValueError, match="only the first is bitsandbytes'"):
            formats.adopt(experts.parametrizations.down_proj)
    actual = step(model)
    assert {n: e for n, t in expected.items() if (e := relative_l2(actual[n], t)) > tolerance(torch.float32)} == {}


class TestNotes:
    """What `lorafuse.patch` finds in a model that was loaded in 4 bits."""

    def model(self, dtype=torch.bfloat16):
        base = moe_models.base("qwen3_moe", **SIZES).to(dtype)
        return quantize(base, skip=("lm_head", "gate"))

    def adapted(self, model):
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "o_proj"]))

    def notes(self, model, match):
        with pytest.warns(UserWarning, match=f"lorafuse.patch: {match}"):
            report = lorafuse.patch(model)
        assert len(report.patched) == 4
        assert f"  note     {report.notes[-1]}" in str(report).splitlines()
        return report.notes

    def test_experts_that_are_left_in_bf16(self):
        (note,) = self.notes(
            self.adapted(self.model()), "4 stacks of experts are bfloat16, 0.00 GiB: loading in 4 or 8"
        )
        assert "replace_parameter_4bit" in note
        assert "prepare_model" not in note

    def test_experts_that_became_fp32(self):
        model = self.model()
        model.is_loaded_in_4bit = True
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        (note,) = self.notes(
            self.adapted(model), "4 stacks of experts are float32.*prepare_model_for_kbit_training casts"
        )
        assert "parameter.data = parameter.data.to(torch.bfloat16)" in note

    def test_experts_without_adapters(self):
        model = self.model()
        for experts in experts_of(model):
            for parameter in ("gate_up_proj", "down_proj"):
                quantization.replace_parameter_4bit(experts, parameter)
        model = self.adapted(model)
        (note,) = self.notes(
            model, "2 quantized experts modules have no adapter, the first is .*layers.0.mlp.experts: PEFT"
        )
        assert "adapt_experts does, after get_peft_model" in note
        adapt_experts(model, R)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert lorafuse.patch(model).notes == []

    def test_experts_alone_are_quantized(self):
        """PEFT warns that no parameter matched, and adapts attention."""
        model = quantized("qwen3_moe")
        config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], target_parameters=moe_models.targets("qwen3_moe"))
        with pytest.warns(RuntimeWarning, match="no parameter was matched"):
            model = peft.get_peft_model(model, config)
        (note,) = self.notes(model, "2 quantized experts modules have no adapter")
        assert "adapt_experts does" in note

    def test_a_model_that_is_not_quantized(self):
        model = self.adapted(moe_models.base("qwen3_moe", **SIZES).to(torch.bfloat16))
        assert lorafuse.patch(model).notes == []
