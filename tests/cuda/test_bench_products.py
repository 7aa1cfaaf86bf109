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
    assert {"forward, two kernels", "forward, one kernel", "input gradient, adapted"} <= calls.keys()
    for name, (call, key) in calls.items():
        layer.y.fill_(float("nan"))
        layer.dx.fill_(float("nan"))
        assert relative_l2(call(), expected[key]) <= tolerance(torch.bfloat16), name
