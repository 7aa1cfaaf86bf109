"""`lorafuse bench moe`: every variant against the formula, the gate, routings, memory, and what bad input gets."""

import json

import pytest
import torch

from lorafuse.cli import _bench_moe, main
from lorafuse.testing import moe_baselines
from lorafuse.testing.cases import MOE_CASES, MoECase
from lorafuse.testing.memory import peak_bytes

CASE = MoECase("tiny", E=6, k=2, H=32, I=16)
CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(MOE_CASES, "tiny", CASE)
    return ["bench", "moe", "--case", "tiny", "--m", "16", "--rank", "8", "--rounds", "3", "--device", "cpu"]


def references(given):
    return moe_baselines.reference(given), moe_baselines.reference(given, adapted=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", moe_baselines.ROUTINGS)
@pytest.mark.parametrize("name", moe_baselines.VARIANTS)
def test_every_variant_computes_the_formula(name, routing, dtype):
    given = moe_baselines.inputs(CASE, 16, 8, routing, dtype, CPU)
    assert moe_baselines.check(moe_baselines.build(name, given), *references(given)) == ""


@pytest.mark.parametrize("broken", ["out", "dx", "dweight", "d_gate_up_a", "d_gate_up_b", "d_down_a", "d_down_b"])
def test_gate_sees_a_wrong_result(broken):
    given = moe_baselines.inputs(CASE, 16, 8, "zipf", torch.float32, CPU)
    variant = moe_baselines.build("lorafuse", given)
    if broken == "out":
        call = variant.call
        variant.call = lambda x: call(x) * 1.01
    else:
        backward, index = variant.backward, list(variant.wanted).index(broken)
        variant.backward = lambda y: tuple(g * (1.01 if i == index else 1) for i, g in enumerate(backward(y)))
    assert f"{broken} is wrong" in moe_baselines.check(variant, *references(given))


def test_a_wrong_variant_prints_no_number(monkeypatch, capsys, tiny):
    def doubled(given):
        run, wanted = moe_baselines._split(given)
        return (lambda *args: 2 * run(*args)), wanted

    monkeypatch.setitem(moe_baselines.VARIANTS, "split", doubled)
    assert main(tiny) == 1
    printed = capsys.readouterr().out
    assert "split: out is wrong" in printed
    assert "LoRA tax" not in printed


def test_json_holds_every_variant_and_the_conditions(tmp_path, capsys, tiny):
    assert main([*tiny, "--routing", "zipf", "--json", str(tmp_path / "r.json")]) == 0
    written = json.loads((tmp_path / "r.json").read_text())
    (result,) = written["results"]
    assert result["variants"].keys() == moe_baselines.VARIANTS.keys()
    assert (result["routing"], result["E"], result["k"]) == ("zipf", 6, 2)
    for figure in result["variants"].values():
        assert 0 < figure["total"]["p20"] <= figure["total"]["median"] <= figure["total"]["p80"]
    assert "LoRA tax" in capsys.readouterr().out


def test_interrupted_it_keeps_what_is_done(tmp_path, capsys, tiny, monkeypatch):
    """The JSON is whole; the table of the first case was printed."""
    run = _bench_moe.run_case

    def once(console, case, *rest):
        if case.name == "moe-64":
            raise KeyboardInterrupt
        return run(console, case, *rest)

    monkeypatch.setattr(_bench_moe, "run_case", once)
    assert main([*tiny, "--case", "moe-64", "--json", str(tmp_path / "r.json")]) == 130
    written = json.loads((tmp_path / "r.json").read_text())
    assert [result["case"] for result in written["results"]] == ["tiny"]
    assert "interrupted" in capsys.readouterr().out


def test_routings_are_what_they_say():
    tokens, E, k = 200, 8, 2
    balanced, zipf, one_hot = (make(tokens, E, k) for make in moe_baselines.ROUTINGS.values())
    assert torch.bincount(balanced.flatten(), minlength=E).unique().tolist() == [tokens * k // E]
    shares = torch.bincount(zipf.flatten(), minlength=E)
    assert shares[0] == shares.max()
    assert shares[0] > 3 * shares[-1]
    assert all(len(set(row)) == k for row in zipf.tolist())
    assert set(one_hot.flatten().tolist()) == {0, 1}


def test_no_temporary_of_a_weights_size():
    """Beyond the frozen block: rank-sized buffers only, where PEFT holds W + ΔW."""
    case = MoECase("wide", E=16, k=1, H=256, I=128)
    given = moe_baselines.inputs(case, 32, 4, "balanced", torch.float32, CPU)
    peaks = {}
    for name in ("frozen", "lorafuse", "peft"):
        variant = moe_baselines.build(name, given)
        variant.backward(variant.forward())
        peaks[name] = peak_bytes(lambda v=variant: v.backward(v.forward()), CPU)
    weights = (given.gate_up.numel() + given.down.numel()) * 4
    factors = sum(t.numel() * 4 for n, t in vars(given).items() if n.endswith(("_a", "_b")))
    assert peaks["peft"] - peaks["frozen"] > weights
    # the factors in x's order, and their gradients while they are packed
    assert peaks["lorafuse"] - peaks["frozen"] < 3 * factors < weights


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--case", "moe-65"], "moe-64"),
        (["--m", "0"], "at least 1"),
        (["--rank", "0"], "at least 1"),
        (["--json", "."], "it is a folder"),
    ],
)
def test_bad_input(wrong, said, capsys):
    assert main(["bench", "moe", *wrong]) != 0
    assert said in capsys.readouterr().err


def test_an_unknown_routing_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "moe", "--routing", "random"])
    assert "balanced" in capsys.readouterr().err
