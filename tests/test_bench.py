"""`lorafuse bench`: the gate, the statistics, the interleaving, and what bad input gets."""

import json

import pytest
import torch

from lorafuse.cli import main
from lorafuse.testing import baselines, memory, timing
from lorafuse.testing.cases import Case, find

CASE = Case("tiny", 24, 40)
SMALL = ["bench", "linear", "--shape", "24,40", "--m", "16", "--rank", "3", "--rounds", "3", "--device", "cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", baselines.VARIANTS)
def test_every_variant_computes_the_formula(name, dtype):
    given = baselines.inputs(CASE, 16, 3, dtype, torch.device("cpu"))
    assert baselines.check(baselines.build(name, given), baselines.reference(given)) == ""


@pytest.mark.parametrize("broken", ["da", "db", "dx", "y"])
def test_gate_sees_a_wrong_result(broken):
    given = baselines.inputs(CASE, 16, 3, torch.float32, torch.device("cpu"))
    variant = baselines.build("lorafuse", given)
    if broken == "y":
        call = variant.call
        variant.call = lambda x: call(x) * 1.01
    else:
        backward, index = variant.backward, list(variant.wanted).index(broken)
        variant.backward = lambda y: tuple(g * (0 if i == index else 1) for i, g in enumerate(backward(y)))
    assert broken in baselines.check(variant, baselines.reference(given))


def test_a_wrong_variant_prints_no_number(monkeypatch, capsys):
    frozen = baselines.VARIANTS["frozen"]
    monkeypatch.setitem(baselines.VARIANTS, "addmm", frozen)
    assert main(SMALL) == 0
    doubled = lambda given: ((lambda x: 2 * frozen(given)[0](x)), {})  # noqa: E731
    monkeypatch.setitem(baselines.VARIANTS, "addmm", doubled)
    capsys.readouterr()
    assert main(SMALL) == 1
    printed = capsys.readouterr().out
    assert "addmm: y is wrong" in printed
    assert "LoRA tax" not in printed


def test_json_holds_every_variant_and_the_conditions(tmp_path, capsys):
    assert main([*SMALL, "--json", str(tmp_path / "r.json")]) == 0
    written = json.loads((tmp_path / "r.json").read_text())
    assert {"device", "torch", "date", "threads"} <= written["conditions"].keys()
    (result,) = written["results"]
    assert result["variants"].keys() == baselines.VARIANTS.keys()
    for figure in result["variants"].values():
        assert 0 < figure["total"]["p20"] <= figure["total"]["median"] <= figure["total"]["p80"]
    assert result["variants"]["frozen"]["tax"] == 0
    assert "LoRA tax" in capsys.readouterr().out


def test_interruption_keeps_what_is_done(monkeypatch, tmp_path, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "measure", interrupted)
    assert main([*SMALL, "--json", str(tmp_path / "r.json")]) == 130
    assert json.loads((tmp_path / "r.json").read_text())["results"] == []


def test_rounds_are_interleaved_in_changing_order():
    calls = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def forward(self):
            calls.append(self.name)
            return torch.zeros(1)

        def backward(self, y):
            return ()

    *_, samples = timing.measure([Fake("a"), Fake("b"), Fake("c")], 8, 2, torch.device("cpu"))
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 10
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1
    assert len(samples["a"].total) == 8


def test_percentile_interpolates():
    assert timing.percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert timing.percentile([1.0], 0.8) == 1.0


def test_peak_memory_counts_what_lives_at_once():
    def run():
        first = torch.ones(1 << 20)
        second = first * 2
        del first
        return second + 1

    # and a few scalars
    assert memory.peak_bytes(run, torch.device("cpu")) == pytest.approx(2 * 4 * (1 << 20), abs=256)


def test_memory_of_a_patched_layer_is_xa_and_the_adapter_gradients():
    case, m, rank = Case("square", 512, 512), 256, 16
    given = baselines.inputs(case, m, rank, torch.bfloat16, torch.device("cpu"))

    def peak(name):
        variant = baselines.build(name, given)
        return memory.peak_bytes(lambda: variant.backward(variant.forward()), torch.device("cpu"))

    xa, gradients = 2 * m * rank, 4 * rank * (512 + 512)
    # beside xa: dyb, and adapters and gradients in the base's dtype before they are fp32
    assert peak("lorafuse") - peak("frozen") <= 2 * xa + 2 * gradients


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--case", "llama-3.1-8b.dwn"], "llama-3.1-8b.down"),
        (["--shape", "12"], "--shape 12"),
        (["--m", "0"], "--m 0"),
    ],
)
def test_bad_input_says_the_value_and_the_fix(arguments, said, capsys):
    assert main(["bench", "linear", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_find_lists_the_known_names():
    assert find("llama-3.1-8b.down") == Case("llama-3.1-8b.down", 4096, 14336)
    with pytest.raises(ValueError, match="smollm2-135m.q"):
        find("nothing")
