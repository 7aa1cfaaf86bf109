"""Runs of `lorafuse study` whose losses are planted: nothing is trained."""

import json
import math

from lorafuse import cli
from lorafuse.study import plots, policy, pretrain, runner, train


def planted(spec, best=None, floor=None):
    """A run whose loss is least at `best` of its rank, 10 times higher for adapters, and there as low as `floor`."""
    at = 5e-3 if spec.task == "strings" else 3e-4 if spec.rank == 0 else 3e-3
    at = at if best is None else best(spec)
    low = 0.1 if floor is None else floor(spec)
    # seeds differ, and their pairs a little
    loss = low + 0.02 * math.log2(spec.lr / at) ** 2 + 1e-3 * (spec.seed % 7) + 1e-4 * (spec.seed * (spec.rank + 1) % 3)
    curve = [[step, loss + 1 / step] for step in range(1, 21)]
    early = [5.0 - 0.05 * step for step in range(min(100, spec.steps))]
    trained = 1000 * (spec.rank or 100)
    return {"validation": loss, "loss": loss, "start": 1.0, "curve": curve, "early": early, "trained": trained}


def plant(monkeypatch, run):
    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(policy, "run", run)
    monkeypatch.setattr(pretrain, "base", lambda lessons, size, steps, seed: None)
    monkeypatch.setattr(runner, "pretrained", lambda lessons, size, steps, seed: None)


def study(folder, *argv):
    """`lorafuse study --quick` in this process; its exit status."""
    return cli.main(["study", *argv, "--quick", "--workers", "1", "--device", "cpu", "--out", str(folder)])


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def planted_lab(monkeypatch, folder):
    """A function that runs a study on planted runs, without its plot, and gives its finding."""
    monkeypatch.setattr(plots, "draw", lambda file, name, finding, conditions: None)

    def run_study(name, run):
        plant(monkeypatch, run)
        assert study(folder, name) == 0
        return read(folder, name)["finding"]

    return run_study
