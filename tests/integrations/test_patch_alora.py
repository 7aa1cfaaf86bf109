"""PEFT's aLoRA under `patch` (T1): the tokens from the invocation on have the adapter, as rows of one operator."""

import copy

import peft
import pytest
import torch
from quantized_models import adapted, quantize
from test_patch_quantized import Mlp, assert_equal_to_peft
from tiny_models import lora_config, tiny, train_away_from_zero

import lorafuse
from lorafuse.integrations import hf_peft
from lorafuse.testing.numerics import relative_l2, tolerance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")

INVOCATION = [5, 6]
# the invocation at the start, in the middle, twice, and not at all
IDS = torch.tensor([[5, 6, 1, 2, 3, 4, 7], [1, 2, 3, 5, 6, 9, 8], [5, 6, 2, 2, 5, 6, 1], [1, 2, 3, 4, 1, 2, 3]])


def alora(**settings):
    settings = {"alora_invocation_tokens": INVOCATION, "target_modules": "all-linear"} | settings
    model = peft.get_peft_model(tiny(), lora_config(task_type="CAUSAL_LM", **settings))
    return train_away_from_zero(model, "lora_B")


def gradients(model, ids=IDS, **inputs):
    model.zero_grad()
    logits = model(input_ids=ids, **inputs).logits
    logits.square().sum().backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | named


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, t in expected.items():
        assert relative_l2(actual[name], t) <= tolerance(torch.float32) or not t.any() and not actual[name].any(), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_gradient_is_pefts(checkpointing):
    stock = alora().train()
    if checkpointing:
        stock.gradient_checkpointing_enable({"use_reentrant": False})
        stock.enable_input_require_grads()
    patched = copy.deepcopy(stock)
    report = lorafuse.patch(patched, strict=True)
    assert len(report.patched) == 14
    expected = gradients(stock)
    assert all(t.count_nonzero() for t in expected.values())
    assert_same(gradients(patched), expected)
    status = lorafuse.status(patched)
    assert status.fallbacks == 0
    assert all(layer.fused for layer in status.layers)
    lorafuse.unpatch(patched)
    assert_same(gradients(patched), expected)


def test_tokens_before_the_invocation_are_the_base():
    model = alora().eval()
    lorafuse.patch(model, strict=True)
    with torch.no_grad():
        logits = model(IDS).logits
        with model.disable_adapter():
            base = model(IDS).logits
        changed = (logits != base).any(-1)
    assert changed.tolist() == [[True] * 7, [False] * 3 + [True] * 4, [False] * 4 + [True] * 3, [False] * 7]


def test_without_an_invocation_gradients_are_zero():
    """As with PEFT, whose layers run the base where no offsets come."""
    model = alora().train()
    lorafuse.patch(model, strict=True)
    grads = gradients(model, IDS[3:])
    assert not any(t.any() for name, t in grads.items() if "lora" in name)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, layer.in_features)
    y = layer(x)
    assert torch.equal(y, layer.base_layer(x))
    y.sum().backward()
    assert not layer.lora_A.default.weight.grad.any()


def test_generation():
    model = alora().eval()
    patched = copy.deepcopy(model)
    lorafuse.patch(patched, strict=True)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=IDS[:2], **settings)
    assert torch.equal(patched.generate(input_ids=IDS[:2], **settings), expected)
    assert lorafuse.status(patched).fallbacks == 0


def test_mixed_with_a_plain_adapter():
    """aLoRA, LoRA and the base in one batch; layers of the plain adapter alone are given the offsets too."""
    stock = alora(target_modules=["q_proj", "up_proj"])
    stock.add_adapter("plain", lora_config(task_type="CAUSAL_LM", target_modules=["up_proj", "down_proj"]))
    train_away_from_zero(stock, "lora_B").eval()
    for name, p in stock.named_parameters():
        p.requires_grad_("lora_" in name)
    patched = copy.deepcopy(stock)
    lorafuse.patch(patched, strict=True)
    names = ["default", "plain", "__base__", "default"]
    assert_same(gradients(patched, adapter_names=names), gradients(stock, adapter_names=names))
    assert lorafuse.status(patched).fallbacks == 0
    # alone, the plain one knows no offsets
    for model in (stock, patched):
        model.set_adapter("plain")
    assert_same(gradients(patched), gradients(stock))


def test_a_quantized_base():
    pytest.importorskip("bitsandbytes")

    class Causal(Mlp):
        prepare_inputs_for_generation = None

    settings = {"target_modules": ["up"], "alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}
    stock = adapted(quantize(Causal(), "nf4"), **settings)
    patched = copy.deepcopy(stock)
    lorafuse.patch(patched, strict=True)
    x, results = torch.randn(2, 5, 128), []
    for model in (stock, patched):
        layer = model.base_model.model.up
        y = layer(x, alora_offsets=[2, None])
        y.square().sum().backward()
        weights = layer.lora_A.default.weight, layer.lora_B.default.weight
        results.append({"y": y.detach(), "da": weights[0].grad, "db": weights[1].grad})
    assert_equal_to_peft(results[1], results[0])
    assert lorafuse.status(patched).fallbacks == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"lora_bias": True}, "aLoRA with a bias of lora_B"), ({}, "several active adapters, one of them aLoRA")],
)
def test_what_stays_with_peft(settings, reason):
    model = alora(target_modules=["q_proj"], **settings)
    if not settings:
        model.add_adapter("plain", lora_config(task_type="CAUSAL_LM", target_modules=["q_proj"]))
        model.base_model.set_adapter(["default", "plain"])
    with pytest.raises(ValueError, match=reason):
        lorafuse.patch(model, strict=True)


def test_few_rows_of_a_packed_base_keep_their_offsets(monkeypatch):
    """Where the library multiplies by the packed weight, PEFT's layer is given what it was called with."""
    model = alora(target_modules=["up_proj"]).eval()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 5, layer.in_features)
    expected = layer(x, alora_offsets=[2, None])
    lorafuse.patch(model, strict=True)
    monkeypatch.setattr(hf_peft, "multiplies_packed", lambda *_: True)
    assert torch.equal(layer(x, alora_offsets=[2, None]), expected)
    assert lorafuse.status(model).fallbacks == 1


def test_dropout():
    """One seed, one mask; rows without the adapter have none."""
    model = alora(target_modules=["up_proj"], lora_dropout=0.5).train()
    lorafuse.patch(model, strict=True)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 5, layer.in_features)

    def run(seed):
        torch.manual_seed(seed)
        return layer(x, alora_offsets=[2, None])

    y, base = run(0), layer.base_layer(x)
    assert torch.equal(y, run(0))
    assert not torch.equal(y, run(1))
    assert torch.equal((y != base).any(-1), torch.tensor([[False] * 3 + [True] * 2, [False] * 5]))
    lorafuse.patch(model, dropout_rng="torch")
    with pytest.warns(UserWarning, match="or of aLoRA, with dropout"):
        run(0)
