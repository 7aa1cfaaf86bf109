"""Gated MLPs of patched models in every state of theirs (T1): what PEFT gives, layer by layer where it must be."""

import copy
import gc
import pickle
import weakref
from unittest import mock

import peft
import pytest
import torch
from test_patch_gated_mlp import Factored, H, Mlp, Scaled, UpFirst, mlp_of, net, pair, step, x_of
from tiny_models import assert_close, counting_groups, counting_mlps, train_away_from_zero
from torch import nn

import lorafuse
from lorafuse.integrations import gated_mlp
from lorafuse.testing.numerics import relative_l2

pytestmark = pytest.mark.usefixtures("small_groups")


def merged(model):
    mlp_of(model).up_proj.merge()


def disabled(model):
    mlp_of(model).down_proj.enable_adapters(False)


def second_adapter(model):
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["gate_proj"]))
    torch.manual_seed(7)
    train_away_from_zero(model.eval(), "other")
    model.base_model.set_adapter(["default", "other"])


def hook_on_a_member(model):
    mlp_of(model).gate_proj.register_forward_hook(lambda module, args, y: 1.5 * y)


def hook_before_a_member(model):
    mlp_of(model).down_proj.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))


def backward_hook_on_a_member(model):
    mlp_of(model).up_proj.register_full_backward_hook(lambda module, dx, dy: (1.5 * dx[0],))


def hook_on_a_base(model):
    mlp_of(model).down_proj.base_layer.register_forward_hook(lambda module, args, y: 1.5 * y)


def hook_on_the_activation(model):
    mlp_of(model).act_fn.register_forward_hook(lambda module, args, y: 1.5 * y)


def another_activation(model):
    mlp_of(model).act_fn = nn.Tanh()


def another_factor(model):
    mlp_of(model).factor = 2.0


def replaced_forward_of_a_member(model):
    layer = mlp_of(model).up_proj
    forward = layer.forward
    layer.forward = lambda x: 1.5 * forward(x)


def replaced_forward(model):
    mlp = mlp_of(model)
    forward = mlp.forward
    mlp.forward = lambda x: 1.5 * forward(x)


def trained_base(model):
    mlp_of(model).gate_proj.base_layer.weight.requires_grad_()


def layer_of_other_sizes(model):
    torch.manual_seed(9)
    mlp_of(model).up_proj = nn.Linear(H, 1).requires_grad_(False)


def hook_on_the_parent(model):
    mlp_of(model).register_forward_hook(lambda module, args, y: 1.5 * y)


def frozen_adapter(model):
    mlp_of(model).up_proj.lora_A["default"].weight.requires_grad_(False)


def scaled(model):
    mlp_of(model).up_proj.scale_layer(0.5)


# how many of two MLPs still run as one operator
STATES = dict.fromkeys(
    (
        merged, disabled, hook_on_a_member, hook_before_a_member, backward_hook_on_a_member, hook_on_a_base,
        hook_on_the_activation, another_activation, another_factor, replaced_forward_of_a_member, trained_base,
        layer_of_other_sizes,
    ),
    1,
) | {second_adapter: 0, replaced_forward: 2, hook_on_the_parent: 2, frozen_adapter: 2, scaled: 2}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("change", STATES, ids=lambda change: change.__name__)
def test_a_state(change, order):
    stock, patched = net(Factored), net(Factored)
    if order == "before":
        change(patched)
    lorafuse.patch(patched, groups=True)
    if order == "after":
        step(patched)
        change(patched)
    change(stock)
    for _ in range(2):
        with counting_mlps() as calls:
            assert_close(step(patched), step(stock))
    if order == "after":
        assert calls.call_count == STATES[change]


def test_a_forward_replaced_on_the_class():
    stock, patched, _ = pair()
    with mock.patch.object(Mlp, "forward", Scaled.forward), counting_mlps() as calls:
        assert_close(step(patched), step(stock))
    assert calls.call_count == 0


@pytest.mark.parametrize("kind", ["keyword", "5-D"])
def test_another_call(kind):
    stock, patched, _ = pair()
    x = torch.randn(1, 1, 2, 3, H)

    def call(model):
        return mlp_of(model)(x=x[0]) if kind == "keyword" else mlp_of(model)(x)

    with counting_mlps() as calls:
        assert_close({"y": call(patched).detach()}, {"y": call(stock).detach()})
    assert calls.call_count == 0


def test_without_gradients_layers_run_alone():
    stock, patched, _ = pair()
    with torch.no_grad(), counting_mlps() as calls:
        assert_close({"y": patched(x_of())}, {"y": stock(x_of())})
    assert calls.call_count == 0


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", [Mlp, UpFirst])
def test_checkpoints_draw_the_same_masks(kind, reentrant):
    stock, patched, _ = pair(kind, None, lora_dropout=0.5)
    again = copy.deepcopy(patched)
    again.base_model.model.reentrant = reentrant
    # masks are those of the layers called one by one
    assert_close(step(again.train()), step(patched.train()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant):
    stock, patched, _ = pair(Mlp, reentrant)
    with counting_mlps() as calls:
        assert_close(step(patched), step(stock))
    # without gradients a reentrant checkpoint calls the layers first
    assert calls.call_count == (2 if reentrant else 4)


@pytest.mark.parametrize("reentrant", [None, False])
def test_compile(reentrant):
    stock, patched, _ = pair(Mlp, reentrant)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    actual = step(torch.compile(patched, fullgraph=True, backend=backend))
    assert_close({name.replace("_orig_mod.", ""): t for name, t in actual.items()}, step(stock))
    (graph,) = graphs
    # a checkpoint is a graph in it
    nodes = [node for part in graph.modules() for node in part.graph.nodes]
    assert sum("lora_gated_mlp" in str(node.target) for node in nodes) == 2
    assert not any("lora_linear" in str(node.target) for node in nodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_adapters", [None, torch.float32])
def test_half_precision_is_no_worse_than_peft(dtype, of_adapters):
    exact = step(net().double(), x_of(200).double())
    stock, patched, _ = pair()
    # over bf16 PEFT computes the low-rank path of fp32 adapters in fp32, and lorafuse in bf16, layer by layer too
    bound = 1.0
    if dtype is torch.bfloat16 and of_adapters:
        lorafuse.patch(stock, groups=False)
        bound = 1.05
    errors = []
    for model in (patched, stock):
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(of_adapters if of_adapters and "lora_" in name else dtype)
        with counting_mlps() as calls:
            actual = step(model, x_of(200).to(dtype))
        assert calls.call_count == (2 if model is patched else 0)
        errors.append(sum(relative_l2(actual[name], t) for name, t in exact.items()))
    assert errors[0] <= bound * errors[1]


def test_autocast():
    stock, patched, _ = pair()
    with torch.autocast("cpu", torch.bfloat16), counting_mlps() as calls:
        actual, expected = step(patched), step(stock)
    assert calls.call_count == 2
    assert_close(actual, expected, 2e-2)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(duplicate):
    stock, patched, _ = pair()
    twin = duplicate(patched)
    assert type(mlp_of(twin)) is type(mlp_of(patched))
    with counting_mlps() as calls:
        assert_close(step(twin), step(stock))
    assert calls.call_count == 2
    assert lorafuse.unpatch(twin) == 6
    assert type(mlp_of(twin)) is Mlp


def test_unpatched_it_is_what_it_was():
    stock, patched, _ = pair()
    assert isinstance(mlp_of(patched), Mlp)
    assert (type(mlp_of(patched)).__name__, repr(patched)) == ("Mlp", repr(stock))
    assert patched.state_dict().keys() == stock.state_dict().keys()
    kept = mlp_of(patched).forward
    step(patched)
    lorafuse.unpatch(patched)
    for ours, theirs in zip(patched.modules(), stock.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert ours.__dict__.keys() == theirs.__dict__.keys()
    with counting_mlps() as calls:
        assert torch.equal(kept(x_of()), mlp_of(stock)(x_of()))
    assert calls.call_count == 0


def test_patched_again():
    stock, patched, first = pair()
    assert lorafuse.patch(patched, groups=True).groups == first.groups
    with counting_mlps() as calls:
        step(patched)
    assert calls.call_count == 2
    lorafuse.patch(patched, groups=False)
    assert type(mlp_of(patched)) is Mlp
    with counting_mlps() as calls, counting_groups() as groups:
        assert_close(step(patched), step(stock))
    assert calls.call_count == groups.call_count == 0


def test_nothing_leaks():
    _, patched, _ = pair()
    alive, original = weakref.WeakSet(), gated_mlp.run_gated_mlp

    def counted(*args):
        y = original(*args)
        alive.add(y)
        return y

    with mock.patch.object(gated_mlp, "run_gated_mlp", counted):
        step(patched)
    gc.collect()
    assert len(alive) == 0
    mlp = weakref.ref(mlp_of(patched))
    del patched
    gc.collect()
    assert mlp() is None
