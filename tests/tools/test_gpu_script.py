"""`make gpu`: its steps are commands that exist, checks before times, and tests that are there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import gpu  # noqa: E402

from lorafuse import cli  # noqa: E402

pytestmark = pytest.mark.no_poison
STEPS = gpu.steps(Path("out"))
GRID = gpu.grid(Path("out"), [])


def named(part):
    return [step for step in STEPS if part in step.command]


def test_every_step_runs_once_in_its_order():
    groups = gpu.grouped(STEPS)
    assert [step for group in groups for step in group] == STEPS
    assert len({step.name for step in STEPS}) == len(STEPS)
    for group in groups:
        assert len({step.stage for step in group}) == 1
        assert len(group) == 1 or group[0].stage
    # what is timed runs alone, and within four minutes of checks
    assert all(step.stage == 0 for step in named("bench"))
    assert sum(max(step.seconds for step in group) for group in groups[:2]) <= 240


def test_there_are_tests_to_run():
    requested = {}
    for step in named("pytest"):
        options = step.command[step.command.index("pytest") + 1 :]
        if "-n" in options:
            del options[options.index("-n") : options.index("-n") + 2]
        requested[step.name] = [*options, "--collect-only"]
    # in one process, since each imports torch
    script = f"import pytest; print({{name: int(pytest.main(options)) for name, options in {requested!r}.items()}})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == repr(dict.fromkeys(requested, 0)), done.stdout[-3000:]


@pytest.mark.parametrize("step", [*named("bench"), *GRID], ids=lambda s: s.name)
def test_benchmarks_take_their_options(step, monkeypatch):
    """As far as the run itself, which needs the GPU."""
    seen = []
    monkeypatch.setattr("lorafuse.cli.bench.run", lambda args: seen.append(args) or 0)
    assert cli.main(step.command[step.command.index("bench") :]) == 0
    assert seen[0].json.parent == Path("out")


def test_the_grid_is_what_is_not_measured_yet():
    """What one machine has measured fills its own cells and no other's."""
    assert len({step.name for step in GRID}) == len(GRID) == 5 + 1 + 4 + 12 + 12
    here = gpu.measured("NVIDIA H200")
    # what was measured from cuBLAS alone fills no cell
    assert gpu.grid(Path("out"), here) == GRID
    here = [result | {"floor": {"forward": "frozen"}} for result in here]
    assert {one["kind"] for one in here} >= {"linear", "moe", "model"}
    left = {step.name: step.command for step in gpu.grid(Path("out"), here)}
    whole = {step.name: step.command for step in GRID}
    gone = {"layers-m8192-r16-llama-3.1-8b.q", "model-llama-3.1-8b-1-off", "experts-m8192-qwen3-30b-a3b-zipf"}
    assert gone <= whole.keys() - left.keys()
    assert "layers-m32768-r16-llama-3.1-8b.q" in left
    assert gpu.grid(Path("out"), gpu.measured("NVIDIA H100")) == GRID


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main() == 0
    assert "no NVIDIA GPU here: nothing to run" in capsys.readouterr().out
