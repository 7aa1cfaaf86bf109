"""This checkout against another commit: the same layers, each side in a process of its own, in turns.

A pair of processes, one per side, finds a pass slower when the median of its rounds' ratios is above 1.03 and the 99 %
confidence interval of that median (order statistics, no assumption on the noise) lies above 1. One pair is not enough:
of two processes with the same code one can be slower in most rounds (a backward by a quarter, one process in ten,
2 cores, 2026-11). So fresh pairs follow until three agree. Neither torch.utils.benchmark nor pytest-benchmark's compare
interleaves two processes or gives an interval.
"""

import argparse
import math
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorafuse.bench import figures, plugins
from lorafuse.bench.problem import Problem
from lorafuse.bench.remote import RemoteRunner
from lorafuse.bench.result import VERSION, shown, write_json
from lorafuse.testing.conditions import conditions, describe
from lorafuse.testing.timing import Samples, measure

__all__ = ["USUAL", "agreed", "interval", "run", "verdict"]

# cases of `lorafuse bench --base REF`: a layer where arithmetic dominates, one where calls do, a block, experts
USUAL = (
    ("linear", "--case", "square-2048", "--m", "512"),
    ("linear", "--case", "smollm2-135m.q", "--m", "64"),
    ("group", "--case", "smollm2-135m.qkv", "--m", "512"),
    ("moe", "--case", "moe-64", "--m", "128"),
)
_NOTABLE = 1.03
# pairs of processes that must agree on a pass, and the most pairs
_AGREE, _PAIRS = 3, 5
_KINDS = ("linear", "group", "moe")
# two-sided probability that the interval misses the median
_MISS = 0.01

Prepare = Callable[[argparse.Namespace], tuple[list[Problem], torch.device]]


def run(runs: list[argparse.Namespace], console: Any, prepare: Prepare) -> int:
    """Compare every case of every run. 0 when nothing is slower, 1 when something is slower or wrong, 130 on Ctrl-C."""
    for args in runs:
        if args.kind not in _KINDS:
            raise ValueError(f"--base compares {', '.join(_KINDS)}, not {args.kind}")
    prepared = [(args, *prepare(args)) for args in runs]
    setting = conditions(prepared[0][2])
    status, results = 0, []
    with _tree(runs[0].base) as (tree, commit):
        console.print(f"{describe(setting)}; base {runs[0].base} is {commit}", highlight=False)
        try:
            for args, problems, device in prepared:
                for problem in problems:
                    result = _compare(problem, args, device, tree, console)
                    results.append(result)
                    console.print(_table(result, runs[0].base))
                    if result["wrong"] or "slower" in result["verdicts"].values():
                        status = 1
        except KeyboardInterrupt:
            console.print("interrupted; what is done is kept")
            status = 130
    for args in runs:
        if args.json is not None:
            content = {"version": VERSION, "kind": "compare", "base": commit, "conditions": setting, "results": results}
            write_json(args.json, content)
    slower = [f"{r['case']} {part}" for r in results for part, v in r["verdicts"].items() if v == "slower"]
    if slower:
        console.print(f"slower than {runs[0].base}: {', '.join(slower)}")
    elif status == 0:
        console.print("nothing became slower")
    return status


def _compare(
    problem: Problem, args: argparse.Namespace, device: torch.device, tree: Path, console: Any
) -> dict[str, Any]:
    result: dict[str, Any] = problem.described() | {"wrong": {}, "verdicts": {}}
    total = {"here": Samples(), "base": Samples()}
    pairs: dict[str, list[dict[str, Any]]] = {part: [] for part in ("forward", "backward", "total")}
    with console.status(problem.name) as shown:
        while any(agreed([one["verdict"] for one in made]) is None for made in pairs.values()):
            progress = f"{problem.name}: pair {len(pairs['total']) + 1} of at most {_PAIRS}, here and base in turns"
            shown.update(progress)
            samples: dict[str, Samples] = {}
            with _pair(problem, args.graphs, device, tree) as (runners, wrong):
                if wrong:
                    return result | {"wrong": wrong}
                rounds = measure(runners, args.rounds, max(2, args.rounds // 10), args.seconds / _PAIRS)
                for done, samples in enumerate(rounds):  # noqa: B007
                    shown.update(f"{progress}, round {done + 1} of {args.rounds}")
            for part, made in pairs.items():
                here, base = getattr(samples["here"], part), getattr(samples["base"], part)
                low, median, high = interval([h / b for h, b in zip(here, base, strict=True)])
                made.append({"low": low, "median": median, "high": high, "verdict": verdict(low, median, high)})
            for side, one in samples.items():
                total[side].forward += one.forward
                total[side].backward += one.backward
    result["pairs"] = pairs
    for side, one in total.items():
        result[side] = {part: figures.summary([getattr(one, part)]) for part in pairs}
    result["ratios"] = {part: statistics.median(one["median"] for one in made) for part, made in pairs.items()}
    result["verdicts"] = {part: agreed([one["verdict"] for one in made]) for part, made in pairs.items()}
    return result


@contextmanager
def _pair(
    problem: Problem, graphs: bool, device: torch.device, tree: Path
) -> Iterator[tuple[list[RemoteRunner], dict[str, str]]]:
    """A new process for each side, until the context ends, and the reason of each side whose result is wrong."""
    with ExitStack() as stack:
        runners = []
        here = Path(__file__).parents[2]
        own = next(one for one in plugins.load(problem.kind, device) if one.name == "lorafuse")
        for side, root in (("here", here), ("base", tree)):
            # each process loads its own side's file, which need not load in this one
            baseline = replace(own, file=root / own.file.relative_to(here))
            runner = RemoteRunner(side, problem, baseline, device, graphs, root)
            stack.callback(runner.close)
            runners.append(runner)
        yield runners, {runner.name: runner.wrong for runner in runners if runner.wrong}


def agreed(verdicts: list[str]) -> str | None:
    """The verdict of three pairs on a pass; "" when no three of five agree; None while pairs are left."""
    for one in sorted(set(verdicts)):
        if verdicts.count(one) >= _AGREE:
            return one
    return "" if len(verdicts) >= _PAIRS else None


def interval(values: list[float]) -> tuple[float, float, float]:
    """(low, median, high): the median and its 99 % confidence interval by order statistics.

    The true median lies outside the k-th smallest and the k-th largest of n values with twice the probability of fewer
    than k heads in n throws of a coin. The interval of fewer than 8 values is infinite.
    """
    ordered, n = sorted(values), len(values)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    below, k = 0.0, 0
    while 2 * (below + math.comb(n, k) / 2**n) <= _MISS:
        below += math.comb(n, k) / 2**n
        k += 1
    return (ordered[k - 1], middle, ordered[n - k]) if k else (-math.inf, middle, math.inf)


def verdict(low: float, median: float, high: float) -> str:
    """ "slower", "faster" or "" of a ratio of times and its interval."""
    if low > 1 and median > _NOTABLE:
        return "slower"
    return "faster" if high < 1 and median < 1 / _NOTABLE else ""


def _table(result: dict[str, Any], ref: str) -> Any:
    rows = []
    for part, pairs in result.get("pairs", {}).items():
        here, base = (f"{result[side][part]['median'] * 1e3:.3f}" for side in ("here", "base"))
        medians = [one["median"] for one in pairs]
        spread = f"{result['ratios'][part]:.3f} \\[{min(medians):.3f}-{max(medians):.3f}]"
        rows.append([part, here, base, spread, result["verdicts"][part]])
    notes = [f"no numbers, {side}: {reason}" for side, reason in result["wrong"].items()]
    columns = "", "here ms", f"{ref} ms", "ratio \\[of the pairs]", ""
    return shown(f"{result['case']}, {result['dtype']}", columns, rows, notes)


@contextmanager
def _tree(ref: str) -> Iterator[tuple[Path, str]]:
    """A temporary work tree of the commit, and its short name. Raises ValueError with git's reason."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"--base {ref}: git {arguments[0]}: {done.stderr.strip()}")
        return done.stdout.strip()

    commit = git("rev-parse", "--verify", "--short=12", f"{ref}^{{commit}}")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            if not (tree / "lorafuse" / "bench" / "worker.py").is_file():
                raise ValueError(f"--base {ref}: it has no lorafuse/bench/worker.py, too old for this")
            yield tree, commit
        finally:
            git("worktree", "remove", "--force", str(tree))
