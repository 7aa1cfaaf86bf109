"""Frozen, PEFT and lorafuse on the cases that `lorafuse bench --base REF` compares, for pytest-benchmark's history.

`make bench ARGS="--benchmark-autosave"` keeps a run, `--benchmark-compare` shows it beside the present one; between two
commits `lorafuse bench --base REF` is surer, since both run in turns.
"""

import argparse

import pytest
import torch

from lorafuse.bench import compare, plugins
from lorafuse.bench.problem import wrong
from lorafuse.cli import bench

NAMES = ("frozen", "peft", "lorafuse")


def usual_problems():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    for argv in compare.USUAL:
        cases, device = bench.prepared(parser.parse_args([*argv]))
        yield from ((problem, device) for problem in cases)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("problem", "device"), [pytest.param(*one, id=one[0].name) for one in usual_problems()])
def test_forward_and_backward(benchmark, problem, device, name):
    benchmark.group = problem.title
    one = next(one for one in plugins.load(problem.kind, device) if one.name == name)
    given = problem.inputs(device)
    variant = one.variant(problem, given)
    assert wrong(variant, problem.references(given)[one.trains], problem.shaped) == ""

    def step():
        variant.backward(variant.forward())
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.pedantic(step, rounds=20, warmup_rounds=2)
