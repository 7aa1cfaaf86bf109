"""xa computed by the tiles of the first columns of y (csrc/kernels/xa_tiles_sm90.cuh), emulated (T5).

Against fp64 in every size, and bit for bit under every schedule, as a launch with items of xa computes it.
"""

import pytest
import torch
from emu_launches import words_are_zero
from test_emu_linear import ALIGNED_NK, DTYPES, TILINGS, check

from lorafuse.plan import override
from lorafuse.testing.check_linear import LinearCase, make_operands

pytest_plugins = "emu_fixtures"
pytestmark = pytest.mark.usefixtures("emu")

ALONE = [config for config in TILINGS if config[2] == 1]


@pytest.fixture(autouse=True)
def _xa_in_tiles():
    with override(force_kernel="cuda xa_in_tiles"):
        yield


def forward(operator, o):
    return operator.forward(o.x, o.w, o.bias, o.a, o.b, None, 1.7, 0.0)


def products(launched):
    return [arguments for name, arguments in launched if name == "linear" and not arguments.get("transposed")]


@pytest.mark.parametrize(("M", "R"), [(1, 1), (1, 32), (63, 8), (128, 16), (257, 13), (257, 32)])
def test_sizes_and_ranks(M, R, launched):
    N, K = ALIGNED_NK[(M + R) % len(ALIGNED_NK)]
    check(LinearCase(leading=(M,), N=N, K=K, R=R, dtype=DTYPES[R % 2], bias=R % 3 == 0))
    assert all("a" in arguments for arguments in products(launched))
    assert "project_x" not in {name for name, _ in launched}


@pytest.mark.parametrize("config", ALONE)
def test_tilings(config, tiles, launched):
    tiles(config)
    check(LinearCase(leading=(300,), N=520, K=200, R=24, dtype=torch.bfloat16))
    assert {("a" in given, given["tiling"][:3]) for given in products(launched)} == {(True, config)}


def test_more_ranks_than_registers_hold_are_refused(emu):
    given = {
        "type": 0,
        "M": 1,
        "N": 8,
        "K": 64,
        "R": 40,
        "stride_x": 64,
        "stride_w": 64,
        "stride_xa": 40,
        "stride_b": 40,
    }
    given |= dict.fromkeys(("x", "w", "xa", "b", "y", "a", "workspace"), 64) | {"stride_y": 8, "stride_a": 64}
    with pytest.raises(ValueError, match="R of 40: one launch computes xa of 1 to 32 ranks in its tiles"):
        emu.linear(**given)
    with pytest.raises(ValueError, match="clusters of 2 blocks in a launch whose tiles compute xa; they have 1"):
        emu.linear(**given | {"R": 8, "stride_xa": 8, "stride_b": 8})


def test_many_schedules(emu, operator, tiles, request):
    """Flags and tickets are left zero, and no bit depends on who computes a tile, or where xa was computed."""
    o = make_operands(LinearCase(leading=(200,), N=264, K=136, R=24, dtype=torch.bfloat16))
    tiles(*ALONE)
    with override(force_kernel="cuda fused_forward"):
        expected = forward(operator, o)
    for i in range(max(50, request.config.getoption("--seeds") // 2)):
        emu.configure(seed=i, resident=1 + i % 4, multiprocessors=1 + i % 5)
        tiles(ALONE[i % len(ALONE)])
        assert all(torch.equal(*pair) for pair in zip(forward(operator, o), expected, strict=True)), i
    assert words_are_zero()
