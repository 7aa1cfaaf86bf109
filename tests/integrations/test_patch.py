"""`patch`, `unpatch` and the report (T1): what changes, what must not, what is refused and how it is said."""

import copy

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.config import VeloraConfig
from tiny_models import (
    Mlp,
    adapted,
    assert_same_model,
    counting_fused,
    lora_config,
    patched_copy,
    run,
    tiny,
    train_away_from_zero,
)
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

import lorafuse
from lorafuse.backends import base as backends
from lorafuse.integrations import hf_mixed, hf_peft
from lorafuse.testing.numerics import relative_l2, tolerance


def surface(model):
    """What others see of a model: names, flags, attributes, classes, text."""
    return {
        "state": {name: (t.shape, t.dtype, t.data_ptr()) for name, t in model.state_dict().items()},
        "flags": {name: (p.requires_grad, id(p)) for name, p in model.named_parameters()},
        "attributes": {name: list(module.__dict__) for name, module in model.named_modules()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "text": repr(model),
    }


class TestPatch:
    def test_only_classes_change(self):
        model = adapted()
        before = surface(model)
        report = lorafuse.patch(model)
        after = surface(model)
        assert after["state"] == before["state"]
        assert after["flags"] == before["flags"]
        changed = {name for name in before["classes"] if after["classes"][name] is not before["classes"][name]}
        # of PEFT's model too, which refuses mixed batches in training, and of MLPs that are one operator
        layers = {patched.name for patched in report.patched}
        mlps = {group.name for group in report.groups if group.kind == "gated_mlp"}
        assert len(mlps) == 2
        assert changed == {"base_model", *layers, *mlps}
        assert {after["classes"][name] for name in layers} == {hf_peft.FusedLinear}
        assert after["classes"]["base_model"] is hf_mixed.FusedLoraModel
        # PEFT names layers by their class
        assert after["text"] == before["text"]

    def test_unpatch_restores_exactly(self):
        model, never = adapted(lora_dropout=0.2).train(), adapted(lora_dropout=0.2).train()
        before = surface(model)
        lorafuse.patch(model)
        run(model)
        model.zero_grad()
        assert lorafuse.unpatch(model) == 14
        assert surface(model) == before
        got, expected = run(model), run(never)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        assert lorafuse.unpatch(model) == 0

    def test_twice_is_once(self):
        model = adapted()
        first = lorafuse.patch(model)
        before = surface(model)
        second = lorafuse.patch(model)
        assert surface(model) == before
        assert second == first
        assert lorafuse.unpatch(model) == 14

    def test_again_takes_in_new_layers(self):
        stock = adapted(target_modules=["q_proj"])
        patched, report = patched_copy(stock)
        assert len(report.patched) == 2
        for model in (stock, patched):
            torch.manual_seed(4)
            model.add_adapter("wide", lora_config(target_modules=["q_proj", "up_proj"]))
            train_away_from_zero(model.eval(), "wide").set_adapter("wide")
        with counting_fused() as calls:
            assert_same_model(patched, stock)
        assert calls.call_count == 2
        assert len(lorafuse.patch(patched).patched) == 4
        with counting_fused() as calls:
            assert_same_model(patched, stock)
        assert calls.call_count == 4

    def test_a_part_of_a_model(self):
        stock = adapted()
        patched = copy.deepcopy(stock)
        assert len(lorafuse.patch(patched.base_model.model.model.layers[0]).patched) == 7
        with counting_fused() as calls:
            assert_same_model(patched, stock)
        assert calls.call_count == 7

    def test_a_single_layer(self):
        layer = adapted().base_model.model.model.layers[0].mlp.up_proj
        assert lorafuse.patch(layer).patched == [("", "linear", "eager")]
        assert type(layer) is hf_peft.FusedLinear

    def test_an_adapter_without_peft_model(self):
        """transformers' own `add_adapter` makes the same layers."""
        try:
            check_peft_version(min_version=MIN_PEFT_VERSION)
        except ValueError as error:
            pytest.skip(f"transformers {transformers.__version__}: {error}")
        stock = tiny()
        stock.add_adapter(lora_config())
        train_away_from_zero(stock.eval())
        patched, report = patched_copy(stock, strict=True)
        assert len(report.patched) == 14
        assert_same_model(patched, stock)

    def test_the_backend_is_kept(self):
        model = adapted()
        assert {p.backend for p in lorafuse.patch(model, backend="eager").patched} == {"eager"}
        with counting_fused() as calls:
            run(model)
        assert {call.args[-1] for call in calls.call_args_list} == {"eager"}
        lorafuse.patch(model, backend="auto")
        with counting_fused() as calls:
            run(model)
        # none named: lorafuse.use_backend decides at every call
        assert {call.args[-1] for call in calls.call_args_list} == {None}


class TestReport:
    def test_its_table(self):
        model = train_away_from_zero(peft.get_peft_model(Mlp(), lora_config(target_modules="first|second|embedding")))
        report = lorafuse.patch(model)
        prefix = "base_model.model."
        assert report.patched == [(f"{prefix}first", "linear", "eager"), (f"{prefix}second", "linear", "eager")]
        reason = "peft.tuners.lora.layer.Embedding is not a LoRA layer over nn.Linear"
        assert report.skipped == [(f"{prefix}embedding", "embedding", reason)]
        assert report.patched[0].backend == "eager"
        assert report.skipped[0].reason == reason
        assert str(report).splitlines() == [
            "lorafuse: 2 adapted layers patched, 1 left to PEFT",
            "  patched      2  linear     eager",
            f"  skipped      1  embedding  {reason}",
            f"                   {prefix}embedding",
        ]

    @pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:lorafuse.patch patched nothing")
    def test_a_long_list_is_cut(self):
        text = str(lorafuse.patch(adapted("gpt2")))
        assert "0 adapted layers patched, 8 left to PEFT" in text
        assert text.endswith("… and 5 more")


class Experts(nn.Module):
    """Weights as parameters, the target of PEFT's `target_parameters`."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(20, 20)
        self.w = nn.Parameter(torch.randn(3, 20, 12) / 5)

    def forward(self, x):
        return torch.einsum("bk,ekn->bn", self.first(x), self.w)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(20, 2, batch_first=True)
        self.second = nn.Linear(20, 12)

    def forward(self, x):
        return self.second(self.attention(x, x, x)[0])


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def ids():
    return torch.randint(16, (3, 5))


# Models with layers that are not taken: the model, its adapter, an input, and per skipped layer kind and reason.
SKIPPED = {
    "VeLoRA": (
        Mlp,
        lora_config(target_modules="first|second", velora_config=VeloraConfig(num_groups=4)),
        ids,
        {"linear": "variant of LoRA (Velora)"},
    ),
    "embedding": (Mlp, lora_config(target_modules="first|embedding"), ids, {"embedding": "not a LoRA layer over"}),
    "Conv2d": (Mlp, lora_config(target_modules="first|convolution"), ids, {"conv2d": "not a LoRA layer over"}),
    "Conv1d": (Mlp, lora_config(target_modules="first|sequence"), ids, {"conv1d": "not a LoRA layer over"}),
    "LoHa": (Mlp, peft.LoHaConfig(target_modules=["first"]), ids, {"linear": "peft.tuners.loha.layer.Linear is not"}),
    "IA3": (
        Mlp,
        peft.IA3Config(target_modules=["first"], feedforward_modules=[]),
        ids,
        {"linear": "peft.tuners.ia3.layer.Linear is not a LoRA layer"},
    ),
    "AdaLoRA": (
        Mlp,
        peft.AdaLoraConfig(target_modules=["first"], total_step=10),
        ids,
        {"svdlinear": "SVDLinear is not a LoRA layer over nn.Linear"},
    ),
    "a subclass with its own forward": (
        lambda: Mlp(OwnLinear),
        lora_config(target_modules="first|second"),
        ids,
        {"linear": "its base is a OwnLinear, not an nn.Linear"},
    ),
    "target parameters": (
        lambda: nn.Sequential(Experts()),
        lora_config(target_modules=["0.first"], target_parameters=["0.w"], lora_dropout=0.0),
        lambda: torch.randn(4, 20),
        {"experts": "Experts is not an experts module of transformers"},
    ),
    "attention": (
        Attention,
        lora_config(target_modules=["attention", "second"]),
        lambda: torch.randn(2, 5, 20),
        {"multiheadattention": "not a LoRA layer over nn.Linear", "linear": "never calls it; PEFT merges"},
    ),
}


@pytest.mark.filterwarnings("ignore:lorafuse.patch patched nothing", "ignore::UserWarning:peft")
@pytest.mark.parametrize("name", SKIPPED)
def test_what_is_skipped(name):
    base, config, make_input, reasons = SKIPPED[name]
    torch.manual_seed(3)
    stock = peft.get_peft_model(base(), config).eval()
    stock = train_away_from_zero(stock, "ia3_" if name == "IA3" else "hada_" if name == "LoHa" else "lora_")
    patched, report = patched_copy(stock)
    assert {skipped.kind for skipped in report.skipped} == reasons.keys()
    assert all(reasons[skipped.kind] in skipped.reason for skipped in report.skipped)
    assert bool(report.patched) == (name not in ("VeLoRA", "LoHa", "IA3", "AdaLoRA"))
    x = make_input()
    y, expected = patched(x), stock(x)
    assert relative_l2(y, expected) <= tolerance(torch.float32)
    y.sum().backward(), expected.sum().backward()
    gradients = dict(patched.named_parameters())
    for name, parameter in stock.named_parameters():
        if parameter.grad is not None:
            assert relative_l2(gradients[name].grad, parameter.grad) <= tolerance(torch.float32), name
    classes, text = surface(stock)["classes"], repr(stock)
    with pytest.raises(ValueError, match=r"(?s)strict=True\) changed nothing: .*left to PEFT"):
        lorafuse.patch(stock, strict=True)
    assert (surface(stock)["classes"], repr(stock)) == (classes, text)


def test_a_tuner_from_elsewhere():
    class Foreign(nn.Module, peft.tuners.tuners_utils.BaseTunerLayer):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.base_layer(x)

    Foreign.__module__ = "elsewhere"
    with pytest.warns(UserWarning, match="patched nothing"):
        report = lorafuse.patch(nn.Sequential(Foreign()))
    assert [skipped.reason.startswith("elsewhere.") for skipped in report.skipped] == [True]


class TestBadInput:
    @pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(), Mlp()])
    def test_no_adapters(self, model):
        before = surface(model)
        with pytest.warns(UserWarning, match=f"{type(model).__name__} has no adapted layer.*get_peft_model"):
            report = lorafuse.patch(model)
        assert (report.patched, report.skipped) == ([], [])
        with pytest.raises(ValueError, match="strict=True.*has no adapted layer"):
            lorafuse.patch(model, strict=True)
        assert surface(model) == before
        assert lorafuse.unpatch(model) == 0

    @pytest.mark.parametrize("model", [None, "model", {}, torch.zeros(3)])
    def test_not_a_module(self, model):
        with pytest.raises(TypeError, match=f"patch got a {type(model).__name__}"):
            lorafuse.patch(model)
        with pytest.raises(TypeError, match=f"unpatch got a {type(model).__name__}"):
            lorafuse.unpatch(model)

    @pytest.mark.parametrize("backend", ["torch", "", "EAGER"])
    def test_unknown_backend(self, backend):
        model = adapted()
        before = surface(model)
        with pytest.raises(ValueError, match=f"backend='{backend}' is not known; use one of 'auto', 'eager'"):
            lorafuse.patch(model, backend=backend)
        assert surface(model) == before

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a CUDA device may have this backend")
    @pytest.mark.parametrize("order", ["fresh", "patched"])
    def test_backend_that_cannot_run(self, order):
        model = adapted()
        if order == "patched":
            lorafuse.patch(model)
        before = surface(model)
        with pytest.raises(lorafuse.BackendUnavailable, match="backend='cuda' is not available: .*fix: "):
            lorafuse.patch(model, backend="cuda")
        assert surface(model) == before

    def test_x_of_another_dtype(self):
        """PEFT refuses it too; the message says what to do."""
        stock = adapted()
        patched, _ = patched_copy(stock)
        inputs = {"inputs_embeds": torch.randn(2, 5, 32, dtype=torch.float64)}
        with pytest.raises(RuntimeError):
            stock(**inputs)
        with pytest.raises(TypeError, match="x torch.float64 and weight torch.float32.*cast x"):
            patched(**inputs)

    def test_x_of_another_size(self):
        layer = patched_copy(adapted())[0].base_model.model.model.layers[0].mlp.up_proj
        with pytest.raises(ValueError, match=r"x \[2, 31\], weight \[40, 32\]"):
            layer(torch.randn(2, 31))


class TestMetaDevice:
    def test_language_model(self):
        with torch.device("meta"):
            model = peft.get_peft_model(tiny(), lora_config())
        report = lorafuse.patch(model, strict=True)
        assert len(report.patched) == 14
        logits = model(inputs_embeds=torch.empty(2, 5, 32, device="meta")).logits
        assert logits.is_meta
        assert logits.shape == (2, 5, 64)

    def test_backward(self):
        model = nn.Sequential(nn.Linear(20, 24), nn.Linear(24, 12)).to("meta")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1"], lora_dropout=0.5)).train()
        lorafuse.patch(model, strict=True)
        model(torch.empty(3, 20, device="meta")).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            assert not parameter.requires_grad or parameter.grad.shape == parameter.shape


class TestBackendOfPatchedLayers:
    """No other backend is here yet, so one that is not available shows whose choice a call follows."""

    @pytest.fixture(autouse=True)
    def _default(self, monkeypatch):
        monkeypatch.setattr(backends, "current", lambda: "cuda")

    @pytest.fixture
    def layer(self, request):
        patched = copy.deepcopy(adapted())
        lorafuse.patch(patched, backend=request.param)
        return patched.base_model.model.model.layers[0].mlp.up_proj

    @pytest.mark.parametrize("layer", ["auto"], indirect=True)
    def test_auto_follows_the_default(self, layer):
        with pytest.raises(lorafuse.BackendUnavailable, match="backend='cuda' is not available"):
            layer(torch.randn(2, 32))

    @pytest.mark.parametrize("layer", ["eager"], indirect=True)
    def test_a_name_holds(self, layer):
        assert layer(torch.randn(2, 32)).shape == (2, 40)
