"""`lorafuse study` (T1): every study on planted losses, its file, interruption, bad input; tiny runs that are real."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorafuse import cli
from lorafuse.study import STUDIES, layers, page, plots, policy, pretrain, record, runner, train
from lorafuse.study.model import Size
from lorafuse.study.runner import Lab
from lorafuse.study.train import Spec

PAGE = Path(__file__).parents[2] / "docs/studies/README.md"
DRAW = plots.draw
TINY = Size(width=16, heads=2, inner=24, depth=1)


def planted(spec, base, device, best=None, floor=None):
    """A run whose loss is least at `best` of its rank, 10 times higher for adapters, and there as low as `floor`."""
    best = (1e-3 if spec.rank == 0 else 1e-2) if best is None else best(spec)
    low = 0.1 if floor is None else floor(spec)
    loss = low + 0.05 * math.log2(spec.lr / best) ** 2 + 1e-3 * spec.seed
    curve = [[step, 3.0 if step == 0 else loss] for step in range(0, 21)]
    early = [5.0 - 0.05 * step for step in range(min(100, spec.steps))]
    return {"loss": loss, "start": 1.0, "curve": curve, "early": early, "trained": 1000 * (spec.rank or 100)}


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Sets what runs return; nothing is trained or drawn."""

    def set_run(run):
        monkeypatch.setattr(train, "run", run)
        monkeypatch.setattr(policy, "run", run)

    monkeypatch.setattr(pretrain, "base", lambda lessons, size, steps, seed: {})
    monkeypatch.setattr(plots, "draw", lambda file, name, finding, conditions: None)
    runner._base.cache_clear()
    set_run(planted)
    yield set_run
    runner._base.cache_clear()


def study(tmp_path, *argv):
    return cli.main(
        ["study", *argv, "--quick", "--seeds", "2", "--workers", "1", "--device", "cpu", "--out", str(tmp_path)]
    )


def read(tmp_path, name):
    return json.loads((tmp_path / f"{name}.json").read_text())


def test_all_studies_write_files_and_plots(plant, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "draw", DRAW)
    assert study(tmp_path, "all") == 0
    out = capsys.readouterr().out
    for name in STUDIES:
        content = read(tmp_path, name)
        assert (content["study"], content["seeds"], content["quick"]) == (name, [0, 1], True)
        assert content["finding"]["claims"]
        assert content["finding"]["outcome"] in ("held", "did not hold", "inconclusive")
        assert content["runs"]
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert re.search(rf"^{name} +{content['finding']['outcome']}$", out, re.MULTILINE)
    assert read(tmp_path, "equivalence")["finding"]["outcome"] == "held"
    assert read(tmp_path, "rate")["finding"]["outcome"] == "held"
    assert read(tmp_path, "rank")["finding"]["outcome"] == "held"
    # planted equal: nothing departs, no gap grows, no layers are worse
    assert all(read(tmp_path, name)["finding"]["outcome"] != "held" for name in ("capacity", "batch", "layers"))


@pytest.mark.parametrize(
    ("name", "floor", "outcome"),
    [
        ("equivalence", lambda spec: 0.1 if spec.rank == 0 else 0.9, "did not hold"),
        ("rl", lambda spec: 0.1 if spec.rank == 0 else 0.3, "did not hold"),
        ("rl", lambda spec: 0.95, "inconclusive"),
        ("batch", lambda spec: 0.1 + (spec.rank > 0) * spec.batch / 500, "held"),
        ("batch", lambda spec: 0.9 - (spec.rank > 0) * spec.batch / 500, "did not hold"),
        ("layers", lambda spec: 0.1 + 0.3 * (spec.layers == "attention"), "held"),
        ("layers", lambda spec: 0.5 - 0.3 * (spec.layers == "attention"), "did not hold"),
        ("capacity", lambda spec: max(0.0, 2.77 - 0.97e3 * (spec.rank or 100) / spec.count / 8), "held"),
    ],
)
def test_a_planted_finding_is_found(plant, tmp_path, name, floor, outcome):
    plant(lambda spec, base, device: planted(spec, base, device, floor=floor))
    assert study(tmp_path, name) == 0
    assert read(tmp_path, name)["finding"]["outcome"] == outcome


def test_the_ratio_of_rates_is_measured(plant, tmp_path):
    plant(lambda spec, base, device: planted(spec, base, device, best=lambda spec: 2e-3))
    assert study(tmp_path, "rate") == 0
    finding = read(tmp_path, "rate")["finding"]
    assert finding["outcome"] == "did not hold"
    assert finding["claims"][0]["value"] == pytest.approx(1, rel=0.05)


def test_a_best_rate_that_never_comes_is_inconclusive(plant, tmp_path):
    plant(lambda spec, base, device: planted(spec, base, device, best=lambda spec: 1e6))
    assert study(tmp_path, "equivalence") == 0
    finding = read(tmp_path, "equivalence")["finding"]
    assert finding["outcome"] == "inconclusive"
    assert all("edge of the sweep" in claim["margin"] for claim in finding["claims"])


def test_a_sweep_goes_on_until_its_best_rate_is_inside(plant):
    lab = Lab([0, 1])
    spec = Spec("add", 10, 4, lr=4e-4, steps=5, seed=0)
    (found,) = lab.sweep([spec])
    assert found.rates[0] < 1e-2 < found.rates[-1]
    assert not found.at_edge
    assert found.best in found.rates[1:-1]
    assert len(found.losses) == 2
    # the sweep with one seed, the best rate with both
    assert len(lab.done) == len(found.rates) + 1


def test_interrupted_runs_are_kept_and_not_run_again(plant, tmp_path, capsys):
    made = []

    def until(last):
        def run(spec, base, device):
            if len(made) == last:
                raise KeyboardInterrupt
            made.append(spec)
            return planted(spec, base, device)

        return run

    plant(until(5))
    assert study(tmp_path, "equivalence") == 130
    assert "goes on from there" in capsys.readouterr().out
    assert len(read(tmp_path, "equivalence")["runs"]) == 5
    plant(until(None))
    assert study(tmp_path, "equivalence") == 0
    content = read(tmp_path, "equivalence")
    assert len(made) == len(set(map(runner.key, made))) == len(content["runs"])
    # and what one study ran another one has
    count = len(made)
    assert study(tmp_path, "rate") == 0
    assert len(made) == count


def test_runs_of_other_code_are_run_again(plant, tmp_path, monkeypatch):
    assert study(tmp_path, "rate") == 0
    assert record.finished_runs(tmp_path, "cpu")
    assert not record.finished_runs(tmp_path, "cuda")
    monkeypatch.setattr(record, "code", lambda: "other")
    assert not record.finished_runs(tmp_path, "cpu")


def test_another_width_keeps_heads_and_proportions(plant, tmp_path):
    assert study(tmp_path, "layers", "--width", "128") == 0
    content = read(tmp_path, "layers")
    assert content["width"] == 128
    sizes = {(run["spec"]["size"]["experts"], *(run["spec"]["size"][name] for name in ("width", "heads", "inner")))
             for run in content["runs"]}  # fmt: skip
    assert sizes == {(0, 128, 8, 256), (4, 128, 8, 128)}
    wide = {name: size.wide(128) for name, size in layers.SIZES.items()}
    assert all(layers.matched(wide[name], 4) == layers.matched(layers.SIZES[name], 4) for name in wide)


def test_the_same_command_twice_gives_the_same_file(tmp_path, monkeypatch):
    """Real runs, tiny ones, in this process and in two of their own."""
    contents = []
    specs = [Spec(task, 32, rank, 1e-2, 3, 0, batch=16, test=16, size=TINY, episodes=episodes)
             for task, rank, episodes in (("add", 0, 0), ("strings", 2, 0), ("smaller", 2, 48))]  # fmt: skip
    for index, workers in enumerate((1, 1, 2)):
        runner._base.cache_clear()
        monkeypatch.setenv("LORAFUSE_CACHE_DIR", str(tmp_path / str(index)))
        with Lab([3, 4], workers=workers, base_steps=3) as lab:
            lab.run([replace(spec, seed=seed) for spec in specs for seed in lab.seeds])
            record.write(tmp_path / "x.json", {}, lab)
        contents.append((tmp_path / "x.json").read_text())
    assert contents[0] == contents[1] == contents[2]
    assert len(json.loads(contents[0])["runs"]) == 6


def test_the_base_comes_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAFUSE_CACHE_DIR", str(tmp_path))
    first = pretrain.base("facts", TINY, 3, 0)
    monkeypatch.setattr(pretrain, "_pretrain", None)
    again = pretrain.base("facts", TINY, 3, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert pretrain.path("facts", TINY, 3, 0) != pretrain.path("facts", TINY, 3, 1)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["rate", "--seeds", "0"], "--seeds 0: it must be at least 1"),
        (["rate", "--workers", "-1"], "--workers -1: it must be at least 1"),
        (["rate", "--device", "cuda:7"], "--device cuda:7"),
        (["rate", "--width", "40"], "--width 40: it must be a multiple of 16"),
        (["rate", "--out", __file__], "it is a file; name a folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, said, capsys):
    if "cuda:7" in argv and torch.cuda.is_available():
        argv, said = ["rate", "--seeds", "-3"], "--seeds -3"
    assert cli.main(["study", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lorafuse study: ")
    assert error.count("\n") == 1
    assert said in error


def test_a_file_that_is_no_json_is_named(plant, tmp_path, capsys):
    (tmp_path / "rate.json").write_text("{")
    assert study(tmp_path, "rate") == 2
    assert "rate.json: it is not JSON" in capsys.readouterr().err


def test_unknown_study_says_what_there_is(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", "rnk"])
    assert stop.value.code == 2
    assert "equivalence" in capsys.readouterr().err


def test_matched_ranks_of_the_study_are_what_the_source_compares():
    assert layers.matched(layers.SIZES["dense"], 4) == {"attention": 5, "mlp": 4, "all": 2}


def test_the_page_says_what_the_committed_results_say():
    assert page.rewrite(PAGE) == PAGE.read_text()


def test_a_changed_result_is_seen(tmp_path):
    shutil.copytree(PAGE.parent, tmp_path, dirs_exist_ok=True)
    assert page.rewrite(tmp_path / PAGE.name) == PAGE.read_text()
    content = read(tmp_path, "rl")
    content["finding"]["outcome"] = "planted"
    (tmp_path / "rl.json").write_text(json.dumps(content))
    assert page.rewrite(tmp_path / PAGE.name) != PAGE.read_text()
