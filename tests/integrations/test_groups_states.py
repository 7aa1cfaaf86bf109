"""Siblings of patched models in every state of theirs (T1): what PEFT gives, alone where it must be."""

import contextlib
import copy
import pickle
from statistics import geometric_mean

import pytest
import torch
from test_groups import net, pair, siblings_of, slots, step, x_of
from tiny_models import (
    adapted,
    assert_close,
    counting_fused,
    counting_groups,
    counting_mlps,
    lora_config,
    run,
    train_away_from_zero,
)
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop

import lorafuse
from lorafuse.integrations import groups
from lorafuse.testing.numerics import relative_l2

pytestmark = pytest.mark.usefixtures("small_groups")


def block_of(model):
    return model.base_model.model.blocks[0]


def merged(model):
    block_of(model).k_proj.merge()


def disabled(model):
    block_of(model).k_proj.enable_adapters(False)


def second_adapter(model):
    model.add_adapter("other", lora_config(r=3, target_modules=["q_proj"]))
    torch.manual_seed(7)
    train_away_from_zero(model.eval(), "other")
    model.set_adapter("other")


def both_adapters(model):
    model.add_adapter("other", lora_config(r=3, target_modules=["k_proj"]))
    torch.manual_seed(7)
    train_away_from_zero(model.eval(), "other")
    model.base_model.set_adapter(["default", "other"])


def hook_on_a_base(model):
    block_of(model).k_proj.base_layer.register_forward_hook(lambda module, args, y: 1.5 * y)


def hook_before_a_member(model):
    block_of(model).k_proj.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))


def hook_on_a_member(model):
    block_of(model).q_proj.register_forward_hook(lambda module, args, y: 1.5 * y)


def backward_hook_on_a_member(model):
    block_of(model).k_proj.register_full_backward_hook(lambda module, dx, dy: (1.5 * dx[0],))


def replaced_forward(model):
    layer = block_of(model).k_proj
    forward = layer.forward
    layer.forward = lambda x: 1.5 * forward(x)


def trained_base(model):
    block_of(model).k_proj.base_layer.weight.requires_grad_()


def frozen_adapter(model):
    block_of(model).k_proj.lora_A["default"].weight.requires_grad_(False)


def scaled(model):
    block_of(model).k_proj.scale_layer(0.5)


def replaced_parameter(model):
    layer = block_of(model).k_proj.lora_B["default"]
    layer.weight = nn.Parameter(2 * layer.weight.detach())


def layer_replaced(model):
    block = block_of(model)
    block.k_proj = copy.deepcopy(block.k_proj)


# how many layers run in a group of the first block
STATES = {
    merged: 2, disabled: 2, second_adapter: 0, both_adapters: 2, hook_on_a_base: 2, hook_before_a_member: 3,
    hook_on_a_member: 3, backward_hook_on_a_member: 3, replaced_forward: 3, trained_base: 2, frozen_adapter: 3,
    scaled: 3, replaced_parameter: 3, layer_replaced: 2,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("change", STATES, ids=lambda change: change.__name__)
def test_a_state(change, order):
    stock, patched = net(), net()
    change(stock)
    if order == "before":
        change(patched)
    lorafuse.patch(patched, groups=True)
    if order == "after":
        step(patched)
        change(patched)
    for i in range(3):
        with counting_groups() as calls:
            assert_close(step(patched), step(stock))
        assert slots(patched) == []
        if i == 0 and order == "after":
            sizes = [len(call.args[1]) for call in calls.call_args_list]
            assert sum(sizes[: 1 if STATES[change] else 0]) == STATES[change]


@pytest.mark.parametrize("between", ["no_grad", "autocast", "inference", "adapter", "merge"])
def test_a_state_that_changes_between_two_siblings(between):
    def block_step(model):
        model.zero_grad()
        block, x = block_of(model), torch.tanh(x_of()).requires_grad_()
        first = block.q_proj(x)
        context = contextlib.nullcontext()
        if between == "no_grad":
            context = torch.no_grad()
        elif between == "inference":
            context = torch.inference_mode()
        elif between == "autocast":
            context = torch.autocast("cpu", torch.bfloat16)
        elif between == "adapter":
            block.k_proj.scale_layer(0.5)
        else:
            block.k_proj.merge()
        with context:
            second = block.k_proj(x)
        (first.sum() + second.float().sum()).backward()
        return {"q": first.detach(), "k": second.detach().clone(), "dx": x.grad}, second.requires_grad

    stock, patched = pair()
    with counting_groups() as calls:
        actual, has_grad = block_step(patched)
    assert calls.call_count == 1
    expected, expected_grad = block_step(stock)
    assert has_grad == expected_grad
    assert actual["k"].dtype is expected["k"].dtype
    assert_close(
        {k: t.float() for k, t in actual.items()},
        {k: t.float() for k, t in expected.items()},
        1e-2 if between == "autocast" else None,
    )


def test_bfloat16_is_no_worse_than_peft():
    """Of one network either may be nearer to the exact results by chance: the ratios of the errors of twelve."""
    ratios = []
    for seed in range(12):
        stock, patched = pair(seed=seed)
        for model in (stock, patched):
            model.to(torch.bfloat16)
        x = x_of(200).to(torch.bfloat16)
        exact = step(copy.deepcopy(stock).double(), x.double())
        with counting_groups() as calls:
            actual, expected = step(patched, x), step(stock, x)
        assert calls.call_count == 2
        errors = [{name: relative_l2(one[name], t) for name, t in exact.items()} for one in (actual, expected)]
        ours, theirs = ({"y": e["y"], "dx": e["dx"], "all": sum(e.values())} for e in errors)
        ratios.append({name: float(ours[name] / theirs[name]) for name in ours})
    means = {name: geometric_mean(one[name] for one in ratios) for name in ratios[0]}
    assert {name: mean for name, mean in means.items() if mean > 1} == {}


def test_an_adapter_that_is_changed_in_place_between_two_siblings():
    stock, patched = pair()
    ys = []
    for model in (stock, patched):
        block, x = block_of(model), x_of()
        block.q_proj(x)
        with torch.no_grad():
            block.k_proj.lora_A["default"].weight.mul_(1.5)
        ys.append(block.k_proj(x).detach())
    assert_close({"y": ys[1]}, {"y": ys[0]})


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpoints_that_do_not_stop_early(dropout):
    _, patched = pair(reentrant=False, lora_dropout=dropout)
    alone = copy.deepcopy(patched)
    lorafuse.patch(alone, groups=False)
    results = []
    for model in (patched, alone):
        torch.manual_seed(7)
        with set_checkpoint_early_stop(False), counting_groups() as calls:
            results.append(step(model.train()))
        assert calls.call_count == (4 if model is patched else 0)
    assert_close(*results)


def test_a_sibling_called_after_the_backward_of_the_first():
    stock, patched = pair()

    def late(model):
        model.zero_grad()
        block, x = block_of(model), torch.tanh(x_of()).requires_grad_()
        block.q_proj(x).sum().backward()
        y = block.k_proj(x)
        y.sum().backward()
        return {"y": y.detach(), "dx": x.grad}

    assert_close(late(patched), late(stock))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_groups_of_their_own(duplicate):
    stock = adapted()
    patched = copy.deepcopy(stock)
    lorafuse.patch(patched, groups=True)
    twin = duplicate(patched)
    assert not {id(one) for one in siblings_of(twin)} & {id(one) for one in siblings_of(patched)}
    train_away_from_zero(twin, "lora_", 0.3)
    for model, calls_expected in ((twin, 4), (patched, 4)):
        with counting_groups() as calls, counting_mlps() as mlps:
            actual = run(model)
        assert calls.call_count + mlps.call_count == calls_expected
        if model is patched:
            assert_close(actual, run(stock))


def test_unpatched_it_is_what_it_was():
    stock, patched = pair()
    step(patched)
    lorafuse.unpatch(patched)
    for ours, theirs in zip(patched.modules(), stock.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert ours.__dict__.keys() == theirs.__dict__.keys()
    with counting_groups() as calls, counting_fused() as fused:
        assert_close(step(patched), step(stock), 0.0)
    assert calls.call_count == fused.call_count == 0


def test_state_dicts_are_pefts():
    stock, patched = pair()
    assert patched.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize("is_small", [False, True])
def test_a_small_x_runs_layer_by_layer(is_small, monkeypatch):
    _, patched = pair()
    sizes, original = [], groups.run_linears
    monkeypatch.setattr(groups, "SMALL", x_of().numel() + is_small)
    monkeypatch.setattr(groups, "run_linears", lambda *args: sizes.append(len(args[1])) or original(*args))
    step(patched)
    assert sizes == ([] if is_small else [3, 3])
