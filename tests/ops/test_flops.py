"""What torch's tools see of the operators (T1): FLOPs, selective checkpoints, the profiler."""

import gc
import sys
from functools import partial

import pytest
import torch
import warm_python
from experts_reference import block, fused
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from lorafuse.functional import lora_experts, lora_grouped_linear, lora_linear
from lorafuse.ops import experts, linear

M, N, K, R = 6, 10, 14, 3


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def flops(run, leaves):
    """`(forward, backward)`, the gradients of all leaves."""
    with FlopCounterMode(display=False) as forward:
        y = run()
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    return forward.get_total_flops(), backward.get_total_flops()


def low_rank(x, w, a, b):
    return F.linear(x, w) + 2.0 * F.linear(F.linear(x, a), b)


@pytest.mark.parametrize("needed", ["x", "a", "b", "xa", "ab", "xab"])
@pytest.mark.parametrize("shape", [(K,), (M, K), (2, 3, K)])
def test_of_a_linear_layer(needed, shape):
    operands = {"x": normal(*shape), "a": normal(R, K), "b": normal(N, R)}
    w, leaves = normal(N, K), [operands[name].requires_grad_() for name in needed]
    actual = flops(lambda: lora_linear(operands["x"], w, operands["a"], operands["b"], scale=2.0), leaves)
    # torch counts no product with a vector
    two = operands["x"].reshape(-1, K)
    assert actual == flops(lambda: low_rank(two, w, operands["a"], operands["b"]), leaves)


@pytest.mark.parametrize("needed", ["x", "a", "b", "xa", "ab", "xab"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_of_grouped_layers(needed, transposed, backend):
    operands = {"x": normal(M, K), "a": normal(3, R, K), "b": normal(3, N, R)}
    w, ends = normal(3, N, K), [2, 2, 6]
    stored = w.mT.contiguous() if transposed else w
    leaves = [operands[name].requires_grad_() for name in needed]
    x, a, b = operands.values()

    def plain():
        return torch.cat([low_rank(x[i:j], w[e], a[e], b[e]) for e, (i, j) in enumerate(zip([0, *ends], ends))])  # noqa: B905

    run = partial(lora_grouped_linear, x, torch.tensor(ends), stored, a, b, is_transposed=transposed, backend=backend)
    assert flops(run, leaves) == flops(plain, leaves)


def plain_experts(o):
    """Every choice, in the order of the experts."""
    out = torch.zeros_like(o["x"])
    for e in range(len(o["gate_up"])):
        t, j = torch.where(o["topk_index"] == e)
        u = low_rank(o["x"][t], *(o[n][e] for n in ("gate_up", "gate_up_a", "gate_up_b")))
        gate, up = u.chunk(2, 1)
        y = low_rank(F.silu(gate) * up, *(o[n][e] for n in ("down", "down_a", "down_b")))
        out = out.index_add(0, t, o["topk_weight"][t, j, None] * y)
    return out


def own(u):
    gate, up = u.chunk(2, 1)
    return F.silu(gate) * up


@pytest.mark.parametrize(
    "needed",
    [
        ("x", "topk_weight", "gate_up_a", "gate_up_b", "down_a", "down_b"), ("gate_up_a", "gate_up_b"),
        ("down_a", "down_b"), ("x",), ("topk_weight", "down_b"), ("gate_up_b",),
    ],
)  # fmt: skip
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", ["silu", own])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_of_experts(needed, transposed, activation, backend):
    # sizes of their own, so that no two products are of one count
    o, settings = block(T=7, E=3, H=20, I=6, R=3, dtype=torch.float32, activation=activation)
    leaves = [o[name].requires_grad_() for name in needed]
    forward, backward = flops(lambda: plain_experts(o), leaves)
    if needed == ("topk_weight", "down_b"):
        # torch keeps y for the gradient of a router weight; here dh is computed
        backward += 2 * 14 * (20 * 6 + 3 * (20 + 6))
    given = {name: o[name].mT.contiguous() for name in ("gate_up", "down")} if transposed else {}
    run = partial(fused, o | given, settings | {"is_transposed": transposed}, backend)
    assert flops(run, leaves) == (forward, backward)


def test_without_adapters():
    o, settings = block(T=7, E=3, H=20, I=6, dtype=torch.float32, adapters=())
    x = o["x"].requires_grad_()
    assert flops(lambda: fused(o, settings), [x]) == (2 * 14 * 18 * 20, 2 * 14 * 18 * 20)


@pytest.mark.parametrize("first", ["lorafuse", "torch.utils.flop_counter"])
def test_the_order_of_imports(first):
    """`import lorafuse` does not import the counter, which takes 0.2 s and imports Triton."""
    second = {"lorafuse": "torch.utils.flop_counter", "torch.utils.flop_counter": "lorafuse"}[first]
    source = f"""
import sys, torch, {first}
assert "{first}" != "lorafuse" or "torch.utils.flop_counter" not in sys.modules
import {second}
import lorafuse
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    lorafuse.functional.lora_linear(torch.ones(2, 3), torch.ones(5, 3), torch.ones(1, 3), torch.ones(5, 1))
assert counter.get_total_flops() == 2 * 2 * (15 + 8), counter.get_total_flops()
import importlib; importlib.reload(lorafuse.functional)
"""
    warm_python.run([sys.executable, "-c", source], check=True, timeout=300)


OPERATORS = {
    "lora_experts": torch.ops.lorafuse.lora_experts.default,
    "lora_linear": torch.ops.lorafuse.lora_linear.default,
}


@pytest.mark.parametrize("activation", ["silu", own])
def test_selective_checkpoints_save_outputs(activation, monkeypatch):
    """A policy that names the operators: backward computes neither again, and the results are equal."""
    o, settings = block(T=7, E=3, H=20, I=6, R=3, dtype=torch.float32, activation=activation)
    a, b, w = normal(R, 20).requires_grad_(), normal(20, R).requires_grad_(), normal(20, 20)
    leaves = [o["x"].requires_grad_(), o["gate_up_a"].requires_grad_(), a, b]
    calls = []
    for module in (linear, experts):
        run = module.forward
        monkeypatch.setattr(
            module, "forward", lambda *args, run=run, name=module.__name__: calls.append(name) or run(*args)
        )

    def layer(x):
        return fused(o | {"x": torch.tanh(lora_linear(x, w, a, b))}, settings).sin()

    def policy(context, operator, *args, **kwargs):
        save = operator in OPERATORS.values()
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    expected = torch.autograd.grad(layer(leaves[0]).sum(), leaves)
    calls.clear()
    contexts = partial(create_selective_checkpoint_contexts, policy)
    y = checkpoint(layer, leaves[0], use_reentrant=False, context_fn=contexts)
    actual = torch.autograd.grad(y.sum(), leaves)
    assert sorted(calls) == ["lorafuse.ops.experts", "lorafuse.ops.linear"]
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("activation", ["silu", own])
def test_the_profiler_shows_operators_and_shapes(activation):
    o, settings = block(T=7, E=3, H=20, I=6, R=3, dtype=torch.float32, activation=activation)
    x, a, b = normal(M, K).requires_grad_(), normal(3, R, K).requires_grad_(), normal(3, N, R)
    with torch.profiler.profile(record_shapes=True) as profile:
        fused(o | {"x": o["x"].requires_grad_()}, settings).sum().backward()
        lora_grouped_linear(x, torch.tensor([2, 2, 6]), normal(3, N, K), a, b).sum().backward()
        lora_linear(x, normal(N, K), a[0], b[0]).sum().backward()
    shown = {event.name: event.input_shapes for event in profile.events()}
    assert shown["lorafuse::lora_experts"][:2] == [[7, 20], [7, 2]]
    assert shown["lorafuse::lora_experts_backward"][:2] == [[7, 20], [7, 20]]
    assert shown["lorafuse::lora_grouped_linear"][:3] == [[M, K], [3], [3, N, K]]
    assert shown["lorafuse::lora_grouped_linear_backward"][:2] == [[M, N], [M, K]]
    assert shown["lorafuse::lora_linear"][:2] == [[M, K], [N, K]]
    assert shown["lorafuse::lora_linear_backward"][:2] == [[M, N], [M, K]]


def test_a_function_is_no_longer_held_than_its_graph():
    """An activation of one's own is found by a name while its operator runs, and until backward."""
    from lorafuse.ops.experts import functions

    o, settings = block(T=7, E=3, dtype=torch.float32, activation=own)
    gc.collect()
    before = set(functions)
    y = lora_experts(
        o["x"].requires_grad_(), o["topk_index"], o["topk_weight"], o["gate_up"], o["down"], activation=own
    )
    assert len(set(functions) - before) == 1
    y.sum().backward()
    del y
    assert set(functions) <= before
