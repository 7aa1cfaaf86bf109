"""The LoRA linear under torch.compile, activation checkpointing, autocast and `opcheck` (T1)."""

import shutil

import pytest
import torch
import torch._inductor.config
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lorafuse.functional import lora_linear
from lorafuse.nn import LoRALinear
from lorafuse.ops import linear as linear_ops
from lorafuse.testing.check_linear import LinearCase, make_operands
from lorafuse.testing.numerics import assert_three_way, relative_l2, tolerance

NAMES = ("x", "a", "b", "bias")
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="Inductor needs a C++ compiler, this machine has none")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.compiler.reset()


def operands(case, names=NAMES):
    o = make_operands(case)
    for name in names:
        if getattr(o, name) is not None:
            getattr(o, name).requires_grad_()
    return o


def results(function, o):
    """y and the gradients of everything in `o` that requires one, by name."""
    y = function(o.x, o.w, o.a, o.b, o.bias)
    requested = [name for name in NAMES if getattr(o, name) is not None]
    for name in requested:
        getattr(o, name).grad = None
    y.backward(o.dy)
    return {"y": y.detach(), **{f"d{name}": getattr(o, name).grad for name in requested}}


def assert_same(actual, expected, bound=None):
    """Equal bit for bit, or up to `bound` in relative L2."""
    assert actual.keys() == expected.keys()
    for name in actual:
        assert actual[name].dtype is expected[name].dtype, name
        if bound is None:
            assert torch.equal(actual[name], expected[name]), name
        else:
            assert relative_l2(actual[name], expected[name]) <= bound, name
        assert expected[name].any(), name


class TestCompile:
    @pytest.mark.parametrize("dropout_p", [0.0, 0.4])
    @pytest.mark.parametrize("bias", [True, False])
    def test_equals_eager(self, dropout_p, bias):
        def function(x, w, a, b, bias):
            # neighbours on both sides, so that the operator sits inside a graph
            y = lora_linear(x * 2, w, a, b, scale=0.7, bias=bias, dropout_p=dropout_p, seed=5)
            return torch.relu(y) + y

        o = operands(LinearCase(leading=(3, 7), bias=bias))
        assert_same(results(torch.compile(function, fullgraph=True, backend="aot_eager"), o), results(function, o))

    def test_half_base_with_fp32_adapters(self):
        def function(x, w, a, b, bias):
            return lora_linear(x, w, a, b, bias=bias)

        o = operands(LinearCase(dtype=torch.bfloat16, adapter_dtype=torch.float32))
        assert_same(results(torch.compile(function, fullgraph=True, backend="aot_eager"), o), results(function, o))

    @pytest.mark.parametrize("names", [("a", "b"), ("x",), ("b",), ("bias",)], ids="-".join)
    def test_some_gradients(self, names):
        def function(x, w, a, b, bias):
            return lora_linear(x, w, a, b, scale=0.7, bias=bias, dropout_p=0.4, seed=5)

        o = operands(LinearCase(), names)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        actual = []
        for f in (compiled, function):
            y = f(o.x, o.w, o.a, o.b, o.bias)
            actual.append([y, *torch.autograd.grad(y, [getattr(o, name) for name in names], o.dy)])
        assert all(map(torch.equal, *actual))

    @pytest.mark.parametrize("dropout_p", [0.0, 0.4])
    def test_one_graph_for_every_number_of_tokens(self, dropout_p):
        graphs = []

        def function(x, w, a, b, bias):
            return lora_linear(x, w, a, b, scale=0.7, bias=bias, dropout_p=dropout_p, seed=5)

        def count(graph, _):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        counted = torch.compile(function, fullgraph=True, backend=count)
        for tokens in (7, 64, 129):
            o = operands(LinearCase(leading=(tokens,)))
            torch._dynamo.mark_dynamic(o.x, 0)
            assert_same(results(compiled, o), results(function, o))
            assert torch.equal(counted(o.x, o.w, o.a, o.b, o.bias), function(o.x, o.w, o.a, o.b, o.bias))
        assert len(graphs) == 1

    def test_a_drawn_seed_differs_per_call(self):
        def function(x, w, a, b, bias):
            return lora_linear(x, w, a, b, bias=bias, dropout_p=0.5)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        o = make_operands(LinearCase())
        tensors = o.x, o.w, o.a, o.b, o.bias
        assert not torch.equal(compiled(*tensors), compiled(*tensors))
        torch.manual_seed(5)
        y = compiled(*tensors)
        torch.manual_seed(5)
        assert torch.equal(compiled(*tensors), y)
        torch.manual_seed(5)
        assert torch.equal(function(*tensors), y)

    def test_module(self):
        layer = LoRALinear(33, 20, 4, alpha=10)
        torch.nn.init.normal_(layer.lora_B.weight)
        x = torch.randn(5, 33)
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))

    def test_errors_stay_errors(self):
        def function(x, w, a, b, bias):
            return lora_linear(x, w, b, a)

        o = make_operands(LinearCase())
        with pytest.raises(Exception, match="lora_linear got x"):
            torch.compile(function, fullgraph=True, backend="aot_eager")(o.x, o.w, o.a, o.b, o.bias)

    @needs_compiler
    @pytest.mark.parametrize("dropout_p", [0.0, 0.4])
    def test_inductor(self, dropout_p):
        def function(x, w, a, b, bias):
            y = lora_linear(x * 2, w, a, b, scale=0.7, bias=bias, dropout_p=dropout_p, seed=5)
            return torch.relu(y) + y

        o = operands(LinearCase(leading=(3, 7)))
        compiled = results(torch.compile(function, fullgraph=True), o)
        assert_same(compiled, results(function, o), tolerance(torch.float32))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mode", ["eager", "aot_eager", pytest.param("inductor", marks=needs_compiler)])
class TestCheckpoint:
    def function(self, x, w, a, b, bias):
        return torch.tanh(lora_linear(x, w, a, b, scale=0.7, bias=bias, dropout_p=0.4, seed=5))

    def test_explicit_seed(self, use_reentrant, mode):
        def saved(*tensors):
            return checkpoint(self.function, *tensors, use_reentrant=use_reentrant)

        o = operands(LinearCase(leading=(3, 7)))
        run = saved if mode == "eager" else torch.compile(saved, fullgraph=True, backend=mode)
        bound = tolerance(torch.float32) if mode == "inductor" else None
        assert_same(results(run, o), results(self.function, o), bound)

    def test_drawn_seed(self, use_reentrant, mode):
        """Two layers that draw: with the same state of the generator the checkpoint changes nothing."""

        def block(x, w, a, b, bias):
            y = lora_linear(x, w, a, b, bias=bias, dropout_p=0.4)
            return lora_linear(torch.tanh(y), w.t(), b.t(), a.t(), dropout_p=0.4)

        def saved(*tensors):
            return checkpoint(block, *tensors, use_reentrant=use_reentrant)

        o = operands(LinearCase(leading=(3, 7)))
        o.dy = torch.randn_like(o.x)
        run = saved if mode == "eager" else torch.compile(saved, fullgraph=True, backend=mode)
        actual = []
        for function in (run, block):
            torch.manual_seed(4)
            # without it Inductor draws other numbers than eager torch
            with torch._inductor.config.patch(fallback_random=True):
                actual.append(results(function, o))
        assert_same(*actual, tolerance(torch.float32) if mode == "inductor" else None)

    def test_drawn_mask_is_one_mask(self, use_reentrant, mode):
        """Whatever generator a compiler uses, backward meets the mask of forward."""
        eye = torch.eye(16)
        a, b = eye.clone().requires_grad_(), eye.clone().requires_grad_()

        def saved(x):
            return checkpoint(lambda x: lora_linear(x, 0 * eye, a, b, dropout_p=0.5), x, use_reentrant=use_reentrant)

        run = saved if mode == "eager" else torch.compile(saved, fullgraph=True, backend=mode)
        x = torch.ones(32, 16, requires_grad=True)
        masks = []
        for _ in range(2):
            x.grad = a.grad = b.grad = None
            y = run(x)
            y.backward(torch.ones_like(y))
            masks.append(y != 0)
            assert torch.equal(x.grad != 0, masks[-1])
            assert torch.equal(b.grad, y.detach().sum(0).expand(16, 16))
            assert torch.equal(a.grad, y.detach().sum(0).expand(16, 16))
            assert masks[-1].any()
        assert not torch.equal(*masks)


def plain(x, w, a, b, bias):
    return linear(x, w, bias) + 0.7 * linear(linear(x, a), b)


def fused(x, w, a, b, bias):
    return lora_linear(x, w, a, b, scale=0.7, bias=bias)


class TestAutocast:
    @pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_equals_the_formula_under_autocast(self, base, dtype):
        case = LinearCase(leading=(3, 21), dtype=base, adapter_dtype=torch.float32)
        result = []
        for function in (fused, plain):
            o = operands(case)
            with torch.autocast("cpu", dtype):
                y = function(o.x, o.w, o.a, o.b, o.bias)
            assert y.dtype is dtype
            y.backward(o.dy.to(dtype))
            result.append({"y": y} | {f"d{name}": getattr(o, name).grad for name in NAMES})
            for name in NAMES:
                assert getattr(o, name).grad.dtype is getattr(o, name).dtype, name
        exact = make_operands(case).to(torch.float64)
        for name in NAMES:
            getattr(exact, name).requires_grad_()
        reference = results(plain, exact)
        for name in reference:
            actual, same = result[0][name].detach(), result[1][name].detach()
            # what is computed in the autocast dtype is judged by its rounding, whatever dtype holds it
            assert_three_way(name, actual.to(dtype), same.to(dtype), reference[name])
            assert actual.any(), name

    @pytest.mark.parametrize("dropout_p", [0.0, 0.4])
    def test_fp32_adapters_need_no_autocast(self, dropout_p):
        o = operands(LinearCase(dtype=torch.bfloat16, adapter_dtype=torch.float32))

        def function(*tensors):
            x, w, a, b, bias = tensors
            return lora_linear(x, w, a, b, scale=0.7, bias=bias, dropout_p=dropout_p, seed=5)

        def under_autocast(*tensors):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*tensors)

        assert_same(results(function, o), results(under_autocast, o))

    def test_switched_off_it_does_nothing(self):
        o = make_operands(LinearCase())
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            y = fused(o.x, o.w, o.a, o.b, o.bias)
        assert torch.equal(y, fused(o.x, o.w, o.a, o.b, o.bias))

    def test_leaves_fp64_alone(self):
        o = make_operands(LinearCase(dtype=torch.float64))
        with torch.autocast("cpu", torch.bfloat16):
            assert fused(o.x, o.w, o.a, o.b, o.bias).dtype is torch.float64

    def test_half_inputs_meet_an_fp32_base(self):
        o = make_operands(LinearCase())
        with torch.autocast("cpu", torch.bfloat16):
            mixed = fused(o.x.bfloat16(), o.w, o.a, o.b, o.bias)
            assert torch.equal(mixed, fused(o.x, o.w, o.a, o.b, o.bias))

    def test_compiled(self):
        o = operands(LinearCase())

        def function(*tensors):
            with torch.autocast("cpu", torch.bfloat16):
                return fused(*tensors)

        o.dy = o.dy.bfloat16()
        assert_same(results(torch.compile(function, fullgraph=True, backend="aot_eager"), o), results(function, o))


SEED = torch.tensor([5])
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


class TestOpcheck:
    @pytest.mark.parametrize("seed", [None, SEED], ids=["", "dropout"])
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
    @pytest.mark.parametrize("case", [LinearCase(leading=(5,)), LinearCase((2, 3), adapter_dtype=torch.float64)])
    def test_forward(self, case, bias, seed):
        o = operands(case)
        p = 0.4 if seed is not None else 0.0
        args = (o.x, o.w, o.bias if bias else None, o.a, o.b, seed, 0.7, p, "eager")
        # a trace takes most of the time and asks for shapes alone: with both options and with neither
        checks = CHECKS if bias == (seed is not None) else CHECKS[:3]
        torch.library.opcheck(torch.ops.lorafuse.lora_linear.default, args, test_utils=checks)

    @pytest.mark.parametrize("seed", [None, SEED], ids=["", "dropout"])
    @pytest.mark.parametrize(
        "needs",
        [(True,) * 4, (True, False, False, False), (False, True, False, True), (False, False, True, False)],
        ids=lambda needs: "".join("nf"[not need] for need in needs),
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_backward(self, needs, seed, dtype):
        o = make_operands(LinearCase(leading=(2, 3), dtype=dtype, adapter_dtype=torch.float32))
        x, xa = (o.x if needs[1] else None), (torch.randn(6, 8, dtype=dtype) if needs[2] else None)
        p = 0.4 if seed is not None else 0.0
        args = (o.dy, x, xa, o.w, o.a, o.b, seed, 0.7, p, list(needs), "eager")
        torch.library.opcheck(torch.ops.lorafuse.lora_linear_backward.default, args)


class Named(torch.Tensor):
    """A subclass, whose calls are its own affair."""


class Seen(TorchDispatchMode):
    """The operators of a call that reach torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def run(x, w, a, b, bias):
    return lora_linear(x, w, a, b, bias=bias, scale=0.7)


class TestDispatcher:
    """The operator is passed to torch's dispatcher where somebody would see it, and only there."""

    BOTH = ("lorafuse.lora_linear.default", "lorafuse.lora_linear_backward.default")

    def test_a_mode_sees_it(self):
        o = operands(LinearCase())
        unseen = results(run, o)
        with Seen() as seen:
            actual = results(run, o)
        assert [name for name in seen.names if name.startswith("lorafuse")] == list(self.BOTH)
        assert all(torch.equal(actual[name], one) for name, one in unseen.items())

    def test_the_profiler_sees_it(self):
        o = operands(LinearCase())
        with torch.profiler.profile() as profiled:
            results(run, o)
        assert {name.removesuffix(".default").replace(".", "::") for name in self.BOTH} <= {
            event.name for event in profiled.events()
        }

    @pytest.mark.parametrize("name", ["x", "w", "a"])
    def test_a_subclass_sees_it(self, name, monkeypatch):
        o, calls = operands(LinearCase()), []
        op = linear_ops.op
        monkeypatch.setattr(linear_ops, "op", lambda *args: calls.append(args) or op(*args))
        results(run, o)
        assert not calls
        given = {one: getattr(o, one).detach() for one in ("x", "w", "a", "b")}
        given[name] = given[name].as_subclass(Named)
        lora_linear(*given.values())
        assert len(calls) == 1

    def test_meta_tensors_have_shapes_and_no_kernel(self):
        o = make_operands(LinearCase())
        y = lora_linear(*(t.to("meta") for t in (o.x, o.w, o.a, o.b)))
        assert y.is_meta
        assert y.shape == lora_linear(o.x, o.w, o.a, o.b).shape
