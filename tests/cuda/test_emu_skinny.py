"""The memory-bound CUDA kernels (csrc/kernels/skinny_sm80.cu), run from their own source by the emulator.

Every buffer is declared to the emulator with its exact extent, so that a byte read or written outside is an error, and
so is a partial sum that is read before it was written. The reference is fp64 of the operands as the kernels round them,
so that a result may be off by its own rounding and by fp32 sums.
"""

import itertools
from functools import cache

import planted
import pytest
import torch
from native_build import EMULATOR as emu

from lorafuse import philox
from lorafuse.testing.numerics import relative_l2, rounding

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TYPES = {BF16: 0, FP16: 1, FP32: 2}
DTYPES = [(BF16, FP32), (FP16, FP16), (BF16, BF16), (FP16, FP32)]
# as many partial sums of fp32 as there are: relative to the L2 norm of the result
FP32_SUMS = 1e-6
SEED = -0x0123456789ABCDEF


@pytest.fixture(autouse=True)
def _standard_emulator():
    yield
    emu.configure()
    emu.forget_memory()


def declare(name, t, unwritten=False):
    elements = (t.shape[0] - 1) * t.stride(0) + t.shape[1] if t.dim() == 2 else t.numel()
    emu.declare_memory(begin=t.data_ptr(), bytes=elements * t.element_size(), name=name, unwritten=unwritten)
    return t.data_ptr()


def rows(t, more=0):
    """`t` with rows on 16-byte boundaries, NaN between them, and nothing behind the last."""
    M, K = t.shape
    stride = -(-K // 8) * 8 + more
    out = torch.full(((M - 1) * stride + K,), float("nan"), dtype=t.dtype).as_strided((M, K), (stride, 1))
    out.copy_(t)
    return out


def nan(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


def drop_arguments(seed, p):
    if seed is None:
        return {}
    return {"seed": declare("seed", seed), "drop_below": min(int(p * 2**32), 2**32 - 1)}


def to_round(t, dtype, scale, stride, transposed=False):
    """Where an adapter is to be rounded, and what its launch is told; `out` is read when the launch has ended."""
    rows, columns = reversed(t.shape) if transposed else t.shape
    out = nan(rows, stride, dtype=dtype)
    return out, {
        "in_type": TYPES[t.dtype], "type": TYPES[dtype], "transposed": transposed, "rows": rows, "columns": columns,
        "in": declare("in", t), "stride_in": t.stride(0), "scale": scale, "out": declare("out", out),
        "stride_out": stride,
    }  # fmt: skip


def project_x(x, a, seed=None, p=0.0, stride=None, adapter=None):
    emu.forget_memory()
    out, rounded = to_round(*adapter) if adapter else (None, None)
    (M, K), R = x.shape, a.shape[0]
    stride = stride or -(-R // 8) * 8
    xa = nan(M, stride, dtype=x.dtype)
    emu.project_x(
        type=TYPES[x.dtype], a_type=TYPES[a.dtype], M=M, K=K, R=R, x=declare("x", x), stride_x=x.stride(0),
        a=declare("a", a), stride_a=a.stride(0), xa=declare("xa", xa), stride_xa=stride, **drop_arguments(seed, p),
        rounded=rounded,
    )  # fmt: skip
    return (xa, out) if adapter else xa


def reduce_dy(dy, b, xa, scale=1.0, want=(True, True, True), sms=4, stride=None, adapter=None, **more):
    emu.forget_memory()
    rounded_out, rounded = to_round(*adapter) if adapter else (None, None)
    (M, N), R = dy.shape, b.shape[1]
    stride = stride or -(-R // 8) * 8
    out = (nan(M, stride, dtype=dy.dtype), nan(N, R, dtype=b.dtype), nan(N, dtype=dy.dtype))
    dyb, db, dbias = (t if requested else None for t, requested in zip(out, want, strict=True))
    sizes = {"type": TYPES[dy.dtype], "b_type": TYPES[b.dtype], "M": M, "N": N, "R": R, "sms": sms}
    # what is not wanted has no place to be written to, and what is then not needed none to be read from
    arguments = {
        **sizes, "dy": declare("dy", dy), "stride_dy": dy.stride(0), "scale": scale,
        "b": declare("b", b) if want[0] else 0, "stride_b": b.stride(0),
        "xa": declare("xa", xa) if want[1] else 0, "stride_xa": xa.stride(0),
        "dyb": 0 if dyb is None else declare("dyb", dyb), "stride_dyb": stride,
        "db": 0 if db is None else declare("db", db), "dbias": 0 if dbias is None else declare("dbias", dbias),
        **more,
    }  # fmt: skip
    workspace = nan(emu.reduce_dy_workspace(**arguments) // 4, dtype=FP32)
    emu.reduce_dy(**arguments, workspace=declare("workspace", workspace, unwritten=True), rounded=rounded)
    return (dyb, db, dbias, rounded_out) if adapter else (dyb, db, dbias)


def reduce_x(x, dyb, a_dtype, seed=None, p=0.0, sms=4):
    emu.forget_memory()
    (M, K), R = x.shape, dyb.shape[1]
    da = nan(R, K, dtype=a_dtype)
    sizes = {"type": TYPES[x.dtype], "a_type": TYPES[a_dtype], "M": M, "K": K, "R": R, "sms": sms}
    arguments = {
        **sizes, "x": declare("x", x), "stride_x": x.stride(0), "dyb": declare("dyb", dyb), "stride_dyb": dyb.stride(0),
        "da": declare("da", da), **drop_arguments(seed, p),
    }  # fmt: skip
    workspace = nan(emu.reduce_x_workspace(**arguments) // 4, dtype=FP32)
    emu.reduce_x(**arguments, workspace=declare("workspace", workspace, unwritten=True))
    return da


def round_adapter(t, dtype, scale, stride, transposed=False):
    emu.forget_memory()
    out, rounded = to_round(t, dtype, scale, stride, transposed)
    emu.round_adapter(**rounded)
    return out


def beside_project_x(*adapter):
    """The same in the launch of another pass, whose own result must not change."""
    x, a = rows(torch.randn(70, 40).to(adapter[1])), rows(torch.randn(17, 40))
    xa, out = project_x(x, a, adapter=adapter)
    assert torch.equal(xa, project_x(x, a))
    return out


def beside_reduce_dy(*adapter):
    dy, b, xa = rows(torch.randn(70, 40).to(adapter[1])), torch.randn(40, 5), rows(torch.randn(70, 5).to(adapter[1]))
    *actual, out = reduce_dy(dy, b, xa, adapter=adapter)
    assert all(torch.equal(one, other) for one, other in zip(actual, reduce_dy(dy, b, xa), strict=True))
    return out


LAUNCHES = [round_adapter, beside_project_x, beside_reduce_dy]


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (300, 16), (72, 13)])
@pytest.mark.parametrize("in_dtype", [FP32, BF16])
def test_rounded_and_transposed(shape, in_dtype, launch):
    t = torch.randn(shape).to(in_dtype)
    columns, stride = shape[0], -(-shape[0] // 8) * 8 + 8
    out = launch(t, BF16, 0.75, stride, True)
    assert torch.equal(out[:, :columns], (0.75 * t.float()).to(BF16).t())
    assert not out[:, columns:].any()


def assert_near(name, actual, reference):
    error, bound = relative_l2(actual, reference), rounding(actual.dtype) + FP32_SUMS
    assert error <= bound, f"{name}: error {error:.3e} above {bound:.3e}, one rounding"


def check_all(M, N, K, R, dtype, a_dtype, sms, p, more=0, **device):
    """Every pass of one shape: near the reference, padding zero, and bitwise equal under two schedules."""
    x, dy = rows(torch.randn(M, K).to(dtype), more), rows(torch.randn(M, N).to(dtype), more)
    # b may have rows of any length
    a, b = rows(torch.randn(R, K).to(a_dtype)), torch.randn(N, R).to(a_dtype)
    seed = torch.tensor([SEED]) if p else None
    dropped = x.double() * (philox.keep_mask(seed, p, slice(0, M), K) if p else 1.0)
    stride = -(-R // 8) * 8 + more
    runs = []
    for schedule in (1, 2):
        emu.configure(seed=schedule, multiprocessors=min(sms, 8), **device)
        xa = project_x(x, a, seed, p, stride)
        dyb, db, dbias = reduce_dy(dy, b, xa[:, :R], 0.75, sms=sms, stride=stride)
        runs.append((xa, dyb, db, dbias, reduce_x(x, dyb[:, :R], a_dtype, seed, p, sms)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
    assert not xa[:, R:].any()
    assert not dyb[:, R:].any()
    xa, dyb = xa[:, :R], dyb[:, :R]
    assert_near("xa", xa, dropped @ a.to(dtype).double().t())
    assert_near("dyb", dyb, 0.75 * dy.double() @ b.to(dtype).double())
    assert_near("db", db, 0.75 * dy.double().t() @ xa.double())
    assert_near("dbias", dbias, dy.double().sum(0))
    assert_near("da", runs[0][4], dyb.double().t() @ dropped)


@pytest.mark.parametrize("M", [1, 7, 64, 129, 300])
@pytest.mark.parametrize("R", [1, 2, 3, 8, 13, 16, 40, 64, 100, 128])
def test_ranks_and_rows(R, M):
    i = [1, 2, 3, 8, 13, 16, 40, 64, 100, 128].index(R) * 5 + [1, 7, 64, 129, 300].index(M)
    # one block of columns, less, and several, the last one ragged
    N, K = [(520, 136), (72, 301), (600, 320), (13, 7)][i // 3 % 4]
    check_all(M, N, K, R, *DTYPES[i % 4], sms=(4, 1, 132, 7)[i // 2 % 4], p=0.3 if i % 3 else 0.0, more=i % 3 * 8)


@pytest.mark.parametrize("R", [5, 24])
@pytest.mark.parametrize(("dtype", "a_dtype"), DTYPES[:2])
def test_tall_blocks(R, dtype, a_dtype):
    """Many rows: blocks of 64 in project_x, and shares of reduce_dy that end within a column block."""
    check_all(700, 512, 264, R, dtype, a_dtype, sms=2, p=0.0)
    sizes = {"type": TYPES[dtype], "b_type": TYPES[a_dtype], "M": 700, "N": 512, "R": R, "sms": 2}
    pitch, slots = R + R % 2, 3
    floats = 2 * 700 * pitch + slots * 256 * (pitch + 1)
    results = {"dy": 0, "stride_dy": 512, "dyb": 16, "db": 16, "dbias": 16}
    assert emu.reduce_dy_workspace(**sizes, **results) == 4 * floats


@pytest.mark.parametrize("M", [20, 300])
@pytest.mark.parametrize(("R", "dtype", "a_dtype"), [(16, BF16, FP32), (40, FP16, FP32), (64, BF16, BF16)])
def test_small_shared_memory(M, R, dtype, a_dtype):
    """GPUs that give a block 99 KB: other blocks, and ranks in tiles of 32."""
    check_all(M, 520, 264, R, dtype, a_dtype, sms=3, p=0.0, shared_memory=101376)


@pytest.mark.parametrize("sms", [1, 2, 3, 5, 7, 132])
@pytest.mark.parametrize(("M", "N"), [(33, 1300), (200, 700), (450, 300)])
def test_every_share_is_added(M, N, sms):
    """Integers: sums are exact, and an item that is left out or counted twice shows."""
    dy, xa, b = (torch.randint(-3, 4, shape).half() for shape in ((M, N), (M, 3), (N, 3)))
    dy, xa = rows(dy), rows(xa)
    dyb, db, dbias = reduce_dy(dy, b.float(), xa, sms=sms)
    assert torch.equal(dyb[:, :3], (dy.float() @ b.float()).half())
    assert torch.equal(db, dy.float().t() @ xa.float())
    assert torch.equal(dbias, dy.float().sum(0).half())
    assert torch.equal(reduce_x(dy, xa, FP32, sms=sms), xa.float().t() @ dy.float())


@pytest.mark.parametrize("want", list(itertools.product([False, True], repeat=3)))
def test_results_that_are_not_wanted(want):
    dy, b, xa = torch.randint(-3, 4, (130, 600)), torch.randint(-2, 3, (600, 20)), torch.randint(-2, 3, (130, 20))
    dy, b, xa = rows(dy.to(BF16)), b.float(), rows(xa.to(BF16))
    actual = reduce_dy(dy, b, xa, 0.5, want)
    expected = (0.5 * dy.float() @ b).to(BF16), 0.5 * dy.float().t() @ xa.float(), dy.float().sum(0).to(BF16)
    assert tuple(t is not None for t in actual) == want
    for one, other in zip(actual, expected, strict=True):
        assert one is None or torch.equal(one[:, :20] if one.dim() == 2 else one, other)


@pytest.mark.parametrize(
    ("want", "sms", "dyb_bytes", "chunks"),
    [((True, True, True), 1, 1, 5), ((True, True, True), 5, 2 * 64 * 3 * 4 * 4, 3), ((True, False, True), 5, 1, 5),
     ((True, True, False), 2, 2 * 64 * 3 * 4 * 4, 3)],
)  # fmt: skip
def test_chunks_of_rows(want, sms, dyb_bytes, chunks):
    """Integers: what a chunk carries on to the next is exact, and the adapter is rounded once."""
    dy, xa, b = (torch.randint(-3, 4, shape).half() for shape in ((300, 600), (300, 3), (600, 3)))
    dy, xa, b = rows(dy), rows(xa), b.float()
    adapter, before = torch.randn(7, 5), emu.statistics()["launches"]
    *actual, rounded = reduce_dy(dy, b, xa, 0.5, want, sms, adapter=(adapter, FP16, 2.0, 8), dyb_bytes=dyb_bytes)
    # partial sums, and their sums, of each
    assert emu.statistics()["launches"] - before == 2 * chunks
    expected = (0.5 * dy.float() @ b).half(), 0.5 * dy.float().t() @ xa.float(), dy.float().sum(0).half()
    for requested, one, other in zip(want, actual, expected, strict=True):
        assert (one is not None) == requested
        assert one is None or torch.equal(one[:, :3] if one.dim() == 2 else one, other)
    assert torch.equal(rounded[:, :5], (2.0 * adapter).half())


@pytest.mark.parametrize(
    ("M", "N", "R"), [(8192, 14336, 16), (32768, 14336, 64), (32768, 28672, 64), (131072, 28672, 64)]
)
def test_partial_sums_are_bounded(M, N, R):
    """Of dyb at 64 MiB, where they took up to 3.5 GiB; those of columns do not grow with the rows."""
    sizes = {"type": 0, "b_type": 2, "M": M, "N": N, "R": R, "sms": 132, "dy": 0, "stride_dy": N, "db": 16, "dbias": 16}
    all_rows = 4 * N // 256 * M * R
    columns = emu.reduce_dy_workspace(**sizes)
    assert columns <= 4 * (132 + N // 256) * 256 * (R + 1)
    carried = 4 * N * (R + 1) if all_rows > 64 << 20 else 0
    assert emu.reduce_dy_workspace(**sizes, dyb=16) <= min(all_rows, 64 << 20) + columns + carried
    assert emu.reduce_dy_workspace(**sizes, dyb=16, dyb_bytes=1 << 40) == all_rows + columns


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("K", [64, 301, 1026])
@pytest.mark.parametrize("sms", [1, 132])
def test_mask_bit_for_bit(K, p, sms):
    """Of x = 1 the products with identities are the mask; one multiprocessor takes tall blocks, many take low ones."""
    M, seed = 70, torch.tensor([SEED])
    emu.configure(multiprocessors=sms)
    keep = philox.keep_mask(seed, p, slice(0, M), K).half()
    x = rows(torch.ones(M, K, dtype=FP16))
    assert torch.equal(reduce_x(x, rows(torch.eye(M, dtype=FP16)), FP32, seed, p, sms), keep.float())
    last = min(K, 128)
    xa = project_x(x, rows(torch.eye(K)[-last:]), seed, p)
    assert torch.equal(xa[:, :last], keep[:, -last:])


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("in_dtype", [FP32, None])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("shape", "stride"), [((1, 1), 8), ((5, 13), 16), ((70, 301), 304), ((3, 16), 64)])
def test_rounded(shape, stride, dtype, in_dtype, launch):
    t = torch.randn(shape).to(in_dtype or dtype)
    out = launch(t, dtype, 0.3, stride)
    assert torch.equal(out[:, : shape[1]], (t.float() * torch.tensor(0.3)).to(dtype))
    assert not out[:, shape[1] :].any()


def test_nan_and_infinity_stay_out_of_the_padding():
    x, a = torch.randn(20, 40).to(BF16), torch.randn(3, 40)
    x[4, 5] = float("inf")
    xa = project_x(rows(x), rows(a), stride=24)
    assert not xa[:, 3:].any()
    assert not xa[4, :3].isfinite().any()
    assert xa[:4].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride_x": 60}, "stride 60 of x is below its 64 columns"),
        ({"stride_x": 68}, "stride 68 of x is not a multiple of 8 elements"),
        ({"stride_a": 66}, "stride 66 of a is not a multiple of 4 elements"),
        ({"stride_xa": 12}, "stride 12 of xa is not a multiple of 8 elements"),
        ({"type": 2}, "type 2 of x is neither BF16 nor FP16"),
        ({"a_type": 0}, "adapter's type 0 is neither FP32 nor that of x, 1"),
        ({"M": 0}, "sizes 0, 64 and rank 9 must be positive"),
        ({"xa": 0}, "xa is null"),
    ],
)
def test_refused_with_the_value(change, message):
    x, a, xa = torch.zeros(4, 64, dtype=FP16), torch.zeros(9, 64), torch.zeros(4, 16, dtype=FP16)
    arguments = {
        "type": 1, "a_type": 2, "M": 4, "K": 64, "R": 9, "x": x.data_ptr(), "stride_x": 64, "a": a.data_ptr(),
        "stride_a": 64, "xa": xa.data_ptr(), "stride_xa": 16,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        emu.project_x(**arguments | change)
    with pytest.raises(ValueError, match="x at .* is not on a 16-byte boundary"):
        emu.project_x(**arguments | {"x": x.data_ptr() + 8})


# by what the table of tests/planted.py names as seeing a bug
SCENARIOS = {
    "project_x": lambda x, dy, a, b, dyb, seed: (project_x(x, a, seed, 0.3),),
    "reduce_dy": lambda x, dy, a, b, dyb, seed: reduce_dy(dy, b, dyb),
    "reduce_dy in chunks": lambda x, dy, a, b, dyb, seed: reduce_dy(dy, b, dyb, dyb_bytes=1),
    "project_x, reduce_x": lambda x, dy, a, b, dyb, seed: (
        project_x(x, a, seed, 0.3),
        reduce_x(x, dyb, FP32, seed, 0.3),
    ),
}


@cache
def right(launch, schedule):
    """Operands, and what the kernels without a bug compute of them."""
    x, dy = rows(torch.randn(300, 520).half()), rows(torch.randn(300, 600).half())
    a, b, dyb = rows(torch.randn(16, 520).half()), torch.randn(600, 16).half(), rows(torch.randn(300, 16).half())
    operands = x, dy, a, b, dyb, torch.tensor([SEED])
    emu.configure(seed=schedule)
    return operands, SCENARIOS[launch](*operands)


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize(("launch", "name"), [(launch, bug) for launch in SCENARIOS for bug in planted.names(launch)])
def test_planted_bugs_are_seen(launch, name, schedule):
    operands, expected = right(launch, schedule)
    emu.configure(seed=schedule, planted=name)
    try:
        wrong = SCENARIOS[launch](*operands)
    except emu.EmulationError:
        return
    assert not all(torch.equal(one, other) for one, other in zip(expected, wrong, strict=True)), f"{name} was not seen"
