"""The frozen layer of `lorafuse bench` by the CUDA kernels at rank 0, and the steps of bench/hopper.py, emulated."""

import sys
from pathlib import Path

import pytest
import torch

from lorafuse.bench import linear, plugins
from lorafuse.bench.problem import Variant, wrong
from lorafuse.plan import find
from lorafuse.testing.numerics import relative_l2, tolerance

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import hopper  # noqa: E402
import probes  # noqa: E402

pytest_plugins = "emu_fixtures"
CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes", [(130, 264, 72), (7, 96, 64)])
def test_the_frozen_layer_by_our_own_product(emu, sizes):
    problem = linear.Linear("tiny", "bfloat16", *sizes, 16)
    given = problem.inputs(CPU)
    (one,) = [b for b in plugins.load("linear", CPU) if b.name == "frozen-lorafuse-cuda"]
    x = given.x.detach().requires_grad_()
    product = one.module.CudaProduct
    call = lambda: (product.apply(x, given.w, emu, find("H200")),)  # noqa: E731
    variant = Variant("frozen", call, ("y",), (given.dy,), {"dx": x})
    assert one.trains == "nothing"
    assert wrong(variant, problem.references(given)["nothing"], problem.shaped) == ""


def test_every_step_of_the_kernels_is_right(emu):
    layer = hopper.Layer(emu, 256, 256, 128, 16, device=CPU)
    expected = layer.references()
    calls = layer.calls()
    assert {"forward, two kernels", "input gradient, adapted"} <= calls.keys()
    for name, (call, key) in calls.items():
        layer.y.fill_(float("nan"))
        layer.dx.fill_(float("nan"))
        assert relative_l2(call(), expected[key]) <= tolerance(torch.bfloat16), name


SMALL = probes.Sizes(layer=(130, 264, 192), sums=(1, 2), turns=5, experts=((256, 2, 264, 136), (96, 3, 128, 64)), sms=4)


@pytest.mark.parametrize("name", probes.PROBES)
def test_every_probe_is_right(emu, name):
    for launch, call in probes.calls(emu, name, SMALL, CPU).items():
        assert call.error() == "", launch


def test_a_wrong_probe_has_no_numbers(emu):
    calls = probes.calls(emu, "columns", SMALL, CPU)
    y, right = calls["bare"].expected[0]
    assert "is wrong by" in probes.Call(calls["bare"].run, ((y, right + 1),)).error()
    words, ends = probes.calls(emu, "flags", SMALL, CPU)["turns"].expected[0]
    assert "not [5, 5, 9]" in probes.Call(lambda: None, ((words, ends - ends.new_tensor([0, 0, 1])),)).error()


def test_probes_say_what_they_are_for(emu, monkeypatch, capsys):
    seconds = {"bare": 2e-4, "16 more": 2.2e-4, "tiles alone": 1e-4, "1 sum": 4e-4, "2 sum": 2e-4, "zeroed": 1e-6}
    monkeypatch.setattr(
        probes, "measure_calls", lambda calls, *_: {name: [seconds.get(name, 11e-6)] * 3 for name in calls}
    )
    written = []
    assert hopper.run_probes(emu, SMALL, 3, CPU, lambda results: written.append(len(results))) == 0
    assert written == [1, 2, 3, 4, 5, 6]
    lines = capsys.readouterr().out.splitlines()
    figures = {line.split(maxsplit=1)[1].rsplit(maxsplit=1)[0]: float(line.split()[-1]) for line in lines}
    assert figures["16 more columns, share of a tile"] == pytest.approx(0.1)
    assert figures["1 SMs sum, times the tiles alone"] == 4
    assert figures["a flag, us"] == pytest.approx(1)
    assert figures["2 experts, N 264, K 136, of cuBLAS dense"] == pytest.approx(256 * 136 / (130 * 192), abs=1e-3)
    assert figures["2 experts, I 128, H 136, dyb, then db, us"] == pytest.approx(11)
    rate = 2 * 96 * 128 * 64 / 11e-6 / 1e12
    assert figures["3 experts, N 128, K 64, through the order, TFLOP/s"] == pytest.approx(rate, abs=1e-3)
