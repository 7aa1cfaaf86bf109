"""The model of experts and `lorafuse plan --moe` (T1): bounds no way can beat, order of the ways, clear errors."""

import json
import re

import pytest

from lorafuse import cli
from lorafuse.plan import DEVICES, cost, find
from lorafuse.plan.experts import WAYS, ExpertsProblem

BLOCK = ExpertsProblem(8192, 128, 8, 2048, 768, 16, "bfloat16", "float32")
ASK = ["plan", "--gpu", "H200", "--moe", "qwen3-30b-a3b"]


@pytest.mark.parametrize("gpu", [name for name in DEVICES if find(name).arch >= 80])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("tokens", [1, 512, 8192])
def test_no_way_beats_the_hardware(gpu, backward, tokens):
    device = find(gpu)
    block = ExpertsProblem(tokens, *(getattr(BLOCK, name) for name in ("E", "k", "H", "I", "R")), "bfloat16", "float32")
    flops = 2 * block.S * 3 * block.I * block.H
    weights = block.E * 3 * block.I * block.H * 2
    floor = max(flops / device.sustained_flops, weights / device.sustained_bandwidth)
    seconds = {name: cost.total(way(block, device, backward)) for name, way in WAYS.items()}
    assert all(taken >= floor for taken in seconds.values()), seconds
    assert seconds["split grouped_mm"] > seconds["frozen"]
    assert (seconds["full fine-tuning"] > seconds["frozen"]) == backward


def test_every_number_says_model_and_the_tax_follows(capsys):
    assert cli.main([*ASK, "--backward"]) == 0
    lines = capsys.readouterr().out.splitlines()
    numbers = [line for line in lines if re.search(r"\d us\b|\d%", line)]
    assert len(numbers) > 40
    assert all("(model)" in line for line in numbers)
    for name in WAYS:
        assert any(line.strip().startswith(name) for line in lines), name
    assert cli.main([*ASK, "--backward", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    total = {n: sum(p["model_us"] for d in found["directions"].values() for p in d[n]) for n in WAYS}
    for name, tax in found["tax_model"].items():
        assert tax == pytest.approx(total[name] / total["frozen"] - 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dropout"], "does not hold it"),
        (["--rank", "0"], "--rank is 0"),
        (["--m", "0"], "--m is 0"),
    ],
)
def test_what_cannot_be_is_one_clear_line(flags, message, capsys):
    assert cli.main([*ASK, *flags]) != 0
    assert message in capsys.readouterr().err
