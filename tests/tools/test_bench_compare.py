"""`lorafuse bench --base REF`: a planted slow-down is seen, an unchanged tree is not, a wrong result is said."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm_python

from lorafuse.bench.compare import USUAL, agreed, interval, verdict
from lorafuse.cli import main

ROOT = Path(__file__).parents[2]
BASELINE = Path("bench") / "baselines" / "lorafuse.py"
# without PEFT: importing it took each of some twenty processes longer than all rounds. A pass takes a known time, since
# two processes of one code compute up to a tenth apart on a machine with other work
OWN = """
from time import sleep

from lorafuse.bench.problem import SCALE
from lorafuse.functional import lora_linear

LABEL = "lorafuse"
SECONDS = 0.01


def linear(given):
    a, b = given.a.clone().requires_grad_(), given.b.clone().requires_grad_()

    def call(x):
        y = lora_linear(x, given.w, a, b, scale=SCALE)
        if y.requires_grad:
            y.register_hook(lambda dy: sleep(SECONDS))
        sleep(SECONDS)
        return y

    return call, {"da": a, "db": b}
"""
LAYER = ["linear", "--shape", "64,64", "--m", "32", "--rank", "8", "--dtype", "float32", "--device", "cpu"]


def test_the_interval_of_a_median():
    assert interval([3.0, 1.0, 2.0]) == (float("-inf"), 2.0, float("inf"))
    # of 8 values: 2 / 256 is below 1 %, 18 / 256 is not, so the ends are the smallest and the largest
    assert interval([float(i) for i in range(1, 9)]) == (1.0, 4.5, 8.0)
    low, middle, high = interval([float(i) for i in range(1, 102)])
    assert (low, middle, high) == (38.0, 51.0, 64.0)


def test_the_interval_misses_as_often_as_it_says():
    drawn, missed = random.Random(0), 0
    for _ in range(2000):
        low, _, high = interval([drawn.gauss(0, 1) for _ in range(40)])
        missed += not low <= 0 <= high
    assert missed <= 2000 * 0.015


def test_verdicts():
    assert verdict(1.01, 1.1, 1.2) == "slower"
    assert verdict(0.99, 1.1, 1.2) == ""
    assert verdict(1.01, 1.02, 1.03) == ""
    assert verdict(0.8, 0.9, 0.99) == "faster"
    assert verdict(0.8, 0.9, 1.01) == ""


def test_three_of_five_pairs_decide():
    assert agreed([]) is None
    assert agreed(["slower", "slower"]) is None
    assert agreed(["slower"] * 3) == "slower"
    assert agreed(["", "slower", "", ""]) == ""
    assert agreed(["slower", "", "faster", "slower"]) is None
    assert agreed(["slower", "", "faster", "slower", "slower"]) == "slower"
    assert agreed(["slower", "", "faster", "slower", "faster"]) == ""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A repository of its own with this working tree committed, and a small layer in place of PEFT's patched one."""
    tree = tmp_path_factory.mktemp("checkout")
    leave = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for folder in ("lorafuse", "bench"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=leave)
    (tree / BASELINE).write_text(OWN)
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "base"]):
        subprocess.run(["git", "-C", str(tree), *command], check=True, timeout=300)
    return tree


def bench(tree, *arguments):
    """Run the command in a checkout, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "lorafuse", "bench", *LAYER, "--base", "HEAD", *arguments]
    done = warm_python.run(
        command, has_children=True, cwd=tree, env=environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def planted(checkout):
    """Changes the layer of the checkout, and takes it back."""
    file = checkout / BASELINE

    def plant(wrapper):
        file.write_text(f"{OWN.replace('return call, ', 'return planted(call), ')}\n\n{wrapper}")

    yield plant
    file.write_text(OWN)


def test_a_slow_down_of_a_tenth_is_detected(checkout, planted, tmp_path):
    planted(
        "def planted(call):\n"
        "    from time import perf_counter\n\n"
        "    def run(x):\n"
        "        start = perf_counter()\n"
        "        y = call(x)\n"
        "        end = perf_counter()\n"
        "        while perf_counter() < end + 0.1 * (end - start):\n"
        "            pass\n"
        "        return y\n\n"
        "    return run\n"
    )
    status, printed = bench(checkout, "--rounds", "40", "--json", str(tmp_path / "r.json"))
    assert status == 1, printed
    assert "64x64 forward" in printed
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert result["verdicts"]["forward"] == "slower"
    assert 1.05 < result["ratios"]["forward"] < 1.2
    assert 3 <= len(result["pairs"]["forward"]) <= 5


def test_an_unchanged_tree_is_not_slower(checkout):
    status, printed = bench(checkout, "--rounds", "40")
    assert status == 0, printed
    assert "nothing became slower" in printed
    trees = subprocess.run(
        ["git", "-C", str(checkout), "worktree", "list"], capture_output=True, text=True, check=True, timeout=300
    )
    assert len(trees.stdout.splitlines()) == 1


def test_a_wrong_result_gets_no_number(checkout, planted):
    planted("def planted(call):\n    return lambda x: 1.01 * call(x)\n")
    status, printed = bench(checkout, "--rounds", "3")
    assert status == 1, printed
    assert "no numbers, here: lorafuse: y is wrong" in printed
    assert "nothing became slower" not in printed
    assert "total" not in printed


def test_a_commit_that_is_too_old_is_refused(checkout, monkeypatch, capsys):
    """The first commit of this repository, where there is a history, has no worker."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "rev-list", "--max-parents=0", "HEAD"], capture_output=True, text=True, timeout=300
    )
    first = done.stdout.split()
    if done.returncode or not first or (ROOT / ".git" / "shallow").exists():
        pytest.skip("this checkout has no history")
    assert main(["bench", *LAYER, "--base", first[0]]) == 2
    assert "no lorafuse/bench/worker.py" in capsys.readouterr().err


def test_the_usual_cases_are_cases():
    from lorafuse.cli import bench as command

    parsed = []

    def parse(argv):
        import argparse

        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        return parser.parse_args(argv)

    for argv in USUAL:
        args = parse([*argv, "--dtype", "float32", "--device", "cpu", "--base", "HEAD"])
        cases, _ = command.prepared(args)
        parsed += [case.kind for case in cases]
        assert args.base == "HEAD"
    assert set(parsed) == {"linear", "group", "moe"}
    assert parse(["--base", "HEAD"]).kind is None
