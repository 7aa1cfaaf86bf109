"""Figures follow from raw rounds: ratios by round, the fastest frozen as the floor, intervals over processes, noise."""

import copy
import json
import multiprocessing
import random
import statistics

import pytest
import torch

from lorafuse.bench import figures, result, runner
from lorafuse.bench import peaks as device_peaks
from lorafuse.cli import main
from lorafuse.testing import timing

CPU = torch.device("cpu")
TINY = ["bench", "linear", "--shape", "24,40", "--m", "16", "--rank", "3", "--rounds", "12", "--device", "cpu"]
TINY += ["--dtype", "float32", "--only", "full", "peft", "lorafuse"]
WORK = {
    trains: {part: {"flops": 6, "bytes": 3} for part in ("forward", "backward")} for trains in ("nothing", "adapters")
}
PEAKS = {"flops_per_s": 12.0, "bytes_per_s": 6.0}


def layer(**variants):
    """A result by the raw seconds of forward and backward: one list for each process, or one process's own."""
    made = {}
    for name, (forward, backward) in variants.items():
        trains = "nothing" if name.startswith("frozen") else "adapters"
        seconds = {"forward": forward, "backward": backward}
        processes = {part: one if isinstance(one[0], list) else [one] for part, one in seconds.items()}
        made[name.replace("_", "-")] = {"label": name, "trains": trains, "seconds": processes}
    return {"kind": "linear", "case": "one", "work": WORK, "peaks": PEAKS, "variants": made, "failed": {}}


def test_a_tax_is_the_median_of_the_rounds_ratios():
    """A ratio of the two medians, which are of different rounds, would be a tax of 1."""
    own, frozen = [4.0, 2.0, 12.0], [1.0, 2.0, 8.0]
    actual = figures.derive(layer(frozen=(frozen, frozen), own=(own, own)))["variants"]["own"]
    assert actual["tax"] == statistics.median([3.0, 0.0, 0.5]) == 0.5
    assert statistics.median(own) / statistics.median(frozen) - 1 == 1.0
    assert (actual["tax_p20"], actual["tax_p80"]) == pytest.approx((0.2, 2.0))
    assert "tax_low" not in actual


def test_the_floor_is_the_fastest_frozen_of_each_pass():
    slow, fast = [2.0] * 3, [1.0] * 3
    made = figures.derive(layer(frozen=(fast, slow), frozen_lorafuse_cuda=(slow, fast), own=(slow, slow)))
    assert made["floor"] == {"forward": "frozen", "backward": "frozen-lorafuse-cuda"}
    assert made["variants"]["own"]["tax"] == 1.0
    # neither frozen is the floor alone
    assert made["variants"]["frozen"]["tax"] == made["variants"]["frozen-lorafuse-cuda"]["tax"] == 0.5


def test_a_warm_x_has_a_floor_of_its_own():
    given = layer(frozen=([4.0], [4.0]), own=([8.0], [8.0]))
    for name, seconds in (("frozen", 2.0), ("own", 3.0)):
        given["variants"][name]["warm_x"] = {"seconds": {"forward": [[seconds]], "backward": [[seconds]]}}
    own = figures.derive(given)["variants"]["own"]
    assert (own["tax"], own["warm_x"]["tax"]) == (1.0, 0.5)
    assert given["warm_floor"] == {"forward": "frozen", "backward": "frozen"}


def test_rates_are_of_medians():
    one = figures.derive(layer(frozen=([1.0, 2.0, 9.0], [1.0, 1.0, 1.0])))["variants"]["frozen"]
    assert one["forward"]["flops_per_s"] == 3.0
    assert one["flops_per_s"] == pytest.approx(12 / 3)
    assert (one["of_peak"], one["of_copy"], one["flops_per_byte"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3), 2.0)


def test_the_interval_is_over_processes():
    """Rounds of a process agree and processes differ: its width is that between processes, the same at every call."""
    draw = random.Random(1)
    processes = [[center + draw.uniform(-0.001, 0.001) for _ in range(20)] for center in (1.0, 1.1, 1.2, 1.3, 1.4)]
    low, high = figures.bootstrap(processes)
    assert (low, high) == figures.bootstrap(processes)
    assert 1.0 <= low < 1.1 < 1.2 < 1.3 < high <= 1.401
    # two processes have no interval of their own: they say next to nothing of a third
    two = [one[:2] for one in ([[0.5] * 3] * 3, [[1.0, 2.0, 1.5]] * 3)]
    made = figures.derive(layer(frozen=(two[0], two[0]), own=(two[1], two[1])))
    assert "tax_low" not in made["variants"]["own"]
    # of one process twice there is next to nothing between processes
    narrow = figures.bootstrap([processes[2]] * 2)
    assert 1.199 <= narrow[0] <= narrow[1] <= 1.201
    ratio = [[own / 1.0 for own in one] for one in processes]
    ones = [[0.5] * 20] * 5
    half = [[own / 2 for own in one] for one in ratio]
    own = figures.derive(layer(frozen=(ones, ones), own=(half, half)))
    assert own["processes"] == 5
    assert own["rounds"] == 100
    assert figures.interval(own["variants"]["own"]) == pytest.approx((low - 1, high - 1))


@pytest.mark.parametrize(
    ("one", "noise"),
    [
        ({"tax": -0.03, "tax_p20": -0.05, "tax_p80": -0.01}, False),
        ({"tax": -0.03, "tax_p20": -0.05, "tax_p80": 0.02}, True),
        ({"tax": 0.03, "tax_p20": -0.05, "tax_p80": 0.08}, False),
        # the interval over processes is the one that counts
        ({"tax": -0.03, "tax_p20": -0.04, "tax_p80": -0.02, "tax_low": -0.06, "tax_high": 0.01}, True),
        ({"tax": -0.03}, False),
    ],
)
def test_a_negative_tax_that_straddles_zero_is_noise(one, noise):
    assert figures.is_noise(one) == noise
    assert (
        figures.is_noise({key.replace("tax", "tax_over_frozen"): t for key, t in one.items()}, "tax_over_frozen")
        == noise
    )


def test_results_of_several_processes_are_one():
    first, second = layer(frozen=([1.0], [1.0]), own=([2.0], [2.0])), layer(frozen=([1.0], [1.0]), own=([3.0], [3.0]))
    lost = layer(frozen=([1.0], [1.0])) | {"failed": {"own": "tired"}}
    merged = figures.merge([first, second])
    assert merged["variants"]["own"]["seconds"] == {"forward": [[2.0], [3.0]], "backward": [[2.0], [3.0]]}
    assert merged["variants"]["own"]["tax"] == 1.5
    assert first["variants"]["own"]["seconds"]["forward"] == [[2.0]], "the first is left as it was"
    merged = figures.merge([first, lost])
    assert merged["variants"].keys() == {"frozen"}
    assert merged["failed"] == {"own": "tired"}


def model(turns, **variants):
    def one(name, seconds):
        trains = {"frozen": "nothing", "full": "base"}.get(name, "adapters")
        return {"trains": trains, "seconds": [seconds], "model_flops": 8}

    made = {name: one(name, seconds) for name, seconds in variants.items()}
    sizes = {"tokens_per_step": 6, "peak_flops_per_s": 8.0, "turns": turns}
    return figures.derive({"kind": "model", "variants": made, "failed": {}, **sizes})["variants"]


def test_steps_are_compared_by_round_where_they_took_turns():
    steps = {"frozen": [1.0, 2.0, 4.0], "full": [2.0, 4.0, 4.0], "lorafuse": [2.0, 2.0, 8.0]}
    own = model([list(steps)], **steps)["lorafuse"]
    assert (own["tax"], own["ratio_to_full"]) == (1.0, 1.0)
    assert (own["tokens_per_s"], own["mfu"], own["rounds"]) == (3.0, 0.5, 3)
    assert "tax" not in model([list(steps)], **steps)["full"]
    apart = model([["full"], ["frozen", "lorafuse"]], **steps)["lorafuse"]
    assert apart["ratio_to_full"] == 2.0 / 4.0
    assert "ratio_to_full_p20" not in apart
    assert "tax_p20" in apart


def stripped(value):
    """A result with nothing but what was recorded."""
    kept = {name: one for name, one in value.items() if name not in ("floor", "warm_floor", "rounds", "processes")}
    recorded = ("label", "trains", "seconds", "peak_bytes", "between_bytes", "launched")
    kept["variants"] = {
        name: {key: one[key] for key in recorded if key in one}
        | ({"warm_x": {"seconds": one["warm_x"]["seconds"]}} if "warm_x" in one else {})
        for name, one in value["variants"].items()
    }
    return copy.deepcopy(kept)


@pytest.fixture
def peaks(monkeypatch):
    monkeypatch.setattr("lorafuse.bench.peaks.matmul_flops", lambda dtype, device: 1e11)
    monkeypatch.setattr("lorafuse.bench.peaks.copy_bytes", lambda device: 1e10)


def test_every_figure_of_a_file_follows_from_its_raw_rounds(tmp_path, peaks, capsys):
    file = tmp_path / "r.json"
    assert main([*TINY, "--warm-x", "--json", str(file)]) == 0
    (one,) = result.read(file)["results"]
    assert figures.derive(stripped(one)) == one
    raw = one["variants"]["peft"]["seconds"]["forward"]
    assert [len(process) for process in raw] == [12]
    assert one["variants"]["peft"]["forward"]["median"] == statistics.median(raw[0])
    assert one["variants"]["peft"]["warm_x"]["seconds"]["forward"] != raw
    # a process's rounds are one line
    assert any(line.count(",") >= 11 for line in file.read_text().splitlines())
    assert "x warm" in capsys.readouterr().out


def test_several_processes_measure_a_case(tmp_path, capsys, monkeypatch):
    file = tmp_path / "r.json"
    # each a fork of one that has imported torch
    forks = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: forks)
    # a process does not measure again what is known of the device
    for what, rate in ((torch.float32, 1e11), ("copy", 1e10)):
        monkeypatch.setitem(device_peaks.RATES, (what, CPU), rate)
    # without PEFT: importing it took each of the processes longer than all the rest
    without = ["--only", "full", "addmm"]
    assert main([*TINY, *without, "--rounds", "10", "--processes", "3", "--json", str(file)]) == 0
    (one,) = result.read(file)["results"]
    assert (one["processes"], one["rounds"]) == (3, 30)
    assert one["peaks"] == {"flops_per_s": 1e11, "bytes_per_s": 1e10}
    for variant in one["variants"].values():
        assert [len(process) for process in variant["seconds"]["backward"]] == [10, 10, 10]
        assert variant["tax_low"] <= variant["tax_high"]
    assert figures.derive(stripped(one)) == one
    assert json.loads(json.dumps(one)) == one
    assert "95 %" in capsys.readouterr().out


def test_a_warm_call_finds_its_operands_written(monkeypatch):
    """x before forward, dy before backward, with the values that they had."""
    x, dy = torch.ones(2, requires_grad=True), torch.full((2,), 3.0)
    versions = []

    class Variant:
        name, leaves, douts = "one", {"dx": x}, (dy,)

        def forward(self):
            versions.append((x._version, dy._version))
            return (x * 2,)

        def backward(self, outputs):
            versions.append((x._version, dy._version))
            return torch.autograd.grad(outputs, (x,), self.douts)

    timed = runner.Runner(Variant(), timing.Clock(CPU))
    timed.once()
    assert versions == [(0, 0), (0, 0)]
    timed.once(warm=True)
    assert versions[2:] == [(1, 0), (1, 1)]
    assert (x.tolist(), dy.tolist()) == ([1.0, 1.0], [3.0, 3.0])
