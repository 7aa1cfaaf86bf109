"""A patched model gives what PEFT gives (T1): outputs, the input gradient and the gradient of every adapter tensor."""

import copy

import peft
import pytest
import torch
from tiny_models import (
    FAMILIES,
    adapted,
    adapted_twice,
    assert_close,
    assert_same_model,
    counting_fused,
    inputs_of,
    patched_copy,
    run,
    tiny,
    token_ids,
    train_away_from_zero,
)
from torch import nn

import lorafuse
from lorafuse.integrations import hf_common, hf_peft
from lorafuse.philox import draw_seed, keep_mask
from lorafuse.testing.numerics import relative_l2, rounding, tolerance

LINEAR_FAMILIES = [family for family in FAMILIES if family != "gpt2"]
# Linear layers of each model, its output layer left out as "all-linear" does.
LAYERS = {"llama": 14, "llama with biases": 14, "qwen3": 14, "gemma3": 14, "mistral": 14, "bert": 13, "t5": 36}


def assert_all_fused(report, calls, forwards=1):
    assert report.skipped == []
    assert calls.call_count == forwards * len(report.patched) > 0


@pytest.mark.parametrize("family", LINEAR_FAMILIES)
def test_families(family):
    stock = adapted(family)
    patched, report = patched_copy(stock, strict=True)
    with counting_fused() as calls:
        assert_same_model(patched, stock)
    assert_all_fused(report, calls)
    assert len(report.patched) == LAYERS[family]


def test_the_adapters_matter():
    model = adapted()
    with_adapter = run(model)["logits"]
    with torch.no_grad(), model.disable_adapter():
        without = model(**inputs_of(model)).logits
    assert relative_l2(with_adapter, without) > 0.1


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_gpt2_is_left_to_peft():
    stock = adapted("gpt2")
    with pytest.warns(UserWarning, match="(?s)patched nothing.*Conv1D"):
        patched, report = patched_copy(stock)
    assert report.patched == []
    assert len(report.skipped) == 8
    assert {skipped.kind for skipped in report.skipped} == {"linear"}
    assert all("Conv1D" in skipped.reason for skipped in report.skipped)
    assert_same_model(patched, stock)


SETTINGS = {
    "rank 1": {"r": 1, "lora_alpha": 2},
    "rank 3": {"r": 3},
    "rank 16": {"r": 16, "lora_alpha": 32},
    "rank above the layer's sizes": {"r": 48},
    "rsLoRA": {"r": 9, "use_rslora": True},
    "bias of B": {"lora_bias": True},
    "all biases": {"bias": "all"},
    "biases of the adapted layers": {"bias": "lora_only"},
    "ranks and alphas by layer": {
        "rank_pattern": {"q_proj": 1, "layers.0.mlp.down_proj": 16},
        "alpha_pattern": {"v_proj": 1, "layers.1.mlp.up_proj": 64},
    },
    "some layers": {"target_modules": ["q_proj", "down_proj"]},
    "one block": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "negative scale": {"lora_alpha": -3},
    "zero scale": {"lora_alpha": 0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name):
    stock = adapted("llama with biases", **SETTINGS[name])
    if "bias" in SETTINGS[name]:
        train_away_from_zero(stock, ".bias")
        assert any(n.endswith("bias") and p.requires_grad for n, p in stock.named_parameters())
    patched, report = patched_copy(stock, strict=True)
    if name == "zero scale":
        # only A and B have no gradient then, on both sides
        got, expected = run(patched), run(stock)
        assert all(not results[n].any() for results in (got, expected) for n in results if "lora_" in n)
        base = ("logits", "d inputs_embeds")
        return assert_close({n: got[n] for n in base}, {n: expected[n] for n in base})
    with counting_fused() as calls:
        assert_same_model(patched, stock)
    assert_all_fused(report, calls)


def test_bias_of_b_without_a_base_bias():
    with pytest.warns(UserWarning, match="has no bias"):
        stock = adapted("llama", lora_bias=True)
    patched, report = patched_copy(stock, strict=True)
    with counting_fused() as calls:
        assert_same_model(patched, stock)
    assert_all_fused(report, calls)


@pytest.mark.parametrize("active", [["default"], ["other"], ["default", "other"], ["other", "default"]])
def test_active_adapters(active):
    stock = adapted_twice()
    patched, report = patched_copy(stock, strict=True)
    for model in (stock, patched):
        model.base_model.set_adapter(active)
    expected = run(stock)
    assert any("default" in name for name in expected) == ("default" in active)
    assert any("other" in name for name in expected) == ("other" in active)
    with counting_fused() as calls:
        assert_close(run(patched), expected)
    assert calls.call_count == (4 if active == ["other"] else 14)
    assert len(report.patched) == 14


def test_active_adapters_with_bias_of_b():
    stock = adapted("llama with biases", lora_bias=True)
    stock.add_adapter("other", stock.peft_config["default"])
    train_away_from_zero(stock.eval(), "other")
    stock.base_model.set_adapter(["default", "other"])
    patched, report = patched_copy(stock, strict=True)
    with counting_fused() as calls:
        assert_same_model(patched, stock)
    assert_all_fused(report, calls)


def assert_three_way(ours, theirs, reference):
    """The house's rule with the floor of bf16, in which both compute, also where a gradient is kept in fp32."""
    assert ours.keys() == theirs.keys() == reference.keys()
    for name, exact in reference.items():
        assert theirs[name].any()
        assert ours[name].dtype is theirs[name].dtype, name
        error, other = relative_l2(ours[name], exact), relative_l2(theirs[name], exact)
        bound = 2 * other + rounding(torch.bfloat16)
        assert error <= bound, f"{name}: error {error:.3e} above {bound:.3e} (PEFT: {other:.3e})"
        assert error > tolerance(torch.float32), f"{name} is fp32-exact: nothing ran in bf16"


def adapters_to(dtype, model):
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("family", ["llama", "llama with biases", "mistral"])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_bf16_base(family, adapters):
    """Against PEFT with adapters of the base's dtype, in which a patched layer computes."""
    stock = adapters_to(adapters, adapted(family, torch.bfloat16))
    patched, report = patched_copy(stock, strict=True)
    exact = run(copy.deepcopy(stock).double())
    with counting_fused() as calls:
        ours = run(patched)
    assert_all_fused(report, calls)
    theirs = run(adapters_to(torch.bfloat16, stock))
    assert_three_way(ours, {name: t.to(ours[name].dtype) for name, t in theirs.items()}, exact)


@pytest.mark.parametrize("family", ["llama", "mistral", "bert"])
def test_bf16_base_with_a_delta_smaller_than_the_base(family):
    """Against PEFT as it is, which runs fp32 adapters in fp32: the delta's rounding is lost in the base's."""
    stock = adapted(family, torch.bfloat16, size=0.4)
    assert {p.dtype for n, p in stock.named_parameters() if "lora_" in n} == {torch.float32}
    patched, _ = patched_copy(stock, strict=True)
    assert_three_way(run(patched), run(stock), run(copy.deepcopy(stock).double()))


@pytest.mark.parametrize("active", [["default"], ["default", "other"]])
def test_autocast(active):
    stock = adapted_twice()
    stock.base_model.set_adapter(active)
    patched, report = patched_copy(stock, strict=True)
    exact = run(copy.deepcopy(stock).double())
    with torch.autocast("cpu", torch.bfloat16), counting_fused() as calls:
        ours = run(patched)
        assert_all_fused(report, calls)
        theirs = run(stock)
    assert_three_way(ours, theirs, exact)


@pytest.mark.parametrize("shape", [(20,), (5, 20), (0, 20), (2, 0, 20), (1, 2, 3, 20), (2, 1, 2, 1, 20)])
def test_shapes_of_x(shape):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(20, 12))
    stock = train_away_from_zero(peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["0"])))
    patched, _ = patched_copy(stock, strict=True)
    x = torch.randn(shape)
    y, expected = patched(x), stock(x)
    assert y.shape == expected.shape == (*shape[:-1], 12)
    assert relative_l2(y, expected) <= tolerance(torch.float32)


class PhiloxDropout(nn.Dropout):
    """What a patched layer's dropout is defined to be, for PEFT's own forward."""

    def forward(self, x):
        if not self.training:
            return x
        flat = x.reshape(-1, x.shape[-1])
        keep = keep_mask(draw_seed(x.device), self.p, slice(0, flat.shape[0]), flat.shape[1])
        return (flat * keep / (1 - self.p)).view(x.shape)


def with_philox_dropout(model):
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is nn.Dropout and module.p:
            module.__class__ = PhiloxDropout
    return model


class TestDropout:
    @pytest.mark.parametrize("family", ["llama", "gemma3", "t5"])
    def test_evaluation(self, family):
        stock = adapted(family, lora_dropout=0.3)
        patched, report = patched_copy(stock, strict=True)
        with counting_fused() as calls:
            assert_same_model(patched, stock)
        assert_all_fused(report, calls)

    @pytest.mark.parametrize("family", LINEAR_FAMILIES)
    def test_training(self, family):
        stock = adapted(family, lora_dropout=0.3).train()
        patched, report = patched_copy(stock, strict=True)
        reference = with_philox_dropout(stock)
        with counting_fused() as calls:
            got = run(patched, seed=9)
        assert_all_fused(report, calls)
        assert_close(got, run(reference, seed=9))
        # the mask is there, and it follows the generator
        assert relative_l2(got["logits"], run(patched, seed=10)["logits"]) > 0.01
        assert relative_l2(got["logits"], run(patched.eval())["logits"]) > 0.01

    def test_the_mean_is_kept(self):
        stock = adapted(lora_dropout=0.5, target_modules=["q_proj"])
        layer = patched_copy(stock)[0].base_model.model.model.layers[0].self_attn.q_proj
        x = torch.randn(1, 32)
        expected = layer(x)
        mean = layer.train()(x.expand(20_000, 32)).mean(0, keepdim=True)
        assert relative_l2(mean, expected) < 0.03

    def test_everything_dropped(self):
        patched, _ = patched_copy(adapted(lora_dropout=1.0).train(), strict=True)
        inputs = inputs_of(patched)
        y = patched(**inputs).logits
        with patched.disable_adapter():
            assert relative_l2(y, patched(**inputs).logits) <= tolerance(torch.float32)

    def test_several_active_adapters_fall_back(self):
        stock = adapted_twice(lora_dropout=0.3)
        stock.base_model.set_adapter(["default", "other"])
        patched, report = patched_copy(stock.train())
        # layers that hold one of the two adapters run fused, whatever its dropout
        assert len(report.patched) == 10
        assert len(report.skipped) == 4
        assert {skipped.reason for skipped in report.skipped} == {
            "several active adapters with dropout; PEFT draws a mask for each"
        }
        assert_close(run(patched), run(with_philox_for(patched, stock)))
        in_evaluation, report = patched_copy(stock.eval(), strict=True)
        with counting_fused() as calls:
            assert_same_model(in_evaluation, stock)
        assert_all_fused(report, calls)
        hf_common.warn_once.cache_clear()
        with pytest.warns(UserWarning, match="runs as PEFT ships it: several active adapters with dropout"):
            got = run(in_evaluation.train())
        assert_close(got, run(with_philox_for(patched, stock.train())))


def with_philox_for(patched, stock):
    """`with_philox_dropout` for the layers that run fused in `patched`; the others keep torch's dropout."""
    reference = with_philox_dropout(stock)
    for name, layer in patched.named_modules():
        if isinstance(layer, hf_peft.PeftLinear) and not isinstance(layer, hf_peft.FusedLinear):
            for dropout in reference.get_submodule(name).lora_dropout.values():
                dropout.__class__ = type(dropout) if type(dropout) is nn.Identity else nn.Dropout
    return reference


def drop_lora(self, x, *args, **kwargs):
    return self.base_layer(x, *args, **kwargs)


def halve_lora(self, x, *args, **kwargs):
    return (hf_peft.PeftLinear.forward(self, x) + self.base_layer(x)) / 2


def stop_the_gradient_of_a(self, x, *args, **kwargs):
    with torch.no_grad():
        xa = self.lora_A["default"](x)
    return self.base_layer(x) + self.lora_B["default"](xa) * self.scaling["default"]


@pytest.mark.parametrize("mutant", [drop_lora, halve_lora, stop_the_gradient_of_a])
def test_mutants_turn_the_comparison_red(mutant, monkeypatch):
    stock = adapted()
    patched, _ = patched_copy(stock)
    assert_same_model(patched, stock)
    # one layer of fourteen is enough
    layer = patched.base_model.model.model.layers[1].mlp.up_proj
    monkeypatch.setattr(type(layer), "forward", pick(mutant, layer, type(layer).forward))
    with pytest.raises(AssertionError, match="error|no gradient"):
        assert_same_model(patched, stock)


def pick(mutant, layer, forward):
    return lambda self, *args, **kwargs: (mutant if self is layer else forward)(self, *args, **kwargs)


def test_a_zero_b_turns_the_comparison_red():
    stock = adapted()
    nn.init.zeros_(stock.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight)
    patched, _ = patched_copy(stock)
    with pytest.raises(AssertionError, match="lora_A.default.weight is zero"):
        assert_same_model(patched, stock)


def test_two_runs_are_bitwise_equal():
    patched, _ = patched_copy(adapted(lora_dropout=0.3).train())
    first, second = run(patched), run(patched)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_generate_gives_the_same_tokens():
    stock = adapted()
    patched, _ = patched_copy(stock)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with counting_fused() as calls:
        ours = patched.generate(input_ids=token_ids(), attention_mask=torch.ones_like(token_ids()), **options)
    theirs = stock.generate(input_ids=token_ids(), attention_mask=torch.ones_like(token_ids()), **options)
    assert calls.call_count == 14 * len(ours.logits)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert relative_l2(torch.cat(ours.logits), torch.cat(theirs.logits)) <= tolerance(torch.float32)
    plain = tiny().generate(input_ids=token_ids(), attention_mask=torch.ones_like(token_ids()), **options)
    assert relative_l2(torch.cat(plain.logits), torch.cat(theirs.logits)) > 0.1


def test_inference_mode():
    stock = adapted()
    patched, _ = patched_copy(stock)
    with torch.inference_mode(), counting_fused() as calls:
        y, expected = (model(**inputs_of(stock)).logits for model in (patched, stock))
    assert calls.call_count == 14
    assert relative_l2(y, expected) <= tolerance(torch.float32)
    assert lorafuse.unpatch(patched) == 14
