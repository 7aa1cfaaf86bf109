"""What PEFT's users do with a layer's output and with autocast: written in place, other autocast in backward (T1)."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lorafuse.backends import base
from lorafuse.functional import lora_linear
from lorafuse.testing.check_linear import LinearCase, make_operands, plain_lora_linear
from lorafuse.testing.numerics import relative_l2, tolerance

LEAVES = ("x", "a", "b", "bias")
backends = pytest.mark.parametrize("backend", ["eager", "triton"])
WRITES = {
    "div": lambda y: y.div_(2),
    "slice": lambda y: y[..., :-1].div_(3),
    "assign": lambda y: y.__setitem__((..., 0), 5.0),
    "relu": lambda y: torch.relu_(y),
    "masked_fill": lambda y: y.masked_fill_(y > 0.5, -1.0),
    "add_view": lambda y: y.view(-1)[1:].add_(1.0),
    "index_put": lambda y: y.index_put_((torch.tensor([0]),), torch.tensor(2.0)),
    "copy_row": lambda y: y[0].copy_(y[-1].detach() * 2),
}


def require(backend):
    if not base.availability(backend).ok:
        pytest.skip(f"{backend} cannot run here")


def results(function, o, **settings):
    """y's gradients by name of `function`, for fresh leaves of the operands."""
    leaves = {name: getattr(o, name).detach().clone().requires_grad_() for name in LEAVES}
    y = function(leaves["x"], o.w, leaves["a"], leaves["b"], bias=leaves["bias"], **settings)
    return y, leaves


@backends
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("leading", [(7,), (2, 3), (2, 2, 2), (0, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_the_output_may_be_written(backend, write, leading, dropout_p):
    require(backend)
    if 0 in leading and write in ("index_put", "copy_row", "assign", "add_view"):
        leading = (3, 1)
    o = make_operands(LinearCase(leading=leading, N=6, K=5, R=2))
    actual = []
    for function, more in ((lora_linear, {"backend": backend}), (plain_lora_linear, {})):
        y, leaves = results(function, o, dropout_p=dropout_p, seed=3, **more)
        WRITES[write](y)
        y.backward(o.dy.view(y.shape))
        actual.append([y.detach(), *(leaf.grad for leaf in leaves.values())])
    for one, other in zip(*actual, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@backends
@pytest.mark.parametrize("leading", [(7,), (2, 3), (2, 2, 2)], ids=str)
def test_the_output_is_an_ordinary_tensor(backend, leading):
    require(backend)
    y, _ = results(lora_linear, make_operands(LinearCase(leading=leading)), backend=backend)
    assert y._base is None
    assert not y._is_view()
    assert y.is_contiguous()
    assert y.untyped_storage().nbytes() == y.numel() * y.element_size()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_output_may_be_written_in_a_checkpoint(use_reentrant):
    o = make_operands(LinearCase(leading=(2, 3)))

    def block(x, *rest):
        y = lora_linear(x, o.w, *rest[:2], bias=rest[2])
        y /= 2
        return y.relu_()

    grads = []
    for run in (block, lambda *args: checkpoint(block, *args, use_reentrant=use_reentrant)):
        leaves = [getattr(o, name).detach().clone().requires_grad_() for name in LEAVES]
        run(*leaves).backward(o.dy)
        grads.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_may_be_written_under_autocast(dtype):
    o = make_operands(LinearCase(leading=(2, 3)))
    with torch.autocast("cpu", dtype):
        y, leaves = results(lora_linear, o)
        y /= 2
        y[:, :-1].mul_(2)
    y.backward(o.dy.to(dtype))
    assert all(leaf.grad.any() for leaf in leaves.values())


STATES = {
    "off": lambda: torch.autocast("cpu", enabled=False),
    "bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "fp16": lambda: torch.autocast("cpu", torch.float16),
}


@backends
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backward", STATES)
@pytest.mark.parametrize("forward", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_autocast_of_backward_changes_nothing(backend, forward, backward, dropout_p, create_graph, dtype):
    require(backend)
    if backend == "triton" and (forward == "bf16" or dtype is torch.float64):
        backend = "eager"
    o = make_operands(LinearCase(leading=(2, 9), dtype=dtype, adapter_dtype=torch.promote_types(dtype, torch.float32)))
    actual = []
    for state in ("off", backward):
        with STATES["bf16"](), STATES[forward]():
            y, leaves = results(lora_linear, o, dropout_p=dropout_p, seed=3, backend=backend)
        with STATES[state]():
            grads = torch.autograd.grad(y, list(leaves.values()), o.dy.to(y.dtype), create_graph=create_graph)
        actual.append([y.detach(), *(g.detach() for g in grads)])
    assert all(map(torch.equal, *actual))
    assert [t.dtype for t in actual[0][1:]] == [leaf.dtype for leaf in leaves.values()]


class TestFp16:
    """An fp16 base with adapters of a larger range: like PEFT, which computes the low-rank path in their dtype."""

    def operands(self, adapter_dtype=torch.float32, leading=(64,)):
        case = LinearCase(leading=leading, N=24, K=40, R=4, dtype=torch.float16, adapter_dtype=adapter_dtype)
        return make_operands(case)

    @backends
    @pytest.mark.parametrize(
        ("adapter_dtype", "dropout_p"),
        [(torch.float32, 0.0), (torch.float32, 0.4), (torch.bfloat16, 0.0), (torch.float64, 0.0)],
    )
    def test_gradients_beyond_fp16_are_finite(self, backend, adapter_dtype, dropout_p):
        require(backend)
        o = self.operands(adapter_dtype, (4, 64))
        # xa and dyb are beyond 65504 and y and dx are not
        o.x, o.b, o.dy = o.x * 2e3, o.b * 1e-3, o.dy * 1e4
        o.a, scale = o.a * 40.0, 0.02
        more = {"scale": scale, "dropout_p": dropout_p, "seed": 3}
        y, leaves = results(lora_linear, o, backend=backend, **more)
        y.backward(o.dy)
        exact = o.to(torch.float64)
        expected, reference = results(plain_lora_linear, exact, **more)
        expected.backward(exact.dy)
        assert relative_l2(y, expected) < tolerance(torch.float16)
        for name, leaf in leaves.items():
            if name == "bias":
                # an fp16 sum, in PEFT as well
                continue
            assert leaf.grad.isfinite().all(), name
            assert leaf.grad.dtype is leaf.dtype
            bound = tolerance(torch.bfloat16 if leaf.dtype is torch.bfloat16 else torch.float16)
            assert relative_l2(leaf.grad, reference[name].grad) < bound, name

    def test_small_gradients_survive(self):
        o = self.operands()
        o.dy, o.b = o.dy * 1e-4, o.b * 1e-4
        y, leaves = results(lora_linear, o)
        y.backward(o.dy)
        exact = o.to(torch.float64)
        expected, reference = results(plain_lora_linear, exact)
        expected.backward(exact.dy)
        assert relative_l2(leaves["a"].grad, reference["a"].grad) < 1e-3

    @pytest.mark.parametrize("autocast", [True, False])
    def test_xa_is_fp32_outside_autocast_only(self, autocast):
        o, saved = self.operands(), []
        with (
            torch.autocast("cpu", torch.float16, enabled=autocast),
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        ):
            results(lora_linear, o)
        (xa,) = [t for t in saved if t.shape == (64, 4)]
        assert xa.dtype is (torch.float16 if autocast else torch.float32)

    def test_adapters_in_fp16_stay_as_they_were(self):
        o, saved = self.operands(torch.float16), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            results(lora_linear, o)
        assert {t.dtype for t in saved} == {torch.float16}

    def test_the_compiled_operator_keeps_fp32_too(self):
        o = self.operands()
        actual = []
        for function in (lora_linear, torch.compile(lora_linear, fullgraph=True, backend="aot_eager")):
            y, leaves = results(function, o, scale=3.0)
            (y * 1e3).backward(o.dy)
            actual.append([y.detach(), *(leaf.grad for leaf in leaves.values())])
        assert all(map(torch.equal, *actual))
