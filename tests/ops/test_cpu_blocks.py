"""Products with a whole weight by csrc/cpu/matmul.cpp, built anew: against fp64, for any sizes, formats and threads."""

import ctypes
from pathlib import Path

import pytest
import torch
from cpu_source import SOURCES, UNREADABLE, compiled, run_a_layer, run_layers_of_one_x, torch_threads
from quantized_weights import FP4, four_bits
from torch._subclasses import FakeTensorMode

from lorafuse.backends import aten_blocks, workspace
from lorafuse.formats import cpu
from lorafuse.operands import Dropout, LowRank, Weight
from lorafuse.testing.numerics import relative_l2

SOURCE = (SOURCES / "matmul.cpp").read_text()
# M, N, K, R: tails of rows and columns, several blocks of columns and of a reduction, one column, no low rank
SIZES = [
    (128, 576, 576, 16), (17, 577, 385, 8), (63, 33, 1000, 1), (20, 1, 50, 3), (257, 1201, 16, 24), (16, 40, 1, 0),
]  # fmt: skip


def made(folder, source, *flags):
    """`lorafuse_matmul` of `matmul.cpp`, or of what was made of it, and torch's sgemm."""
    kept = aten_blocks.functions()
    if kept is None:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        if not hasattr(torch_cpu, "sgemm_"):
            pytest.skip("torch's sgemm has no name here")
        kept = None, ctypes.cast(torch_cpu.sgemm_, ctypes.c_void_p).value
    return compiled(folder, "matmul.cpp", source, *flags).lorafuse_matmul, kept[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return made(tmp_path_factory.mktemp("blocks"), SOURCE, "-O1")


@pytest.fixture
def use(monkeypatch):
    """Makes the primitives call these functions, whatever the sizes and threads."""
    monkeypatch.setattr(aten_blocks, "LEAST_ROWS", 1)
    monkeypatch.setattr(aten_blocks, "MOST_THREADS", 8)
    monkeypatch.setattr(aten_blocks, "OF_THREAD", 1)
    return lambda functions: monkeypatch.setattr(aten_blocks, "functions", lambda: functions)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    with torch_threads(request.param):
        yield request.param


def part(rows, columns):
    """Of a wider tensor."""
    return torch.randn(rows, columns + 3)[:, 1 : columns + 1]


def low_rank(M, N, R, is_transposed):
    if not R:
        return None
    return LowRank(part(M, R), part(R, N) if is_transposed else part(N, R), -0.5, is_transposed)


def exact(x, w, bias, low, total, dtype=torch.float64):
    left = (total.to(dtype) if total is not None else 0) + x.to(dtype) @ w.decoded(torch.float32).right().to(dtype)
    if bias is not None:
        left = left + bias.to(dtype)
    if low is None:
        return left
    right = low.b if low.is_transposed else low.b.t()
    return left + low.scale * (low.xa.to(dtype) @ right.to(dtype))


def check(x, w, bias=None, low=None, total=None):
    """The product, in a part of a tensor around which nothing changes, against torch's error."""
    right, in_torch = exact(x, w, bias, low, total), exact(x, w, bias, low, total, torch.float32)
    if total is None:
        result = aten_blocks.product(x, w, bias, low)
    else:
        around = torch.full((x.shape[0] + 2, total.shape[1] + 8), torch.nan)
        around[1:-1, 3:-5] = total
        result = aten_blocks.product(x, w, bias, low, around[1:-1, 3:-5]).clone()
        around[1:-1, 3:-5] = torch.nan
        assert around.isnan().all()
    assert result.shape == right.shape
    error, of_torch = relative_l2(result, right), relative_l2(in_torch, right)
    assert error <= 2 * of_torch + 1e-7, f"{error:.1e}, torch {of_torch:.1e}"


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_dense_weight(built, use, threads, sizes, is_transposed):
    use(built)
    M, N, K, R = sizes
    x, w = part(M, K), Weight(part(K, N) if is_transposed else part(N, K), is_transposed)
    for adds in (False, True):
        for bias in (None, torch.randn(N)):
            check(x, w, bias, low_rank(M, N, R, is_transposed), torch.randn(M, N) if adds else None)


def int8(N, K, rows_scale=True):
    scale = torch.rand(N, 1) if rows_scale else torch.rand(N) * 127
    return Weight(torch.randint(-127, 128, (N, K), dtype=torch.int8), False, (scale,), "int8")


def mxfp4(N, K):
    data, scale = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8), torch.randint(120, 132, (N, K // 32))
    return Weight(data, False, (scale.to(torch.uint8),), "mxfp4")


def fp8_rows(N, K):
    return Weight(torch.randn(N, K).to(torch.float8_e4m3fn), False, (torch.rand(N, 1),), f"fp8:block=1x{K}")


STORED = {
    "nf4": lambda N, K: four_bits(N, K, rounded="float32", scale=0.1),
    "nf4 nested": lambda N, K: four_bits(N, K, rounded="float32", nested=True),
    "nf4 to bf16": lambda N, K: four_bits(N, K, rounded="bfloat16"),
    "fp4": lambda N, K: four_bits(N, K, block=128, rounded="float32", code=FP4, kind="fp4"),
    "int8 torchao": int8,
    "int8 bitsandbytes": lambda N, K: int8(N, K, False),
    "fp8": fp8_rows,
    "mxfp4": mxfp4,
}  # fmt: skip


# every number half way between two of bf16
TIES = four_bits(40, 64, rounded="bfloat16", code=1 + (2 * torch.arange(16) + 1) / 256)
TIES = Weight(TIES.data, False, (torch.full((40,), 2.0), TIES.statistics[1]), TIES.format)


def check_bits(w):
    """Of the decoded elements: each is a product with one and zeros."""
    result = aten_blocks.product(torch.eye(w.sizes[1]), w)
    assert torch.equal(result, w.decoded(torch.float32).right()), "not exactly what the codec gives"


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("kind", STORED)
def test_a_quantized_weight_is_nowhere_whole(built, use, monkeypatch, kind, is_transposed):
    use(built)
    if cpu.library() is None:
        pytest.skip("lorafuse._cpu is not built")
    monkeypatch.setattr(workspace, "FREE", [])
    # several blocks each way; rows of an odd number of blocks
    for N, K in ((321, 480), (96, 800)):
        stored = STORED[kind](N, K)
        w = stored.t if is_transposed else stored
        with torch_threads(2):
            check(part(20, w.sizes[1]), w, torch.randn(w.sizes[0]), low_rank(20, w.sizes[0], 8, is_transposed))
            check_bits(w)
    check_bits(TIES.t if is_transposed else TIES)
    assert workspace.FREE == []


def test_of_a_matrix_of_a_stack(built, use):
    """Whose elements begin within the stored ones."""
    use(built)
    if cpu.library() is None:
        pytest.skip("lorafuse._cpu is not built")
    stack = four_bits(3, 96, 128, rounded="float32")
    one = stack.select(2, 3)
    one = Weight(one.data, False, one.statistics, one.format.replace("1,96,128", "96,128"))
    assert "first" in one.format
    check(torch.randn(20, 128), one)


def test_results_are_the_same_again(built, use, threads):
    use(built)
    x, w, low = torch.randn(100, 577), Weight(torch.randn(300, 577)), low_rank(100, 300, 16, False)
    assert torch.equal(aten_blocks.product(x, w, None, low), aten_blocks.product(x, w, None, low))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_reaches_what_it_reaches_in_torch(built, use, value):
    use(built)
    for place in range(4):
        x, data, low = torch.randn(20, 30), torch.randn(50, 30), low_rank(20, 50, 8, False)
        (x, data, low.xa, low.b)[place][9, 5] = value
        right = exact(x, Weight(data), None, low, None)
        result = aten_blocks.product(x, Weight(data), None, low)
        assert torch.equal(result.isnan(), right.isnan())
        assert torch.equal(result.isfinite(), right.isfinite())


def check_what_lines_do():
    stored = four_bits(700, 800, rounded="float32")
    for w in (stored, stored.t):
        N, K = w.sizes
        check(torch.randn(20, K), w)
        check(torch.randn(20, K), w, torch.randn(N), low_rank(20, N, 8, False), torch.randn(20, N))
    check_bits(TIES)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("kept = 1;\n  };", "};"),
        ("int(columns), k, count);", "int(columns), 0, count);"),
        ("k * of.w_row + start", "k * of.w_row"),
        ("(of.adds ? row[j] : 0.0f) + of.bias[start + j]", "of.bias[start + j]"),
        ("start, start + n);", "start, start + 16);"),
        ("if (of.rounds)", "if (false)"),
        ("0x7fff + (bits >> 16 & 1)", "0x8000"),
    ],
    ids=[
        "later parts",
        "x of a part",
        "columns of a part",
        "bias and sum",
        "columns of the low rank",
        "rounding",
        "ties",
    ],
)
def test_a_wrong_line_is_seen(built, use, tmp_path, line, wrong):
    if cpu.library() is None:
        pytest.skip("lorafuse._cpu is not built")
    assert SOURCE.count(line) == 1
    use(made(tmp_path, SOURCE.replace(line, wrong)))
    with pytest.raises(AssertionError, match=r"torch|exactly"), torch_threads(2):
        check_what_lines_do()


OTHERS = UNREADABLE | {"strided": lambda t: torch.stack([t, t, t], -1)[..., 0]}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_what_has_other_values_than_its_memory_is_torchs(built, use, change):
    use(built)
    x, data, low = torch.randn(20, 30), torch.randn(50, 30), low_rank(20, 50, 8, False)
    assert aten_blocks.product(change(x), Weight(data)) is None
    assert aten_blocks.product(x, Weight(change(data))) is None
    assert aten_blocks.product(x, Weight(data), change(torch.randn(50, 1))[:, 0]) is None
    assert aten_blocks.product(x, Weight(data), None, LowRank(change(low.xa), low.b)) is None
    assert aten_blocks.product(x, Weight(data), None, LowRank(low.xa, change(low.b))) is None
    assert aten_blocks.product(x, Weight(data), None, low) is not None


def test_what_it_is_not_for_is_torchs(built, use, monkeypatch):
    use(built)
    x, w, low = torch.randn(20, 30), Weight(torch.randn(50, 30)), low_rank(20, 50, 8, False)
    assert aten_blocks.product(x[:, :-1], w) is None
    assert aten_blocks.product(x, w, torch.randn(49)) is None
    assert aten_blocks.product(x, w, None, low_rank(19, 50, 8, False)) is None
    assert aten_blocks.product(x, w, None, low_rank(20, 49, 8, False)) is None
    assert aten_blocks.product(x, w, None, LowRank(low.xa, low.b, dropout=Dropout(torch.ones(1), 0.5))) is None
    assert aten_blocks.product(x, w, total=torch.randn(50, 20).t()) is None
    assert aten_blocks.product(x, four_bits(50, 30, rounded="float16")) is None
    assert aten_blocks.product(x, Weight(torch.randn(2, 50, 30))) is None
    assert aten_blocks.product(x[:, :0], Weight(w.data[:, :0])) is None
    overlapping = torch.randn(60).as_strided((20, 30), (1, 1))
    assert aten_blocks.product(overlapping, w) is None
    with FakeTensorMode():
        assert aten_blocks.product(torch.randn(20, 30), Weight(torch.randn(50, 30))) is None
    runs = []
    torch.vmap(lambda t: (runs.append(aten_blocks.product(x, w)), t)[1])(torch.ones(2))
    assert runs == [None]
    monkeypatch.setattr(aten_blocks, "LEAST_ROWS", 21)
    assert aten_blocks.product(x, w) is None
    monkeypatch.setattr(aten_blocks, "LEAST_ROWS", 20)
    monkeypatch.setattr(aten_blocks, "MOST_THREADS", 1)
    with torch_threads(2):
        assert aten_blocks.product(x, w) is None


@pytest.fixture
def counted(built, use):
    """The calls."""
    calls = []

    def call(*arguments):
        calls.append(None)
        built[0](*arguments)

    use((call, built[1]))
    return calls


def test_a_layer_runs_them(counted):
    run_a_layer()
    # y and dx
    assert len(counted) == 2


def test_layers_of_one_x_run_them(counted):
    run_layers_of_one_x()
    # each y; dx of each reduction
    assert len(counted) == 6


def test_where_it_does_not_run_there_is_a_reason(monkeypatch, built):
    monkeypatch.setattr(aten_blocks.aten_rank, "why_not", lambda: "no library")
    assert aten_blocks.why_not() == "no library"
    monkeypatch.setattr(aten_blocks.aten_rank, "why_not", lambda: "")
    monkeypatch.setattr(aten_blocks, "functions", lambda: None)
    assert "sgemm" in aten_blocks.why_not()
    monkeypatch.setattr(aten_blocks, "functions", lambda: built)
    with torch_threads(aten_blocks.MOST_THREADS + 1):
        assert "threads" in aten_blocks.why_not()
    with torch_threads(1):
        assert aten_blocks.why_not() == ""
