"""The LoRA linear (T1): every tensor by name against fp64, exact integers, layouts, what is saved, what is refused."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lorafuse.functional import lora_linear
from lorafuse.testing.cases import UGLY_M, UGLY_NK, UGLY_R
from lorafuse.testing.check_linear import (
    GATE,
    LinearCase,
    check_linear,
    gradients,
    make_operands,
    plain_lora_linear,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _one_thread(request):
    """Tiny products wait longer for a second thread than they compute: 4 s for this file, not 60 on a busy machine."""
    threads = torch.get_num_threads()
    if request.node.originalname != "test_runs_are_bitwise_equal":
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def name_of(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


@by_dtype
@pytest.mark.parametrize("R", UGLY_R)
@pytest.mark.parametrize("M", UGLY_M)
def test_every_size(M, R, dtype):
    N, K = UGLY_NK[(M + UGLY_R.index(R)) % len(UGLY_NK)]
    check_linear(LinearCase(leading=(M,), N=N, K=K, R=R, dtype=dtype, bias=R % 2 == 0))


@by_dtype
@pytest.mark.parametrize("case", GATE, ids=range(len(GATE)))
def test_gate(case, dtype):
    check_linear(replace(case, dtype=dtype))


@by_dtype
@pytest.mark.parametrize("leading", [(), (5,), (3, 7), (2, 3, 5), (0, 4), (4, 0, 2), (1, 1, 1)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_every_dimension(leading, dropout_p, dtype):
    check_linear(LinearCase(leading=leading, dropout_p=dropout_p, dtype=dtype))


@by_dtype
@pytest.mark.parametrize("scale", [0.0, -1.0, 0.1, 2.0, 1 / 3, -7.3, 64.0])
@pytest.mark.parametrize("base", [0.0, 1.0])
def test_every_scale(scale, base, dtype):
    check_linear(LinearCase(scale=scale, base=base, dtype=dtype))


@by_dtype
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("M", UGLY_M)
def test_dropout(M, dropout_p, dtype):
    check_linear(LinearCase(leading=(M,), dropout_p=dropout_p, dtype=dtype, base=M % 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("R", UGLY_R)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_fp32_adapters_on_a_half_base(R, dropout_p, dtype):
    case = LinearCase(R=R, dtype=dtype, adapter_dtype=torch.float32, dropout_p=dropout_p)
    actual = check_linear(case)
    assert actual["y"].dtype is actual["dx"].dtype is dtype
    assert actual["da"].dtype is actual["db"].dtype is torch.float32


@by_dtype
@pytest.mark.parametrize("R", [1, 3, 16, 64])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_integers_are_exact(R, dropout_p, dtype):
    case = LinearCase(leading=(23,), N=33, K=67, R=R, dtype=dtype, scale=0.5, dropout_p=dropout_p)

    # factors in -1 … 1, so sparse that no sum leaves the integers which the dtype holds
    def integers(tensor, density):
        return torch.where(torch.rand(tensor.shape) < density, torch.randint(-1, 2, tensor.shape), 0).to(dtype)

    given = make_operands(case)
    for name, density in {"x": 0.5, "w": 0.5, "a": 0.2, "b": 2 / (2 + R), "bias": 1.0, "dy": 0.5}.items():
        setattr(given, name, integers(getattr(given, name), density))
    exact = given.to(torch.float64)
    results = []
    for operands, function in ((given, lora_linear), (exact, plain_lora_linear)):
        for tensor in (operands.x, operands.a, operands.b, operands.bias):
            tensor.requires_grad_()
        o = operands
        y = function(o.x, o.w, o.a, o.b, scale=0.5, bias=o.bias, dropout_p=dropout_p, seed=case.seed)
        results.append(gradients(y, operands))
    for name, expected in results[1].items():
        assert expected.abs().max() < {torch.bfloat16: 128, torch.float16: 1024}.get(dtype, 2**23), name
        assert expected.any(), name
        assert torch.equal(results[0][name].double(), expected), name


def _call(o, x=None, **more):
    return lora_linear(o.x if x is None else x, o.w, o.a, o.b, bias=o.bias, scale=0.7, **more)


CASE = LinearCase()


def trainable(case=CASE, names=("x", "a", "b", "bias")):
    operands = make_operands(case)
    for name in names:
        getattr(operands, name).requires_grad_()
    return operands


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every second column": lambda t: torch.stack([t, t + 1], -1).flatten(-2)[:, ::2],
    "every second row": lambda t: torch.stack([t, t + 1], 1).flatten(0, 1)[::2],
    "offset": lambda t: torch.cat([t + 1, t], 1)[:, t.shape[1] :],
    "three dimensions, permuted": lambda t: t.view(7, 9, -1).permute(1, 0, 2).contiguous().permute(1, 0, 2),
    "one row expanded": lambda t: t[:1].expand(t.shape),
    "one column expanded": lambda t: t[:, :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("which", ["x", "dy"])
def test_strides_change_nothing(which, layout, dropout_p):
    o = trainable(LinearCase(dtype=torch.float64))
    strided = LAYOUTS[layout](getattr(o, which).detach())
    assert strided.stride() != torch.empty(strided.shape).stride()
    results = []
    for tensor in (strided, strided.contiguous()):
        x = tensor.detach().requires_grad_() if which == "x" else o.x.detach().view(*tensor.shape[:-1], -1)
        dy = tensor if which == "dy" else o.dy.view(*tensor.shape[:-1], -1)
        y = _call(o, x.requires_grad_(), dropout_p=dropout_p, seed=3)
        results.append([y, *torch.autograd.grad(y, (x, o.a, o.b, o.bias), dy)])
    for name, one, other in zip(("y", "dx", "da", "db", "dbias"), *results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ["w", "a", "b"])
def test_strided_parameters(name):
    o = trainable(LinearCase(dtype=torch.float64), ("x",))
    expected = torch.autograd.grad(_call(o), o.x, o.dy)[0]
    setattr(o, name, LAYOUTS["transposed"](getattr(o, name)))
    assert not getattr(o, name).is_contiguous()
    torch.testing.assert_close(torch.autograd.grad(_call(o), o.x, o.dy)[0], expected, rtol=1e-12, atol=1e-12)


NAMES = ("x", "a", "b", "bias")
SUBSETS = [s for size in range(1, 5) for s in itertools.combinations(NAMES, size)]


@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(subset, dropout_p):
    case = LinearCase(leading=(2, 3), N=4, K=5, R=2, dtype=torch.float64, bias="bias" in subset)
    o = trainable(case, subset)

    def function(*given):
        tensors = {"x": o.x, "a": o.a, "b": o.b, "bias": o.bias, **dict(zip(subset, given, strict=True))}
        x, a, b, bias = tensors.values()
        return lora_linear(x, o.w, a, b, scale=0.7, bias=bias, dropout_p=dropout_p, seed=5)

    assert torch.autograd.gradcheck(function, [getattr(o, name) for name in subset])


@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradients_only_where_asked(subset, dropout_p):
    every, some = trainable(), trainable(names=subset)
    _call(every, dropout_p=dropout_p, seed=5).backward(every.dy)
    _call(some, dropout_p=dropout_p, seed=5).backward(some.dy)
    for name in NAMES:
        grad = getattr(some, name).grad
        if name in subset:
            assert torch.equal(grad, getattr(every, name).grad), name
            assert grad.any(), name
        else:
            assert grad is None, name
    assert every.w.grad is None


def test_without_gradients_there_is_no_graph():
    o = make_operands(LinearCase())
    assert _call(o).grad_fn is None
    with torch.no_grad():
        assert _call(trainable()).grad_fn is None


def saved_by(o, **more):
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = _call(o, **more)
    return y, saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(
    ("subset", "keeps_x", "keeps_xa"),
    [
        (("x", "a", "b", "bias"), True, True),
        (("x", "a", "b"), True, True),
        (("a", "b"), True, True),
        (("x", "a"), True, False),
        (("x", "b"), False, True),
        (("b",), False, True),
        (("x",), False, False),
        (("bias",), False, False),
    ],
)
def test_only_x_and_xa_are_saved(subset, keeps_x, keeps_xa, dropout_p, dtype):
    case = LinearCase(leading=(9, 7), dtype=dtype, adapter_dtype=torch.float32)
    o = trainable(case, subset)
    _, saved = saved_by(o, dropout_p=dropout_p, seed=5)
    parameters = {t.data_ptr() for t in (o.w, o.a, o.b)}
    activations = [t for t in saved if t.data_ptr() not in parameters and t.dtype is not torch.int64]
    expected = [tuple(o.x.shape)] * keeps_x + [(63, case.R)] * keeps_xa
    assert sorted(tuple(t.shape) for t in activations) == sorted(expected)
    assert all(t.dtype is dtype for t in activations)
    assert not keeps_x or any(t.data_ptr() == o.x.data_ptr() for t in activations)
    # the seed is all that dropout adds
    assert sum(t.numel() for t in saved if t.dtype is torch.int64) == (1 if dropout_p else 0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_backward_writes_no_saved_tensor(dropout_p):
    o = trainable()
    before = o.clone()
    y, saved = saved_by(o, dropout_p=dropout_p, seed=5)
    versions, values = [t._version for t in saved], [t.clone() for t in saved]
    y.backward(o.dy)
    assert [t._version for t in saved] == versions
    assert all(map(torch.equal, saved, values))
    assert all(torch.equal(t, getattr(before, name)) for name, t in vars(o).items())


@by_dtype
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_runs_are_bitwise_equal(dropout_p, dtype):
    case = LinearCase(leading=(257,), dtype=dtype, dropout_p=dropout_p)
    first, second = check_linear(case), check_linear(case)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_retain_graph():
    o = trainable()
    y = _call(o, dropout_p=0.4, seed=5)
    requested = o.x, o.a, o.b, o.bias
    first = torch.autograd.grad(y, requested, o.dy, retain_graph=True)
    second = torch.autograd.grad(y, requested, o.dy)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, requested, o.dy)


def test_views_and_writes_after_the_call():
    o = trainable()
    y = _call(o)
    expected = y.detach().clone()
    assert y._base is None
    y.mul_(2)
    assert torch.equal(y, expected * 2)
    y.backward(o.dy)
    assert torch.equal(o.bias.grad, 2 * o.dy.sum(0))
    x = o.x.detach().clone()
    y = _call(o, x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(o.dy)
