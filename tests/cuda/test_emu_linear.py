"""The CUDA kernels behind the operator, emulated on this CPU (T5): every tensor by name against fp64, in every form.

Emulated, not run on hardware: launches are those that an H200 would get, under a seeded schedule. tests/cuda/csrc
and the emulator's own tests look at single kernels under many schedules.
"""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from emu_launches import words_are_zero
from operators import Linear

from lorafuse.backends import base, cuda
from lorafuse.functional import lora_linear
from lorafuse.philox import keep_mask
from lorafuse.plan import override
from lorafuse.testing.cases import UGLY_M, UGLY_R
from lorafuse.testing.check_linear import LinearCase, check_linear, gradients, make_operands
from lorafuse.testing.numerics import relative_l2, tolerance

pytest_plugins = "emu_fixtures"
pytestmark = pytest.mark.usefixtures("emu")

DTYPES = (torch.bfloat16, torch.float16)
# (N, K) of which TMA can read every row
ALIGNED_NK = ((96, 64), (72, 136), (264, 72))
# (block_n, stages, cluster)
TILINGS = ((256, 3, 2), (256, 3, 1), (128, 4, 2), (128, 4, 1), (128, 2, 2), (256, 2, 1))
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


# outside autocast the low-rank path of an fp16 base with other adapters is fp32, which no CUDA kernel runs
fp16_autocast = partial(torch.autocast, "cpu", torch.float16)


def check(case):
    with fp16_autocast(enabled=case.dtype is torch.float16 and case.adapter_dtype not in (None, torch.float16)):
        return check_linear(case, "emu")


GATE = (
    LinearCase(K=64, dtype=torch.bfloat16),
    LinearCase(K=64, base=0.0, bias=False, scale=-0.5, dtype=torch.float16),
    LinearCase(K=64, dropout_p=0.25, R=13, dtype=torch.bfloat16),
    LinearCase(leading=(3, 21), N=72, K=136, R=6, dtype=torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.5),
    LinearCase(leading=(2, 3, 21), N=72, K=136, R=16, dtype=torch.float16, adapter_dtype=torch.float32),
    *(LinearCase(leading=(384,), N=512, K=320, R=R, dtype=torch.bfloat16) for R in (1, 16, 40, 64, 128)),
)


@pytest.mark.parametrize("case", GATE, ids=range(len(GATE)))
def test_gate(case):
    check(case)


@pytest.mark.parametrize("R", UGLY_R)
@pytest.mark.parametrize("M", [m for m in UGLY_M if m != 257])
def test_every_size(M, R):
    N, K = ALIGNED_NK[(M + UGLY_R.index(R)) % 2]
    dtype = DTYPES[(M + UGLY_R.index(R)) % 2]
    check(LinearCase(leading=(M,), N=N, K=K, R=R, dtype=dtype, bias=R % 2 == 0))


@by_dtype
@pytest.mark.parametrize("R", [1, 16, 40, 64, 128])
def test_several_tiles(R, dtype):
    """More rows, columns and steps than one block has, on fewer multiprocessors than tiles."""
    check(LinearCase(leading=(257,), N=264, K=72, R=R, dtype=dtype))


@pytest.mark.parametrize("direction", ["dropout", "plain"])
@pytest.mark.parametrize("config", TILINGS)
def test_every_tiling(config, direction, tiles, launched):
    tiles(config)
    dropout_p = 0.2 if direction == "dropout" else 0.0
    case = LinearCase(leading=(300,), N=264, K=200, R=24, dtype=torch.bfloat16, dropout_p=dropout_p)
    with override(force_kernel="cuda two_kernel"):
        check(case)
    products = [arguments for name, arguments in launched if name == "linear"]
    assert {arguments.get("transposed", False) for arguments in products} == {False, True}
    assert {arguments["tiling"][:3] for arguments in products} == {config}


def test_a_launch_leaves_its_word_of_tickets_zero(operator):
    """And the next one draws every tile again."""
    o = make_operands(LinearCase(leading=(300,), N=264, K=72, R=16, dtype=torch.float16))
    y, xa = operator.forward(o.x, o.w, o.bias, o.a, o.b, None, 1.7, 0.0)
    dx = backwards(operator, o, xa, None, True, False, False, False)[0]
    assert words_are_zero()
    assert torch.equal(operator.forward(o.x, o.w, o.bias, o.a, o.b, None, 1.7, 0.0)[0], y)
    assert torch.equal(backwards(operator, o, xa, None, True, False, False, False)[0], dx)


def test_a_captured_launch_has_a_word_of_its_own(monkeypatch):
    """No launch zeroes it, in whichever graph, and none of the stream's own draws from it."""
    backend, cpu = base.load("emu"), torch.device("cpu")
    monkeypatch.setattr(backend, "captured", {})
    monkeypatch.setattr(backend, "is_capturing", lambda: True)
    # nobody has made any before: zeroed in the graph
    zeroed = [backend.ticket(cpu, 0) for _ in range(2)]
    monkeypatch.setattr(backend, "is_capturing", lambda: False)
    own = {backend.ticket(cpu, stream).data_ptr() for stream in (0, 1, 0)}
    monkeypatch.setattr(backend, "is_capturing", lambda: True)
    given = [backend.ticket(cpu, 0) for _ in range(3)]
    words = {word.data_ptr() for word in given}
    assert len(own) == 2
    assert len(words) == 3
    assert not own & words
    assert not any(word[0] for word in (*zeroed, *given))
    backend.captured[cpu] = backend.captured[cpu][0], cuda.CAPTURED - 1
    assert backend.ticket(cpu, 0).data_ptr() == backend.captured[cpu][0][-1:].data_ptr()
    # all are given away
    assert backend.ticket(cpu, 0).data_ptr() not in range(given[0].data_ptr(), given[0].data_ptr() + 4 * cuda.CAPTURED)


@by_dtype
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9, 1.0, 2**-33])
def test_dropout(dropout_p, dtype):
    check(LinearCase(leading=(70,), N=96, K=72, R=6, dropout_p=dropout_p, dtype=dtype, base=float(dropout_p > 0.2)))


@pytest.mark.parametrize("K", [64, 136])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**40 + 7, 2**63 - 1])
def test_the_mask_is_eagers_bit_for_bit(seed, K, operator):
    """With a = identity columns, xa is x masked; integers, so that nothing is rounded. dx masks too."""
    M, p = 37, 0.3
    at = torch.tensor([seed])
    x = torch.randint(1, 9, (M, K)).half()
    a, b = torch.eye(K).half(), torch.zeros(K, K).half()
    _, xa = operator.forward(x, a, None, a, b, at, 1.0, p)
    keep = keep_mask(at, p, slice(0, M), K)
    assert torch.equal(xa, x * keep)
    # of the gradient the masked low-rank term alone: w is zero, and b the identity
    dx, *_ = operator.backward(x, None, None, b, a, a, at, 1.0 - p, p, True, False, False, False)
    assert torch.equal(dx, x * keep)


@pytest.mark.parametrize(("M", "N", "K", "R"), [(63, 96, 64, 13), (128, 72, 136, 16), (257, 264, 72, 3)])
def test_integers_are_exact(M, N, K, R, operator):
    def integers(*shape):
        return torch.randint(-2, 3, shape).half()

    x, w, a, b, dy = integers(M, K), integers(N, K), integers(R, K), integers(N, R), integers(M, N)
    # so sparse that every sum stays below 2048, where fp16 holds all integers
    a, b = a * (torch.rand_like(a) < 0.1), b * (torch.rand_like(b) < 0.1)
    w, dy = w * (torch.rand_like(w) < 0.3), dy * (torch.rand_like(dy) < 0.1)
    y, xa = operator.forward(x, w, None, a, b, None, 2.0, 0.0)
    dx, da, db, dbias = operator.backward(dy, x, xa, w, a, b, None, 2.0, 0.0, True, True, True, True)
    with override(force_kernel="cuda concurrent_backward"):
        concurrent = operator.backward(dy, x, xa, w, a, b, None, 2.0, 0.0, True, True, True, False)
    for one, other in zip(concurrent, (dx, da, db, None), strict=True):
        assert one is other is None or torch.equal(one, other)
    X, W, A, B, D = (t.double() for t in (x, w, a, b, dy))
    expected = {"y": X @ W.T + 2 * (X @ A.T) @ B.T, "dx": D @ W + 2 * (D @ B) @ A, "da": 2 * (D @ B).T @ X}
    expected |= {"db": 2 * D.T @ (X @ A.T), "dbias": D.sum(0)}
    for name, actual in {"y": y, "dx": dx, "da": da, "db": db, "dbias": dbias}.items():
        assert expected[name].abs().max() <= 2048, f"{name}: the test's integers are too large"
        assert torch.equal(actual.double(), expected[name]), name


@pytest.mark.parametrize("kernel", ["one_pass_backward", "concurrent_backward"])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_only_what_is_needed_is_computed(needs, kernel, operator):
    o = make_operands(LinearCase(leading=(70,), K=64, dtype=torch.float16))
    seed, p = (None, 0.0) if kernel == "concurrent_backward" else (torch.tensor([5]), 0.2)
    _, xa = operator.forward(o.x, o.w, o.bias, o.a, o.b, seed, 1.7, p)
    everything = operator.backward(o.dy, o.x, xa, o.w, o.a, o.b, seed, 1.7, p, True, True, True, True)
    x, xa = o.x if needs[1] else None, xa if needs[2] else None
    with override(force_kernel=f"cuda {kernel}"):
        actual = operator.backward(o.dy, x, xa, o.w, o.a, o.b, seed, 1.7, p, *needs)
    for need, one, other in zip(needs, actual, everything, strict=True):
        assert (one is not None) == need
        assert one is None or relative_l2(one, other) < tolerance(torch.float16)


@pytest.mark.parametrize("leading", [(5,), (3, 7), (2, 3, 5), (0, 4), (1, 1, 1), ()])
def test_every_dimension(leading):
    check(LinearCase(leading=leading, K=64, dtype=torch.float16))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, :64],
        lambda t: t[1::2, 8:72],
        lambda t: t.t().contiguous().t()[:, :64],
        lambda t: t[:1].expand(40, -1)[:, :64],
        lambda t: t.view(4, 20, 96).transpose(0, 1)[..., :64],
    ],
    ids=["columns", "every second row", "transposed", "expanded", "batch second"],
)
def test_strides(view):
    x = view(torch.randn(80, 96).half()).detach().requires_grad_()
    o = make_operands(LinearCase(N=72, K=64, dtype=torch.float16))
    y = lora_linear(x, o.w, o.a, o.b, bias=o.bias, backend="emu")
    same = lora_linear(x.contiguous(), o.w, o.a, o.b, bias=o.bias, backend="emu")
    torch.testing.assert_close(y, same)
    # an expanded gradient: every stride is 0
    (dx,) = torch.autograd.grad(y.sum(), x)
    expected = lora_linear(x, o.w, o.a, o.b, bias=o.bias, backend="eager")
    (same,) = torch.autograd.grad(expected.sum(), x)
    assert relative_l2(dx, same) < tolerance(torch.float16)


def test_adapters_of_any_dtype_and_place():
    """fp64 adapters, and ones that start off a 16-byte boundary."""
    o = make_operands(LinearCase(leading=(40,), N=72, K=64, R=8, dtype=torch.float16, adapter_dtype=torch.float64))
    for shift in (0, 1):
        a, b = (torch.cat([t.flatten().new_zeros(shift), t.flatten()])[shift:].view(t.shape) for t in (o.a, o.b))
        a, b = (t.to(torch.float32 if shift else torch.float64).requires_grad_() for t in (a, b))
        with fp16_autocast():
            y = lora_linear(o.x, o.w, a, b, bias=o.bias, backend="emu")
            expected = lora_linear(o.x, o.w, a, b, bias=o.bias, backend="eager")
        actual = {"y": (y, expected)}
        for name, one, other in zip(
            ("da", "db"), *(torch.autograd.grad(t, (a, b), o.dy) for t in (y, expected)), strict=True
        ):
            actual[name] = one, other
        for name, (one, other) in actual.items():
            assert one.dtype is other.dtype
            assert relative_l2(one, other) < tolerance(torch.float16), name


def test_fp16_outside_autocast_is_refused_with_adapters_of_a_larger_range():
    o = make_operands(LinearCase(N=72, K=64, dtype=torch.float16, adapter_dtype=torch.float32))
    with pytest.raises(ValueError, match="backend='emu'.*round xa and dyb to float16.*use 'triton', 'eager' or 'auto'"):
        lora_linear(o.x, o.w, o.a, o.b, backend="emu")


def test_runs_are_bitwise_equal_under_every_schedule(emu, request):
    """The schedule moves, the result does not: no sum depends on who comes first."""
    case = LinearCase(leading=(257,), N=96, K=136, R=16, dtype=torch.float16, dropout_p=0.2)
    plain = replace(case, dropout_p=0.0)
    emu.configure(seed=1)
    first = check(case), check(plain)
    for seed in range(2, 2 + max(4, request.config.getoption("--seeds") // 50)):
        emu.configure(seed=seed, resident=1 + seed % 4, multiprocessors=4)
        for one, other in zip(first, (check(case), check(plain)), strict=True):
            for name, tensor in one.items():
                assert torch.equal(tensor, other[name]), (name, seed)


# of each kernel a launch over two row blocks, two columns of tiles and three steps, the last one ragged
SCHEDULED = {
    "forward": ("linear", lambda op, o, xa, seed: op.forward(o.x, o.w, o.bias, o.a, o.b, seed, 1.7, 0.2)),
    "dx": ("linear", lambda op, o, xa, seed: backwards(op, o, xa, None, True, False, False, False)),
    "dx, dropout": ("linear", lambda op, o, xa, seed: backwards(op, o, xa, seed, True, False, False, False)),
    "da, db, dbias": ("reduce_x", lambda op, o, xa, seed: backwards(op, o, xa, seed, False, True, True, True)),
}


def backwards(operator, o, xa, seed, *needs):
    return operator.backward(o.dy, o.x, xa, o.w, o.a, o.b, seed, 1.7, 0.2, *needs)


@pytest.mark.parametrize("kernel", SCHEDULED)
def test_many_schedules(kernel, emu, operator, launched, request):
    """The schedule and the tiling move, the result does not: the order of every sum is fixed."""
    name, run = SCHEDULED[kernel]
    o = make_operands(LinearCase(leading=(200,), N=136, K=136, R=24, dtype=torch.bfloat16))
    seed = torch.tensor([5])
    _, xa = operator.forward(o.x, o.w, o.bias, o.a, o.b, seed, 1.7, 0.2)
    first = None
    for i in range(request.config.getoption("--seeds")):
        emu.configure(seed=i, resident=2 + i % 3, multiprocessors=4)
        with override(force_kernel="cuda two_kernel", cuda_tiles=TILINGS[i % len(TILINGS) :][:1]):
            actual = run(operator, o, xa, seed)
        first = first or actual
        for one, other in zip(actual, first, strict=True):
            assert one is other is None or torch.equal(one, other), i
    called = [(called, arguments.get("transposed", False)) for called, arguments in launched]
    assert (name, kernel.startswith("dx")) in called


def test_eager_and_the_kernels_may_be_mixed(operator):
    """xa means the same in both, so that a plan may choose each direction for itself."""
    o = make_operands(LinearCase(leading=(70,), K=64, R=13, dtype=torch.float16))
    seed = torch.tensor([5])
    settings = o.w, o.a, o.b, seed, 1.7, 0.2, True, True, True, True
    eager = Linear("eager")
    xa = {op: op.forward(o.x, o.w, o.bias, o.a, o.b, seed, 1.7, 0.2)[1] for op in (eager, operator)}
    assert xa[operator].shape == xa[eager].shape
    # rows of the kernels' xa begin on 16-byte boundaries
    assert xa[operator].stride() == (16, 1)
    one = operator.backward(o.dy, o.x, xa[eager], *settings)
    other = eager.backward(o.dy, o.x, xa[operator], *settings)
    for left, right in zip(one, other, strict=True):
        assert relative_l2(left, right) < tolerance(torch.float16)


def test_x_of_backward_may_lie_where_tma_cannot_read(operator):
    """Forward ran elsewhere: da reads a copy."""
    o = make_operands(LinearCase(leading=(30,), N=72, K=64, R=8, dtype=torch.float16))
    x = torch.cat([o.x.new_zeros(30, 3), o.x], dim=1)[:, 3:]
    settings = o.w, o.a, o.b, None, 1.7, 0.0, False, True, False, False
    assert torch.equal(operator.backward(o.dy, x, None, *settings)[1], operator.backward(o.dy, o.x, None, *settings)[1])


@pytest.mark.parametrize("case", GATE[:5], ids=range(5))
def test_the_primitives_alone_are_right(case, monkeypatch):
    """Operators without composites of their own are made of these."""
    backend = base.load("emu")
    for composite in ("linear_forward", "linear_backward"):
        monkeypatch.setattr(backend, composite, None)
    monkeypatch.delattr(backend, "native")
    check(case)


def test_it_is_one_operator_for_torch():
    def layer(x, o):
        return lora_linear(x, o.w, o.a, o.b, bias=o.bias, dropout_p=0.2, seed=7, backend="emu")

    o = make_operands(LinearCase(leading=(3, 20), K=64, dtype=torch.float16))
    for tensor in (o.x, o.a, o.b, o.bias):
        tensor.requires_grad_()
    expected = gradients(layer(o.x, o), o)
    compiled = torch.compile(lambda x: layer(x, o), fullgraph=True, backend="aot_eager")
    for name, tensor in gradients(compiled(o.x), o).items():
        assert torch.equal(expected[name], tensor), name


class TestRefusals:
    def refused(self, error, message, **change):
        o = make_operands(LinearCase(**{"K": 64, "dtype": torch.float16} | change))
        with pytest.raises(error, match=message):
            lora_linear(o.x, o.w, o.a, o.b, backend="emu")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_dtype(self, dtype):
        self.refused(
            TypeError,
            f"backend='emu': its kernels run bfloat16 and float16, not {dtype}".replace("torch.", ""),
            dtype=dtype,
        )

    def test_sizes(self):
        self.refused(ValueError, "N 96 and K 67 to be multiples of 8.*'triton', 'eager'", K=67)
        self.refused(ValueError, "N 65 and K 64", N=65)

    def test_rows_off_their_boundary(self):
        o = make_operands(LinearCase(K=64, dtype=torch.float16))
        x = torch.cat([o.x.new_zeros(o.x.shape[0], 3), o.x], dim=1)[:, 3:]
        with pytest.raises(ValueError, match="rows of x, dy and w that start on 16-byte boundaries"):
            lora_linear(x, o.w, o.a, o.b, backend="emu")

    def test_what_a_kernel_refuses_is_a_value_error(self, emu):
        with pytest.raises(ValueError, match="stride 12 of out is not a multiple of 8"):
            emu.round_adapter(**{"in": 64}, in_type=2, type=0, rows=2, columns=12, stride_in=12, out=64, stride_out=12)

    def test_what_the_emulator_objects_to_is_an_error_of_its_own(self, emu):
        assert issubclass(emu.EmulationError, RuntimeError)


@pytest.mark.parametrize("R", [1, 13, 40])
def test_any_rank_is_read_where_forward_wrote_it(R, launched):
    """xa has a pitch between its rows, and neither direction copies it."""
    o = make_operands(LinearCase(leading=(130,), N=72, K=136, R=R, dtype=torch.bfloat16))
    x, a, b = (t.requires_grad_() for t in (o.x, o.a, o.b))
    lora_linear(x, o.w, a, b, scale=1.5, backend="emu").backward(o.dy)
    calls = dict(reversed(launched))
    assert calls["reduce_dy"]["xa"] == calls["project_x"]["xa"] == calls["linear"]["xa"]
    assert {a.get("device", -1 if name.endswith("workspace") else None) for name, a in launched} == {-1}
    assert calls["reduce_dy"]["stride_xa"] == calls["project_x"]["stride_xa"] == -(-R // 8) * 8


def test_xa_of_another_backend_is_copied():
    xa = torch.ones(130, 16, dtype=torch.bfloat16)
    for given in (xa[:, :13].contiguous(), xa[:, 1:14], xa[1:, :13]):
        padded = cuda.padded_rows(given)
        assert torch.equal(padded[:, :13], given)
        is_ours = given.data_ptr() % 16 == 0 and given.stride(0) == 16
        assert (padded.data_ptr() == given.data_ptr()) == is_ours
