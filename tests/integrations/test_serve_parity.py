"""The numerics of servers' LoRA kernels (T1): the roundings, step by step; gradients; what `patch` leaves to PEFT."""

import copy

import moe_models
import peft
import pytest
import torch
from quantized_models import adapted, quantize
from test_patch_quantized import Mlp, step
from tiny_models import lora_config, tiny, train_away_from_zero
from torch import nn

import lorafuse
from lorafuse.functional import lora_linear
from lorafuse.testing.numerics import relative_l2, tolerance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")

SERVERS = ["vllm", "sglang"]


def rounded(t, dtype):
    """The values of a dtype, in fp32."""
    return t.to(dtype).float()


def by_steps(x, w, bias, a, b, scale, server):
    """y as the server's kernels round it: every product in fp32, every result that is stored in x's dtype."""
    dtype = x.dtype
    x, w, a, b = x.float(), w.float(), rounded(a, dtype), rounded(b, dtype)
    shrunk = rounded(x @ a.T, dtype)
    if server == "vllm":
        delta = rounded(shrunk @ rounded(scale * b, dtype).T, dtype)
    else:
        delta = rounded(scale * (shrunk @ b.T), dtype)
    y = rounded(x @ w.T if bias is None else x @ w.T + bias.float(), dtype)
    return (y + delta).to(dtype)


def operands(dtype, adapters=torch.float32, M=24, N=40, K=48, R=6):
    g = torch.Generator().manual_seed(3)
    # small integers over a power of two: every sum is exact in any order, so that only roundings differ
    x, w, bias, a, b = (
        torch.randint(-9, 10, size, generator=g).float() / 8 for size in ((M, K), (N, K), (N,), (R, K), (N, R))
    )
    return x.to(dtype), w.to(dtype), bias.to(dtype), a.to(adapters), b.to(adapters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [2.0, 0.7])
@pytest.mark.parametrize("server", SERVERS)
def test_every_rounding(server, scale, dtype):
    """Bit for bit, and none of the steps is idle: lorafuse's own y, and the other server's, are others."""
    x, w, bias, a, b = operands(dtype)
    y = lora_linear(x.view(2, 12, -1), w, a, b, scale=scale, bias=bias, numerics=server)
    assert torch.equal(y.view(24, -1), by_steps(x, w, bias, a, b, scale, server))
    assert torch.equal(lora_linear(x, w, a, b, scale=scale, numerics=server), by_steps(x, w, None, a, b, scale, server))
    assert not torch.equal(y.view(24, -1), lora_linear(x, w, a, b, scale=scale, bias=bias))
    other = by_steps(x, w, bias, a, b, scale, SERVERS[server == "vllm"])
    # a power of two in b, or in the sum, is the same
    assert torch.equal(y.view(24, -1), other) == (scale == 2.0)


@pytest.mark.parametrize("server", SERVERS)
def test_gradients_are_those_of_lora_linear(server):
    x, w, bias, a, b = (t.double() for t in operands(torch.float64))
    leaves = [t.requires_grad_() for t in (x, a, b, bias)]
    dy = torch.randn(24, 40, dtype=torch.float64)

    def run(numerics):
        y = lora_linear(x, w, a, b, scale=0.7, bias=bias, numerics=numerics)
        return y, *torch.autograd.grad(y, leaves, dy)

    for actual, expected in zip(run(server), run("fused"), strict=True):
        assert expected.count_nonzero()
        assert relative_l2(actual, expected) <= tolerance(torch.float64)
    # in bf16 too, each in the dtype of its leaf
    x, w, bias, a, b = operands(torch.bfloat16)
    leaves, dy = [t.requires_grad_() for t in (x, a, b, bias)], dy.bfloat16()
    for leaf, actual, expected in zip(leaves, run(server)[1:], run("fused")[1:], strict=True):
        assert actual.dtype is leaf.dtype
        assert torch.equal(actual, expected)


def test_transforms_and_compilers_see_the_same():
    x, w, bias, a, b = operands(torch.float32)

    def call(x):
        return lora_linear(x, w, a, b, scale=0.7, bias=bias, numerics="sglang")

    expected = call(x)
    assert relative_l2(torch.func.vmap(call)(x), expected) <= tolerance(torch.float32)
    assert relative_l2(torch.compile(call, backend="eager", fullgraph=True)(x), expected) <= tolerance(torch.float32)
    primal, tangent = torch.func.jvp(call, (x,), (torch.ones_like(x),))
    assert torch.equal(primal, expected)
    assert tangent.count_nonzero()


def test_what_does_not_fit():
    x, w, _, a, b = operands(torch.float32)
    with pytest.raises(ValueError, match="numerics='tgi' is unknown; it is one of 'fused', 'vllm', 'sglang'"):
        lora_linear(x, w, a, b, numerics="tgi")
    with pytest.raises(ValueError, match=r"without dropout; got 0\.1"):
        lora_linear(x, w, a, b, dropout_p=0.1, numerics="vllm")
    with pytest.raises(ValueError, match="the rule is x"):
        lora_linear(x, w, a, b[:, 1:], numerics="vllm")


class TestPatch:
    @pytest.mark.parametrize("server", SERVERS)
    def test_a_model(self, server):
        """Every layer rounds as the server does, and trains; unpatched it is PEFT's."""
        model = peft.get_peft_model(tiny().bfloat16(), lora_config(target_modules="all-linear", lora_alpha=3))
        train_away_from_zero(model, "lora_B").train()
        report = lorafuse.patch(model, strict=True, numerics=server)
        assert not report.groups
        inputs = {}
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
        for name, layer in layers.items():
            layer.register_forward_hook(lambda _, args, y, name=name: inputs.update({name: (args[0], y)}))
        model(torch.randint(64, (1, 5))).logits.sum().backward()
        assert inputs.keys() == layers.keys()
        for name, (x, y) in inputs.items():
            base, a, b = layers[name].base_layer, layers[name].lora_A.default.weight, layers[name].lora_B.default.weight
            assert a.grad.count_nonzero()
            assert b.grad.count_nonzero()
            expected = by_steps(x[0], base.weight, base.bias, a, b, layers[name].scaling["default"], server)
            # sums of other values are not exact: what rounds to a neighbour is an ulp of bf16 apart
            assert relative_l2(y[0], expected) <= tolerance(torch.bfloat16)
            assert (y[0] == expected).float().mean() > 0.98
        assert lorafuse.status(model).fallbacks == 0
        lorafuse.unpatch(model)
        assert not any("_lorafuse_numerics" in layer.__dict__ for layer in layers.values())

    def test_a_quantized_base(self):
        pytest.importorskip("bitsandbytes")
        model = adapted(quantize(Mlp(), "nf4"), target_modules=["up", "down"])
        patched = copy.deepcopy(model)
        lorafuse.patch(patched, strict=True, numerics="vllm")
        x = torch.randn(5, 128)
        expected, actual = step(model, x), step(patched, x)
        assert all(relative_l2(actual[name], t) <= tolerance(torch.float32) for name, t in expected.items())
        assert lorafuse.status(patched).fallbacks == 0

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [({"use_dora": True}, "that of one plain LoRA adapter"), ({"lora_dropout": 0.1}, "has no dropout")],
    )
    def test_what_stays_with_peft(self, settings, reason):
        model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"], **settings))
        with pytest.raises(ValueError, match=reason):
            lorafuse.patch(model.train(), strict=True, numerics="vllm")
        model.eval()
        if "lora_dropout" in settings:
            lorafuse.patch(model, strict=True, numerics="vllm")
            model.train()
            with pytest.warns(UserWarning, match=reason):
                model(torch.randn(2, 8))

    def test_experts_stay_with_peft(self):
        model = moe_models.adapted("qwen3_moe")
        with pytest.raises(ValueError, match="is that of linear layers"):
            lorafuse.patch(model, strict=True, numerics="sglang")

    def test_mixed_batches_stay_with_peft(self):
        model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"]))
        lorafuse.patch(model, numerics="vllm")
        with pytest.warns(UserWarning, match="a mixed batch with the numerics of a server"):
            model.eval()(torch.randn(2, 8), adapter_names=["default", "__base__"])

    def test_an_unknown_server(self):
        with pytest.raises(ValueError, match="numerics='tgi' is unknown"):
            lorafuse.patch(nn.Linear(2, 2), numerics="tgi")
