"""`make gpu`: its steps are commands that exist, in the order of their worth, within a lease that can be resumed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import warm_python
from published_tree import copied

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import gpu  # noqa: E402
import gpu_results  # noqa: E402
import gpu_steps  # noqa: E402
import hopper  # noqa: E402
import publish  # noqa: E402

from lorafuse import cli  # noqa: E402
from lorafuse.bench.transformer import MODELS  # noqa: E402
from lorafuse.bench.transformer_cost import VARIANTS, Sizes, Training, training_bytes  # noqa: E402
from lorafuse.plan import DEVICES  # noqa: E402

pytestmark = pytest.mark.no_poison
OUT = Path("out")
STEPS = gpu.steps(OUT)
GRID = gpu.grid(OUT, [], built=True)
CARD = {"device": "NVIDIA H200", "power limit": "700.00 W", "driver": "580", "torch": "2.11", "commit": "abc"}
CARD |= {"date": "2026-12-01 10:00 UTC"}


def named(part):
    return [step for step in STEPS if part in step.command]


@pytest.mark.parametrize("built", [False, True])
def test_every_step_runs_once_in_its_order(built):
    plan = gpu.steps(OUT, built)
    groups = gpu.grouped(plan)
    assert [step for group in groups for step in group] == plan
    assert len({step.name for step in plan}) == len(plan)
    for group in groups:
        assert len({step.stage for step in group}) == 1
        assert len(group) == 1 or group[0].stage
    # what is timed runs alone, and within six minutes of probes and checks
    timed = [step for step in plan if "bench" in step.command or "probes" in step.name]
    assert all(step.stage == 0 for step in timed)
    first = next(i for i, group in enumerate(groups) if "bench" in group[0].command)
    assert sum(max(step.seconds for step in group) for group in groups[:first]) <= 480
    kinds = ["probes", "layers", "decoder", "model", "experts", "groups"]
    order = [step.name.split("-")[0] for step in timed]
    assert sorted(kinds, key=order.index) == kinds
    # probes wait for nothing but the build, and for no check where there is none
    names = [step.name for step in plan]
    assert names.index("probes") < names.index("gate" if built else "cuda-gate")


def test_there_are_tests_to_run():
    requested = {}
    for step in named("pytest"):
        options = step.command[step.command.index("pytest") + 1 :]
        if "-n" in options:
            del options[options.index("-n") : options.index("-n") + 2]
        requested[step.name] = [*options, "--collect-only"]
    script = f"import pytest; print({{name: int(pytest.main(options)) for name, options in {requested!r}.items()}})"
    command = [sys.executable, "-c", script]
    done = warm_python.run(command, warm_python.PeftPopen, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == repr(dict.fromkeys(requested, 0)), done.stdout[-3000:]


@pytest.mark.parametrize("step", [*named("bench"), *GRID], ids=lambda s: s.name)
def test_benchmarks_take_their_options(step, monkeypatch):
    """As far as the run itself, which needs the GPU."""
    seen = []
    monkeypatch.setattr("lorafuse.cli.bench.run", lambda args: seen.append(args) or 0)
    assert cli.main(step.command[step.command.index("bench") :]) == 0
    assert seen[0].json.parent == OUT


def test_scripts_take_their_options():
    scripts = [step for step in STEPS if step.command[1].startswith("bench/")]
    assert {step.name for step in scripts} == {"probes", "hopper", "decode", "dora", "host"}
    for step in scripts:
        options = step.command[2:]
        assert (ROOT / step.command[1]).exists()
        assert options[-2:] == ["--json", str(OUT / f"{step.name}.json")]
        if "hopper" in step.command[1]:
            hopper.arguments().parse_args(options)


def test_models_fit_a_gpu_of_80_gb():
    for name, layers in gpu_steps.LAYERS.items():
        sizes = replace(Sizes.of(MODELS[name].config()), layers=layers)
        needed = (training_bytes(sizes, one, Training(16, 2048, 2, False)) for one in VARIANTS)
        assert max(needed) < 0.8 * DEVICES["H100"].memory_bytes


def test_the_grid_is_what_is_not_measured_yet():
    """What one machine has measured fills its own cells and no other's."""
    assert len({step.name for step in GRID}) == len(GRID) == 4 * 5 + 1 + 2 + 4 + 12 + 12
    here = gpu.measured("NVIDIA H200")
    # what was measured from cuBLAS alone fills no cell
    assert gpu.grid(OUT, here, built=True) == GRID
    here = [result | {"floor": {"forward": "frozen"}} for result in here]
    assert {one["kind"] for one in here} >= {"linear", "moe", "model"}
    left = {step.name for step in gpu.grid(OUT, here, built=True)}
    whole = {step.name for step in GRID}
    gone = {f"layers-m8192-r16-llama-3.1-8b.{name}" for name in ("q", "k", "gate", "down")}
    gone |= {"model-llama-3.1-8b-1-off", "experts-m8192-qwen3-30b-a3b-zipf"}
    assert gone <= whole - left
    assert {"layers-m32768-r16-llama-3.1-8b.q", "layers-m512-r16-llama-3.1-8b.k"} <= left
    assert gpu.grid(OUT, gpu.measured("NVIDIA H100"), built=True) == GRID
    # the sizes of the goals come first
    assert {step.name for step in GRID[:4]} < gone


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main() == 0
    assert "no NVIDIA GPU here: nothing to run" in capsys.readouterr().out


def test_a_call_takes_nine_minutes_at_most(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--minutes", "10"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "at most 9" in capsys.readouterr().err


class Machine:
    """A clock, and commands that take so many seconds and end with a status; None: they are cut off."""

    def __init__(self, **commands):
        self.now, self.commands, self.ran, self.seen = 0.0, commands, [], []

    def execute(self, step, out):
        seconds, status = self.commands[step.name]
        self.ran.append(step.name)
        # what an interruption at this moment would leave
        self.seen.append(summary(out))
        self.now += step.seconds if status is None else seconds
        return status

    def lease(self, out, minutes, plan, setting=CARD, resume=()):
        out.mkdir(exist_ok=True)
        before = gpu.remembered([*resume, out], setting)
        lease = gpu.Lease(out, setting, minutes, before, clock=lambda: self.now, execute=self.execute)
        return lease.run(gpu.pending(plan, before))


def summary(out):
    if not (out / "gpu.json").exists():
        return {}
    return {one["name"]: one["outcome"] for one in json.loads((out / "gpu.json").read_text())["steps"]}


def plan(**seconds):
    return [gpu.Step(name, [sys.executable], budget) for name, budget in seconds.items()]


def test_steps_that_do_not_fit_are_left_for_the_next_lease(tmp_path):
    machine = Machine(a=(50, 0), b=(90, 0), c=(20, 0), d=(5, 1))
    left = machine.lease(tmp_path, 2, plan(a=60, b=100, c=30, d=10))
    # b would end after the two minutes; what is smaller behind it still fits
    assert machine.ran == ["a", "c", "d"]
    assert [step.name for step in left] == ["b"]
    assert machine.seen[1:] == [{"a": "passed"}, {"a": "passed", "c": "passed"}]
    assert summary(tmp_path) == {"a": "passed", "c": "passed", "d": "failed with status 1"}
    # another lease, on a machine that has the former one's folder alone
    again = Machine(a=(50, 0), b=(90, 0), c=(20, 0), d=(5, 0))
    assert again.lease(tmp_path / "second", 2, plan(a=60, b=100, c=30, d=10), resume=[tmp_path]) == []
    assert again.ran == ["b", "d"]
    assert set(summary(tmp_path / "second").values()) == {"passed"}


def test_what_was_cut_off_comes_last(tmp_path):
    machine = Machine(a=(0, None), b=(10, 0))
    machine.lease(tmp_path, 1, plan(a=55, b=30))
    assert machine.now == 55
    assert summary(tmp_path) == {"a": "cut off after 55 s"}
    machine.lease(tmp_path, 2, plan(a=55, b=30))
    assert machine.ran == ["a", "b", "a"]


def test_other_conditions_are_another_run(tmp_path):
    machine = Machine(a=(1, 0))
    machine.lease(tmp_path, 1, plan(a=5))
    machine.lease(tmp_path, 1, plan(a=5), setting=CARD | {"date": "2026-12-02 10:00 UTC"})
    assert machine.ran == ["a"]
    with pytest.raises(ValueError, match=r"power limit 700.00 W, here 350.00 W: name another folder"):
        machine.lease(tmp_path, 1, plan(a=5), setting=CARD | {"power limit": "350.00 W"})


def test_a_command_and_what_it_started_end_with_its_budget(tmp_path):
    script = "import os, subprocess, time; subprocess.Popen(['sleep', '60']); print(os.getpid(), flush=True); "
    step = gpu.Step("slow", [sys.executable, "-c", script + "time.sleep(60)"], 1)
    step.seconds = 0.5
    assert gpu.execute(step, tmp_path) is None
    group = int((tmp_path / "slow.log").read_text())
    for _ in range(100):
        states = subprocess.run(
            ["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True, timeout=300
        ).stdout.split()
        if all(state.startswith("Z") for state in states):
            break
    else:
        pytest.fail(f"processes of {group} are alive: {states}")


@pytest.fixture
def measured(tmp_path):
    """Two leases' files of layers and a model, as `lorafuse bench` writes them."""
    source = {kind: f"h200-2026-11-26-{kind}.json" for kind in ("linear", "rows", "model", "hopper")}
    files = {kind: json.loads((ROOT / "bench" / "results" / file).read_text()) for kind, file in source.items()}

    def put(folder, name, kind, keep):
        (tmp_path / folder).mkdir(exist_ok=True)
        content = files[kind] | {"results": [files[kind]["results"][i] for i in keep]}
        content["conditions"] = files[kind]["conditions"] | CARD
        (tmp_path / folder / f"{name}.json").write_text(json.dumps(content))

    put("first", "layers-m8192-r16-q", "linear", [0])
    put("first", "layers-m512-r16-q", "rows", [1])
    put("first", "hopper", "hopper", [0, 1])
    put("second", "layers-m8192-r16-k", "linear", [1])
    put("second", "layers-m8192-r16-q", "linear", [0])
    put("second", "model-llama", "model", [0])
    (tmp_path / "first" / "gpu.json").write_text("{}")
    return [tmp_path / "first", tmp_path / "second"]


def test_results_of_several_leases_become_published_files(measured, tmp_path):
    (tree := tmp_path / "tree").mkdir()
    copied(tree)
    files = gpu_results.collect(measured, tree)
    names = {file.name for file in files}
    assert names == {f"h200-2026-12-01-{kind}.json" for kind in ("linear", "rows", "hopper", "model")}
    layers = json.loads((tree / "bench" / "results" / "h200-2026-12-01-linear.json").read_text())
    assert [one["case"] for one in layers["results"]] == ["llama-3.1-8b.k", "llama-3.1-8b.q"]
    assert publish.main([], tree) == 0
    # the tables that plans follow, and the pages, hold what was collected
    tables = json.loads((tree / "lorafuse" / "plan" / "measured" / "h200.json").read_text())
    assert "abc" in json.dumps(tables)
    assert "h200-2026-12-01-rows.json" in (tree / "bench" / "README.md").read_text()
    # once more changes nothing
    before = {file: file.read_bytes() for file in files}
    assert {file: file.read_bytes() for file in gpu_results.collect(measured, tree)} == before


def test_groups_are_collected_in_one_file(measured, tmp_path):
    """Of layers of one x, whose out features are a list, and gated MLPs; of one size the last file's result stays."""
    one = json.loads((measured[1] / "layers-m8192-r16-q.json").read_text())
    (result,) = one["results"]
    sizes = ({"case": "llama-3.1-8b.qkv", "N": [4096, 1024, 1024]}, {"case": "llama-3.1-8b.mlp", "H": 4096, "I": 14336})
    for i, (name, more) in enumerate((("qkv", sizes[0]), ("mlp", sizes[1]), ("again", sizes[0]))):
        content = one | {"kind": "group", "results": [result | {"floors": {"tax": i}} | more]}
        (measured[0] / f"groups-m8192-{name}.json").write_text(json.dumps(content))
    (file,) = [file for file in gpu_results.collect(measured[:1], tmp_path) if file.name.endswith("-group.json")]
    collected = json.loads(file.read_text())["results"]
    assert [(one["case"], one["floors"]["tax"]) for one in collected] == [
        ("llama-3.1-8b.mlp", 1), ("llama-3.1-8b.qkv", 0),
    ]  # fmt: skip


def test_conditions_are_not_mixed_in_one_file(measured, tmp_path):
    file = measured[1] / "layers-m8192-r16-k.json"
    content = json.loads(file.read_text())
    content["conditions"]["driver"] = "590"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="driver 580 and 590: collect them one by one"):
        gpu_results.collect(measured, tmp_path)


def test_an_unknown_card_is_refused(measured, tmp_path):
    for file in measured[0].glob("*.json"):
        content = json.loads(file.read_text())
        if content:
            content["conditions"]["device"] = "NVIDIA B7"
            file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="NVIDIA B7: the planner does not know it"):
        gpu_results.collect(measured[:1], tmp_path)


def test_the_table_names_every_tax(measured):
    lines = list(gpu_results.lines(measured))
    assert any(line.startswith("llama-3.1-8b.q M 512 R 16: frozen 5") for line in lines)
    assert any("tokens/s: " in line for line in lines)
