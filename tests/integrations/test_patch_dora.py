"""PEFT's DoRA, and the variants that are LoRA with other factors, under `patch` (T1): PEFT's results and gradients."""

import copy

import peft
import pytest
import torch
from dora_reference import reference
from peft.tuners.lora.config import KasaConfig
from quantized_models import adapted, quantize
from test_patch_quantized import Mlp, assert_equal_to_peft, step
from tiny_models import lora_config, tiny, train_away_from_zero
from torch import nn

import lorafuse
from lorafuse.integrations import hf_variants
from lorafuse.testing.numerics import relative_l2, tolerance

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::RuntimeWarning:peft", "ignore::DeprecationWarning"
)
VARIANTS = {
    "dora": {"use_dora": True},
    "dora rslora": {"use_dora": True, "use_rslora": True},
    "mica": {"init_lora_weights": "mica"},
    "kasa": {"kasa_config": KasaConfig()},
}


def mlp(dtype=torch.float32, seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"target_modules": ["up", "down"], "r": 4, "lora_alpha": 6} | settings
    config = peft.LoraConfig(**settings)
    # MiCA's initialization knows no fp64
    model = peft.get_peft_model(Mlp(), config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + 0.3 * torch.randn_like(p))
            elif "lora_B" in name:
                p.normal_(std=0.3)
    return model.train()


def patched_copy(stock):
    patched = copy.deepcopy(stock)
    return patched, lorafuse.patch(patched, strict=True)


@pytest.fixture
def ran(monkeypatch):
    """The DoRA layers that ran fused."""
    calls, run = [], hf_variants.run_dora_layer
    monkeypatch.setattr(lorafuse.integrations.hf_peft, "run_dora_layer", lambda *a: calls.append(0) or run(*a))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_gradient_is_pefts(name, dtype, p, ran):
    stock = mlp(dtype, lora_dropout=p if "dora" in name else 0.0, **VARIANTS[name])
    patched, report = patched_copy(stock)
    assert len(report.patched) == 2
    x = torch.randn(3, 7, 128, dtype=dtype)
    torch.manual_seed(4)
    expected = step(stock, x)
    torch.manual_seed(4)
    actual = step(patched, x)
    assert actual.keys() == expected.keys()
    assert any("magnitude" in key for key in actual) == ("dora" in name)
    for key, t in expected.items():
        assert t.count_nonzero(), key
        assert relative_l2(actual[key], t) <= tolerance(dtype), key
    assert len(ran) == (2 if "dora" in name else 0)
    lorafuse.unpatch(patched)
    torch.manual_seed(4)
    again = step(patched, x)
    assert all(torch.equal(again[key], t) for key, t in expected.items())


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_bf16_is_nearer_than_peft(p):
    """A bf16 model with adapters in bf16: y and every gradient of one layer against fp64."""
    base = nn.Linear(256, 192).bfloat16()
    config = lora_config(target_modules=["0"], use_dora=True, r=16, lora_dropout=p)
    model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    train_away_from_zero(model, "lora_B", 0.3).train()
    layer = model.base_model.model[0]
    operands = layer.lora_A.default.weight, layer.lora_B.default.weight, layer.lora_magnitude_vector.default.weight
    x, dy = torch.randn(128, 256).bfloat16().requires_grad_(), torch.randn(128, 192).bfloat16()

    def run():
        torch.manual_seed(9)
        y = model(x)
        tensors = y, *torch.autograd.grad(y, (x, *operands), dy)
        return dict(zip(("y", "dx", "da", "db", "dm"), tensors, strict=True))

    torch.manual_seed(9)
    keep = torch.empty(x.shape, dtype=torch.bool).bernoulli_(1 - p)
    exact = reference(x, base.weight, base.bias, *operands, dy, layer.scaling["default"], keep if p else None, p)
    theirs = run()
    lorafuse.patch(model, strict=True)
    for name, t in run().items():
        assert t.dtype is torch.bfloat16
        assert relative_l2(t, exact[name]) <= relative_l2(theirs[name], exact[name]), name


@pytest.mark.parametrize("how", ["nf4", "int8", "torchao int8"])
def test_quantized_bases(how, ran):
    pytest.importorskip("torchao" if how.startswith("torchao") else "bitsandbytes")
    stock = adapted(quantize(Mlp(), how), target_modules=["up", "down"], use_dora=True)
    patched, report = patched_copy(stock)
    assert len(report.bases) == 2
    x = torch.randn(3, 7, 128)
    assert_equal_to_peft(step(patched, x), step(stock, x))
    assert len(ran) == 2


def test_a_model_in_training(ran):
    """Siblings and gated MLPs with DoRA run as layers; checkpointing and steps of AdamW give PEFT's losses."""
    stock = train_away_from_zero(peft.get_peft_model(tiny(), lora_config(use_dora=True)), "lora_B").train()
    stock.gradient_checkpointing_enable({"use_reentrant": False})
    stock.enable_input_require_grads()
    patched, report = patched_copy(stock)
    assert len(report.patched) == 14
    ids = torch.randint(64, (2, 7))
    losses = {}
    for model in (stock, patched):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            losses.setdefault(model, []).append(loss.item())
    assert losses[patched] == pytest.approx(losses[stock], rel=1e-5)
    assert losses[stock][2] < losses[stock][0]
    assert len(ran) == 14 * 3 * 2
    with torch.no_grad():
        patched.eval(), stock.eval()
        expected = stock(ids).logits
        assert relative_l2(patched(ids).logits, expected) <= tolerance(torch.float32)
        # merged, the norm of DoRA is that of the merge: PEFT's own path
        patched.merge_adapter()
        assert relative_l2(patched(ids).logits, expected) <= tolerance(torch.float32)
        patched.unmerge_adapter()
        assert relative_l2(patched(ids).logits, expected) <= tolerance(torch.float32)


def test_a_write_into_the_weight_is_seen(ran):
    """Not even a write past autograd's version counters leaves an old norm."""
    model = mlp(use_dora=True)
    patched, _ = patched_copy(model)
    x = torch.randn(5, 128)
    patched(x)
    for one in (model, patched):
        one.base_model.model.up.base_layer.weight.data.mul_(1.7)
    assert_equal_to_peft(step(patched, x), step(model, x))
    assert len(ran) == 4


def change_magnitude(model):
    model.base_model.model.up.lora_magnitude_vector.default.register_forward_hook(lambda *_: None)


def add_dora(model):
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up", "down"], use_dora=True))
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_magnitude, "its magnitude vector has hooks"),
        (add_dora, "several active adapters, one of them DoRA"),
    ],
)
def test_what_stays_with_peft(change, reason):
    stock = mlp(use_dora=True)
    change(stock)
    report = lorafuse.patch(copy.deepcopy(stock))
    assert any(reason in one.reason for one in report.skipped)


def test_kasa_truncates_first():
    """An adapter made on the meta device truncates the base weight in its first forward, which is PEFT's."""
    model = mlp(kasa_config=KasaConfig())
    layer = model.base_model.model.up
    layer._lora_kasa_truncation_deferred.add("default")
    patched, x = copy.deepcopy(model), torch.randn(5, 128)
    report = lorafuse.patch(patched)
    assert "KaSA truncates" in report.skipped[0].reason
    assert relative_l2(patched(x), model(x)) <= tolerance(torch.float32)
    assert lorafuse.patch(patched).skipped == []
    assert relative_l2(patched(x), model(x)) <= tolerance(torch.float32)
