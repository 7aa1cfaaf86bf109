"""`lorafuse bench`: the gate, the statistics, the interleaving, what is written, and what bad input gets."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from lorafuse.bench import model, peaks, plugins, result, timed
from lorafuse.bench.group import Group
from lorafuse.bench.linear import Linear
from lorafuse.bench.moe import Experts
from lorafuse.bench.problem import wrong
from lorafuse.bench.runner import Runner
from lorafuse.cli import main
from lorafuse.testing import memory, timing
from lorafuse.testing.cases import CASES, GROUPS, Case, find, find_any, find_group

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = Linear("tiny", "float32", 16, 24, 40, 3)
# without the one that compiles
OWN = ["full", "peft", "peft-half", "addmm", "lorafuse"]
HOW = ["--rounds", "3", "--device", "cpu", "--dtype", "float32", "--only", *OWN]
SMALL = ["bench", "linear", "--shape", "24,40", "--m", "16", "--rank", "3", *HOW]

BASELINES = {kind: {one.name: one for one in plugins.load(kind, CPU) if not one.absent} for kind in ("linear", "group")}
EVERY = [
    (kind, one.name, dtype)
    for kind in BASELINES
    for dtype in ("float32", "bfloat16")
    for one in plugins.load(kind, CPU, dtype=dtype)
    if not one.absent
]
PROBLEMS = {"linear": TINY, "group": Group("tiny.qkv", "float32", 16, (24, 8, 8), 40, 3)}


@pytest.fixture(autouse=True)
def _no_peaks(monkeypatch):
    """What the machine reaches is measured in seconds and matters in one test."""
    monkeypatch.setattr(peaks, "matmul_flops", lambda dtype, device: 1e11)
    monkeypatch.setattr(peaks, "copy_bytes", lambda device: 1e10)


@pytest.fixture
def baselines(tmp_path):
    """A folder of baselines that a test may change, and the option for it."""
    folder = tmp_path / "baselines"
    shutil.copytree(plugins.folder(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder, ["--baselines", str(folder)]


def variant(name, problem, dtype="float32"):
    problem = type(problem)(**{**vars(problem), "dtype": dtype})
    one = BASELINES[problem.kind][name]
    given = problem.inputs(CPU)
    return one.variant(problem, given), problem.references(given)[one.trains], problem


@pytest.mark.parametrize(("kind", "name", "dtype"), EVERY)
def test_every_variant_computes_the_formula(kind, name, dtype):
    built, expected, problem = variant(name, PROBLEMS[kind], dtype)
    assert wrong(built, expected, problem.shaped) == ""


def test_the_own_baselines_are_all_there():
    assert {"frozen", "full", "peft", "peft-half", "peft-compiled", "addmm", "lorafuse"} <= BASELINES["linear"].keys()
    assert {"peft-autocast", "addmm-saved", "addmm-saved-fp32", "lorafuse-half"} <= BASELINES["linear"].keys()
    assert [one.name for one in plugins.load("linear", CPU)][:2] == ["frozen", "full"]
    assert "split" in {one.name for one in plugins.load("moe", CPU)}
    # autocast on a float32 base computes in bfloat16, which is other work
    absent = {one.name: one.absent for one in plugins.load("linear", CPU, dtype="float32")}
    assert absent["peft-autocast"] == "needs a base in bfloat16 or float16"


def test_both_sides_are_measured_with_both_adapter_dtypes():
    def dtypes(name):
        built, *_ = variant(name, TINY, "bfloat16")
        return {tensor.dtype for key, tensor in built.leaves.items() if key != "dx"}

    for fp32 in ("peft", "peft-autocast", "addmm-saved-fp32", "lorafuse"):
        assert dtypes(fp32) == {torch.float32}, fp32
    for half in ("peft-half", "addmm", "addmm-saved", "lorafuse-half"):
        assert dtypes(half) == {torch.bfloat16}, half


@pytest.mark.parametrize(("name", "dtype"), [("peft", torch.float32), ("peft-autocast", torch.bfloat16)])
def test_autocast_runs_the_adapters_in_the_bases_dtype(name, dtype):
    built, *_ = variant(name, TINY, "bfloat16")
    a, seen = built.leaves["da"], []
    hook = register_module_forward_hook(
        lambda module, args, out: seen.append(out.dtype) if getattr(module, "weight", None) is a else None
    )
    try:
        built.forward()
    finally:
        hook.remove()
    assert seen == [dtype]


@pytest.mark.parametrize("broken", ["da", "db", "dx", "y"])
def test_gate_sees_a_wrong_result(broken):
    built, expected, problem = variant("lorafuse", TINY)
    if broken == "y":
        call = built.forward
        built.forward = lambda: (call()[0] * 1.01,)
    else:
        backward, index = built.backward, list(built.leaves).index(broken)
        built.backward = lambda y: tuple(g * (0 if i == index else 1) for i, g in enumerate(backward(y)))
    assert broken in wrong(built, expected, problem.shaped)


def test_gate_sees_a_missing_gradient_and_nan():
    built, expected, problem = variant("addmm", TINY)
    del built.leaves["da"]
    assert "does not give da" in wrong(built, expected, problem.shaped)
    built, expected, problem = variant("addmm", TINY)
    call = built.forward
    built.forward = lambda: (call()[0] * math.nan,)
    assert "y is wrong" in wrong(built, expected, problem.shaped)


def test_a_wrong_baseline_of_ours_stops_the_run_without_a_number(baselines, tmp_path, capsys):
    folder, option = baselines
    assert main([*SMALL, *option]) == 0
    source = (folder / "addmm.py").read_text()
    assert "alpha=SCALE" in source
    (folder / "addmm.py").write_text(source.replace("alpha=SCALE", "alpha=1.01 * SCALE"))
    capsys.readouterr()
    arguments = ["bench", "linear", "--case", "smollm2-135m.k", "--case", "smollm2-135m.q", "--m", "8", *HOW]
    assert main([*arguments, *option, "--json", str(tmp_path / "r.json")]) == 1
    printed = capsys.readouterr().out
    assert "addmm: y is wrong" in printed
    assert "LoRA tax" not in printed
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["results"] == []
    # the second case did not run
    assert [name.partition(":")[0] for name in written["not_run"]] == ["smollm2-135m.k"]


def test_files_hold_every_variant_and_the_conditions(tmp_path, capsys):
    assert main([*SMALL, "--m", "8", "16", "--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv")]) == 0
    written = result.read(tmp_path / "r.json")
    assert {"device", "torch", "date", "threads"} <= written["conditions"].keys()
    assert [one["M"] for one in written["results"]] == [8, 16]
    for one in written["results"]:
        assert one["variants"].keys() == {"frozen", *OWN}
        for figure in one["variants"].values():
            assert 0 < figure["total"]["p20"] <= figure["total"]["median"] <= figure["total"]["p80"]
            assert figure["tax_p20"] <= figure["tax_p80"]
            assert figure["of_peak"] == pytest.approx(figure["flops_per_s"] / 1e11)
        assert one["variants"]["frozen"]["tax"] == 0
        assert one["variants"]["full"]["ratio_to_full"] == 1
    printed = capsys.readouterr().out
    assert "LoRA tax" in printed
    assert "geometric means over 2 cases" in printed
    lines = (tmp_path / "r.csv").read_text().splitlines()
    assert any(line.startswith("# torch: ") for line in lines)
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [(row["M"], row["variant"]) for row in rows] == [
        (str(one["M"]), name) for one in written["results"] for name in one["variants"]
    ]
    assert float(rows[0]["total.median"]) == written["results"][0]["variants"]["frozen"]["total"]["median"]


def test_the_conditions_say_how_each_kind_is_timed(tmp_path):
    file, gpu = tmp_path / "r.json", torch.device("cuda")
    assert main([*SMALL, "--json", str(file)]) == 0
    assert result.read(file)["conditions"]["timing"] == timed.timing(CPU) == model.timing(CPU)
    # steps of a model are timed by the wall clock, on what the step before left
    assert timed.timing(gpu) == "interleaved, L2 filled by a read before every call"
    assert model.timing(gpu) == model.timing(CPU)
    how = ["--device", "cpu", "--dtype", "float32", "--only", "lorafuse"]
    assert main(["bench", "memory", "--case", "smollm2-135m.k", "--m", "8", *how, "--json", str(file)]) == 0
    assert "timing" not in result.read(file)["conditions"]


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        (["group", "--shape", "24,8,40", "--m", "16", "--rank", "3"], {"N": [24, 8], "K": 40}),
        (["moe", "--shape", "4,2,32,16", "--m", "8", "--rank", "4"], {"E": 4, "k": 2, "H": 32, "I": 16}),
    ],
)
def test_explicit_shapes(arguments, sizes, tmp_path):
    how = ["--rounds", "2", "--device", "cpu", "--dtype", "float32", "--only", "peft", "lorafuse"]
    assert main(["bench", *arguments, *how, "--json", str(tmp_path / "r.json")]) == 0
    (one,) = result.read(tmp_path / "r.json")["results"]
    assert sizes.items() <= one.items()
    assert one["variants"].keys() == {"frozen", "peft", "lorafuse"}


def test_interruption_keeps_what_is_done(monkeypatch, tmp_path, capsys):
    run = timed.run_case

    def once(problem, *rest):
        if problem.M == 16:
            raise KeyboardInterrupt
        return run(problem, *rest)

    monkeypatch.setattr(timed, "run_case", once)
    assert main([*SMALL, "--m", "8", "16", "--json", str(tmp_path / "r.json")]) == 130
    assert [one["M"] for one in result.read(tmp_path / "r.json")["results"]] == [8]
    assert "what is done is kept" in capsys.readouterr().out


def test_a_case_that_does_not_fit_is_reported_and_the_run_goes_on(tmp_path, capsys):
    shape = ["bench", "linear", "--shape", "64,64", *HOW, "--rank", "3"]
    # 512 TiB of x
    assert main([*shape, "--m", str(2**41), "8", "--json", str(tmp_path / "r.json")]) == 0
    written = result.read(tmp_path / "r.json")
    assert "out of memory" in written["not_run"][f"64x64: M {2**41}, N 64, K 64, R 3, float32"]
    assert [one["M"] for one in written["results"]] == [8]
    assert "out of memory" in capsys.readouterr().out


def test_one_variant_that_does_not_fit_is_reported_and_not_counted(baselines, tmp_path):
    folder, option = baselines
    source = (folder / "full.py").read_text()
    greedy = "def linear(given):\n    torch.empty(2**49)\n"
    (folder / "full.py").write_text("import torch\n" + source.replace("def linear(given):\n", greedy))
    assert main([*SMALL, *option, "--json", str(tmp_path / "r.json")]) == 0
    (one,) = result.read(tmp_path / "r.json")["results"]
    assert "out of memory" in one["failed"]["full"]
    assert "full" not in one["variants"]
    assert "ratio_to_full" not in one["variants"]["lorafuse"]


def test_rounds_are_interleaved_in_changing_order():
    calls = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def once(self):
            calls.append(self.name)
            return 1.0, 2.0

    *_, samples = timing.measure([Fake("a"), Fake("b"), Fake("c")], 8, 2)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 10
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1
    assert samples["a"].total == [3.0] * 8
    # out of time at once, the fewest rounds that are published are left
    *_, samples = timing.measure([Fake("a")], 40, 2, seconds=0)
    assert len(samples["a"].total) == 10
    *_, samples = timing.measure([Fake("a")], 3, 2, seconds=0)
    assert len(samples["a"].total) == 3


def test_a_runner_times_its_own_variant():
    built, *_ = variant("full", TINY)
    ran = []
    forward, backward = built.forward, built.backward
    built.forward = lambda: ran.append("forward") or forward()
    built.backward = lambda y: ran.append("backward") or backward(y)
    seconds = Runner(built, timing.Clock(CPU)).once()
    assert ran == ["forward", "backward"]
    assert all(0 < s < 1 for s in seconds)


def test_percentile_interpolates():
    assert timing.percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert timing.percentile([1.0], 0.8) == 1.0


def test_geometric_means():
    def one(**seconds):
        variants = {n: {"tax": s - 1, "ratio_to_full": s / 2, "total": {"median": s}} for n, s in seconds.items()}
        return {"variants": variants, "absent": {"a": "not installed", "b": "needs a GPU", "c": "needs a GPU"}}

    lines = timed.closing(
        [one(frozen=1.0, full=2.0, peft=2.0, lorafuse=1.1), one(frozen=1.0, full=2.0, peft=8.0, lorafuse=1.1)]
    )
    # the setting of PEFT against which the factor is smallest comes first
    sides = {"frozen": 1.0, "peft": 2.0, "peft-half": 1.5, "peft-autocast": 1.8, "lorafuse": 1.0}
    factors = "1.50 times as fast as peft-half, 1.80 times as fast as peft-autocast, 2.00 times as fast as peft"
    assert f"lorafuse: LoRA tax 0.0%, of full fine-tuning 0.50, {factors}" in timed.closing([one(**sides)] * 2)
    absent = ["not run: a: not installed", "not run: b, c: needs a GPU"]
    assert lines[:3] == [*absent, "geometric means over 2 cases"]
    assert "peft: LoRA tax 300.0%, of full fine-tuning 2.00" in lines
    assert "lorafuse: LoRA tax 10.0%, of full fine-tuning 0.55, 3.64 times as fast as peft" in lines
    assert timed.closing([one(frozen=1.0)]) == absent
    assert timed.closing([]) == []


def test_floors_are_arithmetic():
    problem = Linear("square", "bfloat16", 8192, 4096, 4096, 16)
    floors = problem.floors()
    assert floors["tax"] == pytest.approx(3 * 16 * (4096 + 4096) / (2 * 4096 * 4096))
    assert floors["ratio_to_full"] == pytest.approx(2 / 3 + 16 * (4096 + 4096) / (4096 * 4096))
    experts = Experts("e", "bfloat16", 64, 8, 2, 64, 32, 4, "balanced")
    assert experts.work("nothing")["forward"].flops == 2 * 64 * 2 * 3 * 64 * 32


def test_peak_memory_counts_what_lives_at_once():
    def run():
        first = torch.ones(1 << 20)
        second = first * 2
        del first
        return second + 1

    # and a few scalars
    assert memory.peak_bytes(run, CPU) == pytest.approx(2 * 4 * (1 << 20), abs=256)


def test_memory_between_forward_and_backward():
    held = memory.held_bytes(lambda: torch.ones(1 << 20) * 2, lambda y: y + 1, CPU)
    assert held.between == pytest.approx(4 << 20, abs=256)
    assert held.peak == pytest.approx(8 << 20, abs=256)


def test_memory_of_a_patched_layer_is_xa_and_the_adapter_gradients(tmp_path, capsys):
    m, rank = 256, 16
    file = tmp_path / "r.json"
    arguments = ["bench", "memory", "--case", "smollm2-135m.q", "--m", str(m), "--device", "cpu", "--dtype", "bfloat16"]
    assert main([*arguments, "--only", "lorafuse", "peft", "--json", str(file)]) == 0
    (one,) = result.read(file)["results"]
    peaks_of = {name: figure["peak_bytes"] for name, figure in one["variants"].items()}
    xa, gradients = 2 * m * rank, 4 * rank * (576 + 576)
    # beside xa: dyb, and adapters and gradients in the base's dtype before they are fp32
    assert 0 < peaks_of["lorafuse"] - peaks_of["frozen"] <= 2 * xa + 2 * gradients
    assert peaks_of["peft"] > peaks_of["lorafuse"]
    assert "over frozen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["linear", "--case", "llama-3.1-8b.dwn"], "llama-3.1-8b.down"),
        (["linear", "--shape", "12"], "--shape 12"),
        (["linear", "--m", "8", "0"], "--m 0"),
        (["group", "--shape", "24"], "--shape 24"),
        (["group", "--shape", "24,8,40", "--rank", "9"], "no rank above those"),
        (["moe", "--shape", "4,2,32"], "--shape 4,2,32"),
        (["moe", "--shape", "2,4,32,16"], "cannot have 4 of 2"),
        (["linear", "--shape", "24,40", "--rank", "25"], "no rank above that"),
        (["linear", "--only", "nothing"], "the known ones: frozen, full"),
        (["linear", "--json", "."], "it is a folder"),
        (["group", "--case", "smollm2-135m.q"], "smollm2-135m.qkv"),
        (["memory", "--case", "nothing"], "smollm2-135m.qkv"),
        ([], "name what to measure"),
        (["linear", "--base", "nothing"], "--base nothing: git rev-parse"),
        (["memory", "--base", "HEAD"], "--base compares linear, group, moe"),
    ],
)
def test_bad_input_says_the_value_and_the_fix(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_find_lists_the_known_names():
    assert find("llama-3.1-8b.down") == Case("llama-3.1-8b.down", 4096, 14336)
    with pytest.raises(ValueError, match="smollm2-135m.q"):
        find("nothing")
    assert [layer.N for layer in find_group("llama-3.1-8b.qkv")] == [4096, 1024, 1024]
    # down, the last layer of an MLP, reads what gate and up give
    assert all(len({one.K for one in ls[: 2 if name.endswith(".mlp") else None]}) == 1 for name, ls in GROUPS.items())
    assert [find_any(name) for name in ("square-2048", "smollm2-135m.qkv", "moe-64")] == ["linear", "group", "moe"]
    assert len(CASES) == 29


def test_peaks_are_of_this_machine(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(peaks, "RATES", {})
    monkeypatch.setattr(peaks, "PATIENCE", 0.002)
    assert 1e8 < peaks.matmul_flops(torch.float32, CPU) < 1e15
    assert 1e7 < peaks.copy_bytes(CPU) < 1e13
    assert peaks.RATES.keys() == {(torch.float32, CPU), ("copy", CPU)}


@pytest.mark.parametrize(("half", "message"), [(1e9, "float32"), (1e12, "bfloat16")])
def test_the_usual_dtype_is_the_faster_one(half, message, monkeypatch):
    monkeypatch.setattr(peaks, "matmul_flops", lambda dtype, device: half if dtype == torch.bfloat16 else 1e11)
    assert peaks.usual_dtype(CPU) == message


def test_a_built_package_brings_the_baselines(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    environment = {**os.environ, "LORAFUSE_SKIP_CUDA_BUILD": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    brought = {file.name: file.read_text() for file in (tmp_path / "lorafuse" / "_baselines").glob("*.py")}
    assert brought == {file.name: file.read_text() for file in plugins.folder().glob("*.py")}
    assert "frozen.py" in brought
