"""What autograd does with experts and grouped layers (T1, T2): second order, in-place changes, autocast.

Expected values are autograd's of the formula, token by token, in fp64.
"""

import contextlib
from functools import partial

import pytest
import torch
from experts_reference import block, differentiated, fused, plain
from torch.utils.checkpoint import checkpoint

from lorafuse.activation import ACTIVATIONS, GATES
from lorafuse.functional import lora_grouped_linear
from lorafuse.nn import LoRAExperts
from lorafuse.testing.numerics import relative_l2, tolerance

pytest_plugins = "backend_fixtures"
SMALL = {"T": 5, "E": 3, "k": 2, "H": 8, "I": 4, "R": 2}


def squared(u):
    """An activation of one's own, with a second derivative."""
    gate, up = u.chunk(2, -1)
    return gate.square() * up


def in_place(u):
    """An activation that changes its input."""
    half = u.shape[1] // 2
    u[:, :half].relu_()
    return u[:, :half] * u[:, half:]


@pytest.fixture(params=["eager", "grouped_mm", "triton"])
def backend(request):
    """The name to call with, and a dtype that it runs."""
    if request.param != "grouped_mm":
        return request.param
    request.getfixturevalue("by_grouped_mm")
    return "eager"


def formula(x, ends, w, a, b, bias):
    y, first = [], 0
    for e, last in enumerate(ends.tolist()):
        rows = x[first:last]
        y.append(rows @ w[e].t() + bias[e] + 1.3 * (rows @ a[e].t()) @ b[e].t())
        first = last
    return torch.cat([*y, x.new_zeros((len(x) - first, w.shape[1]))])


def grouped(backend, x, ends, w, a, b, bias):
    return lora_grouped_linear(x, ends, w, a, b, scale=1.3, bias=bias, backend=backend)


def grouped_operands(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x, w, a, b, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        for size in ((5, 8), (3, 8, 8), (3, 2, 8), (3, 8, 2), (3, 8))
    )
    return x, torch.tensor([2, 2, 4]), w, a, b, bias


def trained(o):
    return [name for name in o if name in ("x", "topk_weight") or name.endswith(("_a", "_b"))]


def second_order(run, o, settings, of="x"):
    """Gradients of the squared norm of a gradient, by name."""
    o = {name: t.clone() for name, t in o.items()}
    leaves = {name: o[name].requires_grad_() for name in trained(o)}
    loss = run(o, settings).pow(2).sum()
    actual = torch.autograd.grad(loss, [leaves[name] for name in ([of] if of else leaves)], create_graph=True)
    assert all(grad.requires_grad for grad in actual)
    sum(grad.pow(2).sum() for grad in actual).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


class TestSecondOrder:
    @pytest.mark.parametrize("activation", ["silu", "clamped_swiglu", squared])
    @pytest.mark.parametrize("of", ["x", None])
    def test_a_penalty(self, backend, activation, of):
        o, settings = block(**SMALL, dtype=torch.float32, activation=activation, bias=True)
        exact = {name: t if t.dtype is torch.int64 else t.double() for name, t in o.items()}
        expected = second_order(lambda o, s: plain(o, **s), exact, settings, of)
        actual = second_order(partial(fused, backend=backend), o, settings, of)
        for name, grad in expected.items():
            assert relative_l2(actual[name], grad) <= tolerance(torch.float32), name
            assert grad.count_nonzero() > 0, name

    @pytest.mark.parametrize("activation", [*ACTIVATIONS, *GATES, squared, in_place])
    @pytest.mark.parametrize("gate", [True, False])
    def test_every_activation(self, activation, gate):
        if not gate and (activation in GATES or callable(activation)):
            pytest.skip("it is a function of gate and up")
        o, settings = block(**SMALL, activation=activation, gate=gate)
        names = trained(o)

        def run(*values):
            return fused(o | dict(zip(names, values, strict=True)), settings)

        leaves = [o[name].requires_grad_() for name in names]
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)

    @pytest.mark.parametrize(
        "change",
        [
            {"transposed": True},
            {"concatenated": False},
            {"adapters": ("down",)},
            {"shared": ("gate_up_a", "down_b")},
            {"index": torch.tensor([[0, 3], [3, 3], [1, 9], [0, 0], [2, 0]])},
        ],
    )
    def test_every_layout(self, change):
        o, settings = block(**SMALL, bias=True, **change)
        expected = second_order(lambda o, s: plain(o, **s), o, settings, None)
        for name, grad in second_order(fused, o, settings, None).items():
            torch.testing.assert_close(grad, expected[name])

    def test_grouped(self, backend):
        operands = grouped_operands(torch.float32)

        def penalty(run, given):
            x, ends, w, a, b, bias = given
            leaves = [t.clone().requires_grad_() for t in (x, a, b)]
            actual = torch.autograd.grad(
                run(leaves[0], ends, w, *leaves[1:], bias).pow(2).sum(), leaves, create_graph=True
            )
            return torch.autograd.grad(sum(grad.pow(2).sum() for grad in actual), leaves)

        exact = [t if t.dtype is torch.int64 else t.double() for t in operands]
        expected = penalty(formula, exact)
        for name, one, other in zip("xab", penalty(partial(grouped, backend), operands), expected, strict=True):
            assert relative_l2(one, other) <= tolerance(torch.float32), name

    @pytest.mark.parametrize("needed", ["x", "a", "b", "xa", "xb", "ab", "xab"])
    def test_grouped_with_what_is_frozen(self, needed):
        x, ends, w, a, b, bias = grouped_operands()
        given = {"x": x, "a": a, "b": b}
        leaves = [given[name].requires_grad_() for name in needed]

        def run(*values):
            now = given | dict(zip(needed, values, strict=True))
            return grouped("eager", now["x"], ends, w, now["a"], now["b"], bias)

        assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)

    def test_hooks_run_once(self):
        o, settings = block(**SMALL)
        calls = []
        x = o["x"].requires_grad_()
        h = x * 1.0
        h.register_hook(lambda grad: calls.append(1))
        o["gate_up_a"].requires_grad_().register_hook(lambda grad: calls.append(2))
        torch.autograd.grad(fused(o | {"x": h}, settings).sum(), [x, o["gate_up_a"]], create_graph=True)
        assert sorted(calls) == [1, 2]

    def test_no_tokens(self):
        o, settings = block(**SMALL | {"T": 0})
        for name, grad in second_order(fused, o, settings, None).items():
            assert grad is None or not grad.any(), name

    def test_hessian(self):
        o, settings = block(**SMALL)

        def loss(run):
            return lambda a: run(o | {"gate_up_a": a}).pow(2).sum()

        for vectorize in (False, True):
            actual = torch.autograd.functional.hessian(
                loss(lambda o: fused(o, settings)), o["gate_up_a"], vectorize=vectorize
            )
            expected = torch.autograd.functional.hessian(loss(lambda o: plain(o, **settings)), o["gate_up_a"])
            torch.testing.assert_close(actual, expected)
            assert actual.any()

    @pytest.mark.parametrize("activation", ["silu", squared])
    def test_batched_gradients(self, backend, activation):
        o, settings = block(**SMALL, dtype=torch.float32, activation=activation)
        for name in ("x", "gate_up_a", "topk_weight"):
            run = lambda t, name=name: fused(o | {name: t}, settings, backend)  # noqa: E731
            exact = torch.autograd.functional.jacobian(lambda t, name=name: plain(o | {name: t}, **settings), o[name])
            batched = torch.autograd.functional.jacobian(run, o[name], vectorize=True)
            torch.testing.assert_close(batched, exact, rtol=1e-4, atol=1e-5)


class TestInPlace:
    CHANGES = {
        "div_": lambda y: y.div_(2.0),
        "slice": lambda y: y[:, :-1].mul_(3.0),
        "relu_": lambda y: torch.relu_(y),
        "masked_fill_": lambda y: y.masked_fill_(y > 0.3, 0.0),
        "assign": lambda y: y.__setitem__(0, 1.0),
    }

    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("activation", ["silu", squared])
    def test_outputs_may_be_changed(self, backend, change, autocast, activation):
        o, settings = block(**SMALL, dtype=torch.float32, activation=activation)

        def run(o, s, in_place):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = fused(o, s, backend)
                assert not y._is_view()
                y = y if in_place else y.clone()
                self.CHANGES[change](y)
            return y

        expected = differentiated(partial(run, in_place=False), o, settings)
        for name, t in differentiated(partial(run, in_place=True), o, settings).items():
            assert torch.equal(t, expected[name]), name

    @pytest.mark.parametrize("change", CHANGES)
    def test_of_grouped(self, backend, change):
        x, ends, w, a, b, bias = grouped_operands(torch.float32)
        actual = []
        for in_place in (False, True):
            leaves = [t.clone().requires_grad_() for t in (x, a, b)]
            y = grouped(backend, leaves[0], ends, w, *leaves[1:], bias)
            assert not y._is_view()
            y = y if in_place else y.clone()
            self.CHANGES[change](y)
            actual.append(torch.autograd.grad(y.square().sum(), leaves))
        assert all(torch.equal(one, other) for one, other in zip(*actual, strict=True))

    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("shape", [(6, 8), (1, 2, 3, 8)])
    @pytest.mark.parametrize("checkpointed", [False, True])
    def test_of_the_module(self, change, shape, checkpointed):
        o, _ = block(**SMALL | {"T": 6}, dtype=torch.float32)
        layer = LoRAExperts(3, 8, 4, 2)
        torch.manual_seed(0)
        layer.load_state_dict({name: torch.randn_like(t) for name, t in layer.state_dict().items()})
        actual = []
        for in_place in (False, True):
            x = o["x"].reshape(shape).clone().requires_grad_()

            def run(x, in_place=in_place):
                y = layer(x, o["topk_index"], o["topk_weight"])
                assert not y._is_view()
                y = y if in_place else y.clone()
                self.CHANGES[change](y)
                return y

            y = checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
            actual.append(torch.autograd.grad(y.square().sum(), [x, layer.down_lora_A]))
        assert all(torch.equal(one, other) for one, other in zip(*actual, strict=True))

    def test_an_activation_may_change_its_input(self, backend):
        o, settings = block(**SMALL, dtype=torch.float32)
        relu = differentiated(partial(fused, backend=backend), o, settings | {"activation": "relu"})
        own = differentiated(partial(fused, backend=backend), o, settings | {"activation": in_place})
        for name, t in own.items():
            assert relative_l2(t, relu[name]) <= tolerance(torch.float32), name


STATES = {
    "only backward": (None, torch.bfloat16),
    "only forward": (torch.bfloat16, None),
    "an island": (False, torch.bfloat16),
    "float16": (None, torch.float16),
}


def autocast(state):
    if state is None:
        return contextlib.nullcontext()
    return torch.autocast("cpu", torch.bfloat16 if state is False else state, enabled=state is not False)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("activation", "create_graph"), [("silu", False), (squared, False), (squared, True)])
def test_autocast_of_forward_and_backward(state, activation, create_graph, backend):
    """The block computes in its weights' dtype whatever autocast says, in both directions."""
    o, settings = block(**SMALL, dtype=torch.float32, activation=activation)
    leaves = [o[name].requires_grad_() for name in trained(o)]
    x, ends, w, a, b, bias = grouped_operands(torch.float32)
    low = [t.requires_grad_() for t in (x, a, b)]

    def step(forward, backward):
        with autocast(backward), autocast(forward):
            y, z = fused(o, settings, backend), grouped(backend, x, ends, w, a, b, bias)
            dy, dz = torch.linspace(-1, 1, y.numel()).view_as(y), torch.linspace(-1, 1, z.numel()).view_as(z)
        with autocast(backward):
            return (
                *torch.autograd.grad(y, leaves, dy, create_graph=create_graph),
                *torch.autograd.grad(z, low, dz, create_graph=create_graph),
            )

    for one, other in zip(step(*STATES[state]), step(None, None), strict=True):
        assert one.dtype is torch.float32
        assert torch.equal(one, other)


def test_compiled_without_the_plain_formula(monkeypatch):
    """A graph of autograd holds the operator in both directions, and no grad mode leads it elsewhere."""
    monkeypatch.setattr("lorafuse.ops.plain.experts", None)
    monkeypatch.setattr("lorafuse.ops.plain.grouped", None)
    o, settings = block(**SMALL, dtype=torch.float32)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    expected = differentiated(fused, o, settings)
    for name, tensor in differentiated(compiled, o, settings).items():
        assert torch.equal(tensor, expected[name]), name
    x, ends, w, a, b, bias = grouped_operands(torch.float32)
    y = torch.compile(grouped, fullgraph=True, backend="aot_eager")("eager", x.requires_grad_(), ends, w, a, b, bias)
    assert torch.equal(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, grouped("eager", x, ends, w, a, b, bias))))
