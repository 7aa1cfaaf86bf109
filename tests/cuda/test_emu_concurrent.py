"""da and db summed in dx's launch (csrc/kernels/adapter_grads_sm90.cuh), emulated (T5): against fp64, any schedule."""

from dataclasses import replace

import pytest
import torch
from test_emu_linear import ALIGNED_NK, DTYPES, TILINGS, backwards, check

from lorafuse.plan import clear_cache, configs_cuda, override
from lorafuse.testing.cases import UGLY_R
from lorafuse.testing.check_linear import LinearCase, make_operands

pytest_plugins = "emu_fixtures"
pytestmark = pytest.mark.usefixtures("emu")


@pytest.fixture(params=configs_cuda.CONCURRENT, ids=lambda one: one[0])
def sums(request, monkeypatch):
    """Plans that sum in dx's launch after this pass; what they sum."""
    monkeypatch.setattr(configs_cuda, "CONCURRENT", (request.param,))
    clear_cache()
    with override(force_kernel="cuda concurrent_backward"):
        yield request.param[1]
    clear_cache()


@pytest.mark.parametrize("R", [r for r in UGLY_R if r <= 64])
@pytest.mark.parametrize("M", [1, 63, 128, 257])
def test_da_and_db_concurrent_with_dx(M, R, sums, launched):
    N, K = ALIGNED_NK[(M + R) % len(ALIGNED_NK)]
    adapters = torch.float32 if M % 2 else DTYPES[R % 2]
    check(LinearCase(leading=(M,), N=N, K=K, R=R, dtype=DTYPES[R % 2], adapter_dtype=adapters, bias=False))
    names = {name for name, _ in launched}
    assert "reduce_x" not in names
    assert ("reduce_dy" in names) == ("db" not in sums)
    products = [arguments for name, arguments in launched if name == "linear" and arguments["transposed"]]
    assert products
    assert all(dx["sum_blocks"] and all((name in dx) == (name in sums) for name in ("da", "db")) for dx in products)


@pytest.mark.parametrize("config", [config for config in TILINGS if config[2] == 1])
@pytest.mark.parametrize("blocks", [1, 2, 3, 50])
def test_any_number_of_blocks_concurrent_with_dx(blocks, config, sums, tiles, launched, monkeypatch):
    """More and fewer than there are columns to sum, and than there are multiprocessors."""
    monkeypatch.setattr(configs_cuda, "sum_blocks", lambda problem, device: [blocks])
    tiles(config)
    check(LinearCase(leading=(2, 150), N=264, K=520, R=24, dtype=torch.bfloat16, bias="db" not in sums, scale=-0.5))
    products = [arguments for name, arguments in launched if name == "linear" and arguments["transposed"]]
    assert {(dx["sum_blocks"], dx["tiling"][:3]) for dx in products} == {(blocks, config)}


def test_where_da_and_db_cannot_be_concurrent_with_dx(sums, launched):
    """Many ranks, or a mask: they run as they did."""
    plain = LinearCase(leading=(40,), N=72, K=64, R=8, dtype=torch.float16, bias=False)
    for change in ({"R": 65}, {"dropout_p": 0.2}):
        check(replace(plain, **change))
    assert all(not arguments.get("sum_blocks") for _, arguments in launched)


def test_many_schedules_concurrent_with_dx(emu, operator, sums, tiles, launched, request):
    o = make_operands(LinearCase(leading=(200,), N=136, K=264, R=24, dtype=torch.bfloat16))
    _, xa = operator.forward(o.x, o.w, None, o.a, o.b, None, 1.7, 0.0)
    alone = [config for config in TILINGS if config[2] == 1]
    first = None
    for i in range(max(50, request.config.getoption("--seeds") // 2)):
        emu.configure(seed=i, resident=1 + i % 4, multiprocessors=4)
        tiles(alone[i % len(alone)])
        actual = backwards(operator, o, xa, None, True, True, True, False)
        first = first or actual
        assert all(torch.equal(*pair) for pair in zip(actual[:3], first[:3], strict=True)), i
    products = [arguments for name, arguments in launched if name == "linear" and arguments["transposed"]]
    assert all(arguments["sum_blocks"] for arguments in products)
