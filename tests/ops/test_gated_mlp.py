"""The gated MLP as one operator (T1): every gradient by name against fp64, what is saved, mutations, activations."""

from dataclasses import replace

import pytest
import torch
from group_reference import Case, check, make, mlp, plain_mlp, results, single

from lorafuse import activation as activations
from lorafuse import functional as LF
from lorafuse.backends import base, protocol
from lorafuse.ops import gated_mlp, group
from lorafuse.testing.numerics import relative_l2, tolerance

pytest_plugins = "backend_fixtures"
backends = pytest.mark.parametrize("backend", ["eager", "triton"])
SIZES = {"N": (20, 20, 14), "K": 14}
CASES = {
    "plain": Case(**SIZES),
    "gate and down": Case(**SIZES, R=(4, 0, 2)),
    "up alone": Case(**SIZES, R=(0, 3, 0)),
    "frozen": Case(**SIZES, R=(0, 0, 0)),
    "masked": Case(**SIZES, p=(0.4, 0.0, 0.25), bias=(False, True, False)),
    "masks everywhere": Case(**SIZES, p=(0.3, 0.5, 0.5), R=(1, 13, 6), leading=(31,)),
    "another width": Case(N=(20, 20, 9), K=14, leading=(3, 2, 4)),
    "bf16": Case(N=(96, 96, 66), K=66, dtype=torch.bfloat16, adapter_dtype=torch.float32, leading=(3, 21)),
    "fp16": Case(N=(96, 96, 66), K=66, dtype=torch.float16, leading=(64,), p=(0.0, 0.2, 0.0)),
}
ACTIVATIONS = (*activations.ACTIVATIONS, *activations.GATES)


def require(backend, dtype=torch.float32):
    if not base.availability(backend).ok:
        pytest.skip(f"{backend} cannot run here")
    if backend == "triton" and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")


def operands(case=CASES["plain"]):
    return make(case, of_mlp=True)


@backends
@pytest.mark.parametrize("recompute_up", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_gradient(case, recompute_up, backend):
    require(backend, CASES[case].dtype)
    check(lambda o: mlp(o, backend=backend, recompute_up=recompute_up), plain_mlp, operands(CASES[case]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    o = operands()
    # on both sides of the limits and slopes
    o.x = o.x * 8
    check(lambda o: mlp(o, activation), lambda o: plain_mlp(o, activation), o)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_in_chunks(activation, rows, monkeypatch):
    """A CPU activates some rows at a time, forward and backward."""
    o = operands()
    monkeypatch.setattr(activations, "CHUNK", rows * 20)
    check(lambda o: mlp(o, activation), lambda o: plain_mlp(o, activation), o)


@pytest.mark.parametrize("leading", [(), (0,), (0, 4), (1,), (1, 1, 1), (257,)])
@pytest.mark.parametrize("p", [(0.0, 0.0, 0.0), (0.4, 0.0, 0.4)])
def test_every_dimension(leading, p):
    check(mlp, plain_mlp, operands(Case(**SIZES, leading=leading, p=p)))


@pytest.mark.parametrize("recompute_up", [False, True])
@pytest.mark.parametrize("case", ["plain", "gate and down", "masked"])
def test_equals_layers_in_composites(case, recompute_up, spy):
    run = lambda o: mlp(o, backend="triton", recompute_up=recompute_up)  # noqa: E731
    check(run, plain_mlp, operands(CASES[case]), draws=1)
    adapted = sum(r > 0 for r in CASES[case].R)
    again = recompute_up and CASES[case].R[1] > 0
    assert spy.calls == ["linear_forward"] * adapted + ["linear_forward"] * again + ["linear_backward"] * adapted


@backends
def test_equals_the_single_layers(backend):
    require(backend)
    o = operands()

    def layers(o):
        gate, up = single(replace(o, projections=o.projections[:2]))
        h = torch.nn.functional.silu(gate) * up
        return single(replace(o, x=h, projections=o.projections[2:]))

    one, other = results(lambda o: mlp(o, backend=backend), o), results(layers, o)
    for name, tensor in one.items():
        assert relative_l2(tensor, other[name]) < tolerance(torch.float32), name


SUBSETS = [
    ("x",), ("a 0", "b 0"), ("b 1",), ("a 2",), ("b 2",), ("bias 0",), ("bias 2",), ("x", "b 2"), ("x", "a 1"),
    ("a 0", "b 0", "a 1", "b 1", "a 2", "b 2"),
]  # fmt: skip


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
@pytest.mark.parametrize("p", [(0.0, 0.0, 0.0), (0.4, 0.0, 0.3)])
@pytest.mark.parametrize("recompute_up", [False, True])
def test_some_gradients(names, p, recompute_up):
    o = operands(Case(**SIZES, p=p))
    every = results(mlp, o)
    some = check(lambda o: mlp(o, recompute_up=recompute_up), plain_mlp, o, names)
    for name in names:
        assert relative_l2(some[f"d{name}"], every[f"d{name}"]) < tolerance(torch.float32), name


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("recompute_up", [False, True])
def test_gradcheck(activation, recompute_up):
    case = Case(N=(5, 5, 3), R=(2, 1, 2), K=4, leading=(2, 3), p=(0.0, 0.3, 0.0), dtype=torch.float64)
    o = operands(case)
    leaves = o.fresh().leaves()

    def function(*tensors):
        return mlp(o.with_leaves(dict(zip(leaves, tensors, strict=True))), activation, recompute_up=recompute_up)

    assert torch.autograd.gradcheck(function, list(leaves.values()), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, list(leaves.values()), fast_mode=True)


def saved_by(o, names=None, **more):
    """Shapes of what is saved beyond parameters, x and seeds; and whether x is."""
    o, saved = o.fresh(names), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        (y,) = mlp(o, **more)
    parameters = {t.data_ptr() for one in o.projections for t in one[:5] if isinstance(t, torch.Tensor) and t.numel()}
    kept = [t for t in saved if t.data_ptr() not in parameters and t.dtype is not torch.int64]
    assert y.requires_grad
    others = [t for t in kept if t.data_ptr() != o.x.data_ptr()]
    assert len({t.untyped_storage().data_ptr() for t in kept}) == len(kept)
    return sorted(tuple(t.shape) for t in others), len(kept) - len(others)


@pytest.mark.parametrize("p", [(0.0, 0.0, 0.0), (0.4, 0.0, 0.3)])
def test_gate_and_up_are_saved(p):
    """Beyond x and what has the rank, autograd would keep act(gate) and h as well."""
    o = operands(Case(**SIZES, p=p))
    gate = up = (18, 20)
    xa, ha = (18, 7), (18, 2)
    assert saved_by(o) == (sorted([gate, up, xa, ha]), 1)
    assert saved_by(o, recompute_up=True) == (sorted([gate, xa, ha]), 1)
    assert saved_by(o, ("x",)) == ([gate, up], 1)
    assert saved_by(o, ("b 2",)) == ([ha], 1)


def test_h_is_not_kept_between_passes(monkeypatch):
    """The activation is computed in forward and once more in backward, which makes h of it where down's a needs it."""
    monkeypatch.setattr(activations, "function", lambda: None)
    calls, act = [], activations.ACTIVATIONS["gelu"]
    monkeypatch.setitem(activations.ACTIVATIONS, "gelu", (lambda x: calls.append(1) or act[0](x), act[1]))
    o = operands()
    (y,) = mlp(o.fresh(), "gelu")
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2


def test_retain_graph_writes_no_saved_tensor():
    o = operands(CASES["masked"]).fresh()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ys = mlp(o)
    before, leaves = [t.clone() for t in saved], list(o.leaves().values())
    first = torch.autograd.grad(ys, leaves, o.dys, retain_graph=True)
    second = torch.autograd.grad(ys, leaves, o.dys)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, before, saved))


@backends
def test_the_result_may_be_written(backend):
    require(backend)
    o = operands()
    actual = [
        results(lambda o, run=run: (run(o)[0].mul_(2),), o) for run in (lambda o: mlp(o, backend=backend), plain_mlp)
    ]
    for name, tensor in actual[0].items():
        torch.testing.assert_close(tensor, actual[1][name], rtol=1e-4, atol=1e-5)
    (y,) = mlp(o.fresh())
    assert y._base is None


def test_runs_are_bitwise_equal():
    o = operands(Case(**SIZES, leading=(257,), p=(0.0, 0.3, 0.0)))
    one, other = results(mlp, o), results(mlp, o)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("activation", ["swish", None, torch.relu])
def test_an_unknown_activation_is_refused(activation):
    with pytest.raises(ValueError, match=r"activation .* must be one of silu, gelu"):
        mlp(operands(), activation)


def red(o, **more):
    """The first tensor that is wrong, by name; "" where none is."""
    try:
        check(lambda o: mlp(o, **more), plain_mlp, o)
    except AssertionError as error:
        return str(error).partition(":")[0]
    return ""


def exchange_gate_and_up(forward):
    return lambda run, plan, x, layers, *rest: forward(run, plan, x, [layers[1], layers[0], layers[2]], *rest)


def change_layer(place, **changes):
    def register(function):
        def wrong(run, plan, x, layers, *rest):
            changed = [replace(one, **changes) if i == place else one for i, one in enumerate(layers)]
            return function(run, plan, x, changed, *rest)

        return wrong

    return register


def change_result(place, change):
    def register(function):
        def wrong(*args):
            made = list(function(*args))
            made[place] = change(made)
            return made

        return wrong

    return register


def exchange_slopes(backward):
    return lambda *args: tuple(reversed(backward(*args)))


def drop_a_dx(backward):
    def wrong(run, plan, dys, *rest):
        right = backward(run, plan, dys, *rest)
        return [backward(run, plan, [dys[0], None], *rest)[0], *right[1:]]

    return wrong


# of equal ranks, so that shapes betray nothing: where, what, the change, and what shows it first
SAME = Case(N=(14, 14, 14), K=14, R=(3, 3, 3), bias=(False, False, False))
MUTATIONS = {
    "gate and up exchanged": (gated_mlp, "forward", exchange_gate_and_up, "y 0"),
    "down without its scale": (gated_mlp, "forward", change_layer(2, scale=1.0), "y 0"),
    "down with the scale of a mask": (gated_mlp, "forward", change_layer(2, scale=0.5), "y 0"),
    "gate kept as up": (gated_mlp, "forward", change_result(2, lambda made: made[1].clone()), "dx"),
    "xa of gate for both": (group, "low_rank", change_result(0, lambda made: made[0][:, :3].repeat(1, 2)), "db 1"),
    "a stale ha": (gated_mlp, "forward", change_result(4, lambda made: made[4].roll(1, 0)), "db 2"),
    "dgate and dup exchanged": (protocol, "gate_backward", exchange_slopes, "dx"),
    "up's dx dropped": (group, "backward", drop_a_dx, "dx"),
    "two da exchanged": (group, "backward", change_result(1, lambda made: made[2]), "da 0"),
}


def test_the_right_operator_is_green():
    assert red(make(SAME, of_mlp=True)) == ""


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_red(name, monkeypatch):
    module, function, change, shown = MUTATIONS[name]
    monkeypatch.setattr(module, function, change(getattr(module, function)))
    assert red(make(SAME, of_mlp=True)) == shown


def test_an_up_computed_again_is_the_one_of_forward(monkeypatch):
    monkeypatch.setattr(
        gated_mlp, "up_again", lambda run, x, xa, siblings, wide: run.matmul(x, siblings[1].weight, None, None)
    )
    assert red(make(SAME, of_mlp=True), recompute_up=True) == "dx"


def test_of_weights_in_another_format():
    o = operands(Case(N=(16, 16, 14), K=14))
    data = [torch.randint(-127, 127, one.weight.shape, dtype=torch.int8) for one in o.projections]
    scales = [torch.rand(one.weight.shape[0], 1) / 500 for one in o.projections]
    quantized, dense = [], []
    for one, q, s in zip(o.projections, data, scales, strict=True):
        weight = LF.Weight(q, statistics=(s,), format="int8")
        quantized.append(one._replace(weight=weight))
        dense.append(one._replace(weight=weight.decoded(torch.float32).data))
    actual = []
    for layers in (quantized, dense):
        new = replace(o, projections=layers).fresh()
        ys = (*mlp(new), *LF.lora_linears(new.x, new.projections[:2]))
        actual.append([*ys, *torch.autograd.grad(sum(y.sin().sum() for y in ys), list(new.leaves().values()))])
    assert all(map(torch.equal, *actual))
