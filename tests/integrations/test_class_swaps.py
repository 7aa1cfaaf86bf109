"""Class swaps of torchtune and NeMo Automodel (T1), against their packages where installed, else their interfaces."""

import copy
import importlib
import pickle
import sys

import pytest
import torch
from fake_trainers import module_of, provide, randomize
from torch import nn

import lorafuse
from lorafuse.testing.numerics import relative_l2, tolerance


def gradients(model, x):
    """y and the gradient of x and of every trained parameter."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return {"y": y.detach(), "dx": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        assert reference.any(), name
        assert relative_l2(actual[name], reference) <= tolerance(torch.float32), name


class TestTorchtune:
    @pytest.fixture
    def integration(self, monkeypatch):
        provide(monkeypatch, "torchtune")
        return module_of("torchtune", monkeypatch)

    def layer(self, **options):
        torch.manual_seed(1)
        kind = importlib.import_module("torchtune.modules.peft").LoRALinear
        model = nn.Sequential(kind(12, 10, 3, 6.0, **options), nn.Tanh(), kind(10, 8, 2, 2.0, **options))
        for name, parameter in randomize(model).named_parameters():
            parameter.requires_grad_("lora_" in name)
        return model

    @pytest.mark.parametrize("use_bias", [False, True])
    def test_equal(self, integration, use_bias):
        model, x = self.layer(use_bias=use_bias), torch.randn(2, 5, 12)
        expected, names = gradients(model, x), list(model.state_dict())
        assert len(integration.patch(model, strict=True).patched) == 2
        assert_equal(gradients(model, x), expected)
        assert lorafuse.status(model).fused == 2
        assert list(model.state_dict()) == names
        assert integration.unpatch(model) == 2
        assert_equal(gradients(model, x), expected)
        assert lorafuse.status(model).layers == []

    def test_the_patch_of_peft_leaves_them_alone(self, integration):
        """And names the one that is theirs."""
        model, x = self.layer(), torch.randn(2, 5, 12)
        for patched in (0, 2):
            with pytest.warns(UserWarning, match=r"lorafuse\.integrations\.torchtune\.patch"):
                lorafuse.patch(model)
            model(x)
            assert lorafuse.status(model).fused == patched
            lorafuse.unpatch(model)
            integration.patch(model)
        assert integration.unpatch(model) == 2

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_are_patched(self, integration, copied, monkeypatch):
        # where pickle looks for its functions
        monkeypatch.setitem(sys.modules, "lorafuse.integrations.torchtune", integration)
        model, x = self.layer(), torch.randn(2, 5, 12)
        integration.patch(model, strict=True)
        twin = copied(model)
        assert torch.equal(twin(x), model(x))
        assert integration.unpatch(twin) == integration.unpatch(model) == 2
        assert type(twin[0]) is type(model[0])

    def test_disabled_adapters(self, integration):
        """DPO's reference: the same module without its adapters."""
        model, x = self.layer(), torch.randn(2, 5, 12)
        for layer in (model[0], model[2]):
            layer.disabled = True
        expected = model(x)
        integration.patch(model, strict=True)
        assert torch.equal(model(x), expected)
        assert lorafuse.status(model).fallbacks == 2

    def test_dropout(self, integration):
        model, x = self.layer(dropout=0.5), torch.randn(2, 5, 12)
        expected = model.eval()(x)
        integration.patch(model, strict=True)
        assert relative_l2(model(x), expected) <= tolerance(torch.float32)
        model.train()
        assert relative_l2(model(x), expected) > 0.01
        assert lorafuse.status(model).fallbacks == 0

    def test_what_cannot_run_fused(self, integration):
        model = self.layer()
        model[0].weight.requires_grad_()
        model[2].lora_a.register_forward_hook(lambda module, args, y: None)
        with pytest.warns(UserWarning, match="patched nothing"):
            report = integration.patch(model)
        assert [s.reason.partition(";")[0] for s in report.skipped] == [
            "its base weight is trainable",
            "its factors are not plain nn.Linear without hooks",
        ]

    def test_a_hook_that_came_later_is_run(self, integration):
        model, x = self.layer(), torch.randn(2, 5, 12)
        integration.patch(model, strict=True)
        model[2].lora_b.register_forward_hook(lambda module, args, y: y * 0)
        with pytest.warns(UserWarning, match="a patched LoRALinear runs as it was shipped"):
            y = model(x)
        expected = torch.nn.functional.linear(torch.tanh(model[0](x)), model[2].weight)
        assert relative_l2(y, expected) <= tolerance(torch.float32)

    @pytest.mark.usefixtures("integration")
    def test_without_torchtune(self, monkeypatch):
        module = module_of("torchtune", monkeypatch)
        monkeypatch.setitem(sys.modules, "torchtune.modules.peft", None)
        with pytest.raises(lorafuse.MissingDependency, match="pip install torchtune"):
            module.patch(nn.Linear(2, 2))


class TestAutomodel:
    @pytest.fixture
    def integration(self, monkeypatch):
        provide(monkeypatch, "nemo_automodel")
        return module_of("automodel", monkeypatch)

    def layer(self, **options):
        torch.manual_seed(1)
        patch_linear = importlib.import_module("nemo_automodel.components._peft.lora").patch_linear_module
        options = {"dim": 3, "alpha": 6, "use_triton": False} | options
        model = nn.Sequential(patch_linear(nn.Linear(12, 10), **options), patch_linear(nn.Linear(10, 8), **options))
        return randomize(model)

    @pytest.mark.parametrize("position", ["pre", "post"])
    def test_equal(self, integration, position):
        model, x = self.layer(dropout_position=position), torch.randn(2, 5, 12)
        expected, names = gradients(model, x), list(model.state_dict())
        kinds = [type(layer) for layer in model]
        assert len(integration.patch(model, strict=True).patched) == 2
        assert_equal(gradients(model, x), expected)
        assert lorafuse.status(model).fused == 2
        assert list(model.state_dict()) == names
        assert integration.unpatch(model) == 2
        assert [type(layer) for layer in model] == kinds

    def test_dropout_after_the_adapter_is_nemos(self, integration):
        model = self.layer(dropout=0.5, dropout_position="post").train()
        with pytest.warns(UserWarning, match="patched nothing"):
            report = integration.patch(model)
        assert {s.reason for s in report.skipped} == {"its dropout comes after the adapter"}
        # in evaluation there is none
        assert len(integration.patch(model.eval()).patched) == 2

    def test_its_triton_kernels_are_replaced(self, integration):
        model = self.layer(use_triton=True)
        assert len(integration.patch(model, strict=True).patched) == 2

    def test_its_function_for_an_mlp_calls_patched_layers(self, integration):
        """NeMo's memory-efficient forward of an MLP, on by default, reads the weights of its layers otherwise."""
        from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

        peft = importlib.import_module("nemo_automodel.components._peft.lora")
        torch.manual_seed(1)
        mlp = LlamaMLP(LlamaConfig(hidden_size=12, intermediate_size=10, num_attention_heads=2))
        for name in ("gate_proj", "up_proj", "down_proj"):
            peft.patch_linear_module(getattr(mlp, name), dim=3, alpha=6, dropout_position="pre", use_triton=False)
        model, x = nn.Sequential(randomize(mlp)), torch.randn(2, 5, 12)
        expected = gradients(model, x)
        assert importlib.import_module("nemo_automodel.components._peft.lora_mlp").install_fused_lora_mlp(model) == 1
        assert_equal(gradients(model, x), expected)
        for _ in range(2):
            integration.patch(model, strict=True)
        assert_equal(gradients(model, x), expected)
        status = lorafuse.status(model)
        assert (status.fused, status.fallbacks) == (3, 0)
        assert integration.unpatch(model) == 3
        assert all(layer.use_memory_efficient_lora for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def test_experts_are_listed(self, integration):
        experts = importlib.import_module("nemo_automodel.components._peft.lora").GroupedExpertsLoRA
        model = nn.Sequential(*self.layer(), experts.__new__(experts))
        nn.Module.__init__(model[2])
        report = integration.patch(model)
        assert len(report.patched) == 2
        assert [(row.name, row.kind) for row in report.skipped] == [("2", "GroupedExpertsLoRA")]
        assert "run as NeMo ships them" in str(report)
