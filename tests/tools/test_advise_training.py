"""The advisor in training (T1): the probe's ranks are PEFT's, Adam's invariances."""

import peft
import pytest
import torch
from tiny_models import tiny
from torch import nn

from lorafuse import advise
from lorafuse.advise import probe
from lorafuse.functional import lora_linear

TOKENS = torch.arange(8 * 12).reshape(8, 12) % 60 + 3


def batches():
    return [{"input_ids": TOKENS[:4], "labels": TOKENS[:4]}, {"input_ids": TOKENS[4:], "labels": TOKENS[4:]}]


@pytest.mark.parametrize("keep_scale", [False, True])
def test_the_probes_ranks_are_what_peft_takes(keep_scale):
    model = tiny("llama")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    actual = advise.probe_ranks(model, batches(), 4, keep_scale=keep_scale)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert actual.rank_pattern
    uniform = advise.trainable(advise.shapes_of(model), 4)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=32,
        target_modules="all-linear",
        rank_pattern=dict(actual.rank_pattern),
        alpha_pattern=dict(actual.alpha_pattern),
    )
    adapted = peft.get_peft_model(model, config)
    layers = {n: m for n, m in adapted.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    for name, layer in layers.items():
        own = actual.rank_pattern.get(name.replace(".", r"\."), 4)
        assert layer.r["default"] == own
        scale = 8 if keep_scale else 32 / own
        assert layer.scaling["default"] == pytest.approx(scale, rel=0.1)
    # as many parameters as the uniform rank, but for less than one more rank
    spent = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert uniform - 128 < spent <= uniform


def test_the_sketch_is_the_gradient_times_omega():
    model = tiny("llama")
    layer = model.model.layers[0].mlp.up_proj
    actual = probe.sketch(model, {"up": layer}, lambda: model(**batches()[0]).loss.backward(), width=6, seed=1)["up"]
    model(**batches()[0]).loss.backward()
    omega = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(1)) / 6**0.5
    torch.testing.assert_close(actual, layer.weight.grad @ omega.T, rtol=1e-4, atol=1e-6)
    assert actual.norm() > 0


def test_ranks_go_where_the_energy_is():
    assert probe.allocate({"a": [9.0, 8.0, 7.0], "b": [1.0, 0.5, 0.1]}, {"a": 10, "b": 10}, 40) == {"a": 3, "b": 1}


def test_the_probe_refuses_what_it_cannot_use():
    model = tiny("llama")
    with pytest.raises(ValueError, match="no batch"):
        advise.probe_ranks(model, [], 4)
    with pytest.raises(ValueError, match="rank 0"):
        advise.probe_ranks(model, batches(), 0)
    with pytest.raises(ValueError, match="the model has adapters"):
        advise.probe_ranks(peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")), batches(), 4)


X, TARGET = (
    torch.randn(16, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)) for size in (7, 5)
)
W = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def curve(a, b, alpha, *, lr_a=1e-2, lr_b=1e-2, scale_of=lambda alpha, r: alpha / r):
    """Losses of 20 steps of Adam with ε = 0. B is not zero: with it A's first update would be 0 / 0."""
    a, b = (nn.Parameter(t.clone()) for t in (a, b))
    optimizer = torch.optim.Adam([{"params": [a], "lr": lr_a}, {"params": [b], "lr": lr_b}], eps=0.0)
    losses = []
    for _ in range(20):
        loss = (lora_linear(X, W, a, b, scale=scale_of(alpha, a.shape[0])) - TARGET).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def factors():
    generator = torch.Generator().manual_seed(9)
    return (torch.randn(size, dtype=torch.float64, generator=generator) for size in ((3, 7), (5, 3)))


def test_adam_without_epsilon_does_not_see_how_alpha_init_and_rates_are_shared():
    a, b = factors()
    p, q = 3.0, 0.25
    plain = curve(a, b, 2.0)
    same = curve(p * a, q * b, 2.0 / (p * q), lr_a=p * 1e-2, lr_b=q * 1e-2)
    torch.testing.assert_close(same, plain, rtol=1e-11, atol=0)
    assert plain[-1] < 0.99 * plain[0]
    # each of the four is needed
    for wrong in (
        curve(p * a, q * b, 2.0, lr_a=p * 1e-2, lr_b=q * 1e-2),
        curve(a, q * b, 2.0 / (p * q), lr_a=p * 1e-2, lr_b=q * 1e-2),
        curve(p * a, q * b, 2.0 / (p * q), lr_b=q * 1e-2),
        curve(p * a, q * b, 2.0 / (p * q), lr_a=p * 1e-2),
    ):
        assert (wrong - plain).abs().max() > 1e-4


def test_with_one_over_r_the_curve_does_not_depend_on_the_rank():
    a, b = factors()
    doubled = torch.cat([a, a]), torch.cat([b, b], 1)
    torch.testing.assert_close(curve(*doubled, 2.0), curve(a, b, 2.0), rtol=1e-11, atol=0)

    def root(alpha, r):
        return alpha / r**0.5

    assert (curve(*doubled, 2.0, scale_of=root) - curve(a, b, 2.0, scale_of=root)).abs().max() > 1e-4
