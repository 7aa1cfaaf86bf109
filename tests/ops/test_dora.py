"""`dora_linear` (T1; Triton in its interpreter, T2): every tensor by name, the norm, transforms, errors."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from dora_reference import operands, reference
from quantized_weights import four_bits
from torch.utils._python_dispatch import TorchDispatchMode

from lorafuse.backends import columns
from lorafuse.functional import dora_linear
from lorafuse.operands import Weight
from lorafuse.ops.dora import row_norms
from lorafuse.testing.numerics import relative_l2, tolerance

SCALE = 1.5
RUNS = [("eager", torch.float64), ("eager", torch.float32), ("eager", torch.bfloat16), ("eager", torch.float16)]
RUNS += [("triton", torch.float32), ("triton", torch.float16)]
by_run = pytest.mark.parametrize(
    ("backend", "dtype"), RUNS, ids=[f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in RUNS]
)


def run(x, w, bias, a, b, magnitude, dy, **more):
    x, a, b, m = (t.detach().clone().requires_grad_() for t in (x, a, b, magnitude))
    y = dora_linear(x, w, a, b, m, scale=SCALE, bias=bias, **more)
    return {"y": y} | dict(zip(("dx", "da", "db", "dm"), torch.autograd.grad(y, (x, a, b, m), dy), strict=True))


def check(actual, expected, dtype):
    for name, t in actual.items():
        assert relative_l2(t, expected[name]) <= tolerance(dtype), name
        assert t.count_nonzero(), name


@by_run
@pytest.mark.parametrize("sizes", [{}, {"N": 33, "K": 65, "R": 70, "M": 1}, {"M": 257, "R": 1, "bias": False}])
def test_every_tensor(backend, dtype, sizes):
    given = operands(dtype=dtype, **sizes)
    actual = run(*given, backend=backend)
    check(actual, reference(*given, SCALE), dtype)
    assert {t.dtype for t in actual.values()} == {dtype}


@by_run
def test_dropout(backend, dtype):
    """PEFT's other formula: the base of x, and that of drop(x)."""
    given = operands(dtype=dtype)
    torch.manual_seed(5)
    keep = torch.empty(given[0].shape, dtype=torch.bool).bernoulli_(0.7)
    torch.manual_seed(5)
    check(run(*given, dropout_p=0.3, backend=backend), reference(*given, SCALE, keep, 0.3), dtype)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_the_delta_alone(backend):
    x, w, *rest = operands(dtype=torch.float32)
    given = x, torch.zeros_like(w), *rest
    check(run(*given, backend=backend), reference(*given, SCALE), torch.float32)


def test_all_is_dropped():
    x, w, bias, a, b, magnitude, _ = operands()
    y = dora_linear(x, w, a, b, magnitude, scale=SCALE, bias=bias, dropout_p=1.0)
    assert relative_l2(y, x @ w.T + bias) <= tolerance(torch.float64)


def test_no_rows():
    x, w, bias, a, b, magnitude, dy = operands(M=0)
    assert not run(x, w, bias, a, b, magnitude, dy)["dm"].any()


def test_shapes_and_frozen_operands():
    x, w, bias, a, b, magnitude, dy = operands(M=24)
    flat = dora_linear(x, w, a, b, magnitude, bias=bias)
    assert torch.equal(dora_linear(x.view(2, 3, 4, -1), w, a, b, magnitude, bias=bias).flatten(0, 2), flat)
    assert torch.equal(
        dora_linear(x[3], w, a, b, magnitude, bias=bias), dora_linear(x[3:4], w, a, b, magnitude, bias=bias)[0]
    )
    for t in (x, a, b, magnitude, bias):
        t.requires_grad_()
        (grad,) = torch.autograd.grad(dora_linear(x, w, a, b, magnitude, bias=bias), t, dy)
        assert grad.count_nonzero()
        t.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("backend", "K"), [*(("eager", K) for K in (16, 48, 96, 192, 384, 640, 1024)), ("triton", 512)]
)
def test_the_norm_is_nearer_than_pefts(backend, K, dtype):
    """Over fp32 adapters: PEFT rounds each element of W + s·BA to x's dtype, and the norm."""
    if backend == "triton" and dtype is torch.bfloat16:
        dtype = torch.float16
    worst, N = {}, 64 if backend == "eager" else 32
    for seed in range(4):
        torch.manual_seed(seed)
        _, w, _, a, b, *_ = operands(N=N, K=K, R=16, dtype=torch.float32, size=(0.01, 0.1, 1, 10)[seed])
        w = w.to(dtype)
        exact = (w.double() + SCALE * b.double() @ a.double()).norm(dim=1)
        given = w, a.to(dtype), b.to(dtype)
        rounded = (w.double() + SCALE * given[2].double() @ given[1].double()).norm(dim=1)
        # as peft.tuners.lora.dora computes it, in the adapters' dtype
        theirs = torch.linalg.norm(w + SCALE * (given[2] @ given[1]), dim=1)
        ours = row_norms(*given, SCALE, dtype, backend, "dense", None)
        assert ours.dtype is torch.float32
        worst["ours"] = max(worst.get("ours", 0), relative_l2(ours, rounded))
        worst["theirs"] = max(worst.get("theirs", 0), relative_l2(theirs, rounded))
        assert relative_l2(row_norms(w, a, b, SCALE, dtype, backend, "dense", None), exact) <= 2e-7
    assert worst["ours"] <= worst["theirs"], worst


def test_an_adapter_that_cancels_the_weight():
    """The square is a difference then, which rounding may leave below zero: the norm is no NaN."""
    w = torch.randn(6, 6)
    norms = row_norms(w, torch.eye(6), -w, 1.0, w.dtype, "eager", "dense", None)
    assert (norms <= 2e-3 * w.norm(dim=1)).all()
    assert (norms >= 0).all()


class Watched(TorchDispatchMode):
    """The largest tensor that is made besides those held, and how many norms are computed."""

    def __init__(self, *held):
        super().__init__()
        self.held, self.largest, self.norms = [t.untyped_storage().data_ptr() for t in held], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.norms += function is torch.ops.aten.linalg_vector_norm.default
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.held:
            self.largest = max(self.largest, out.numel())
        return out


def test_nothing_as_large_as_the_weight_is_made():
    w, a, b = torch.randn(1024, 1024).bfloat16(), torch.randn(8, 1024), torch.randn(1024, 8)
    for _ in range(2):
        with Watched(w, a, b) as watched:
            columns.row_norms(Weight(w), a, b, 1.0)
        assert 0 < watched.largest <= w.numel() // 4


def write_element(w):
    """A part of what a row has, of the size of its last bits."""
    w.data[3, 5] += 1e-6 * w[3].norm()


WRITES = {
    "in place": lambda w: w.mul_(1.7), "past the counter": lambda w: w.data.mul_(1.7),
    "past torch": lambda w: w.numpy().__imul__(1.7), "another weight": lambda w: w.data.copy_(torch.randn_like(w)),
    "one element": lambda w: w.data[3, 5].mul_(1.01), "last bits": write_element,
    "signs": lambda w: w.data[2].neg_(), "places": lambda w: w.data.copy_(w.roll(1, 0)),
}  # fmt: skip


@pytest.mark.parametrize("K", [48, 320])
@pytest.mark.parametrize("name", WRITES)
def test_the_norm_of_the_weight_is_kept_until_it_changes(name, K):
    """Whoever writes, and by whatever means."""
    _, w, _, a, b, *_ = operands(N=24, K=K, dtype=torch.float32)

    def norms_of(a):
        with Watched() as watched:
            norms = columns.row_norms(Weight(w), a, b, SCALE)
        assert relative_l2(norms, (w.double() + SCALE * b.double() @ a.double()).norm(dim=1)) <= 2e-7
        return watched.norms

    assert norms_of(a)
    assert norms_of(2 * a) == norms_of(a) == 0
    WRITES[name](w)
    assert norms_of(a)
    assert norms_of(-a) == 0
    # another view of the memory is another weight
    part = w[:, : K // 2]
    norms = columns.row_norms(Weight(part), a[:, : K // 2], b, SCALE)
    assert relative_l2(norms, (part.double() + SCALE * b.double() @ a[:, : K // 2].double()).norm(dim=1)) <= 2e-7


def test_kept_norms_of_weights_that_are_decoded():
    """Into one workspace: each is known by what it is stored in."""
    weights, watched = [four_bits(64, 64, rounded="float32") for _ in range(2)], []
    _, _, _, a, b, *_ = operands(N=64, K=64, dtype=torch.float32)
    for _ in range(2):
        for weight in weights:
            with Watched() as one:
                norms = columns.row_norms(weight.decoded(torch.float32), a, b, SCALE, weight.data.data_ptr())
            exact = weight.decoded(torch.float32).data.double() + SCALE * b.double() @ a.double()
            assert relative_l2(norms, exact.norm(dim=1)) <= 2e-7
            watched.append(one.norms)
    assert all(watched[:2])
    assert watched[2:] == [0, 0]


def test_threads_that_read_kept_norms():
    _, w, _, a, b, *_ = operands(N=24, dtype=torch.float32)
    expected = columns.row_norms(Weight(w), a, b, SCALE)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: columns.row_norms(Weight(w), a, b, SCALE), range(64)))
    assert all(torch.equal(one, expected) for one in results)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_quantized_weight(backend):
    dtype, weight = torch.float32, four_bits(64, 64, rounded="float32")
    exact = weight.decoded(dtype).data
    x, _, bias, a, b, magnitude, dy = operands(N=64, K=64, dtype=dtype)
    for p in (0.0, 0.3):
        torch.manual_seed(5)
        keep = torch.empty(x.shape, dtype=torch.bool).bernoulli_(1 - p)
        torch.manual_seed(5)
        actual = run(x, weight, bias, a, b, magnitude, dy, dropout_p=p, backend=backend)
        check(actual, reference(x, exact, bias, a, b, magnitude, dy, SCALE, keep if p else None, p), dtype)


def test_second_derivatives_and_transforms():
    x, w, bias, a, b, magnitude, dy = operands(M=3, N=5, K=6, R=2)

    def of(x, a, b, m):
        # the norm is a constant, so that differences would see it move: b and a enter through z alone
        return dora_linear(x, w, a, b, m, scale=SCALE, bias=bias)

    leaves = [t.requires_grad_() for t in (x, a, b, magnitude)]
    y = of(*leaves)
    first = torch.autograd.grad(y, leaves, dy.requires_grad_(), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), [dy, x, magnitude])
    assert all(g.count_nonzero() for g in second)
    assert torch.autograd.gradcheck(lambda x, m: of(x, a.detach(), b.detach(), m), (x, magnitude))
    assert torch.autograd.gradgradcheck(lambda x, m: of(x, a.detach(), b.detach(), m), (x, magnitude))
    stacked = torch.randn(4, 3, 6, dtype=x.dtype)
    mapped = torch.vmap(lambda one: of(one, a, b, magnitude))(stacked)
    assert relative_l2(mapped, of(stacked, a, b, magnitude)) <= tolerance(torch.float64)


def test_autocast():
    x, w, bias, a, b, magnitude, dy = operands(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = dora_linear(x, w, a, b, magnitude.requires_grad_(), scale=SCALE, bias=bias)
    (dm,) = torch.autograd.grad(y, magnitude, dy.bfloat16())
    assert (y.dtype, dm.dtype) == (torch.bfloat16, torch.float32)
    expected = reference(x, w, bias, a, b, magnitude, dy, SCALE)
    check({"y": y, "dm": dm}, expected, torch.bfloat16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled():
    x, w, bias, a, b, magnitude, dy = operands(dtype=torch.float32)
    torch._dynamo.reset()

    def step(*leaves):
        return dora_linear(leaves[0], w, *leaves[1:], scale=SCALE, bias=bias)

    leaves = [t.requires_grad_() for t in (x, a, b, magnitude)]
    y = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    grads = dict(zip(("dx", "da", "db", "dm"), torch.autograd.grad(y, leaves, dy), strict=True))
    check({"y": y} | grads, reference(x, w, bias, a, b, magnitude, dy, SCALE), torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"magnitude": torch.ones(3)}, ValueError, r"magnitude \[3\] on cpu for b \[40, 4\]"),
        ({"magnitude": torch.ones(40).int()}, TypeError, "torch.int32 for magnitude"),
        ({"magnitude": 2.0}, TypeError, "float for magnitude"),
        ({"bias": torch.ones(3)}, ValueError, r"bias \[3\] on cpu"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p=1.5 is not a probability"),
        ({"a": torch.ones(4, 3)}, ValueError, "the rule is"),
        ({"backend": "nowhere"}, ValueError, "backend='nowhere' is not known"),
    ],
)
def test_what_is_refused(change, error, message):
    x, w, bias, a, b, magnitude, _ = operands(dtype=torch.float32)
    given = {"x": x, "weight": w, "a": a, "b": b, "magnitude": magnitude, "bias": bias} | change
    with pytest.raises(error, match=message):
        dora_linear(**given)
