"""PEFT's `adapter_names` under `lorafuse.patch` (T1): the same results as PEFT's loop, in training too."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import lorafuse
from lorafuse import formats
from lorafuse.backends import aten_wide
from lorafuse.integrations import gated_mlp, hf_mixed, hf_peft
from lorafuse.testing.numerics import relative_l2, tolerance

NAMES = ["b", "__base__", "a", "b", "c", "a"]


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.q, self.o = nn.Linear(24, 40, bias=bias), nn.Linear(40, 16)

    def forward(self, x):
        return self.o(torch.tanh(self.q(x)))


def model_of(dropout=0.0, **more):
    """Adapters of three ranks, one of which has one layer only; b is not zero."""
    base = Net()
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["q", "o"], lora_dropout=dropout), "a")
    model.add_adapter("b", peft.LoraConfig(r=8, lora_alpha=4, target_modules=["q", "o"], lora_dropout=dropout, **more))
    model.add_adapter("c", peft.LoraConfig(r=1, target_modules=["q"], lora_dropout=dropout))
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(p)
    return model


@pytest.fixture
def fused(monkeypatch):
    """Counts the calls that ran fused."""
    calls, run = [], hf_peft.run_mixed

    def counting(*args):
        y = run(*args)
        if isinstance(y, torch.Tensor):
            calls.append(args[2])
        return y

    monkeypatch.setattr(hf_peft, "run_mixed", counting)
    return calls


def step(model, x, **more):
    model.zero_grad()
    y = model(x, adapter_names=NAMES, **more)
    F.mse_loss(y, torch.ones_like(y), reduction="sum").backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dims", [(), (5,), (2, 3, 2)])
def test_equal_to_pefts_loop_in_evaluation_and_training(dims, fused):
    model = model_of()
    x = torch.randn(len(NAMES), *dims, 24)
    y, grads = step(model.eval(), x)
    lorafuse.patch(model)
    for mode in (False, True):
        ours, own = step(model.train(mode), x)
        assert relative_l2(ours, y) <= tolerance(torch.float32)
        assert own.keys() == grads.keys()
        for name, grad in grads.items():
            assert relative_l2(own[name], grad) <= tolerance(torch.float32), name
    assert len(fused) == 4
    assert model.base_model.training
    lorafuse.unpatch(model)
    with pytest.raises(ValueError, match="training mode"):
        model(x, adapter_names=NAMES)
    assert torch.equal(step(model.eval(), x)[0], y)


class Block(nn.Module):
    """Layers that `patch` groups."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 32)
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=96))
        self.without = None

    def forward(self, x):
        q, k, v = (one(x) for one in (self.q_proj, self.k_proj, self.v_proj) if one is not self.without)
        return self.mlp(x) + q + torch.cat((k, v), -1)


TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def block_of(base=None, dropout=0.0):
    """A block with adapters of three ranks, of which one has some layers only."""
    base = Block() if base is None else base
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=TARGETS, lora_dropout=dropout), "a")
    model.add_adapter("b", peft.LoraConfig(r=8, target_modules=TARGETS, lora_dropout=dropout))
    model.add_adapter("c", peft.LoraConfig(r=1, target_modules=["q_proj", "down_proj"], lora_dropout=dropout))
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(p)
    return model


@pytest.fixture
def operators(monkeypatch):
    """How many layers each call of an operator of many adapters had."""
    seen = []
    for module, name in ((hf_mixed, "lora_linears_multi"), (gated_mlp, "lora_gated_mlp_multi")):
        run = getattr(module, name)

        def counting(x, offsets, *layers, run=run, **more):
            seen.append(len(layers) if len(layers) == 3 else len(layers[0]))
            return run(x, offsets, *layers, **more)

        monkeypatch.setattr(module, name, counting)
    return seen


def test_groups_run_as_one_operator(operators):
    model = block_of()
    # enough elements for a group in other calls
    x = torch.randn(len(NAMES), 100, 64)
    y, grads = step(model.eval(), x)
    report = lorafuse.patch(model)
    assert {group.kind for group in report.groups} == {"siblings", "gated_mlp"}
    for mode in (False, True):
        ours, own = step(model.train(mode), x)
        assert relative_l2(ours, y) <= tolerance(torch.float32)
        assert own.keys() == grads.keys()
        assert all(relative_l2(own[name], grad) <= tolerance(torch.float32) for name, grad in grads.items())
    assert operators == [3, 3] * 2
    counts = {layer.name.rpartition(".")[2]: (sum(layer.fused.values()), layer.grouped)
              for layer in lorafuse.status(model).layers}  # fmt: skip
    assert counts == dict.fromkeys(TARGETS, (2, 2))
    # without gradients layers run alone, as in other calls
    with torch.no_grad():
        assert relative_l2(model(x, adapter_names=NAMES), y) <= tolerance(torch.float32)
    assert operators == [3, 3] * 2 + [1] * 6


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("tokens", [1, 90])
def test_groups_leave_an_adapter_its_bits(operators, tokens, dropout):
    """Those of a batch of its own, whose x is small here and large there."""
    model = block_of(dropout=dropout).train()
    lorafuse.patch(model)
    x, dy = torch.randn(2, len(NAMES), tokens, 64)

    def results(rows):
        torch.manual_seed(1)
        model.zero_grad()
        mine = x[rows].requires_grad_()
        y = model(mine, adapter_names=[NAMES[i] for i in rows])
        y.backward(dy[rows])
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"y": y.detach(), "dx": mine.grad}, grads

    tensors, grads = results(range(len(NAMES)))
    for name in "abc":
        rows = [i for i, other in enumerate(NAMES) if other == name]
        alone, own = results(rows)
        assert all(torch.equal(t, tensors[key][rows]) for key, t in alone.items())
        # an adapter that is in no row has no gradient, not one of zeros that an optimizer would step
        assert all(f".{name}." in key for key in own)
        assert len(own) == (4 if name == "c" else 12)
        assert all(torch.equal(grad, grads[key]) for key, grad in own.items())
    assert set(operators) == {3}


def test_groups_over_a_quantized_base(operators):
    bnb = pytest.importorskip("bitsandbytes")
    base = Block()
    for name, layer in list(base.named_modules()):
        if isinstance(layer, nn.Linear):
            has_bias = layer.bias is not None
            made = bnb.nn.Linear4bit(*layer.weight.shape[::-1], has_bias, torch.float32, quant_type="nf4")
            base.set_submodule(name, made.to("cpu"))
    base.is_loaded_in_4bit = True
    model, x = block_of(base), torch.randn(len(NAMES), 5, 64)
    y, grads = step(model.eval(), x)
    lorafuse.patch(model)
    ours, own = step(model.train(), x)
    assert operators == [3, 3]
    assert relative_l2(ours, y) <= tolerance(torch.float32)
    assert own.keys() == grads.keys()
    assert all(relative_l2(own[name], grad) <= tolerance(torch.float32) for name, grad in grads.items())


def test_groups_whose_layers_are_called_otherwise(operators):
    model = block_of().train()
    lorafuse.patch(model)
    x = torch.randn(len(NAMES), 3, 64)
    y = step(model, x)[0]
    # a sibling that nobody calls leaves, and a layer with a hook makes its MLP run layer by layer, gate and up as one
    block = model.base_model.model
    block.without, block.forward = block.v_proj, lambda x: block.q_proj(x) + torch.cat([block.k_proj(x)] * 2, -1)
    for _ in range(2):
        step(model, x)
    assert operators[2:] == [3, 2]
    del block.forward
    block.without = None
    operators.clear()
    handle = block.mlp.down_proj.register_forward_hook(lambda *_: None)
    assert relative_l2(step(model, x)[0], y) <= tolerance(torch.float32)
    assert operators == [2, 1, 2, 1]
    handle.remove()
    # a call that does not end leaves nothing, and copies group their own layers
    handle = block.k_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(model, x)
    handle.remove()
    # nor do PEFT's hooks stay, which would give the next call the names of this one
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert relative_l2(step(copy.deepcopy(model), x)[0], y) <= tolerance(torch.float32)
    lorafuse.patch(model, groups=False)
    operators.clear()
    assert relative_l2(step(model, x)[0], y) <= tolerance(torch.float32)
    assert operators == [1] * 6


def test_an_adapter_is_bit_for_bit_what_it_is_alone(fused):
    model = model_of()
    lorafuse.patch(model)
    x = torch.randn(len(NAMES), 5, 24)
    y = model(x, adapter_names=NAMES)
    for name in "abc":
        mine = [i for i, other in enumerate(NAMES) if other == name]
        assert torch.equal(model(x[mine], adapter_names=[name] * len(mine)), y[mine])
    assert fused


def test_dropout_in_training(fused):
    model = model_of(dropout=0.5)
    lorafuse.patch(model)
    x = torch.randn(len(NAMES), 5, 24)
    model.eval()
    expected = model(x, adapter_names=NAMES)
    model.train()
    torch.manual_seed(3)
    y = model(x, adapter_names=NAMES)
    torch.manual_seed(3)
    assert torch.equal(model(x, adapter_names=NAMES), y)
    assert relative_l2(y, expected) > 0.05
    # without an adapter nothing is dropped
    assert relative_l2(y[1], expected[1]) <= tolerance(torch.float32)
    assert len(fused) == 6
    # the mask of an adapter is that of it alone
    for name in "abc":
        mine = [i for i, other in enumerate(NAMES) if other == name]
        torch.manual_seed(3)
        assert torch.equal(model(x[mine], adapter_names=[name] * len(mine)), y[mine])


def test_autocast(fused):
    model = model_of()
    x = torch.randn(len(NAMES), 5, 24)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x, adapter_names=NAMES)
        lorafuse.patch(model)
        y = model(x, adapter_names=NAMES)
    assert y.dtype is torch.bfloat16
    assert relative_l2(y, expected) <= tolerance(torch.bfloat16)
    assert fused


def test_what_cannot_be_fused_is_pefts(fused):
    model = model_of(lora_bias=True)
    nn.init.normal_(model.base_model.model.q.lora_B["b"].bias)
    x = torch.randn(len(NAMES), 24)
    y = model.eval()(x, adapter_names=NAMES)
    lorafuse.patch(model)
    with pytest.warns(UserWarning, match="a bias of lora_B"):
        assert torch.equal(model.train()(x, adapter_names=NAMES), y)
    assert not fused
    # nobody's adapter here
    y = model(x, adapter_names=["__base__"] * len(NAMES))
    with model.disable_adapter():
        assert torch.equal(model(x), y)


def test_pefts_checks_stay():
    model = model_of()
    lorafuse.patch(model)
    x = torch.randn(len(NAMES), 24)
    with pytest.raises(ValueError, match="non-existing"):
        model(x, adapter_names=["d"] * len(NAMES))
    with pytest.raises(ValueError, match="Length of"):
        model(x[:2], adapter_names=NAMES)
    model.base_model.model.gradient_checkpointing = True
    with pytest.raises(ValueError, match="use_adapters covers backward"):
        model(x, adapter_names=NAMES)
    model.base_model.model.gradient_checkpointing = False
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="merged"):
        model(x, adapter_names=NAMES)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_the_models_own_is_refused_in_backward(reentrant):
    """Its rows would all have the active adapter there."""
    model = model_of()
    lorafuse.patch(model)
    base, x = model.base_model.model, torch.randn(len(NAMES), 24, requires_grad=True)
    expected = model(x)
    forward, base.forward = base.forward, lambda x: checkpoint(forward, x, use_reentrant=reentrant)
    y = model(x, adapter_names=NAMES)
    with pytest.raises(RuntimeError, match="runs again in backward"):
        y.sum().backward()
    assert torch.equal(model(x), expected)


def test_copies_and_pickles_are_patched_too():
    model = model_of()
    lorafuse.patch(model)
    x = torch.randn(len(NAMES), 24)
    twin = copy.deepcopy(model).train()
    assert torch.equal(twin(x, adapter_names=NAMES), model(x, adapter_names=NAMES))
    lorafuse.unpatch(twin)
    assert type(twin.base_model) is peft.LoraModel
    assert type(model.base_model) is hf_mixed.FusedLoraModel


def test_quantized_base(fused):
    bnb = pytest.importorskip("bitsandbytes")
    model = Net()
    model.o = bnb.nn.Linear4bit(40, 16, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    model.is_loaded_in_4bit = True
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q", "o"]), "a")
    model.add_adapter("b", peft.LoraConfig(r=5, target_modules=["q", "o"]))
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p.requires_grad_())
    names, x = ["b", "a", "b", "__base__"], torch.randn(4, 3, 24)
    expected = model.eval()(x, adapter_names=names)
    lorafuse.patch(model)
    y = model.train()(x, adapter_names=names)
    assert relative_l2(y, expected) <= tolerance(torch.float32)
    assert len(fused) == 2


@pytest.mark.parametrize("has_products", [False, True], ids=["fp32 products", "bf16 products"])
def test_a_bf16_quantized_base_rounds_as_it_does_unmixed(has_products, monkeypatch, fused):
    """One adapter's batch through the operator of many is as near to fp64 as through that of one."""
    bnb = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(aten_wide, "has_products", lambda dtype: has_products)
    base = nn.Sequential(bnb.nn.Linear4bit(128, 96, bias=True, compute_dtype=torch.bfloat16, quant_type="nf4"))
    base = base.to(torch.bfloat16).to("cpu")
    base.is_loaded_in_4bit = True
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False), "a")
    lorafuse.patch(model)
    layer = model.base_model.model[0]
    a, b, scale = layer.lora_A["a"].weight, layer.lora_B["a"].weight, layer.scaling["a"]
    x, dy = torch.randn(64, 128).to(torch.bfloat16), torch.randn(64, 96).to(torch.bfloat16)

    def results(run, x):
        model.zero_grad()
        x = x.clone().requires_grad_()
        y = run(x)
        y.backward(dy.to(y.dtype))
        return {"y": y.detach(), "dx": x.grad, "da": a.grad.clone(), "db": b.grad.clone()}

    w = formats.adopt(layer.base_layer).decoded(torch.bfloat16).data.double()
    bias = layer.base_layer.bias.double()
    exact = results(lambda x: F.linear(x, w, bias) + scale * (x @ a.double().t() @ b.double().t()), x.double())
    alone, mixed = (results(run, x) for run in (model, lambda x: model(x, adapter_names=["a"] * 64)))
    for name, t in exact.items():
        assert relative_l2(mixed[name], t) <= 1.02 * relative_l2(alone[name], t), name
    assert len(fused) == 1
