"""Modules of many adapters (T1): groups in a pool against their layers, experts against the operator."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lorafuse.adapters import AdapterPool
from lorafuse.functional import MultiProjection, lora_experts, lora_experts_multi
from lorafuse.nn import LoRAExpertsMulti, LoRAGatedMLP, LoRALinear, LoRAQKV
from lorafuse.nn.multi import AdapterRows
from lorafuse.testing.numerics import relative_l2, tolerance

SLOTS = [1, -1, 0, 1]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = LoRAQKV(nn.Linear(12, 16), nn.Linear(12, 8, bias=False), nn.Linear(12, 8))
        self.mlp = LoRAGatedMLP(nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12))

    def forward(self, x):
        return (*self.qkv(x), self.mlp(x))


def layer_by_layer(block, x):
    gate, up, down = block.mlp.children()
    return (*(layer(x) for layer in block.qkv.children()), down(F.silu(gate(x)) * up(x)))


def test_groups_in_a_pool_are_their_layers():
    """And the base alone outside of it."""
    pool = AdapterPool(Block())
    for rank, targets in ((3, None), (5, ["k_proj", "down_proj"])):
        slot = pool.allocate(rank, dropout=0.25, targets=targets)
        for name, t in pool.parameters(slot).items():
            if "lora_B" in name:
                t.normal_()
    x, results = torch.randn(4, 5, 12), []
    for run in (pool.model, lambda x: layer_by_layer(pool.model, x)):
        for slot in pool.slots:
            pool.zero_grad(slot)
        # the same masks
        pool._calls.zero_()
        with pool.use_adapters(SLOTS):
            ys = run(x)
            sum(y.square().sum() for y in ys).backward()
        grads = [t.clone() for slot in pool.slots for t in pool.gradients(slot).values()]
        assert all(t.count_nonzero() for t in grads)
        results.append([*(y.detach() for y in ys), *grads])
    for one, other in zip(*results, strict=True):
        assert relative_l2(one, other) <= tolerance(torch.float32)
    for one, other in zip(pool.model(x), layer_by_layer(pool.model, x), strict=True):
        assert relative_l2(one, other) <= tolerance(torch.float32)


def test_what_groups_refuse():
    first, second = (AdapterPool(nn.ModuleList([nn.Linear(12, 8)])) for _ in range(2))
    for pool in (first, second):
        pool.allocate(2)
    layers = first.model[0], second.model[0]
    with first.use_adapters([0]), pytest.raises(ValueError, match="different pools"):
        LoRAQKV(layers[0], layers[1], nn.Linear(12, 8))(torch.randn(1, 12))
    mixed = LoRAQKV(layers[0], LoRALinear.from_linear(nn.Linear(12, 8), 2), nn.Linear(12, 8))
    with first.use_adapters([0]), pytest.raises(TypeError, match="one adapter for all rows"):
        mixed(torch.randn(1, 12))


@pytest.mark.parametrize("shared_outer", [False, True])
def test_experts(shared_outer):
    E, H, I, ranks = 3, 12, 8, (2, 5)  # noqa: E741
    up, down, up_bias = torch.randn(E, 2 * I, H), torch.randn(E, H, I), torch.randn(E, 2 * I)
    outer = () if shared_outer else (E,)
    sizes = [((*outer, R, H), (E, 2 * I, R), (E, R, I), (*outer, H, R)) for R in ranks]
    adapters = [tuple(torch.randn(shape) for shape in some) for some in sizes]
    module = LoRAExpertsMulti(up, down, gate_up_bias=up_bias, shared_outer=shared_outer)
    index, weight, x = torch.rand(8, E).topk(2, 1).indices, torch.rand(8, 2), torch.randn(8, H)
    assert torch.equal(module(x, index, weight), lora_experts(x, index, weight, up, down, gate_up_bias=up_bias))
    module.fill(adapters, (0.5, 2.0))
    # of samples of two tokens each
    module.rows = AdapterRows(torch.tensor([1, 2, 0, 1]), 2, is_sorted=False)
    out = module(x, index, weight)
    dout = torch.randn(8, H)
    out.backward(dout)
    order = torch.tensor([4, 5, 0, 1, 6, 7, 2, 3])
    stacks = [torch.cat([one[i] for one in adapters], -1 if i % 2 else -2).requires_grad_() for i in range(4)]
    projections = [
        MultiProjection(w, *stacks[i : i + 2], ranks, (0.5, 2.0), bias)
        for w, i, bias in ((up, 0, up_bias), (down, 2, None))
    ]
    offsets = torch.tensor([2, 6], dtype=torch.int32)
    expected = lora_experts_multi(x[order], offsets, index[order], weight[order], *projections)
    expected.backward(dout[order])
    assert torch.equal(out[order], expected)
    for g in range(2):
        first = sum(ranks[:g])
        for i, t in enumerate(module.gradients(g)):
            own = stacks[i].grad.narrow(-1 if i % 2 else -2, first, ranks[g])
            assert torch.equal(t, own)
            assert t.count_nonzero()
    with pytest.raises(ValueError, match="4 samples"):
        module(x[:7], index[:7], weight[:7])
    with pytest.raises(ValueError, match="adapter 0 has gate_up_b"):
        module.fill([(adapters[0][0], adapters[0][0], *adapters[0][2:])], (1.0,))
    with pytest.raises(ValueError, match="1 scales for 2 adapters"):
        module.fill(adapters[:2], (1.0,))
