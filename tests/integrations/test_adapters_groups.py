"""A pool's layers that run as one operator (T1): the bits of an adapter alone, the results of layers apart."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from lorafuse.adapters import AdapterPool
from lorafuse.nn import multi_groups
from lorafuse.testing.numerics import relative_l2, tolerance


class Block(nn.Module):
    """What stands between its layers computes a row from that row, element by element."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16, bias=i < 3) for i in range(4))
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2))

    def forward(self, x):
        x = self.o_proj(self.q_proj(x) * self.k_proj(x) + self.v_proj(x))
        return x + self.mlp(x)


with torch.random.fork_rng():
    torch.manual_seed(0)
    BASE = Block()
# rank, targets, dropout
USERS = (
    (1, None, 0.0),
    (128, ["q_proj", "up_proj", "down_proj"], 0.25),
    (5, ["v_proj", "gate_proj", "o_proj"], 0.5),
    (3, ["k_proj"], 0.0),
)
WHO = [2, 0, 1, 0, -1, 3, 2]
X, DY = torch.randn(2, len(WHO), 5, 16, generator=torch.Generator().manual_seed(0))


def pooled(users, base=BASE, dtype=torch.float32, **more):
    pool = AdapterPool(copy.deepcopy(base).to(dtype), **more)
    for i in users:
        rank, targets, dropout = USERS[i]
        slot = pool.allocate(rank, alpha=2 * rank, seed=i, targets=targets, dropout=dropout)
        for name, t in pool.parameters(slot).items():
            if "lora_B" in name:
                t.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
    return pool


def step(pool, slots, x=X, dy=DY, run=None):
    x = x.to(pool.model.o_proj.base.weight.dtype).clone().requires_grad_()
    with pool.use_adapters(slots):
        y = pool.model(x) if run is None else run(x)
        y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "dx": x.grad}


@pytest.fixture
def calls(monkeypatch):
    """The operators that groups ran, and of how many layers."""
    seen = []

    def spy(name, run):
        monkeypatch.setattr(multi_groups, name, lambda *a, **k: seen.append((name, a[2:])) or run(*a, **k))

    spy("lora_linears_multi", multi_groups.lora_linears_multi)
    spy("lora_gated_mlp_multi", multi_groups.lora_gated_mlp_multi)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("order", "by"), [((0, 1, 2, 3), "ints"), ((3, 1, 0, 2), "tensor")])
def test_bits_alone_and_in_a_batch(order, by, dtype, calls):
    """Twice, so that masks of dropout are those of each slot's second batch."""
    pool = pooled(order, dtype=dtype)
    slots = [order.index(user) if user >= 0 else -1 for user in WHO]
    for _ in range(2):
        # a batch without it, which a slot does not see
        step(pool, [order.index(0)] * 2, X[:2], DY[:2])
        pool.zero_grad(order.index(0))
        every = step(pool, slots if by == "ints" else torch.tensor(slots))
    assert [name for name, _ in calls] == ["lora_linears_multi", "lora_gated_mlp_multi"] * 4
    for user in order:
        alone, mine = pooled([user], dtype=dtype), [i for i, other in enumerate(WHO) if other == user]
        for _ in range(2):
            if user == 0:
                step(alone, [0, 0], X[:2], DY[:2])
                alone.zero_grad(0)
            expected = step(alone, [0] * len(mine), X[mine], DY[mine])
        for name, t in expected.items():
            assert torch.equal(every[name][mine], t), (user, name)
        for name, t in alone.gradients(0).items():
            assert torch.equal(pool.gradients(order.index(user))[name], t), (user, name)
            assert t.count_nonzero(), name


def test_the_results_are_those_of_layers_apart(calls):
    pools = [pooled(range(4), groups=groups) for groups in (True, False)]
    results = [step(pool, WHO) for pool in pools]
    assert len(calls) == 2
    for pool, result in zip(pools, results, strict=True):
        result |= {f"{slot} {name}": t for slot in pool.slots for name, t in pool.gradients(slot).items()}
    for name, t in results[0].items():
        assert relative_l2(t, results[1][name]) <= tolerance(torch.float32), name
        assert t.count_nonzero(), name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant, calls):
    pools = [pooled(range(4)) for _ in range(2)]
    step(pools[0], WHO)
    step(pools[1], WHO, run=lambda x: checkpoint(pools[1].model, x, use_reentrant=use_reentrant))
    for slot in range(4):
        for name, t in pools[0].gradients(slot).items():
            assert torch.equal(pools[1].gradients(slot)[name], t), name
    # a reentrant checkpoint's first call has no gradients
    assert len(calls) == (5 if use_reentrant else 6)


def test_compiled():
    pools = [pooled(range(4)) for _ in range(2)]
    first = step(pools[0], WHO)
    second = step(pools[1], WHO, run=torch.compile(pools[1].model, backend="aot_eager", fullgraph=True))
    for name, t in first.items():
        assert relative_l2(second[name], t) <= tolerance(torch.float32), name


def test_layers_that_somebody_watches_are_called(calls):
    pool, seen = pooled([0]), []
    mlp = pool.model.mlp
    expected = step(pool, [0] * len(X))
    handle = mlp.up_proj.register_forward_hook(lambda *_: seen.append("up"))
    actual = step(pool, [0] * len(X))
    handle.remove()
    mlp.act_fn, former = nn.Tanh(), mlp.act_fn
    assert relative_l2(step(pool, [0] * len(X))["y"], expected["y"]) > 0.01
    mlp.act_fn = former
    assert seen == ["up"]
    assert relative_l2(actual["y"], expected["y"]) <= tolerance(torch.float32)
    # gate and up are siblings then
    names = [(name, len(layers[0])) for name, layers in calls if name == "lora_linears_multi"]
    assert [count for _, count in names] == [3, 3, 2, 3, 2]


class Mixed(nn.Module):
    """Reads two tensors where the names of its layers say one."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))
        self.o_proj = nn.Linear(16, 16)

    def forward(self, x):
        return self.o_proj(self.q_proj(x) + self.k_proj(x) + self.v_proj(2 * x))


def test_a_layer_that_reads_another_tensor_leaves(calls):
    """And changes no bit by it; the second call computes nothing that nobody fetches."""
    pool = pooled([0, 3], Mixed())
    results = [step(pool, [0, 1, -1, 1, 1, 0, -1]) for _ in range(2)]
    assert [len(layers[0]) for _, layers in calls] == [3, 2]
    for name, t in results[0].items():
        assert torch.equal(results[1][name], t), name


def test_nothing_is_held_that_backward_has_freed(calls):
    """Neither x nor outputs that nobody fetched; a layer that is called after backward runs alone."""
    pool = pooled([0])
    with pool.use_adapters([0] * len(X)):
        for fetched in (3, 1):
            h = X.clone().requires_grad_()
            ys = [layer(h) for layer in (pool.model.q_proj, pool.model.k_proj, pool.model.v_proj)[:fetched]]
            held = [weakref.ref(h), *(weakref.ref(y) for y in ys)]
            sum(ys).backward(DY)
            if fetched == 1:
                pool.model.v_proj(h).backward(DY)
            del h, ys
            assert [one() for one in held] == [None] * len(held)
    assert len(calls) == 2


def test_an_output_may_be_changed_in_place():
    pool = pooled([0])
    x = X.clone().requires_grad_()
    with pool.use_adapters([0] * len(X)):
        q, k = pool.model.q_proj(x), pool.model.k_proj(x)
        q /= 2
        (q + k).backward(DY)
    assert x.grad.count_nonzero()


def test_closed_and_copied():
    pool = pooled([0])
    with pool.use_adapters([0] * len(X)), torch.no_grad():
        assert torch.equal(copy.deepcopy(pool.model)(X), pool.model(X))
    assert "forward" in vars(pool.model.mlp)
    pool.close()
    assert vars(pool.model.mlp).keys() == vars(BASE.mlp).keys()
    assert torch.equal(pool.model(X), BASE(X))
