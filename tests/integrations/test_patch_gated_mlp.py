"""Gated MLPs of patched models run as one operator (T1): what PEFT gives, which are one, and when layers are called."""

import copy
import re

import peft
import pytest
import torch
from tiny_models import adapted, assert_close, counting_mlps, run, train_away_from_zero
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lorafuse
from lorafuse.activation import ACTIVATIONS, gate_differentiable
from lorafuse.integrations.report import Group

pytestmark = pytest.mark.usefixtures("small_groups")

H, I = 16, 24
NAMES = ("gate_proj", "up_proj", "down_proj")


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        for name, (n, k) in zip(NAMES, ((I, H), (I, H), (H, I)), strict=True):
            setattr(self, name, nn.Linear(k, n, bias=name == "up_proj"))
        self.act_fn = nn.SiLU()
        self.factor = 1.0

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class UpFirst(Mlp):
    def forward(self, x):
        up = self.up_proj(x)
        return self.down_proj(up * F.gelu(self.gate_proj(x), approximate="tanh"))


class Dropped(Mlp):
    def forward(self, x):
        return self.down_proj(F.dropout(self.act_fn(self.gate_proj(x)), 0.1, self.training) * self.up_proj(x))


class Scaled(Mlp):
    def forward(self, x):
        return 0.5 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Shifted(Mlp):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x + 1))


class Quick(Mlp):
    def forward(self, x):
        gate = self.gate_proj(x)
        return self.down_proj(gate * torch.sigmoid(1.702 * gate) * self.up_proj(x))


class ByWeight(Mlp):
    def forward(self, x):
        return self.down_proj(self.act_fn(F.linear(x, self.gate_proj.weight)) * self.up_proj(x))


class Failing(Mlp):
    def forward(self, x):
        return super().forward(x.view(-1, 5, H))


class Normed(Mlp):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(I)

    def forward(self, x):
        return self.down_proj(self.norm(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Factored(Mlp):
    """With an attribute that is 1 when the model is patched."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.factor * self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    """No gate."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(H, I), nn.Linear(I, H)

    def forward(self, x):
        return self.down_proj(F.relu(self.up_proj(x)))


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(H, 2 * I), nn.Linear(I, H)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Net(nn.Module):
    def __init__(self, kind, reentrant):
        super().__init__()
        self.mlps = nn.ModuleList(kind() for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x, *args):
        for mlp in self.mlps:
            x = torch.tanh(x)
            x = x + (mlp(x, *args) if self.reentrant is None else checkpoint(mlp, x, use_reentrant=self.reentrant))
        return x


def net(kind=Mlp, reentrant=None, **settings):
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | settings
    model = peft.get_peft_model(Net(kind, reentrant), peft.LoraConfig(**settings)).eval()
    return train_away_from_zero(model)


def pair(*args, **settings):
    stock = net(*args, **settings)
    patched = copy.deepcopy(stock)
    return stock, patched, lorafuse.patch(patched, groups=True)


def mlp_of(model):
    return model.base_model.model.mlps[0]


def x_of(rows=5):
    return torch.randn(2, rows, H, generator=torch.Generator().manual_seed(1))


def step(model, x=None, seed=7):
    x = (x_of() if x is None else x).clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    y = model(x)
    y.square().sum().backward()
    results = {"y": y.detach(), "dx": x.grad}
    return results | {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}


class TestWhichAreOne:
    @pytest.mark.parametrize("family", ["llama with biases", "gemma3", "t5"])
    def test_a_family(self, family):
        stock = adapted(family)
        patched = copy.deepcopy(stock)
        report = lorafuse.patch(patched, groups=True)
        expected = [group for group in report.groups if group.kind == "gated_mlp"]
        with counting_mlps() as calls:
            actual = run(patched)
        assert calls.call_count == len(expected) == (4 if family == "t5" else 2)
        assert_close(actual, run(stock))

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_an_activation(self, activation):
        class Gated(Mlp):
            def forward(self, x):
                return self.down_proj(gate_differentiable(activation, self.gate_proj(x), self.up_proj(x)))

        stock, patched, report = pair(Gated)
        assert [group.kind for group in report.groups] == ["gated_mlp"] * 2
        with counting_mlps() as calls:
            assert_close(step(patched), step(stock))
        assert [call.args[2] for call in calls.call_args_list] == [activation] * 2

    def test_clamped_swiglu(self):
        class Clamped(Mlp):
            def forward(self, x):
                gate, up = self.gate_proj(x).clamp(max=7.0), self.up_proj(x).clamp(-7.0, 7.0)
                return self.down_proj((up + 1) * gate * torch.sigmoid(1.702 * gate))

        stock, patched, report = pair(Clamped)
        assert [group.kind for group in report.groups] == ["gated_mlp"] * 2
        assert_close(step(patched), step(stock))

    def test_the_report(self):
        *_, report = pair()
        assert report.groups == [Group(f"base_model.model.mlps.{i}", "gated_mlp", NAMES) for i in range(2)]
        assert "grouped      2  gated_mlp  gate_proj, up_proj, down_proj" in str(report)

    @pytest.mark.parametrize(
        ("kind", "reason"),
        [
            (Dropped, "between its layers lies more than"),
            (Quick, "between its layers lies more than"),
            (Scaled, r"its forward is not down\(act\(gate\(x\)\) · up\(x\)\)"),
            (Shifted, r"its forward is not down\(act\(gate\(x\)\) · up\(x\)\)"),
            (ByWeight, "does not call each of its layers once"),
            (Failing, "its forward fails on a small input: RuntimeError"),
            (Normed, "norm has hooks, parameters or children"),
            (Fused, r"gate and up are one layer \(gate_up_proj\)"),
        ],
    )
    def test_not_one(self, kind, reason):
        stock, patched, report = pair(kind)
        assert [one.kind for one in report.apart] == ["gated_mlp"] * 2
        assert re.search(reason, report.apart[0].reason)
        with counting_mlps() as calls:
            assert_close(step(patched), step(stock))
        assert calls.call_count == 0

    def test_no_gate(self):
        *_, report = pair(Plain)
        assert report.apart == report.groups == []

    def test_other_adapters(self):
        model = net(target_modules=["up_proj"])
        velora = peft.tuners.lora.VeloraConfig(num_groups=4)
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["down_proj"], velora_config=velora))
        model.set_adapter("other")
        report = lorafuse.patch(model, groups=True)
        assert report.apart[0].reason.startswith("down_proj is left to PEFT")

    def test_a_layer_with_dora_runs_alone(self):
        stock = net(target_modules=["down_proj"], use_dora=True)
        patched = copy.deepcopy(stock)
        assert lorafuse.patch(patched, groups=True).skipped == []
        with counting_mlps() as calls:
            assert_close(step(patched), step(stock))
        assert calls.call_count == 0

    @pytest.mark.parametrize("target", NAMES)
    def test_one_adapted_layer(self, target):
        stock, patched, _ = pair(target_modules=[target])
        with counting_mlps() as calls:
            assert_close(step(patched), step(stock))
        assert calls.call_count == 2

    def test_looking_changes_nothing(self):
        model, called = net(Dropped).train(), []
        for module in model.modules():
            if isinstance(module, (Net, Mlp)) or hasattr(module, "base_layer"):
                module.register_forward_hook(lambda *_: called.append(0))
        state, modules = torch.get_rng_state(), dict(model.named_modules())
        assert "between its layers" in lorafuse.patch(model, groups=True).apart[0].reason
        assert torch.equal(torch.get_rng_state(), state)
        assert called == []
        assert dict(model.named_modules()) == modules


def test_saved_are_gate_and_up():
    def saved(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append((t.data_ptr(), t.shape)) or t, lambda t: t
        ):
            model(x_of().requires_grad_())
        frozen = {p.data_ptr() for p in model.parameters()}
        return [shape for pointer, shape in set(sizes) if pointer not in frozen and shape[-1] == I]

    stock, patched, _ = pair()
    # of two MLPs: gate and up each; silu(gate) and h too, and autograd keeps none of them twice
    assert len(saved(patched)) == 4
    assert len(saved(stock)) == 8
