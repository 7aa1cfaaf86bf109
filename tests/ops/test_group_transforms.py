"""Groups (T1) under torch.compile, checkpointing, autocast, `opcheck`, functorch and torch's counters."""

import pytest
import torch
from group_reference import Case, Operands, linears, make, mlp, plain_linears, plain_mlp, results
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lorafuse.ops import gated_mlp, group
from lorafuse.ops.layers import Settings, layers_of
from lorafuse.testing.numerics import assert_three_way, relative_l2, tolerance

# name: (ours, the formula, whether it is an MLP)
OPERATORS = {"linears": (linears, plain_linears, False), "mlp": (mlp, plain_mlp, True)}
operators = pytest.mark.parametrize("name", OPERATORS)
MASKS = pytest.mark.parametrize("p", [(0.0, 0.0, 0.0), (0.4, 0.0, 0.3)], ids=["", "masks"])
SIZES = {"N": (14, 14, 10), "K": 12}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.compiler.reset()


def operands(name, **changes):
    return make(Case(**SIZES | changes), of_mlp=OPERATORS[name][2])


def assert_equal(one, other, bound=None):
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        if bound is None or key == "differentiable":
            assert torch.equal(tensor, other[key]), key
        else:
            assert relative_l2(tensor, other[key]) <= bound, key


def of_tensors(name, o, run=None):
    """The operator as a function of its leaves, and these."""
    leaves = o.leaves()

    def function(*tensors):
        return (run or OPERATORS[name][0])(o.with_leaves(dict(zip(leaves, tensors, strict=True))))

    return function, list(leaves.values())


def traced(name, o, wrap):
    """`run` of operands, whose leaves went through `wrap` of the function of tensors."""

    def run(given):
        function, _ = of_tensors(name, given)
        return wrap(function)(*given.leaves().values())

    return run


@operators
@MASKS
@pytest.mark.parametrize("ranks", [(4, 3, 2), (4, 0, 2)], ids=["", "frozen"])
def test_compiled(name, p, ranks):
    o, run = operands(name, p=p, R=ranks), OPERATORS[name][0]
    compiled = traced(name, o, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"))
    assert_equal(results(compiled, o), results(run, o))


@operators
@pytest.mark.parametrize("names", [("x",), ("a 0", "b 2"), ("b 0", "b 1", "b 2"), ("x", "bias 0")], ids="-".join)
def test_compiled_with_some_gradients(name, names):
    o, run = operands(name, p=(0.0, 0.3, 0.0)), OPERATORS[name][0]
    compiled = traced(name, o, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"))
    assert_equal(results(compiled, o, names), results(run, o, names))


@operators
def test_one_graph_for_every_number_of_tokens(name):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    o = operands(name)
    layers = tuple(o.projections)

    def function(x):
        return OPERATORS[name][0](Operands(x, list(layers)))

    counted = torch.compile(function, fullgraph=True, backend=count, dynamic=True)
    for tokens in (7, 64, 129):
        x = torch.randn(tokens, 12)
        assert all(map(torch.equal, counted(x), function(x)))
    assert len(graphs) == 1


@operators
@MASKS
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_checkpointed(name, p, use_reentrant, is_compiled):
    def wrap(function):
        def run(*tensors):
            return checkpoint(lambda *t: tuple(y.tanh() for y in function(*t)), *tensors, use_reentrant=use_reentrant)

        return torch.compile(run, fullgraph=True, backend="aot_eager") if is_compiled else run

    o, run = operands(name, p=p), OPERATORS[name][0]
    assert_equal(results(traced(name, o, wrap), o), results(lambda o: [y.tanh() for y in run(o)], o))


@operators
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, base, dtype):
    ours, formula, _ = OPERATORS[name]
    o = operands(name, N=(64, 64, 32), K=66, leading=(3, 21), dtype=base, adapter_dtype=torch.float32)

    def under(run):
        def call(o):
            with torch.autocast("cpu", dtype):
                return run(o)

        return call

    def cast(run):
        # the formula casts adapters to x's dtype, which is autocast's in the layers alone
        def call(o):
            x, layers = o.x.to(dtype), []
            for one in o.projections:
                layers.append(
                    one._replace(weight=one.weight.to(dtype), bias=None if one.bias is None else one.bias.to(dtype))
                )
            return run(Operands(x, layers))

        return call

    actual, same = results(under(ours), o), results(cast(formula), o)
    exact = results(formula, o.fresh(dtype=torch.float64))
    for key, tensor in actual.items():
        if key != "differentiable":
            assert tensor.dtype is (dtype if key.startswith("y") else o.fresh().leaves()[key[1:]].dtype), key
            assert_three_way(key, tensor.to(dtype), same[key].to(dtype), exact[key])
            assert tensor.any(), key


@operators
@MASKS
def test_autocast_of_backward_changes_nothing(name, p):
    o, run, actual = operands(name, p=p), OPERATORS[name][0], []
    for enabled in (False, True):
        new = o.fresh()
        ys = run(new)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            actual.append(torch.autograd.grad(ys, list(new.leaves().values()), o.dys))
    assert all(map(torch.equal, *actual))


@operators
@pytest.mark.parametrize("p", [(0.0, 0.0, 0.0), (0.4, 0.0, 0.0)])
def test_fp16_with_wider_adapters(name, p):
    """xa and dyb are beyond 65504, y and dx are not: the low-rank path is fp32, as PEFT's."""
    ours, formula, is_mlp = OPERATORS[name]
    o = operands(name, N=(64, 64, 40), K=40, leading=(64,), dtype=torch.float16, adapter_dtype=torch.float32, p=p)
    new = []
    for one in o.projections:
        # of an MLP's down too: h is of unit size
        new.append(one._replace(a=one.a * 4e4, b=one.b * 1e-3, scale=0.01, bias=None))
    if is_mlp:
        new[0] = new[0]._replace(a=o.projections[0].a, b=o.projections[0].b)
    o = Operands(o.x, new, [dy * 100 for dy in o.dys])
    actual, exact = results(ours, o), results(formula, o.fresh(dtype=torch.float64))
    for key, tensor in actual.items():
        if key != "differentiable":
            assert tensor.isfinite().all(), key
            assert relative_l2(tensor, exact[key]) < tolerance(torch.float16), key


def arguments(name, o, names=None, **more):
    """What the operator is called with."""
    seen = []
    module, function = (gated_mlp, "lora_gated_mlp") if name == "mlp" else (group, "lora_linears")
    with pytest.MonkeyPatch.context() as patch:
        run = getattr(module, function)
        patch.setattr(module, function, lambda *args: seen.append(args) or run(*args))
        OPERATORS[name][0](o.fresh(names), backend="eager", **more)
    x, layers, *others = seen[0]
    settings, tensors = Settings.of_layers(layers)
    return x, *settings.arguments(tensors), *others


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def opcheck(op, args, is_traced):
    """torch's checks of an operator. A trace with symbolic sizes takes most of their time, and asks the operator for
    shapes alone: masks change none, and each of the other arguments is traced with them or without.
    """
    torch.library.opcheck(op.default, args, test_utils=(*CHECKS, "test_aot_dispatch_dynamic") if is_traced else CHECKS)


@operators
@MASKS
@pytest.mark.parametrize("changes", [{}, {"R": (0, 3, 0)}, {"dtype": torch.float16, "adapter_dtype": torch.float32}])
def test_opcheck(name, p, changes):
    op = torch.ops.lorafuse.lora_gated_mlp if name == "mlp" else torch.ops.lorafuse.lora_linears
    opcheck(op, arguments(name, operands(name, p=p, **changes)), is_traced=any(p) != bool(changes))


@MASKS
@pytest.mark.parametrize(
    "needs", [(True,) * 10, (True, *(False,) * 9), (False, True, False, False, True, *(False,) * 5)]
)
@pytest.mark.parametrize("present", [(0, 1, 2), (1,)])
def test_opcheck_of_backward(p, needs, present):
    o = operands("linears", p=p)
    x, *rest, backend, wide = arguments("linears", o, ())
    dys = [dy if i in present else None for i, dy in enumerate(o.dys)]
    needs = [need and (i == 0 or (i - 1) % 3 in present) for i, need in enumerate(needs)]
    args = dys, x, torch.randn(18, 9), *rest, needs, backend, wide
    opcheck(torch.ops.lorafuse.lora_linears_backward, args, is_traced=any(p) == (len(present) > 1))


@MASKS
@pytest.mark.parametrize(
    "needs", [(True,) * 10, (True, *(False,) * 9), (False, True, False, False, True, *(False,) * 5)]
)
@pytest.mark.parametrize("recompute_up", [False, True])
def test_opcheck_of_mlp_backward(p, needs, recompute_up):
    o = operands("mlp", p=p)
    x, *rest, backend, wide, activation, _ = arguments("mlp", o, ())
    _, gate, up, xa, ha = torch.ops.lorafuse.lora_gated_mlp(x, *rest, backend, wide, activation, False)
    kept = x, gate, None if recompute_up else up, xa, ha
    args = o.dys[0], *kept, *rest, list(needs), backend, wide, activation, recompute_up
    opcheck(torch.ops.lorafuse.lora_gated_mlp_backward, args, is_traced=any(p) != recompute_up)


@operators
def test_settings_and_tensors_are_the_arguments(name):
    _, *rest = arguments(name, operands(name))
    settings, tensors = Settings.of(rest[:10])
    assert settings.arguments(tensors)[6:] == tuple(rest[6:10])
    assert [layer.rank for layer in layers_of(*settings.arguments(tensors))] == [4, 3, 2]


def sum_of_squares(function):
    return lambda *tensors: sum(y.square().sum() for y in function(*tensors))


TRANSFORMS = {
    "grad": lambda f, n: torch.func.grad(sum_of_squares(f), tuple(range(n))),
    "vmap": lambda f, n: torch.func.vmap(f, (0, *[None] * (n - 1))),
    "jacrev": lambda f, n: torch.func.jacrev(f, (0, 1)),
    "jacfwd": lambda f, n: torch.func.jacfwd(f, (0, 1)),
    "jvp": lambda f, n: lambda *t: torch.func.jvp(f, t, tuple(torch.ones_like(one) for one in t)),
    "hessian": lambda f, n: torch.func.hessian(sum_of_squares(f), 0),
}


@operators
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functorch(name, transform):
    o = operands(name, dtype=torch.float64, leading=(2, 3), R=(2, 0, 1))
    actual = []
    for run in OPERATORS[name][:2]:
        function, tensors = of_tensors(name, o, run)
        actual.append(torch.utils._pytree.tree_leaves(TRANSFORMS[transform](function, len(tensors))(*tensors)))
    for one, other in zip(*actual, strict=True):
        torch.testing.assert_close(one, other)
    # y of one sibling has no derivative by the adapter of another
    assert sum(bool(one.any()) for one in actual[0]) >= len(actual[0]) // 2


@operators
@pytest.mark.parametrize("names", [None, ("x", "b 0", "b 1", "b 2")])
@MASKS
def test_a_gradient_penalty_reaches_every_operand(name, names, p):
    o, actual = operands(name, dtype=torch.float64, p=p), []
    for run in OPERATORS[name][:2]:
        new = o.fresh(names)
        leaves = [t for t in new.leaves().values() if t.requires_grad]
        loss = sum(y.pow(3).sum() for y in run(new))
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        sum(g.pow(2).sum() for g in grads).backward()
        actual.append([t.grad for t in leaves])
    for one, other in zip(*actual, strict=True):
        torch.testing.assert_close(one, other)
        assert one.any()


@operators
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_inputs(name, layout):
    o, run = operands(name), OPERATORS[name][0]
    rows = [torch.randn(3, 12), torch.randn(2, 12)]
    ys = run(Operands(torch.nested.nested_tensor(rows, layout=layout), o.projections))
    for i, x in enumerate(rows):
        for y, expected in zip(ys, run(Operands(x, o.projections)), strict=True):
            torch.testing.assert_close(y.unbind()[i], expected)
    masked = operands(name, p=(0.5, 0.0, 0.0))
    with pytest.raises(NotImplementedError, match=r"lora_\w+ draws no dropout mask for a nested x"):
        run(Operands(torch.nested.nested_tensor(rows, layout=layout), masked.projections))


@operators
@pytest.mark.parametrize("names", [None, ("x",), ("a 0", "b 0"), ("b 1",), ("a 2", "b 2"), ("x", "b 0", "a 1")])
@pytest.mark.parametrize("ranks", [(4, 3, 2), (4, 0, 2)])
def test_flops(name, names, ranks):
    # no two products are of one count; biases do not count
    o = operands(name, leading=(17,), R=ranks, bias=(False, False, False))
    names = names and [one for one in names if one in o.leaves()]
    if not names and names is not None:
        pytest.skip("none of these exists without its adapter")
    actual = []
    for run in OPERATORS[name][:2]:
        new = o.fresh(names)
        with FlopCounterMode(display=False) as forward:
            ys = run(new)
        used = [y for y in ys if y.requires_grad]
        dys = [torch.ones_like(y) for y in used]
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(used, [t for t in new.leaves().values() if t.requires_grad], dys)
        actual.append((forward.get_total_flops(), backward.get_total_flops()))
    assert actual[0] == actual[1]


@operators
def test_the_dispatcher_sees_it_where_somebody_looks(name):
    with torch.profiler.profile() as profiled:
        results(OPERATORS[name][0], operands(name))
    op = "lorafuse::lora_gated_mlp" if name == "mlp" else "lorafuse::lora_linears"
    assert {op, f"{op}_backward"} <= {event.name for event in profiled.events()}


@operators
def test_meta_tensors_have_shapes(name):
    o = operands(name)
    layers = [
        one._replace(**{k: t.to("meta") for k in ("weight", "a", "b", "bias") if (t := getattr(one, k)) is not None})
        for one in o.projections
    ]
    ys = OPERATORS[name][0](Operands(o.x.to("meta"), layers))
    assert [tuple(y.shape) for y in ys] == [tuple(y.shape) for y in OPERATORS[name][0](o)]
    assert all(y.is_meta for y in ys)
