"""Triton kernels behind the operator (T2; on a GPU, T6): every tensor by name against fp64, in every form.

On a machine without a GPU they run in Triton's interpreter, planned as for an H200 (TMA) and for an A100 (pointers).
"""

import itertools
from dataclasses import replace

import pytest
import torch
from operators import Linear
from torch.utils.checkpoint import checkpoint

import lorafuse
from lorafuse.backends import triton as triton_backend
from lorafuse.functional import lora_linear
from lorafuse.kernels import common, lowrank
from lorafuse.philox import keep_mask
from lorafuse.plan import find, override, select
from lorafuse.plan.problem import Problem
from lorafuse.testing.cases import UGLY_M, UGLY_NK, UGLY_R
from lorafuse.testing.check_linear import GATE, LinearCase, check_linear, gradients, make_operands
from lorafuse.testing.numerics import relative_l2, tolerance

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if ON_GPU else ())
# (N, K) of which TMA can read every row
ALIGNED_NK = ((96, 64), (72, 136), (264, 72))
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


# a GPU whose kernels take a form where the problem allows it
GPU_OF = {"tma": find("H200"), "pointer": find("A100")}
ATEN, TRITON = Linear("eager"), Linear("triton")


@pytest.fixture(params=["tma"] if ON_GPU else ["tma", "pointer"])
def form(request):
    """Plans of a GPU whose kernels take this form."""
    with override(interpreted_as=GPU_OF[request.param]):
        yield request.param


def check(case):
    return check_linear(case, "triton", DEVICE)


def allowed(case):
    """The case in a dtype that runs here."""
    if case.dtype is torch.bfloat16 and not ON_GPU:
        return replace(case, dtype=torch.float16)
    return case


@pytest.mark.parametrize("case", GATE, ids=range(len(GATE)))
def test_gate(case, form):
    check(allowed(case))


@by_dtype
@pytest.mark.parametrize("R", UGLY_R)
@pytest.mark.parametrize("M", UGLY_M)
def test_every_size(M, R, dtype):
    N, K = UGLY_NK[(M + UGLY_R.index(R)) % len(UGLY_NK)]
    check(LinearCase(leading=(M,), N=N, K=K, R=R, dtype=dtype, bias=R % 2 == 0))


@pytest.mark.parametrize("R", UGLY_R)
@pytest.mark.parametrize("M", UGLY_M)
def test_every_aligned_size(M, R, form):
    N, K = ALIGNED_NK[(M + UGLY_R.index(R)) % len(ALIGNED_NK)]
    check(LinearCase(leading=(M,), N=N, K=K, R=R, dtype=DTYPES[-1], bias=R % 2 == 0))


def test_partial_sums_of_dyb_in_chunks_of_rows(monkeypatch):
    """Integers: da, db and dbias are exact, however many chunks they are summed over."""
    o = make_operands(LinearCase(leading=(300,), N=264, K=72, R=8, dtype=torch.float16)).to(DEVICE)
    x, w, a, b, dy = (torch.randint(-2, 3, t.shape, device=DEVICE).half() for t in (o.x, o.w, o.a, o.b, o.dy))
    xa = (x.float() @ a.float().t()).half()
    settings = dy, x, xa, w, a, b, None, 1.0, 0.0, True, True, True, True
    expected, projected = TRITON.backward(*settings), []
    monkeypatch.setattr(triton_backend, "DYB_BYTES", 1)
    plain = lowrank.project_outer
    monkeypatch.setattr(lowrank, "project_outer", lambda *given: projected.append(len(given[0])) or plain(*given))
    for one, other in zip(TRITON.backward(*settings), expected, strict=True):
        assert torch.equal(one, other)
    assert len(projected) > 2
    assert sum(projected) == 300


@pytest.mark.parametrize(("M", "N", "R"), [(8192, 14336, 16), (32768, 28672, 64), (131072, 28672, 64)])
def test_partial_sums_of_dyb_are_bounded(M, N, R):
    problem = Problem(M, N, 8192, R, "bfloat16", "float32", gradients=("dx", "da", "db"))
    for device in GPU_OF.values():
        config = select(problem, device, (("triton", ""),)).config("project_outer")
        rows = triton_backend.rows_at_once(M, N, R, config)
        columns = -(-N // config.block_n)
        assert 4 * columns * rows * R <= triton_backend.DYB_BYTES
        # no more chunks than that takes
        assert rows == M or 8 * columns * rows * R > triton_backend.DYB_BYTES


def test_a_rank_beyond_every_tile(form):
    check(LinearCase(leading=(40,), N=72, K=64, R=300, dtype=torch.float16))


@by_dtype
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9, 1.0, 2**-33])
@pytest.mark.parametrize(("N", "K"), [(65, 96), (96, 67), (96, 64)])
def test_dropout(N, K, dropout_p, dtype, form):
    check(LinearCase(leading=(70,), N=N, K=K, R=6, dropout_p=dropout_p, dtype=dtype, base=K % 2))


@pytest.mark.parametrize("K", [64, 67, 130])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**40 + 7, 2**63 - 1])
def test_the_mask_is_eagers_bit_for_bit(seed, K):
    """With a = identity columns, xa is x masked; integers, so that nothing is rounded."""
    M, p = 37, 0.3
    x = torch.randint(1, 9, (M, K), device=DEVICE).half()
    a, b = torch.eye(K, device=DEVICE).half(), torch.zeros(K, K, device=DEVICE).half()
    _, xa = TRITON.forward(x, a, None, a, b, torch.tensor([seed], device=DEVICE), 1.0, p)
    keep = keep_mask(torch.tensor([seed], device=DEVICE), p, slice(0, M), K)
    assert torch.equal(xa, x * keep)


@pytest.mark.parametrize(("M", "N", "K", "R"), [(63, 96, 67, 13), (128, 72, 136, 16), (257, 33, 130, 3)])
def test_integers_are_exact(M, N, K, R, form):
    def integers(*shape):
        return torch.randint(-2, 3, shape, device=DEVICE).half()

    x, w, a, b, dy = integers(M, K), integers(N, K), integers(R, K), integers(N, R), integers(M, N)
    # so sparse that every sum stays below 2048, where fp16 holds all integers
    a, b = a * (torch.rand_like(a) < 0.1), b * (torch.rand_like(b) < 0.1)
    w, dy = w * (torch.rand_like(w) < 0.3), dy * (torch.rand_like(dy) < 0.1)
    y, xa = TRITON.forward(x, w, None, a, b, None, 2.0, 0.0)
    dx, da, db, dbias = TRITON.backward(dy, x, xa, w, a, b, None, 2.0, 0.0, True, True, True, True)
    X, W, A, B, D = (t.double() for t in (x, w, a, b, dy))
    expected = {"y": X @ W.T + 2 * (X @ A.T) @ B.T, "dx": D @ W + 2 * (D @ B) @ A, "da": 2 * (D @ B).T @ X}
    expected |= {"db": 2 * D.T @ (X @ A.T), "dbias": D.sum(0)}
    for name, actual in {"y": y, "dx": dx, "da": da, "db": db, "dbias": dbias}.items():
        assert expected[name].abs().max() <= 2048, f"{name}: the test's integers are too large"
        assert torch.equal(actual.double(), expected[name]), name


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_only_what_is_needed_is_computed(needs):
    o = make_operands(LinearCase(leading=(70,), dtype=torch.float16)).to(DEVICE)
    seed = torch.tensor([5], device=DEVICE)
    _, xa = TRITON.forward(o.x, o.w, o.bias, o.a, o.b, seed, 1.7, 0.2)
    everything = TRITON.backward(o.dy, o.x, xa, o.w, o.a, o.b, seed, 1.7, 0.2, True, True, True, True)
    x, xa = o.x if needs[1] else None, xa if needs[2] else None
    actual = TRITON.backward(o.dy, x, xa, o.w, o.a, o.b, seed, 1.7, 0.2, *needs)
    for need, one, other in zip(needs, actual, everything, strict=True):
        assert (one is not None) == need
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("leading", [(5,), (3, 7), (2, 3, 5), (0, 4), (1, 1, 1), ()])
def test_every_dimension(leading):
    check(LinearCase(leading=leading, dtype=torch.float16))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, :64],
        lambda t: t[1::2, 8:72],
        lambda t: t[:, 3:67],
        lambda t: t.t().contiguous().t()[:, :64],
        lambda t: t[:1].expand(40, -1)[:, :64],
        lambda t: t.view(4, 20, 96).transpose(0, 1)[..., :64],
    ],
    ids=["columns", "every second row", "unaligned columns", "transposed", "expanded", "batch second"],
)
def test_strides(view, form):
    x = view(torch.randn(80, 96, device=DEVICE).half()).detach().requires_grad_()
    o = make_operands(LinearCase(N=72, K=64, dtype=torch.float16)).to(DEVICE)
    y = lora_linear(x, o.w, o.a, o.b, bias=o.bias, backend="triton")
    same = lora_linear(x.contiguous(), o.w, o.a, o.b, bias=o.bias, backend="triton")
    torch.testing.assert_close(y, same)
    # an expanded gradient: every stride is 0
    (dx,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(same.sum(), x)
    torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize(("N", "K"), [(0, 8), (8, 0), (1, 1), (1, 200), (200, 1)])
@pytest.mark.parametrize("M", [0, 1, 5])
def test_thin_layers(M, N, K):
    x, w, a, b = (torch.randn(s, device=DEVICE).requires_grad_() for s in ((M, K), (N, K), (2, K), (N, 2)))
    w.requires_grad_(False)
    y = lora_linear(x, w, a, b, backend="triton")
    expected = lora_linear(x, w, a, b, backend="eager")
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y, (x, a, b), torch.ones_like(y))
    for one, other in zip(grads, torch.autograd.grad(expected, (x, a, b), torch.ones_like(y)), strict=True):
        torch.testing.assert_close(one, other)


def test_runs_are_bitwise_equal():
    case = LinearCase(leading=(257,), N=96, K=136, R=16, dtype=torch.float16, dropout_p=0.2)
    first, second = check(case), check(case)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_eager_and_triton_may_be_mixed():
    """xa means the same in both, so that a plan may choose each direction for itself."""
    o = make_operands(LinearCase(leading=(70,), dtype=torch.float32)).to(DEVICE)
    seed = torch.tensor([5], device=DEVICE)
    settings = o.w, o.a, o.b, seed, 1.7, 0.2, True, True, True, True
    xa = {run: run.forward(o.x, o.w, o.bias, o.a, o.b, seed, 1.7, 0.2)[1] for run in (ATEN, TRITON)}
    one = TRITON.backward(o.dy, o.x, xa[ATEN], *settings)
    other = ATEN.backward(o.dy, o.x, xa[TRITON], *settings)
    for left, right in zip(one, other, strict=True):
        assert relative_l2(left, right) < tolerance(torch.float32)


@pytest.mark.no_poison
@pytest.mark.parametrize("form_of", ["tma", "pointer"])
def test_rows_beyond_2_to_the_31(form_of):
    """Three rows far apart in memory that nobody else touches: their offsets do not fit 32 bits."""
    K, stride = 64, 2**30 + 8
    far = torch.empty(2 * stride + K, dtype=torch.float16, device=DEVICE).as_strided((3, K), (stride, 1))
    o = make_operands(LinearCase(leading=(3,), N=72, K=K, dtype=torch.float16)).to(DEVICE)
    far.copy_(o.x)
    with override(interpreted_as=GPU_OF[form_of]):
        near, there = (TRITON.forward(x, o.w, o.bias, o.a, o.b, None, 1.7, 0.0) for x in (o.x, far))
        for one, other in zip(near, there, strict=True):
            assert torch.equal(one, other)
        settings = o.a, o.b, None, 1.7, 0.0, True, True, True, True
        near = TRITON.backward(o.dy, o.x, near[1], o.w, *settings)
        there = TRITON.backward(o.dy, far, there[1], o.w, *settings)
        for one, other in zip(near, there, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("setting", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_fp32_is_ieee_unless_torch_allows_tf32(setting, expected):
    former = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert common.precision(torch.float32) == expected
        assert common.precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(former)


def graded(run, o):
    """y and the gradients of `run(o)`."""
    for tensor in (o.x, o.a, o.b, o.bias):
        tensor.requires_grad_()
    return gradients(run(o), o)


@pytest.mark.parametrize("variant", ["compiled", "checkpointed", "checkpointed, reentrant"])
def test_it_is_one_operator_for_torch(variant):
    def layer(x, o):
        return lora_linear(x, o.w, o.a, o.b, bias=o.bias, dropout_p=0.2, backend="triton")

    runs = {
        "compiled": lambda o: torch.compile(lambda x: layer(x, o), fullgraph=True, backend="aot_eager")(o.x),
        "checkpointed": lambda o: checkpoint(layer, o.x, o, use_reentrant=False),
        "checkpointed, reentrant": lambda o: checkpoint(layer, o.x, o, use_reentrant=True),
    }
    o = make_operands(LinearCase(leading=(3, 20), dtype=torch.float16)).to(DEVICE)
    torch.manual_seed(1)
    expected = graded(lambda o: layer(o.x, o), o)
    torch.manual_seed(1)
    if variant.endswith("reentrant"):
        y = runs[variant](o)
        y.backward(o.dy)
        actual = {"y": y.detach(), "dx": o.x.grad, "da": o.a.grad, "db": o.b.grad, "dbias": o.bias.grad}
    else:
        actual = graded(runs[variant], o)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_a_patched_peft_model_trains_as_it_did():
    from peft import LoraConfig, get_peft_model

    layers = torch.nn.Sequential(torch.nn.Linear(64, 72), torch.nn.Linear(72, 40, bias=False)).to(DEVICE)
    model = get_peft_model(layers, LoraConfig(r=6, target_modules=["0", "1"], init_lora_weights=False))
    x = torch.randn(5, 9, 64, device=DEVICE)

    def step():
        model.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected = step()
    report = lorafuse.patch(model, backend="triton", strict=True)
    assert {patched.backend for patched in report.patched} == {"triton"}
    actual = step()
    assert actual.keys() == expected.keys()
    assert len(actual) == 5
    for name, tensor in expected.items():
        assert relative_l2(actual[name], tensor) < tolerance(torch.float32), name


def test_opcheck():
    o = make_operands(LinearCase(leading=(20,), dtype=torch.float32)).to(DEVICE)
    for tensor in (o.x, o.a, o.b, o.bias):
        tensor.requires_grad_()
    seed = torch.tensor([5], device=DEVICE)
    torch.library.opcheck(torch.ops.lorafuse.lora_linear, (o.x, o.w, o.bias, o.a, o.b, seed, 1.7, 0.2, "triton"))


class TestRefusals:
    def test_a_dtype(self):
        o = make_operands(LinearCase(dtype=torch.float64)).to(DEVICE)
        with pytest.raises(TypeError, match="float64.*'eager'"):
            lora_linear(o.x, o.w, o.a, o.b, backend="triton")

    @pytest.mark.skipif(ON_GPU, reason="there is a GPU: nothing is interpreted")
    def test_bfloat16_in_the_interpreter(self):
        o = make_operands(LinearCase(dtype=torch.bfloat16))
        with pytest.raises(TypeError, match=r"bfloat16.*11585.*float16"):
            lora_linear(o.x, o.w, o.a, o.b, backend="triton")

    def test_a_cpu_tensor_outside_the_interpreter(self, monkeypatch):
        monkeypatch.setattr("triton.knobs.runtime.interpret", False)
        o = make_operands(LinearCase())
        with pytest.raises(ValueError, match=r"on cpu.*\.cuda\(\).*TRITON_INTERPRET=1"):
            lora_linear(o.x, o.w, o.a, o.b, backend="triton")
