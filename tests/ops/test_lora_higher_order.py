"""The LoRA linear differentiated twice, under functorch transforms, forward mode and tracing; nested inputs (T1)."""

import io
import itertools

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn.functional import linear

from lorafuse.backends import base
from lorafuse.functional import lora_linear
from lorafuse.nn import LoRALinear
from lorafuse.ops.transforms import is_transformed
from lorafuse.testing.check_linear import LinearCase, make_operands, plain_lora_linear
from lorafuse.testing.numerics import relative_l2

LEAVES = ("x", "a", "b", "bias")
SUBSETS = [s for n in range(1, 5) for s in itertools.combinations(LEAVES, n)]
TRANSFORMS = (
    *("grad", "vmap", "vmap-grad", "jacrev", "jacfwd", "hessian"),
    *("jvp", "vjp", "linearize", "hessian-ad", "jacobian-ad", "hvp"),
)
backends = pytest.mark.parametrize("backend", ["eager", "triton"])


def case(**changes):
    return make_operands(LinearCase(**({"leading": (2, 3), "N": 4, "K": 5, "R": 2, "dtype": torch.float64} | changes)))


def function(o, names, backend="eager", dropout_p=0.0):
    """lora_linear of the operands in `names`, the others fixed; and those."""

    def call(*tensors):
        given = vars(o) | dict(zip(names, tensors, strict=True))
        more = {"scale": 0.7, "bias": given["bias"], "dropout_p": dropout_p, "seed": 3}
        return lora_linear(given["x"], given["w"], given["a"], given["b"], **more, backend=backend)

    return call, [getattr(o, name).detach().requires_grad_() for name in names]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_second_derivatives(names, dropout_p):
    call, leaves = function(case(), names, dropout_p=dropout_p)
    # every entry of the Jacobians once, projections of them for the rest
    fast = len(names) < len(LEAVES)
    assert gradgradcheck(call, leaves, fast_mode=fast)
    # jacobian(vectorize=True), is_grads_batched, forward mode
    assert gradcheck(call, leaves, check_batched_grad=True, check_forward_ad=True, fast_mode=fast)


@backends
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("names", [("x",), ("x", "b"), LEAVES], ids="-".join)
def test_a_gradient_penalty_reaches_every_operand(names, dropout_p, backend):
    if not base.availability(backend).ok:
        pytest.skip(f"{backend} cannot run here")
    o = case(dtype=torch.float32, leading=(7,))
    actual = []
    for run in ("ours", "plain"):
        call, leaves = function(o, names, backend, dropout_p)
        if run == "plain":
            more = {"scale": 0.7, "dropout_p": dropout_p, "seed": 3}

            def call(*tensors, more=more):
                given = vars(o) | dict(zip(names, tensors, strict=True))
                return plain_lora_linear(given["x"], given["w"], given["a"], given["b"], bias=given["bias"], **more)

        grads = torch.autograd.grad(call(*leaves).pow(3).sum(), leaves, create_graph=True)
        sum(g.pow(2).sum() for g in grads).backward()
        actual.append([leaf.grad for leaf in leaves])
    for name, ours, plain in zip(names, *actual, strict=True):
        assert ours.any(), name
        assert relative_l2(ours, plain) < 1e-5, name


def test_a_frozen_a_still_lets_x_go():
    """LoRA-FA saves memory by not keeping x: nothing but xa is kept for db."""
    call, leaves = function(case(), ("x", "b"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(*leaves)
    assert leaves[0].data_ptr() not in [t.data_ptr() for t in kept]


class TestTransforms:
    def modules(self, dropout=0.0):
        torch.manual_seed(1)
        layer = LoRALinear(5, 4, 2, alpha=3, dropout=dropout).double()
        torch.nn.init.normal_(layer.lora_B.weight)

        def stock(x, a, b):
            return linear(x, layer.weight, layer.bias) + layer.scale * linear(linear(x, a), b)

        def ours(x, a, b):
            return torch.func.functional_call(layer, {"lora_A.weight": a, "lora_B.weight": b}, (x,))

        factors = layer.lora_A.weight.detach(), layer.lora_B.weight.detach()
        return ours, stock, (torch.randn(6, 5, dtype=torch.float64), *factors)

    @pytest.mark.parametrize(
        "transform",
        [
            lambda f: torch.func.grad(lambda *o: f(*o).square().sum(), (0, 1, 2)),
            lambda f: torch.func.vmap(f, (0, None, None)),
            lambda f: torch.func.vmap(torch.func.grad(lambda *o: f(*o).square().sum(), (0, 1, 2)), (0, None, None)),
            lambda f: torch.func.jacrev(f, (0, 1, 2)),
            lambda f: torch.func.jacfwd(f, (0, 1, 2)),
            lambda f: torch.func.hessian(lambda *o: f(*o).pow(3).sum(), (0, 1, 2)),
            lambda f: lambda *o: torch.func.jvp(f, o, tuple(torch.ones_like(t) for t in o)),
            lambda f: lambda *o: torch.func.vjp(f, *o)[1](torch.ones(6, 4, dtype=torch.float64)),
            lambda f: lambda *o: torch.func.linearize(f, *o)[1](*o),
            lambda f: lambda *o: torch.autograd.functional.hessian(lambda *t: f(*t).pow(3).sum(), o, vectorize=True),
            lambda f: lambda *o: torch.autograd.functional.jacobian(f, o),
            lambda f: lambda *o: torch.autograd.functional.hvp(lambda *t: f(*t).pow(3).sum(), o, o)[1],
        ],
        ids=TRANSFORMS,
    )
    def test_equals_the_formula(self, transform):
        ours, stock, operands = self.modules()
        actual = torch.utils._pytree.tree_leaves(transform(ours)(*operands))
        expected = torch.utils._pytree.tree_leaves(transform(stock)(*operands))
        assert len(actual) == len(expected) > 0
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)
            assert one.any()

    def test_dual_numbers(self):
        ours, stock, (x, a, b) = self.modules()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            tangents = [forward_ad.unpack_dual(f(dual, a, b)).tangent for f in (ours, stock)]
        torch.testing.assert_close(*tangents)

    def test_a_trace_loads_without_lorafuse(self):
        layer = LoRALinear(5, 4, 2)
        torch.nn.init.normal_(layer.lora_B.weight)
        x = torch.randn(3, 5)
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(layer, (x,)), file)
        file.seek(0)
        loaded = torch.jit.load(file)
        assert "lorafuse::" not in str(loaded.inlined_graph)
        torch.testing.assert_close(loaded(torch.stack([x, -x])), layer(torch.stack([x, -x])))

    @pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
    def test_nested_inputs(self, layout):
        layer = LoRALinear(5, 4, 2)
        torch.nn.init.normal_(layer.lora_B.weight)
        rows = [torch.randn(3, 5), torch.randn(2, 5)]
        y = layer(torch.nested.nested_tensor(rows, layout=layout))
        for part, x in zip(y.unbind(), rows, strict=True):
            torch.testing.assert_close(part, layer(x))
        with pytest.raises(NotImplementedError, match="lora_linear draws no dropout mask for a nested x"):
            LoRALinear(5, 4, 2, dropout=0.5)(torch.nested.nested_tensor(rows, layout=layout))

    def test_the_mask_of_dropout_is_the_operators(self):
        call, (x,) = function(case(), ("x",), dropout_p=0.4)
        torch.testing.assert_close(torch.func.vjp(call, x.detach())[0], call(x))

    def test_ordinary_calls_are_not_transformed(self):
        x = torch.randn(2, 2, requires_grad=True)
        assert not is_transformed(x)
        seen = []
        torch.func.grad(lambda x: seen.append(is_transformed(x)) or x.sum())(x)
        assert seen == [True]
