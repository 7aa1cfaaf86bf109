"""`lora_linear_multi` (T1; Triton in its interpreter, T2): every tensor by name against a loop in fp64, and bits."""

import pytest
import torch
from multi_reference import batch, count_reads, mover, reference, run
from quantized_weights import four_bits
from torch.utils.flop_counter import FlopCounterMode

from lorafuse import backends
from lorafuse.functional import lora_linear_multi
from lorafuse.plan import find, override
from lorafuse.testing.numerics import relative_l2, tolerance

ON_GPU = torch.cuda.is_available()
TRITON = (torch.float32, torch.float16) + ((torch.bfloat16,) if ON_GPU else ())
EAGER = torch.float64, torch.float32, torch.bfloat16, torch.float16
RUNS = [("eager", dtype) for dtype in EAGER] + [("triton", dtype) for dtype in TRITON]
by_run = pytest.mark.parametrize(
    ("backend", "dtype"), RUNS, ids=[f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in RUNS]
)
by_backend = pytest.mark.parametrize("backend", ["eager", "triton"])
COUNTS, RANKS = [3, 0, 17, 1, 40], [1, 4, 8, 128, 3]


def check(actual, expected, dtype):
    for name, t in expected.items():
        assert actual[name].dtype is dtype
        assert relative_l2(actual[name], t) <= tolerance(dtype), name
        assert actual[name].count_nonzero(), name


@by_run
@pytest.mark.parametrize("dropout", [False, True])
def test_every_tensor(backend, dtype, dropout):
    given = batch(COUNTS, RANKS, dtype, dropout=dropout)
    check(run(given, backend=backend), reference(given), dtype)


@by_run
def test_odd_sizes_and_no_bias(backend, dtype):
    given = batch([2, 33, 5], [5, 0, 70], dtype, N=45, K=67, rest=0, bias=False)
    check(run(given, backend=backend), reference(given), dtype)


@by_backend
def test_tma_and_pointers(backend):
    given = batch([2, 33, 5], [5, 33, 16], torch.float16, N=72, K=64)
    for name in ("H200", "A100"):
        with override(interpreted_as=find(name)):
            check(run(given, backend=backend), reference(given), torch.float16)


@by_backend
def test_the_delta_alone(backend):
    given = batch(COUNTS, RANKS, torch.float32)
    given.w.zero_()
    check(run(given, backend=backend), reference(given), torch.float32)


@by_backend
def test_adapters_of_another_dtype(backend):
    """fp32 adapters over fp16, whose xa leaves fp16's range."""
    given = batch(COUNTS, RANKS, torch.float16)
    given.a, given.b = given.a.float() * 2**15, given.b.float() / 2**15
    expected = reference(given)
    for name, t in run(given, backend=backend).items():
        assert t.dtype is (torch.float32 if name in ("da", "db") else torch.float16)
        assert relative_l2(t, expected[name]) <= tolerance(torch.float16), name


def alone(given, every, chosen, **more):
    """The names of tensors of which an adapter has other bits in the batch, whose results are `every`, than alone."""
    differing = []
    for g in chosen:
        rows, ranks = given.rows(g), given.of(g)
        mine = {"y": every["y"][rows], "dx": every["dx"][rows]}
        mine |= {"da": every["da"][ranks], "db": every["db"][:, ranks]}
        expected = run(given.pick([g]), **more)
        differing += [(g, name) for name, t in mine.items() if not torch.equal(t, expected[name])]
    return differing


# rows 0 to 300 and ranks 1 to 128 in plain torch; less where the interpreter computes
SHAPES = {
    "eager": {
        1: ([300], [128]), 2: ([1, 299], [128, 1]), 7: ([0, 3, 130, 2, 64, 1, 31], [64, 1, 13, 128, 2, 8, 33]),
        64: ([i * i % 101 for i in range(64)], [1 + i * 7 % 128 for i in range(64)]),
        2000: ([0 if i % 90 else i % 7 for i in range(2000)], [1 + i % 4 for i in range(2000)]),
    },
    "triton": {
        1: ([50], [40]), 2: ([1, 39], [40, 1]), 7: ([0, 3, 20, 2, 9, 1, 31], [64, 1, 13, 128, 2, 8, 33]),
        64: ([0 if i % 24 else 1 + i % 5 for i in range(64)], [1 + i * 7 % 40 for i in range(64)]),
        2000: ([0 if i % 1800 else 1 + i % 7 for i in range(2000)], [1 + i % 4 for i in range(2000)]),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "dtype", "L"),
    # in the interpreter, many adapters in one dtype
    [(name, dtype, L) for name, dtype in RUNS for L in SHAPES[name] if name == "eager" or L < 64 or dtype is TRITON[0]],
)
def test_bits_are_those_of_an_adapter_alone(backend, dtype, L):
    counts, ranks = SHAPES[backend][L]
    given = batch(counts, ranks, dtype, N=20, K=36)
    every = run(given, backend=backend)
    has_rows = [g for g, count in enumerate(counts) if count]
    assert alone(given, every, has_rows[:: 1 if backend == "eager" else 3], backend=backend) == []
    empty = [g for g, count in enumerate(counts) if not count]
    assert not any(every["da"][given.of(g)].any() or every["db"][:, given.of(g)].any() for g in empty[:50])


@by_backend
def test_bits_do_not_depend_on_the_order(backend):
    given, order = batch(COUNTS, RANKS, torch.float32), [4, 2, 0, 1, 3]
    first, moved = run(given, backend=backend), given.pick(order)
    second = run(moved, backend=backend)
    for at, g in enumerate(order):
        assert torch.equal(first["y"][given.rows(g)], second["y"][moved.rows(at)])
        assert torch.equal(first["dx"][given.rows(g)], second["dx"][moved.rows(at)])
        assert torch.equal(first["da"][given.of(g)], second["da"][moved.of(at)])
        assert torch.equal(first["db"][:, given.of(g)], second["db"][:, moved.of(at)])


def test_one_product_over_all_rows_is_not_invariant():
    """What batch_invariant=False gives up, and that the tests above can fail."""
    given = batch([1, 2, 1, 30], [2, 3, 4, 8], torch.float32, N=64, K=1024, rest=0)
    every = run(given, backend="eager", batch_invariant=False)
    check(every, reference(given), torch.float32)
    differing = {name for _, name in alone(given, every, range(4), backend="eager", batch_invariant=False)}
    assert differing <= {"y", "dx"}
    assert differing


@by_backend
def test_gradients_are_added_to_buffers(backend):
    given = batch(COUNTS, RANKS, torch.float32)
    expected = run(given, backend=backend)
    move = mover(backend)
    x, a, b = (move(t.clone()).requires_grad_() for t in (given.x, given.a, given.b))
    offsets, w, bias, seeds, dy = map(move, (given.offsets, given.w, given.bias, given.seeds, given.dy))
    # as contiguous as b, and transposed
    buffers = torch.ones_like(a.detach()), torch.ones_like(b.detach().t()).t()
    idle = given.of(1)
    buffers[0][idle], buffers[1][:, idle] = float("nan"), float("nan")
    for _ in range(2):
        y = lora_linear_multi(
            x, offsets, w, a, b, ranks=given.ranks, scales=given.scales, bias=bias, dropout_p=given.p, seeds=seeds,
            grad_buffers=buffers, backend=backend,
        )  # fmt: skip
        y.backward(dy)
    assert a.grad is None
    assert b.grad is None
    buffers = [t.cpu() for t in buffers]
    assert torch.equal(x.grad.cpu(), 2 * expected["dx"])
    for name, buffer, columns in (("da", buffers[0], 0), ("db", buffers[1], 1)):
        buffer, gradient = buffer.movedim(columns, 0), expected[name].movedim(columns, 0)
        # an adapter without rows keeps what was there
        assert buffer[idle].isnan().all()
        rest = [i for i in range(sum(RANKS)) if not idle.start <= i < idle.stop]
        assert torch.equal(buffer[rest], 1 + gradient[rest] + gradient[rest])


@by_backend
def test_nothing_waits_for_the_device(backend, monkeypatch):
    given = batch(COUNTS, RANKS, torch.float32)
    # what is copied to the device once
    run(given, backend=backend)
    seen = count_reads(monkeypatch)
    # a new batch of other rows
    given.counts = [20, 0, 5, 30, 6]
    run(given, backend=backend)
    assert bool(seen) is (backend == "eager"), seen


@by_backend
def test_quantized_base(backend):
    given = batch(COUNTS, RANKS, torch.float32, N=32, K=64)
    weight = four_bits(32, 64, rounded="float32")
    given.w = weight.decoded(torch.float32).data
    actual, expected = run(given, weight=weight, backend=backend), run(given, backend=backend)
    for name, t in expected.items():
        assert torch.equal(actual[name], t), name


def test_no_rows_at_all():
    given = batch([0, 0], [2, 3], torch.float32, rest=0)
    actual = run(given, backend="eager")
    assert actual["y"].shape == (0, 36)
    assert not actual["da"].any()
    assert not actual["db"].any()


def test_leading_dimensions_and_frozen_x():
    given = batch([3, 5], [2, 3], torch.float32, rest=0, dropout=False)
    a = given.a.clone().requires_grad_()
    y = lora_linear_multi(
        given.x.view(2, 4, -1), given.offsets, given.w, a, given.b, ranks=given.ranks, scales=given.scales,
        bias=given.bias,
    )  # fmt: skip
    y.backward(given.dy.view(2, 4, -1))
    expected = run(given)
    assert torch.equal(y.view(8, -1), expected["y"])
    assert torch.equal(a.grad, expected["da"])


def test_strides_of_x_change_no_bit():
    given = batch(COUNTS, RANKS, torch.float32)
    expected = run(given, backend="eager")
    given.x, given.dy = (t.t().contiguous().t() for t in (given.x, given.dy))
    assert all(torch.equal(t, expected[name]) for name, t in run(given, backend="eager").items())


def formula(given):
    def call(x, a, b):
        return lora_linear_multi(
            x, given.offsets, given.w, a, b, ranks=given.ranks, scales=given.scales, bias=given.bias,
            dropout_p=given.p, seeds=given.seeds,
        )  # fmt: skip

    return call, [t.clone().requires_grad_() for t in (given.x, given.a, given.b)]


def test_gradcheck_of_both_orders():
    call, leaves = formula(batch([2, 0, 3], [2, 1, 3], N=4, K=5, rest=1))
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_functional_transform():
    given = batch([2, 0, 3], [2, 1, 3], N=4, K=5, rest=1)
    call, leaves = formula(given)
    expected = run(given)
    _, gradients = torch.func.vjp(call, *leaves)
    for t, name in zip(gradients(given.dy), ("dx", "da", "db"), strict=True):
        assert relative_l2(t, expected[name]) <= tolerance(torch.float64)


def test_compiled():
    given = batch(COUNTS, RANKS, torch.float32)
    call, leaves = formula(given)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    y = compiled(*leaves)
    y.backward(given.dy)
    expected = run(given)
    for t, name in zip((y, *(leaf.grad for leaf in leaves)), expected, strict=True):
        assert torch.equal(t, expected[name]), name


def test_opcheck():
    given = batch([2, 0, 3], [2, 1, 3], torch.float32, rest=1)
    factors = [given.a], [given.b]
    settings = given.ranks, given.scales, given.p, ["dense"], [0], False, True, "eager", False
    layers = [given.w], [None], *factors, [given.seeds], [], *settings
    op = torch.ops.lorafuse.lora_linears_multi
    torch.library.opcheck(op, (given.x, given.offsets, *layers))
    _, xas = op(given.x, given.offsets, *layers)
    for needs in ([True, True, True], [True, False, True]):
        gradients = [torch.zeros_like(given.a)], [torch.zeros_like(given.b)], needs
        operands = [given.dy], given.x, xas, given.offsets
        torch.library.opcheck(torch.ops.lorafuse.lora_linears_multi_backward, (*operands, *layers, *gradients))


def test_flops_are_those_of_the_largest_rank():
    given = batch([4], [3], torch.float32, rest=0, dropout=False)
    with FlopCounterMode(display=False) as counter:
        run(given)
    (M, K), N = given.x.shape, given.w.shape[0]
    # y, xa b; dx, dyb, dyb a, da, db
    assert counter.get_total_flops() == 2 * M * (2 * N * K + 3 * (3 * N + 3 * K))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [2]}, "one of each"),
        ({"ranks": [-1, 6]}, "rank -1"),
        ({"ranks": [2, 2]}, "sum to 4"),
        ({"scales": [1.0, float("inf")]}, "not finite"),
        ({"dropout_p": [0.5, 2.0]}, "not a probability"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, "seeds is"),
        ({"offsets": torch.tensor([1, 2])}, "int32"),
        ({"offsets": torch.tensor([4, 2]).int()}, "ascend"),
        ({"offsets": torch.tensor([4, 20]).int()}, "ascend"),
        ({"grad_buffers": (torch.zeros(5, 40), torch.zeros(36, 5))}, "requires_grad=False"),
        ({"grad_buffers": (torch.zeros(5, 40),)}, "they are two"),
        ({"grad_buffers": (torch.zeros(5, 40).int(), torch.zeros(36, 5))}, "torch.int32"),
        ({"weight": torch.zeros(36, 41)}, "the rule is"),
        ({"ranks": [2.0, 3]}, "it must be an int"),
        ({"dropout_p": 0.5}, "it is a sequence"),
    ],
)
def test_errors(change, message):
    given = batch([2, 3], [2, 3], torch.float32, dropout=False)
    operands = {"x": given.x, "offsets": given.offsets, "weight": given.w, "a": given.a, "b": given.b}
    with pytest.raises((ValueError, TypeError), match=message):
        lora_linear_multi(**operands | {"ranks": given.ranks, "scales": given.scales, "backend": "eager"} | change)


def test_the_backend_without_kernels_says_so(monkeypatch):
    given = batch([2, 3], [2, 3], torch.float32, dropout=False)
    monkeypatch.setitem(backends.base._AVAILABILITY, "cuda", backends.base.Availability(True))
    with pytest.raises(ValueError, match="use 'triton', 'eager'"):
        run(given, backend="cuda")
