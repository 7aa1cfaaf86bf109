"""`lorafuse bench moe`: every variant against the formula, the gate, routings, memory, and what bad input gets."""

import json
import shutil

import pytest
import torch

from lorafuse.bench import moe, peaks, plugins, timed
from lorafuse.bench.moe import Experts
from lorafuse.bench.problem import wrong
from lorafuse.cli import main
from lorafuse.testing.cases import MOE_CASES, MoECase
from lorafuse.testing.memory import peak_bytes

CPU = torch.device("cpu")
BASELINES = {one.name: one for one in plugins.load("moe", CPU, dtype="bfloat16") if not one.absent}
IN_FLOAT32 = {one.name for one in plugins.load("moe", CPU, dtype="float32") if not one.absent}
EVERY = [
    (name, dtype) for name in BASELINES for dtype in ("float32", "bfloat16") if dtype != "float32" or name in IN_FLOAT32
]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(peaks, "matmul_flops", lambda dtype, device: 1e11)
    monkeypatch.setattr(peaks, "copy_bytes", lambda device: 1e10)
    monkeypatch.setitem(MOE_CASES, "tiny", MoECase("tiny", E=6, k=2, H=32, I=16))
    how = ["--rounds", "3", "--device", "cpu", "--dtype", "float32"]
    return ["bench", "moe", "--case", "tiny", "--m", "16", "--rank", "8", *how]


def build(name, problem):
    given = problem.inputs(CPU)
    one = BASELINES[name]
    return one.variant(problem, given), problem.references(given)[one.trains]


def problem(dtype="float32", routing="balanced"):
    return Experts("tiny", dtype, 16, 6, 2, 32, 16, 8, routing)


@pytest.mark.parametrize("routing", moe.ROUTINGS)
@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_every_variant_computes_the_formula(name, routing, dtype):
    given = problem(dtype, routing)
    assert wrong(*build(name, given), given.shaped) == ""


def test_the_own_baselines_are_all_there():
    assert {"frozen", "full", "peft", "peft-half", "split", "lorafuse"} <= BASELINES.keys()
    assert {"frozen-lorafuse", "peft-autocast", "lorafuse-half"} <= BASELINES.keys()
    assert BASELINES.keys() - IN_FLOAT32 == {"peft-autocast"}


COMMON = ["out", "dx", "dweight"]
RESULTS = {
    "lorafuse": [*COMMON, "d_gate_up_a", "d_gate_up_b", "d_down_a", "d_down_b"],
    "full": [*COMMON, "d_gate_up", "d_down"],
}


@pytest.mark.parametrize(("name", "broken"), [(name, broken) for name, actual in RESULTS.items() for broken in actual])
def test_gate_sees_a_wrong_result(name, broken):
    variant, expected = build(name, problem(routing="zipf"))
    assert expected.keys() == set(RESULTS[name])
    if broken == "out":
        call = variant.forward
        variant.forward = lambda: (call()[0] * 1.01,)
    else:
        backward, index = variant.backward, list(variant.leaves).index(broken)
        variant.backward = lambda y: tuple(g * (1.01 if i == index else 1) for i, g in enumerate(backward(y)))
    assert f"{broken} is wrong" in wrong(variant, expected, problem().shaped)


@pytest.mark.parametrize("stack", ["gate_up_proj", "down_proj"])
def test_a_wrong_weight_gradient_of_full_fine_tuning_stops_the_run(stack, tiny, tmp_path, capsys):
    folder = tmp_path / "baselines"
    shutil.copytree(plugins.folder(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = (folder / "full.py").read_text()
    returned = "    return block, "
    assert source.count(returned) == 1
    planted = f"    block.{stack}.register_hook(lambda dw: 1.01 * dw)\n"
    (folder / "full.py").write_text(source.replace(returned, planted + returned))
    assert main([*tiny, "--baselines", str(folder), "--only", "full"]) == 1
    printed = capsys.readouterr().out
    assert f"full: d_{stack.removesuffix('_proj')} is wrong" in printed
    assert "LoRA tax" not in printed


def test_json_holds_every_variant_and_the_routings(tmp_path, capsys, tiny):
    assert main([*tiny, "--routing", "zipf", "one-hot", "--json", str(tmp_path / "r.json")]) == 0
    written = json.loads((tmp_path / "r.json").read_text())
    assert [one["routing"] for one in written["results"]] == ["zipf", "one-hot"]
    for one in written["results"]:
        assert one["variants"].keys() == IN_FLOAT32
        # of the two frozen blocks the faster one
        assert one["floor"].keys() == {"forward", "backward"}
        assert set(one["floor"].values()) <= {"frozen", "frozen-lorafuse"}
        assert (one["E"], one["k"]) == (6, 2)
        for figure in one["variants"].values():
            assert 0 < figure["total"]["p20"] <= figure["total"]["median"] <= figure["total"]["p80"]
    assert "LoRA tax" in capsys.readouterr().out


def test_interrupted_it_keeps_what_is_done(tmp_path, capsys, tiny, monkeypatch):
    """The JSON is whole; the table of the first case was printed."""
    run = timed.run_case

    def once(case, *rest):
        if case.name == "moe-64":
            raise KeyboardInterrupt
        return run(case, *rest)

    monkeypatch.setattr(timed, "run_case", once)
    assert main([*tiny, "--case", "moe-64", "--json", str(tmp_path / "r.json")]) == 130
    written = json.loads((tmp_path / "r.json").read_text())
    assert [result["case"] for result in written["results"]] == ["tiny"]
    assert "interrupted" in capsys.readouterr().out


def test_routings_are_what_they_say():
    tokens, E, k = 200, 8, 2
    balanced, zipf, one_hot = (make(tokens, E, k) for make in moe.ROUTINGS.values())
    assert torch.bincount(balanced.flatten(), minlength=E).unique().tolist() == [tokens * k // E]
    shares = torch.bincount(zipf.flatten(), minlength=E)
    assert shares[0] == shares.max()
    assert shares[0] > 3 * shares[-1]
    assert all(len(set(row)) == k for row in zipf.tolist())
    assert set(one_hot.flatten().tolist()) == {0, 1}


def test_no_temporary_of_a_weights_size():
    """Beyond the frozen block: rank-sized buffers only, where PEFT holds W + ΔW."""
    wide = Experts("wide", "float32", 32, 16, 1, 256, 128, 4, "balanced")
    given = wide.inputs(CPU)
    held = {}
    for name in ("frozen", "lorafuse", "peft"):
        variant, _ = build(name, wide)
        variant.backward(variant.forward())
        held[name] = peak_bytes(lambda v=variant: v.backward(v.forward()), CPU)
    weights = (given.gate_up.numel() + given.down.numel()) * 4
    factors = sum(t.numel() * 4 for n, t in vars(given).items() if n.endswith(("_a", "_b")))
    assert held["peft"] - held["frozen"] > weights
    # the factors in x's order, and their gradients while they are packed
    assert held["lorafuse"] - held["frozen"] < 3 * factors < weights


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--case", "moe-65"], "moe-64"),
        (["--m", "0"], "at least 1"),
        (["--rank", "0"], "at least 1"),
        (["--rank", "769"], "no rank above"),
        (["--json", "."], "it is a folder"),
    ],
)
def test_bad_input(wrong, message, capsys):
    assert main(["bench", "moe", "--dtype", "float32", *wrong]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_routing_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "moe", "--routing", "random"])
    assert "balanced" in capsys.readouterr().err
