"""A layer of few tiles whose K the blocks of a cluster divide (csrc/kernels/split_sm90.cuh), emulated (T5)."""

import pytest
import torch
from test_emu_linear import DTYPES, check

from lorafuse.plan import clear_cache, configs_cuda, override
from lorafuse.testing.check_linear import LinearCase, make_operands

pytest_plugins = "emu_fixtures"
pytestmark = pytest.mark.usefixtures("emu")


@pytest.fixture(autouse=True)
def _divided():
    with override(force_kernel="cuda split_k"):
        yield


@pytest.fixture(params=[2, 4])
def splits(request, monkeypatch):
    """Plans of so many parts of K."""
    monkeypatch.setattr(configs_cuda, "SPLITS", (request.param,))
    clear_cache()
    yield request.param
    clear_cache()


def launches(launched):
    return [arguments for name, arguments in launched if name == "split_linear"]


@pytest.mark.parametrize(("M", "R"), [(1, 1), (63, 32), (128, 16), (257, 13)])
def test_sizes_and_ranks(M, R, splits, launched):
    """Parts of K that are alike and not, the last one ragged; fp32 adapters and others; nothing else is launched."""
    N, K = ((96, 264), (136, 328))[R % 2]
    adapters = torch.float32 if M % 2 else None
    check(LinearCase(leading=(M,), N=N, K=K, R=R, dtype=DTYPES[R % 2], adapter_dtype=adapters, bias=R % 3 == 0))
    assert {one["splits"] for one in launches(launched)} == {splits}
    assert not {"project_x", "round_adapter"} & {name for name, _ in launched}


def test_as_many_blocks_as_the_gpu_holds(operator, launched):
    """And where K has too few parts, or ranks are many, another kernel runs."""
    for change, expected in (({}, 4), ({"K": 128}, 2), ({"K": 64}, 0), ({"R": 40}, 0)):
        o = make_operands(LinearCase(**{"leading": (40,), "N": 72, "K": 264, "R": 8, "dtype": torch.float16} | change))
        launched.clear()
        operator.forward(o.x, o.w, o.bias, o.a, o.b, None, 1.7, 0.0)
        assert [one["splits"] for one in launches(launched)] == [expected] * bool(expected), change


def test_what_is_refused(emu):
    given = {"type": 0, "a_type": 2, "b_type": 2, "M": 1, "N": 8, "K": 256, "R": 8, "stride_x": 256, "stride_w": 256}
    given |= dict.fromkeys(("x", "w", "a", "b", "xa", "y"), 64) | {"stride_a": 256, "stride_b": 8, "stride_xa": 8}
    given |= {"stride_y": 8, "tiling": (128, 4, 1)}
    for message, change in {
        "R of 40: tiles compute xa of 1 to 32 ranks": {"R": 40},
        "splits of 3: 2 or 4 blocks divide K": {"splits": 3},
        "K of 128 has 2 blocks of 64 for 4 parts": {"K": 128},
        "tiles of 128 x 256; where blocks divide K they are 128 x 128": {"tiling": (256, 3, 1)},
        "2 stages are too few for the sums of a tile": {
            "tiling": (128, 2, 1),
            "R": 32,
            "stride_xa": 32,
            "stride_b": 32,
        },
        "adapter's type 1 is neither FP32 nor that of x": {"a_type": 1},
    }.items():
        with pytest.raises(ValueError, match=message):
            emu.split_linear(**given | change)


def test_many_schedules(emu, operator, splits, request):
    """No bit depends on the order in which blocks come."""
    o = make_operands(LinearCase(leading=(70,), N=120, K=328, R=24, dtype=torch.bfloat16))
    first = None
    for i in range(max(8, request.config.getoption("--seeds") // 2)):
        emu.configure(seed=i, resident=splits * (1 + i % 3), multiprocessors=8)
        actual = operator.forward(o.x, o.w, o.bias, o.a, o.b, None, 1.7, 0.0)
        first = first or actual
        assert all(torch.equal(*pair) for pair in zip(actual, first, strict=True)), i
