"""`dropout_rng="torch"` draws the masks of torch's dropout (T1): at equal seeds everything is what PEFT gives."""

import copy

import pytest
import torch
from tiny_models import (
    adapted,
    assert_close,
    assert_same_model,
    counting_fused,
    counting_groups,
    patched_copy,
    run,
    token_ids,
)
from torch import nn

import lorafuse
from lorafuse.functional import Projection, lora_linear, lora_linears
from lorafuse.nn import LoRAGatedMLP, LoRALinear, LoRAQKV
from lorafuse.philox import draw_mask
from lorafuse.testing.numerics import relative_l2, tolerance


def torch_copy(model, **options):
    return patched_copy(model, strict=True, dropout_rng="torch", **options)[0]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_step_is_pefts(family):
    stock = adapted(family, lora_dropout=0.3).train()
    patched = torch_copy(stock)
    with counting_fused() as calls:
        got = run(patched, seed=9)
    assert calls.call_count == len(lorafuse.status(patched).layers)
    assert_close(got, run(stock, seed=9))
    assert relative_l2(got["logits"], run(stock, seed=10)["logits"]) > 0.01
    assert_same_model(patched.eval(), stock.eval())


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_is_drawn_where_peft_draws_nothing(p):
    stock = adapted(lora_dropout=p).train()
    states = []
    for model in (stock, torch_copy(stock)):
        torch.manual_seed(3)
        model(input_ids=token_ids())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_curves_are_pefts():
    """Six steps, in groups too, whose layers then run one by one."""
    stock = adapted(lora_dropout=0.1).train()
    models = [stock, torch_copy(stock), torch_copy(stock, groups=True)]
    curves = []
    for model in models:
        torch.manual_seed(4)
        optimizer, losses = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05), []
        with counting_groups() as siblings:
            for step in range(6):
                ids = token_ids(seed=step)
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        assert not siblings.call_count
        curves.append(losses)
    assert len(set(curves[0])) == 6
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)
    assert curves[2] == pytest.approx(curves[0], rel=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_a_mask_again(reentrant):
    stock = adapted(lora_dropout=0.3).train()
    patched = torch_copy(stock)
    for model in (stock, patched):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with counting_fused() as calls:
        got = run(patched, seed=6)
    assert calls.call_count == 28
    assert_close(got, run(stock, seed=6))


def test_autocast_and_transposed_x():
    """PEFT draws the mask of x cast to the adapter's dtype, in the order in which x lies in memory."""
    layer = adapted("llama with biases", lora_dropout=0.4).train().base_model.model.model.layers[0].mlp.up_proj
    twin = torch_copy(nn.ModuleList([layer]))[0]
    x = torch.randn(32, 5, 3).permute(1, 2, 0)
    for autocast in (False, True):
        ys = []
        for one in (layer, twin):
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                ys.append(one(x))
        assert relative_l2(ys[1], ys[0]) <= (tolerance(torch.bfloat16) if autocast else tolerance(torch.float32))


def test_patching_again_changes_it_and_unpatch_forgets_it():
    stock = adapted(lora_dropout=0.3).train()
    patched = torch_copy(stock)
    expected = run(stock, seed=9)["logits"]
    lorafuse.patch(patched, strict=True)
    assert relative_l2(run(patched, seed=9)["logits"], expected) > 0.01
    twin = copy.deepcopy(torch_copy(stock))
    assert_close(run(twin, seed=9), run(stock, seed=9))
    assert lorafuse.unpatch(twin) == 14
    assert not any("_lorafuse_dropout_rng" in module.__dict__ for module in twin.modules())


def test_what_is_refused():
    with pytest.raises(ValueError, match="dropout_rng='numpy' is unknown; it is one of 'philox', 'torch'"):
        lorafuse.patch(adapted(), dropout_rng="numpy")
    with pytest.raises(ValueError, match="dropout_rng='numpy'"):
        LoRALinear(4, 3, 2, dropout_rng="numpy")
    x, w, a, b = torch.randn(5, 4), torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"or a mask, bool \[5, 4\]"):
        lora_linear(x, w, a, b, dropout_p=0.5, seed=torch.ones(6, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"or a mask, bool \[5, 4\]"):
        lora_linears(x, [Projection(w, a, b, dropout_p=0.5, seed=torch.ones(6, 4, dtype=torch.bool))])


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_kernel_asked_for_by_name_is_refused(name):
    """Its mask comes from a seed."""
    from lorafuse.ops.choose import for_masks
    from lorafuse.philox import check_dropout_rng

    mask = torch.ones(5, 4, dtype=torch.bool)
    assert [for_masks(backend, [None, mask]) for backend in ("auto", "current", "eager")] == ["eager"] * 3
    assert for_masks(name, [None, torch.zeros(1, dtype=torch.int64)]) == name
    with pytest.raises(ValueError, match=f"backend='{name}' computes dropout's mask from a seed"):
        for_masks(name, [mask])
    with pytest.raises(ValueError, match=f"backend='{name}'"):
        check_dropout_rng("torch", name)


def test_a_given_mask_is_the_formula():
    """In fp64, every gradient."""
    torch.manual_seed(2)
    x, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 5, 6), (3, 6), (4, 3)))
    w, keep = torch.randn(4, 6, dtype=torch.float64), torch.rand(2, 5, 6) > 0.4
    expected = x @ w.T + 1.5 * (x * keep / 0.6) @ a.T @ b.T
    y = lora_linear(x, w, a, b, scale=1.5, dropout_p=0.4, seed=keep)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    actual = torch.autograd.grad(y, (x, a, b), dy)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, (x, a, b), dy))


class Plain(nn.Module):
    """What PEFT computes of one of our modules."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.drop = layer, nn.Dropout(layer.dropout)

    def forward(self, x):
        one = self.layer
        return nn.functional.linear(x, one.weight, one.bias) + one.lora_B(one.lora_A(self.drop(x))) * one.scale


def filled(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def of_both(run, reference, x):
    for forward in (run, reference):
        x.grad = None
        torch.manual_seed(8)
        y = forward(x)
        (y.double() * torch.arange(y.shape[-1])).sum().backward()
        yield y.detach(), x.grad


OPTIONS = {"dropout": 0.3, "dropout_rng": "torch"}


def test_modules():
    x = torch.randn(2, 7, 12, requires_grad=True)
    layer = filled(LoRALinear.from_linear(nn.Linear(12, 9), 3, alpha=5, **OPTIONS))
    qkv = filled(
        LoRAQKV.from_linears(*(nn.Linear(12, n) for n in (8, 4, 4)), 3, targets=["q_proj", "v_proj"], **OPTIONS)
    )
    mlp = filled(LoRAGatedMLP.from_linears(nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12), 3, **OPTIONS))
    gate, up, down = (Plain(one) for one in mlp.children())
    cases = [
        (layer, Plain(layer)),
        (
            lambda x: torch.cat(qkv(x), -1),
            lambda x: torch.cat([Plain(qkv.q_proj)(x), qkv.k_proj(x), Plain(qkv.v_proj)(x)], -1),
        ),
        (mlp, lambda x: down(nn.functional.silu(gate(x)) * up(x))),
    ]
    for run_one, reference in cases:
        (y, dx), (expected, expected_dx) = of_both(run_one, reference, x)
        assert relative_l2(y, expected) <= tolerance(torch.float32)
        assert relative_l2(dx, expected_dx) <= tolerance(torch.float32)


def test_draw_mask():
    x = torch.zeros(40, 30).t()
    torch.manual_seed(5)
    expected = nn.functional.dropout(torch.ones(40, 30).t(), 0.25) != 0
    torch.manual_seed(5)
    mask = draw_mask(x.requires_grad_(), torch.bfloat16, 0.25)
    assert mask.dtype is torch.bool
    assert mask.stride() == x.stride()
    assert torch.equal(mask, expected)
    assert 0.15 < 1 - mask.float().mean() < 0.35
