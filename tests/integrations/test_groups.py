"""Siblings of patched models run as one operator (T1): what PEFT gives, and which calls are shared."""

import copy
import gc
import threading
import weakref

import peft
import pytest
import torch
from tiny_models import adapted, assert_close, counting_groups, counting_mlps, run, token_ids, train_away_from_zero
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorafuse
from lorafuse.integrations import groups
from lorafuse.integrations.report import Group, Skipped

pytestmark = pytest.mark.usefixtures("small_groups")
K = 16


class Block(nn.Module):
    """Attention without its softmax; `calls` are the layers in the order of their calls, "-" changes x in between."""

    names = ("q_proj", "k_proj", "v_proj")

    def __init__(self, calls=None):
        super().__init__()
        for name, n in zip(self.names, (K, 8, 8), strict=True):
            setattr(self, name, nn.Linear(K, n, bias=name == self.names[1]))
        self.out = nn.Linear(K, K)
        self.calls = list(calls or self.names)

    def forward(self, x):
        x = torch.tanh(x)
        ys = []
        for name in self.calls:
            if name == "-":
                x.mul_(0.5)
            elif name == "other":
                x = x.clone()
            else:
                ys.append(getattr(self, name)(x))
        return self.out(x) + sum(y.square().sum(-1, keepdim=True) for y in ys)


class Odd(Block):
    """Layers whose names say nothing."""

    names = ("north", "south", "east")


class Net(nn.Module):
    def __init__(self, kind=Block, calls=None, reentrant=None):
        super().__init__()
        self.blocks = nn.ModuleList(kind(calls) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return x


def net(kind=Block, calls=None, reentrant=None, seed=3, **settings):
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(kind.names)} | settings
    model = peft.get_peft_model(Net(kind, calls, reentrant), peft.LoraConfig(**settings)).eval()
    return train_away_from_zero(model)


def x_of(rows=5):
    return torch.randn(2, rows, K, generator=torch.Generator().manual_seed(1))


def step(model, x=None):
    x = (x_of() if x is None else x).clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    results = {"y": y.detach(), "dx": x.grad}
    return results | {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}


def pair(*args, **settings):
    stock = net(*args, **settings)
    patched = copy.deepcopy(stock)
    lorafuse.patch(patched, groups=True)
    return stock, patched


def siblings_of(model):
    every = (module.__dict__.get("_lorafuse_siblings") for module in model.modules())
    return list({id(one[0]): one[0] for one in every if one}.values())


def slots(model):
    return [one.slot for one in siblings_of(model) if one.slot is not None]


class TestModels:
    @pytest.mark.parametrize("family", ["llama", "llama with biases", "qwen3", "gemma3", "mistral", "bert", "t5"])
    def test_a_family_in_fp32(self, family):
        stock = adapted(family)
        patched = copy.deepcopy(stock)
        report = lorafuse.patch(patched, groups=True)
        with counting_groups() as calls, counting_mlps() as mlps:
            actual = run(patched)
        assert calls.call_count + mlps.call_count == len(report.groups) > 0
        assert_close(actual, run(stock))
        assert slots(patched) == []

    def test_ranks_and_scales_of_their_own(self):
        stock, patched = pair(rank_pattern={"q_proj": 2, "v_proj": 7}, alpha_pattern={"k_proj": 1})
        with counting_groups() as calls:
            actual = step(patched)
        assert calls.call_count == 2
        assert_close(actual, step(stock))

    def test_some_of_the_siblings_have_adapters(self):
        stock, patched = pair(target_modules=["q_proj", "v_proj"])
        with counting_groups() as calls:
            actual = step(patched)
        assert [len(call.args[1]) for call in calls.call_args_list] == [2, 2]
        assert_close(actual, step(stock))

    def test_dropout_is_drawn_for_each(self):
        _, patched = pair(lora_dropout=0.5)
        patched.train()
        with counting_groups() as calls:
            torch.manual_seed(0)
            first = step(patched)
        assert calls.call_count == 2
        # of the masks alone the layers' outputs differ from call to call
        torch.manual_seed(0)
        assert_close(step(patched), first, 0.0)
        assert not torch.equal(step(patched)["y"], first["y"])

    def test_without_gradients_layers_run_alone(self):
        stock = adapted()
        patched = copy.deepcopy(stock)
        lorafuse.patch(patched, groups=True)
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        with counting_groups() as calls:
            actual = patched.generate(input_ids=token_ids(), **settings)
        assert calls.call_count == 0
        assert torch.equal(actual, stock.generate(input_ids=token_ids(), **settings))


class TestReport:
    def test_by_names(self):
        patched = net()
        report = lorafuse.patch(patched, groups=True)
        path = "base_model.model.blocks.{}"
        assert report.groups == [Group(path.format(i), "siblings", ("q_proj", "k_proj", "v_proj")) for i in range(2)]
        assert "grouped      2  siblings   q_proj, k_proj, v_proj" in str(report)

    def test_by_calls(self):
        report = lorafuse.patch(net(Odd), groups=True)
        assert [(group.kind, group.members) for group in report.groups] == [("candidates", Odd.names)] * 2

    def test_weights_on_meta(self):
        with torch.device("meta"):
            model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=list(Block.names)))
        report = lorafuse.patch(model, groups=True)
        reason = "weights are on the meta device (q_proj, k_proj, v_proj)"
        assert report.apart == [Skipped(f"base_model.model.blocks.{i}", "siblings", reason) for i in range(2)]
        assert report.groups == []
        assert reason in str(report)

    def test_without_groups(self):
        model = net()
        report = lorafuse.patch(model, groups=False)
        assert (report.groups, siblings_of(model)) == ([], [])

    def test_patched_again(self):
        model = net()
        first = lorafuse.patch(model, groups=True)
        before = siblings_of(model)
        assert lorafuse.patch(model, groups=True).groups == first.groups
        assert siblings_of(model) == before
        # without groups, those that are there go
        lorafuse.patch(model, groups=False)
        assert siblings_of(model) == []


class TestOrders:
    def test_learned_without_gradients_for_checkpoints(self):
        stock, patched = pair(Odd, reentrant=False)
        with torch.no_grad():
            patched(x_of())
            patched(2 * x_of())
        with counting_groups() as calls:
            assert_close(step(patched), step(stock))
        # forward, and what the checkpoints compute again
        assert calls.call_count == 4

    def test_learned_from_one_forward(self):
        stock, patched = pair(Odd)
        for expected in (0, 2, 2):
            with counting_groups() as calls:
                actual = step(patched)
            assert calls.call_count == expected
            assert_close(actual, step(stock))

    def test_another_order_than_that_of_names(self):
        stock, patched = pair(calls=["v_proj", "q_proj", "k_proj"])
        for _ in range(4):
            with counting_groups() as calls:
                assert_close(step(patched), step(stock))
        assert [len(call.args[1]) for call in calls.call_args_list] == [3, 3]

    def test_cross_attention(self):
        class Cross(Block):
            def forward(self, x):
                x, memory = torch.tanh(x), torch.cos(x)
                ys = self.q_proj(x), self.k_proj(memory), self.v_proj(memory)
                return self.out(x) + sum(y.square().sum(-1, keepdim=True) for y in ys)

        stock, patched = pair(Cross)
        for _ in range(2):
            with counting_groups() as calls:
                assert_close(step(patched), step(stock))
        # by the name of the class k and v read one x
        assert [len(call.args[1]) for call in calls.call_args_list] == [2, 2]

    @pytest.mark.parametrize(
        "calls",
        [
            ["q_proj", "k_proj"],
            ["q_proj", "k_proj", "other", "v_proj"],
            ["q_proj", "q_proj", "k_proj", "v_proj"],
            ["q_proj", "k_proj", "k_proj", "v_proj"],
            ["q_proj", "other", "k_proj", "other", "v_proj"],
            ["v_proj"],
        ],
        ids=" ".join,
    )
    def test_called_otherwise(self, calls):
        stock, patched = pair(calls=calls)
        # what a sibling that was never called leaves is found and given up in later steps
        for _ in range(4):
            assert_close(step(patched), step(stock))
            assert slots(patched) == []

    def test_given_up(self):
        _, patched = pair(calls=["q_proj", "other", "k_proj", "other", "v_proj"])
        step(patched)
        with counting_groups() as calls:
            step(patched)
        assert calls.call_count == 0

    def test_a_single_miss_is_forgiven(self):
        _, patched = pair()
        step(patched)
        for block in patched.base_model.model.blocks:
            block.calls = ["q_proj"]
        step(patched)
        for block in patched.base_model.model.blocks:
            block.calls = list(block.names)
        with counting_groups() as calls:
            step(patched)
        assert calls.call_count == 2


@pytest.mark.parametrize("kind", [Block, Odd])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("calls", [None, [0], [0, "other", 1, 2]], ids=["all", "one", "another x"])
def test_checkpoints(reentrant, kind, calls):
    calls = calls and [one if isinstance(one, str) else kind.names[one] for one in calls]
    stock, patched = pair(kind, calls, reentrant)
    for _ in range(3):
        assert_close(step(patched), step(stock))
        assert slots(patched) == []


@pytest.mark.parametrize("calls", [None, ["v_proj", "q_proj", "k_proj"], ["q_proj", "v_proj", "k_proj"]])
def test_reentrant_checkpoints_draw_the_same_masks(calls):
    torch.manual_seed(0)
    _, patched = pair(calls=calls, reentrant=True, lora_dropout=0.5)
    alone = copy.deepcopy(patched)
    lorafuse.patch(alone, groups=False)
    alone.base_model.model.reentrant = None
    for _ in range(2):
        results = []
        for model in (patched, alone):
            torch.manual_seed(7)
            results.append(step(model.train()))
        assert_close(*results)


def test_two_forwards_before_the_backwards_of_checkpoints():
    stock, patched = pair(Odd, reentrant=False)

    def both(model):
        first, second = model(x_of()), model(2 * x_of())
        model.zero_grad()
        (first.square().sum() + second.sum()).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    for _ in range(2):
        assert_close(both(patched), both(stock))


class TestNothingLeaks:
    @pytest.mark.parametrize("calls", [None, ["q_proj"], ["q_proj", "v_proj"]], ids=["all", "one", "two"])
    @pytest.mark.parametrize("train", [True, False])
    def test_after_a_step(self, calls, train, monkeypatch):
        _, patched = pair(calls=calls)
        alive, original = weakref.WeakSet(), groups.run_linears

        def counted(*args):
            ys = original(*args)
            alive.update(ys)
            return ys

        monkeypatch.setattr(groups, "run_linears", counted)
        if train:
            step(patched)
        else:
            # of a loss that nobody differentiates, what the last group left lives until another runs
            patched(x_of())
            gc.collect()
            assert len(alive) <= len(Block.names)
            step(pair()[1])
        gc.collect()
        assert len(alive) == 0

    def test_a_model_is_freed_without_garbage_collection(self):
        _, patched = pair()
        step(patched)
        block = weakref.ref(patched.base_model.model.blocks[0].q_proj)
        gc.collect()
        gc.disable()
        try:
            siblings = siblings_of(patched)
            assert [one() is not None for one in siblings[0].members] == [True] * 3
            for module in list(patched.modules()):
                module._modules.clear()
            del patched, module
            assert block() is None
        finally:
            gc.enable()


def test_compile():
    stock, patched = pair()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    actual = step(torch.compile(patched, fullgraph=True, backend=backend))
    assert_close({name.replace("_orig_mod.", ""): t for name, t in actual.items()}, step(stock))
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("lora_linears" in target for target in targets) == 2
    assert sum("lora_linear.default" in target or target.endswith("lora_linear") for target in targets) == 0
    assert slots(patched) == []


def test_compiled_checkpoints_run_siblings_alone():
    stock, patched = pair(reentrant=False)
    torch._dynamo.reset()
    actual = step(torch.compile(patched, fullgraph=True, backend="aot_eager"))
    assert_close({name.replace("_orig_mod.", ""): t for name, t in actual.items()}, step(stock))
    assert slots(patched) == []


@pytest.mark.parametrize("compiled", [False, True])
def test_an_x_that_is_changed_in_between(compiled):
    stock, patched = pair(calls=["q_proj", "k_proj", "-", "v_proj"])
    model = torch.compile(patched, backend="aot_eager") if compiled else patched
    with torch.no_grad():
        for _ in range(3):
            assert_close({"y": model(x_of())}, {"y": stock(x_of())})


def test_threads():
    stock, patched = pair()
    expected = [step(stock, x_of(rows))["dx"] for rows in range(1, 5)]
    actual, barrier = {}, threading.Barrier(4, timeout=60)

    def work(i):
        barrier.wait()
        for _ in range(20):
            x = x_of(i + 1).requires_grad_()
            (actual[i],) = torch.autograd.grad(patched(x).square().sum(), x)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert_close(actual, dict(enumerate(expected)))
