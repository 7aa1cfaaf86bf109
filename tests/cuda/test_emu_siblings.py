"""Layers of one x in one launch each way (csrc/kernels/siblings_sm90.cuh), emulated (T5).

Every gradient by name against fp64; bit for bit in every tiling and under every schedule.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from emu_launches import words_are_zero
from group_reference import Case, check, linears, make, mlp, plain_linears, plain_mlp, results
from test_emu_linear import TILINGS

from lorafuse.plan import override
from lorafuse.testing.numerics import relative_l2, tolerance

pytest_plugins = "emu_fixtures"
pytestmark = pytest.mark.usefixtures("emu")

# columns off the tile and several tiles of one layer, ranks that differ, one without an adapter
PLAIN = Case(N=(72, 40, 264), K=136, R=(13, 0, 40), leading=(70,), dtype=torch.float16)
CASES = {
    "plain": replace(PLAIN, leading=(140,)),
    "fp32 adapters": replace(PLAIN, R=(8, 16, 24), dtype=torch.bfloat16, adapter_dtype=torch.float32, leading=(2, 35)),
    "half adapters": replace(PLAIN, R=(16, 8, 8), bias=(False,) * 3, dtype=torch.bfloat16),
    "two, many ranks": Case(N=(264, 72), K=72, R=(64, 80), p=(0.0,) * 2, bias=(True, False), dtype=torch.float16),
    "four, one row": Case(N=(8, 8, 16, 8), K=16, R=(2, 2, 2, 1), p=(0.0,) * 4, bias=(True,) * 4, leading=(1,)),
    "no adapter": replace(PLAIN, R=(0, 0, 0), leading=(7,)),
}
CASES["four, one row"] = replace(CASES["four, one row"], dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _together():
    with override(force_kernel="cuda siblings"):
        yield


def run(o):
    return linears(o, backend="emu")


def counted(launched):
    return Counter(name for name, _ in launched if not name.endswith("_workspace"))


@pytest.mark.parametrize("name", CASES)
def test_every_gradient(name, launched):
    case = CASES[name]
    check(run, plain_linears, make(case))
    expected = {"siblings_forward": 1, "siblings_dx": 1, "project_x": 1, "reduce_x": 1, "reduce_each": 1}
    assert counted(launched) == Counter({key: n for key, n in expected.items() if any(case.R) or key.startswith("sib")})


@pytest.mark.parametrize(("p", "R"), [((0.3, 0.0, 0.5), (6, 4, 40)), ((0.5, 0.5, 0.0), (80, 8, 0))])
def test_masks(p, R, launched):
    """Every layer's own, in both directions."""
    check(run, plain_linears, make(replace(PLAIN, p=p, R=R, leading=(70,))))
    assert counted(launched)["siblings_forward"] == counted(launched)["siblings_dx"] == 1
    (one,) = (arguments for name, arguments in launched if name == "siblings_dx")
    assert [seed != 0 for seed in one["seed"]].count(True) == sum(map(bool, p))


@pytest.mark.parametrize("used", [(0,), (1,), (2, 0)])
def test_results_without_a_gradient(used, launched):
    """dx sums the layers that have one."""
    check(run, plain_linears, make(replace(PLAIN, leading=(40,))), used=used)
    (one,) = (arguments for name, arguments in launched if name == "siblings_dx")
    assert one["count"] == len(used)
    assert (one["lows"] > 0) == (used != (1,))


def test_adapters_alone(launched):
    """Without dx nothing is left to share but da: layer by layer."""
    case = replace(PLAIN, leading=(40,))
    check(run, plain_linears, make(case), names=("a 0", "b 0", "b 2", "bias 2"))
    assert counted(launched)["siblings_dx"] == 0


def test_more_than_four(launched):
    case = Case(N=(8,) * 5, K=16, R=(2,) * 5, p=(0.0,) * 5, bias=(False,) * 5, leading=(9,), dtype=torch.bfloat16)
    check(run, plain_linears, make(replace(case, N=(8,) * 4, R=(2,) * 4, p=(0.0,) * 4, bias=(False,) * 4)))
    before = counted(launched)["siblings_forward"]
    o = make(replace(case, N=(8,) * 4, R=(2,) * 4, p=(0.0,) * 4, bias=(False,) * 4))
    o.projections.append(o.projections[0])
    run(o)
    assert counted(launched)["siblings_forward"] == before == 1


def test_strided_gradients(launched):
    """dy of a layer that begins off a boundary is copied to where TMA can read it."""
    o = make(replace(PLAIN, leading=(40,))).fresh()
    exact = results(plain_linears, o.fresh(dtype=torch.float64))
    wide = [o.dys[0], *(torch.nn.functional.pad(dy, (1, 6))[:, 1:-6] for dy in o.dys[1:])]
    torch.autograd.backward(run(o), wide)
    for name, leaf in o.leaves().items():
        assert relative_l2(leaf.grad, exact[f"d{name}"]) < tolerance(torch.float16), name


@pytest.mark.parametrize("recompute_up", [False, True])
def test_gated_mlp(recompute_up, launched):
    """Gate and up together, with their activation (test_emu_gated.py); down alone."""
    case = Case(N=(136, 136, 40), K=96, R=(13, 0, 16), leading=(40,), dtype=torch.bfloat16)
    check(lambda o: mlp(o, backend="emu", recompute_up=recompute_up), plain_mlp, make(case, of_mlp=True))
    assert counted(launched)["gated_forward"] == counted(launched)["siblings_dx"] == 1


def test_every_tiling(tiles, launched):
    """No bit depends on it, since each tile sums in the same order."""
    case = replace(PLAIN, N=(40, 264), K=72, R=(13, 8), p=(0.0,) * 2, bias=(True, False), leading=(140,))
    o, first = make(case), None
    for config in TILINGS:
        tiles(config)
        actual = results(run, o)
        first = first or actual
        assert all(torch.equal(tensor, first[name]) for name, tensor in actual.items()), config
    products = [one["tiling"][:3] for name, one in launched if name.startswith("siblings")]
    assert products == [config for config in TILINGS for _ in range(2)]


def test_what_is_refused(emu):
    given = {"type": 0, "count": 2, "M": 1, "K": 64, "N": (8, 8), "x": 64, "stride_x": 64, "w": (64, 64)}
    given |= {"stride_w": (64, 64), "y": (64, 64), "stride_y": (8, 8), "tiling": (128, 4, 1), "workspace": 64}
    for message, change in {
        "workspace is null": {"workspace": 0},
        "5 layers in one launch; there are 1 to 4": {"count": 5},
        "N of 12 is not a positive multiple of 8": {"N": (8, 12)},
        "w is null": {"w": (64,)},
        "stride 60 of w is below its 64 columns": {"stride_w": (64, 60)},
        "xa is null": {"R": (0, 8)},
        "clusters of 3 blocks": {"tiling": (128, 4, 3)},
        "block_n of 64 has no kernel": {"tiling": (64, 4, 1)},
    }.items():
        with pytest.raises(ValueError, match=message):
            emu.siblings_forward(**given | change)
    with pytest.raises(TypeError, match="keyword 'N'"):
        emu.siblings_forward(**given | {"N": (8,) * 5})
    given = {"type": 0, "count": 1, "M": 1, "K": 64, "N": (8,), "dy": (64,), "stride_dy": (8,), "w": (64,)}
    given |= {"stride_w": (64,), "dx": 64, "stride_dx": 64, "tiling": (128, 4, 1), "workspace": 64}
    for message, change in {
        "workspace at .* is not on a 4-byte boundary": {"workspace": 66},
        "0 layers in one launch": {"count": 0},
        "K of 60 is not a positive multiple of 8": {"K": 60},
        "dyb is null": {"lows": 1, "R": (8,)},
        "R of 0 is not a rank": {"lows": 1},
        "2 low-rank products of 1 layers": {"lows": 2},
        "dy is null": {"dy": (0,)},
    }.items():
        with pytest.raises(ValueError, match=message):
            emu.siblings_dx(**given | change)
    names = ("N", "dy", "stride_dy", "w", "stride_w", "R", "dyb", "stride_dyb", "a", "stride_a")
    both = {name: (8 if name in ("N", "stride_dy", "R", "stride_dyb") else 64,) * 2 for name in names}
    with pytest.raises(ValueError, match="low-rank products 0 and 1 have no mask; they are one"):
        emu.siblings_dx(**given | both | {"count": 2, "lows": 2})


def test_many_schedules(emu, tiles, request):
    """No bit depends on the order in which blocks run, or on how many do at a time: late ones leave tiles to others."""
    case = Case(N=(40, 72), K=72, R=(20, 3), p=(0.0,) * 2, bias=(True, False), leading=(130,), dtype=torch.bfloat16)
    o, first, configs = make(case), None, [config for config in TILINGS if config[0] == 128]
    for i in range(max(50, request.config.getoption("--seeds") // 2)):
        config = configs[i % len(configs)]
        tiles(config)
        emu.configure(seed=i, resident=config[2] * (1 + i % 3), multiprocessors=config[2] * (1 + i % 4))
        actual = results(run, o)
        first = first or actual
        assert all(torch.equal(tensor, first[name]) for name, tensor in actual.items()), i
        assert words_are_zero()
