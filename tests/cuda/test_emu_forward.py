"""y and xa in one launch (csrc/kernels/one_launch_sm90.cuh), emulated (T5).

Against fp64 in every size, and bit for bit under every schedule; what it reads of adapters and what it leaves behind.
"""

import pytest
import torch
from emu_launches import words_are_zero
from test_emu_linear import ALIGNED_NK, DTYPES, TILINGS, check

from lorafuse.plan import override
from lorafuse.testing.check_linear import LinearCase, make_operands
from lorafuse.testing.numerics import relative_l2, tolerance

pytest_plugins = "emu_fixtures"
pytestmark = pytest.mark.usefixtures("emu")

ALONE = [config for config in TILINGS if config[2] == 1]


@pytest.fixture(autouse=True)
def _one_launch():
    with override(force_kernel="cuda fused_forward"):
        yield


def launches(launched):
    return [arguments for name, arguments in launched if name == "fused_forward"]


@pytest.mark.parametrize(("M", "R"), [(1, 1), (1, 64), (63, 8), (128, 16), (257, 13), (257, 33)])
def test_sizes_and_ranks(M, R, operator, launched):
    N, K = ALIGNED_NK[(M + R) % len(ALIGNED_NK)]
    adapters = torch.float32 if M % 2 else None
    o = make_operands(LinearCase(leading=(M,), N=N, K=K, R=R, dtype=DTYPES[R % 2], adapter_dtype=adapters))
    y, xa = operator.forward(o.x, o.w, o.bias, o.a, o.b, None, 1.7, 0.0)
    assert {name for name, _ in launched} == {"fused_forward_workspace", "fused_forward"}
    x, w, a, b = (t.double() for t in (o.x, o.w, o.a, o.b))
    assert relative_l2(xa, x @ a.T) < tolerance(xa.dtype)
    assert relative_l2(y, x @ w.T + o.bias.double() + 1.7 * (x @ a.T) @ b.T) < tolerance(y.dtype)


@pytest.mark.parametrize("config", ALONE)
def test_layers_against_fp64(config, tiles, launched):
    tiles(config)
    check(LinearCase(leading=(2, 175), N=264, K=520, R=24, dtype=torch.bfloat16, scale=-0.5))
    assert {one["tiling"][:3] for one in launches(launched)} == {config}


def test_adapters_that_need_no_rounding(operator, launched):
    """a in x's dtype is read where it is, and b where its scale is 1."""
    o = make_operands(LinearCase(leading=(70,), N=72, K=64, R=8, dtype=torch.float16))
    operator.forward(o.x, o.w, None, o.a, o.b, None, 1.0, 0.0)
    (one,) = launches(launched)
    assert (one["rounded_a"], one["rounded_b"]) == (None, None)
    assert (one["a"], one["b"]) == (o.a.data_ptr(), o.b.data_ptr())


def test_where_it_cannot_run(launched):
    """Many ranks, or a mask: as planned without it."""
    for change in ({"R": 65}, {"dropout_p": 0.2}):
        check(LinearCase(**{"leading": (40,), "N": 72, "K": 64, "R": 8, "dtype": torch.float16, **change}))
    assert not launches(launched)


def test_what_is_refused(emu):
    given = {"type": 0, "M": 1, "N": 64, "K": 8, "R": 8, "stride_x": 8, "stride_w": 8, "stride_a": 8, "stride_b": 8}
    given |= dict.fromkeys(("x", "w", "a", "b", "xa", "y", "workspace"), 64) | {"stride_xa": 8, "stride_y": 64}
    for message, change in {
        "R of 72: one launch computes a forward of 1 to 64 ranks": {"R": 72, "stride_xa": 72, "stride_b": 72},
        "clusters of 2 blocks in one launch for forward; they have 1": {},
        "bias at .* is not on a 4-byte boundary": {"bias": 66},
        "stride 12 of xa is not a multiple of 8": {"stride_xa": 12},
        "N of 60 is not a positive multiple of 8": {"N": 60},
        "workspace is null": {"workspace": 0, "tiling": (256, 3, 1, 8, 0, 128)},
    }.items():
        with pytest.raises(ValueError, match=message):
            emu.fused_forward(**given | change)


def test_many_schedules(emu, operator, tiles, request):
    """The workspace is left zero, and no bit depends on who computes what, or in which order; nor on the tiles."""
    o = make_operands(LinearCase(leading=(200,), N=264, K=72, R=24, dtype=torch.bfloat16))
    first = None
    for i in range(max(50, request.config.getoption("--seeds"))):
        emu.configure(seed=i, resident=1 + i % 4, multiprocessors=1 + i % 5)
        tiles(ALONE[i % len(ALONE)])
        actual = operator.forward(o.x, o.w, o.bias, o.a, o.b, None, 1.7, 0.0)
        first = first or actual
        assert all(torch.equal(*pair) for pair in zip(actual, first, strict=True)), i
    assert words_are_zero()
