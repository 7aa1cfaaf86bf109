"""Siblings as one operator (T1): every gradient by name against fp64, what is saved, mutations, what is refused."""

import itertools
from dataclasses import replace

import pytest
import torch
from group_reference import CASES, Case, check, linears, make, plain_linears, results, single

from lorafuse import functional as LF
from lorafuse.backends import aten, base
from lorafuse.backends.protocol import Backend
from lorafuse.operands import Weight
from lorafuse.ops import group
from lorafuse.ops.layers import Layer
from lorafuse.testing.numerics import relative_l2, tolerance

pytest_plugins = "backend_fixtures"
backends = pytest.mark.parametrize("backend", ["eager", "triton"])


def require(backend, dtype=torch.float32):
    if not base.availability(backend).ok:
        pytest.skip(f"{backend} cannot run here")
    if backend == "triton" and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")


@backends
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_every_gradient(case, backend):
    require(backend, case.dtype)
    check(lambda o: linears(o, backend=backend), plain_linears, make(case))


@pytest.mark.parametrize("leading", [(), (0,), (0, 4), (4, 0, 2), (1,), (1, 1, 1), (257,)])
@pytest.mark.parametrize("p", [(0.0, 0.0, 0.0), (0.4, 0.0, 0.4)])
def test_every_dimension(leading, p):
    check(linears, plain_linears, make(Case(leading=leading, p=p)))


@backends
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3]], ids=["plain", "frozen", "masked"])
def test_equals_the_single_layers(case, backend):
    require(backend)
    o = make(case)
    one, other = (results(run, o) for run in (lambda o: linears(o, backend=backend), single))
    for name, tensor in one.items():
        assert relative_l2(tensor, other[name]) < tolerance(torch.float32), name


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=["plain", "masked"])
def test_equals_layers_in_composites(case, spy):
    """A backend with one launch for a whole layer runs layer by layer."""
    check(lambda o: linears(o, backend="triton"), plain_linears, make(case), draws=1)
    assert spy.calls == ["linear_forward"] * 3 + ["linear_backward"] * 3


NAMES = ("x", "a 0", "b 0", "bias 0", "a 1", "b 1", "a 2", "b 2", "bias 2")
SUBSETS = [("x",), ("a 0", "b 0"), ("b 1",), ("a 2",), ("bias 0",), ("x", "b 0", "b 1"), ("x", "a 1"), NAMES[1:]]


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
@pytest.mark.parametrize("p", [(0.0, 0.0, 0.0), (0.4, 0.0, 0.3)])
def test_some_gradients(names, p):
    o = make(Case(p=p))
    every, some = results(linears, o), check(linears, plain_linears, o, names)
    for name in names:
        assert relative_l2(some[f"d{name}"], every[f"d{name}"]) < tolerance(torch.float32), name


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2), (2, 1)])
@pytest.mark.parametrize("p", [(0.0, 0.0, 0.0), (0.4, 0.0, 0.3)])
def test_results_without_a_gradient(used, p):
    """As after `q, k, _ = …`: what is not used has no gradient, and costs nothing."""
    check(linears, plain_linears, make(Case(p=p)), used=used)


@pytest.mark.parametrize("names", [None, ("x", "b 0", "b 1"), ("a 0", "a 1", "bias 2")])
@pytest.mark.parametrize("p", [(0.0, 0.0, 0.0), (0.4, 0.0, 0.3)])
def test_gradcheck(names, p):
    o = make(Case(N=(4, 3, 2), R=(2, 1, 2), K=5, leading=(2, 3), p=p, dtype=torch.float64))
    leaves = o.fresh(names).leaves()
    trained = {name: t for name, t in leaves.items() if t.requires_grad}

    def function(*tensors):
        return linears(o.with_leaves(leaves | dict(zip(trained, tensors, strict=True))))

    assert torch.autograd.gradcheck(function, list(trained.values()), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, list(trained.values()), fast_mode=names is None)


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "every second column": lambda t: torch.stack([t, t + 1], -1).flatten(-2)[..., ::2],
    "permuted": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "one row expanded": lambda t: t[:1, :1].expand(t.shape),
}


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(layout, backend):
    require(backend)
    o, strided = make(Case()), LAYOUTS[layout]
    actual = []
    for make_layout in (strided, lambda t: strided(t).contiguous()):
        new = o.fresh()
        x = make_layout(o.x).detach().requires_grad_()
        ys = linears(new.with_leaves({"x": x}), backend=backend)
        grads = torch.autograd.grad(ys, [x, *list(new.leaves().values())[1:]], [make_layout(dy) for dy in o.dys])
        actual.append([*ys, *grads])
    for one, other in zip(*actual, strict=True):
        torch.testing.assert_close(one, other)


def saved_by(run, o):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ys = run(o)
    return ys, saved


@pytest.mark.parametrize(
    ("names", "keeps_x", "keeps_xa"),
    [(None, True, True), (("b 0", "b 1"), False, True), (("x", "a 1"), True, False), (("x",), False, False)],
)
@pytest.mark.parametrize("p", [(0.0, 0.0, 0.0), (0.4, 0.4, 0.0)])
def test_only_x_and_xa_are_saved(names, keeps_x, keeps_xa, p):
    o = make(Case(p=p)).fresh(names)
    _, saved = saved_by(linears, o)
    parameters = {t.data_ptr() for one in o.projections for t in (one.weight, one.a, one.b)}
    kept = [t for t in saved if t.data_ptr() not in parameters and t.dtype is not torch.int64]
    assert sorted(tuple(t.shape) for t in kept) == sorted([(2, 9, 14)] * keeps_x + [(18, 9)] * keeps_xa)
    assert not keeps_x or any(t.data_ptr() == o.x.data_ptr() for t in kept)
    assert sum(t.dtype is torch.int64 for t in saved) == sum(one > 0 for one in p)


class Counting(aten.Aten):
    """Eager, which records its primitives with the sizes of their first operand."""

    def __init__(self):
        self.calls = []

    def project(self, x, *args, **more):
        self.calls.append(("project", tuple(x.shape)))
        return super().project(x, *args, **more)

    def outer(self, narrow, wide, *args, **more):
        self.calls.append(("outer", tuple(wide.shape)))
        return super().outer(narrow, wide, *args, **more)

    def matmul_sum(self, terms, lows, *args, **more):
        terms = list(terms)
        self.calls.append(("matmul_sum", len(terms), len(lows)))
        return super().matmul_sum(terms, lows, *args, **more)


def test_x_is_read_once_each_way(monkeypatch):
    run = Counting()
    monkeypatch.setattr("lorafuse.ops.choose.ATEN", run)
    results(linears, make(Case()))
    of_x = [call for call in run.calls if call[1] == (18, 14)]
    assert of_x == [("project", (18, 14)), ("outer", (18, 14))]
    assert [call for call in run.calls if call[0] == "matmul_sum"] == [("matmul_sum", 3, 1)]


def test_masks_are_drawn_once_each_way(monkeypatch):
    draws, draw = [], aten.keep_mask
    monkeypatch.setattr(aten, "keep_mask", lambda *args: draws.append(args) or draw(*args))
    results(linears, make(Case(p=(0.4, 0.0, 0.4))))
    # two masked layers; in backward one mask serves dx and da
    assert len(draws) == 4


def test_siblings_draw_masks_of_their_own():
    """With one seed for all, PEFT's masks of q, k and v would be equal; they are drawn one after the other."""
    eye = torch.eye(16)
    layers = [LF.Projection(torch.zeros(16, 16), eye, eye, 1.0, None, 0.5)] * 3
    torch.manual_seed(3)
    masks = [y != 0 for y in LF.lora_linears(torch.ones(32, 16), layers)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(masks, 2))
    torch.manual_seed(3)
    for mask in masks:
        y = LF.lora_linear(torch.ones(32, 16), torch.zeros(16, 16), eye, eye, dropout_p=0.5)
        assert torch.equal(mask, y != 0)


def test_runs_are_bitwise_equal():
    o = make(Case(leading=(257,), p=(0.0, 0.3, 0.0)))
    one, other = results(linears, o), results(linears, o)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_retain_graph_and_saved_tensors():
    o = make(Case(p=(0.4, 0.0, 0.4))).fresh()
    ys, saved = saved_by(linears, o)
    before, leaves = [t.clone() for t in saved], list(o.leaves().values())
    first = torch.autograd.grad(ys, leaves, o.dys, retain_graph=True)
    second = torch.autograd.grad(ys, leaves, o.dys)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, before, saved))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(ys, leaves, o.dys)


@backends
@pytest.mark.parametrize("leading", [(7,), (2, 3), (2, 2, 2)], ids=str)
def test_results_may_be_written(leading, backend):
    require(backend)

    def written(run):
        def write(o):
            q, k, v = run(o)
            q.div_(2)
            k[..., :-1].mul_(3)
            return q, k, torch.relu_(v)

        return write

    o = make(Case(leading=leading))
    actual, expected = results(written(lambda o: linears(o, backend=backend)), o), results(written(plain_linears), o)
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    for y in linears(o):
        assert y._base is None
        assert y.untyped_storage().nbytes() == y.numel() * y.element_size()


def test_gradients_share_no_memory():
    grads = [t for name, t in results(linears, make(Case())).items() if name.startswith("d")]
    assert len({t.untyped_storage().data_ptr() for t in grads}) == len(grads)


def test_the_order_is_q_k_v():
    o = make(Case())
    for one, other in zip(LF.lora_qkv(o.x, *o.projections), linears(o), strict=True):
        assert torch.equal(one, other)


def red(o):
    """The first tensor that is wrong, by name; "" where none is."""
    try:
        check(linears, plain_linears, o)
    except AssertionError as error:
        return str(error).partition(":")[0]
    return ""


def swapped_adapters(forward):
    def wrong(run, plan, x, layers, wide):
        a = [layers[1].a, layers[0].a, *(one.a for one in layers[2:])]
        return forward(run, plan, x, [replace(one, a=t) for one, t in zip(layers, a, strict=True)], wide)

    return wrong


def one_scale_for_all(forward):
    def wrong(run, plan, x, layers, wide):
        return forward(run, plan, x, [replace(one, scale=layers[0].scale) for one in layers], wide)

    return wrong


def stale_xa(forward):
    kept = []

    def wrong(*args):
        xa, ys = forward(*args)
        kept.append(xa)
        return kept[0].clone(), ys

    wrong(aten.BACKEND, None, torch.ones(18, 14), _layers(), False)
    return wrong


def _layers():
    return [
        Layer(Weight(one.weight), None, one.a, one.b, None, 1.0, 0.0) for one in make(Case(R=(3, 3, 3))).projections
    ]


def dropped_dx(backward):
    def wrong(run, plan, dys, *rest):
        right = backward(run, plan, dys, *rest)
        return [backward(run, plan, [*dys[:-1], None], *rest)[0], *right[1:]]

    return wrong


def dropped_low_rank_dx(backward):
    def wrong(run, plan, dys, x, xa, layers, *rest):
        right = backward(run, plan, dys, x, xa, layers, *rest)
        bare = [replace(one, b=one.b * 0) if i == 1 else one for i, one in enumerate(layers)]
        return [backward(run, plan, dys, x, xa, bare, *rest)[0], *right[1:]]

    return wrong


def exchanged(first, second):
    def register(backward):
        def wrong(*args):
            grads = list(backward(*args))
            grads[first], grads[second] = grads[second], grads[first]
            return grads

        return wrong

    return register


def unscaled(place):
    def register(backward):
        def wrong(run, plan, dys, x, xa, layers, *rest):
            right = list(backward(run, plan, dys, x, xa, layers, *rest))
            bare = [replace(one, scale=1.0) for one in layers]
            right[place] = backward(run, plan, dys, x, xa, bare, *rest)[place]
            return right

        return wrong

    return register


# of equal sizes, so that shapes betray nothing: what is wrong, the function, and what shows it first
SAME = Case(N=(8, 8, 8), R=(3, 3, 3), bias=(False, False, False))
MUTATIONS = {
    "two adapters swapped": ("forward", swapped_adapters, "y 0"),
    "the scale of the first for all": ("forward", one_scale_for_all, "y 1"),
    "a stale xa": ("forward", stale_xa, "db 0"),
    "a sibling's dx dropped": ("backward", dropped_dx, "dx"),
    "a sibling's low-rank dx dropped": ("backward", dropped_low_rank_dx, "dx"),
    "two da swapped": ("backward", exchanged(1, 2), "da 0"),
    "two db swapped": ("backward", exchanged(5, 6), "db 1"),
    "dx without scales": ("backward", unscaled(0), "dx"),
    "da without scales": ("backward", unscaled(2), "da 1"),
    "db without scales": ("backward", unscaled(4), "db 0"),
}


@pytest.mark.parametrize("p", [(0.0, 0.0, 0.0), (0.4, 0.0, 0.0)])
def test_the_right_operator_is_green(p):
    assert red(make(replace(SAME, p=p))) == ""


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_red(name, monkeypatch):
    function, change, shown = MUTATIONS[name]
    monkeypatch.setattr(group, function, change(getattr(group, function)))
    assert red(make(SAME)) == shown


def test_the_default_of_matmul_sum_is_atens():
    """Backends without one of their own multiply and add."""
    o = make(Case(p=(0.0, 0.3, 0.0)))

    class Adding(aten.Aten):
        matmul_sum = Backend.matmul_sum

    expected = results(linears, o)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorafuse.ops.choose.ATEN", Adding())
        actual = results(linears, o)
    for name, tensor in actual.items():
        assert relative_l2(tensor, expected[name]) < tolerance(torch.float32), name
