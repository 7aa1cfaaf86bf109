"""dx, dyb, da and db in one launch (csrc/kernels/one_launch_sm90.cuh), emulated (T5).

Against fp64 in every size, and bit for bit under every schedule; what it reads of adapters and what it leaves behind.
"""

import itertools

import pytest
import torch
from emu_launches import words_are_zero
from test_emu_linear import ALIGNED_NK, DTYPES, TILINGS, backwards, check

from lorafuse.plan import clear_cache, configs_cuda, override
from lorafuse.testing.check_linear import LinearCase, make_operands
from lorafuse.testing.numerics import relative_l2, tolerance

pytest_plugins = "emu_fixtures"
pytestmark = pytest.mark.usefixtures("emu")

ALONE = [config for config in TILINGS if config[2] == 1]
HELPERS = {"fused_backward_workspace", "fused_backward_partials"}


@pytest.fixture(autouse=True)
def _one_launch():
    with override(force_kernel="cuda fused_backward"):
        yield


@pytest.fixture(params=[128, 256, 2048])
def parts(request, monkeypatch):
    """Rows of a part of da and db; how many there are of M rows."""
    monkeypatch.setattr(configs_cuda, "SUM_ROWS", request.param)
    clear_cache()
    yield lambda M: -(-M // request.param)
    clear_cache()


def launches(launched):
    return [arguments for name, arguments in launched if name == "fused_backward"]


@pytest.mark.parametrize(("M", "R"), [(1, 1), (1, 64), (63, 8), (128, 16), (257, 13), (257, 33)])
def test_sizes_and_ranks(M, R, launched):
    N, K = ALIGNED_NK[(M + R) % len(ALIGNED_NK)]
    adapters = torch.float32 if M % 2 else None
    check(LinearCase(leading=(M,), N=N, K=K, R=R, dtype=DTYPES[R % 2], adapter_dtype=adapters, bias=False))
    # of a backward nothing else is launched
    forward = {"project_x", "linear"}
    assert {name for name, _ in launched} == {*forward, *HELPERS, "fused_backward"}
    assert not any(arguments.get("transposed") for name, arguments in launched if name == "linear")


@pytest.mark.parametrize("config", ALONE)
def test_parts_of_the_rows(config, parts, tiles, launched):
    """da and db in one part, stored as it is, and in several, which the last one adds."""
    tiles(config)
    check(LinearCase(leading=(2, 175), N=264, K=520, R=24, dtype=torch.bfloat16, bias=False, scale=-0.5))
    assert {-(-350 // one["sum_rows"]) for one in launches(launched)} == {parts(350)}
    assert {one["tiling"][:3] for one in launches(launched)} == {config}


def test_adapters_that_need_no_rounding(operator, launched):
    """a in x's dtype is read where it is; b is transposed in any case."""
    o = make_operands(LinearCase(leading=(70,), N=72, K=64, R=8, dtype=torch.float16))
    _, xa = operator.forward(o.x, o.w, None, o.a, o.b, None, 1.0, 0.0)
    backwards(operator, o, xa, None, True, True, True, False)
    (one,) = launches(launched)
    assert one["rounded_a"] is None
    assert one["a"] == o.a.data_ptr()
    assert one["rounded_b"]["transposed"]


def test_gradients_are_in_the_adapters_dtype(operator):
    """Before autograd casts them: what was rounded to x's dtype would stay so."""
    o = make_operands(LinearCase(leading=(70,), N=72, K=64, R=8, dtype=torch.bfloat16, adapter_dtype=torch.float32))
    _, xa = operator.forward(o.x, o.w, None, o.a, o.b, None, 1.0, 0.0)
    _, da, db, _ = backwards(operator, o, xa, None, True, True, True, False)
    assert (da.dtype, db.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("needs", [n for n in itertools.product([False, True], repeat=4) if any(n)])
def test_only_what_is_needed_is_computed(needs, operator, launched):
    o = make_operands(LinearCase(leading=(70,), K=64, dtype=torch.float16))
    with override(force_kernel="cuda two_kernel"):
        _, xa = operator.forward(o.x, o.w, o.bias, o.a, o.b, None, 1.7, 0.0)
        everything = operator.backward(o.dy, o.x, xa, o.w, o.a, o.b, None, 1.7, 0.0, True, True, True, True)
    x, xa = o.x if needs[1] else None, xa if needs[2] else None
    launched.clear()
    actual = operator.backward(o.dy, x, xa, o.w, o.a, o.b, None, 1.7, 0.0, *needs)
    assert bool(launches(launched)) == (needs[0] and (needs[1] or needs[2]) and not needs[3])
    for need, one, other in zip(needs, actual, everything, strict=True):
        assert (one is not None) == need
        assert one is None or relative_l2(one, other) < tolerance(torch.float16)


def test_where_it_cannot_run(launched):
    """Many ranks, or a mask: as planned without it."""
    for change in ({"R": 65}, {"dropout_p": 0.2}):
        given = {"leading": (40,), "N": 72, "K": 64, "R": 8, "dtype": torch.float16, "bias": False}
        check(LinearCase(**given | change))
    assert not launches(launched)


def test_what_is_refused(emu):
    given = {"type": 0, "M": 1, "N": 64, "K": 8, "R": 8, "stride_dy": 64, "stride_w": 8, "stride_a": 8, "stride_b": 64}
    given |= dict.fromkeys(("dy", "w", "a", "b", "dyb", "dx", "workspace"), 64) | {"stride_dyb": 8, "stride_dx": 8}
    for message, change in {
        "R of 72: one launch computes a backward of 1 to 64 ranks": {"R": 72, "stride_dyb": 72},
        "clusters of 2 blocks in one launch for backward; they have 1": {},
        "sum_rows of 100 is not a multiple of 128": {"sum_rows": 100},
        "x is null": {"da": 64},
        "stride 12 of xa is not a multiple of 8": {"db": 64, "xa": 64, "stride_xa": 12},
        "partials is null": {"M": 300, "sum_rows": 128, "db": 64, "xa": 64, "stride_xa": 8},
        "workspace is null": {"workspace": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            emu.fused_backward(**given | change)


def test_many_schedules(emu, operator, parts, tiles, request):
    """The workspace is left zero, and no bit depends on who computes what, or in which order."""
    o = make_operands(LinearCase(leading=(300,), N=136, K=264, R=24, dtype=torch.bfloat16))
    with override(force_kernel="cuda two_kernel"):
        _, xa = operator.forward(o.x, o.w, None, o.a, o.b, None, 1.7, 0.0)
    first = None
    for i in range(max(8, request.config.getoption("--seeds") // 2)):
        emu.configure(seed=i, resident=1 + i % 4, multiprocessors=1 + i % 5)
        tiles(ALONE[i % len(ALONE)])
        actual = backwards(operator, o, xa, None, True, True, True, False)[:3]
        first = first or actual
        assert all(torch.equal(*pair) for pair in zip(actual, first, strict=True)), i
    assert words_are_zero()
