"""This checkout against another commit: the same layers, each side in a process of its own, in turns.

A pass has become slower when the median of its rounds' ratios is above 1.03 and the 99 % confidence interval of that
median (from order statistics, without assumptions on the noise) lies above 1.
"""

import argparse
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from lorafuse.bench import plugins
from lorafuse.bench.problem import Problem
from lorafuse.bench.remote import RemoteRunner
from lorafuse.bench.result import VERSION, write_json
from lorafuse.testing.conditions import conditions, describe
from lorafuse.testing.timing import Samples, measure

__all__ = ["USUAL", "interval", "run", "verdict"]

# what `lorafuse bench --base REF` runs: a layer where arithmetic counts, one where calls do, a block, experts
USUAL = (
    ("linear", "--case", "square-2048", "--m", "512"),
    ("linear", "--case", "smollm2-135m.q", "--m", "64"),
    ("group", "--case", "smollm2-135m.qkv", "--m", "512"),
    ("moe", "--case", "moe-64", "--m", "128"),
)
_NOTABLE = 1.03
_KINDS = ("linear", "group", "moe")
# two-sided probability that the interval misses the median
_MISS = 0.01

Prepare = Callable[[argparse.Namespace], tuple[list[Problem], torch.device]]


def run(runs: list[argparse.Namespace], console: Any, prepare: Prepare) -> int:
    """Compare every case of every run. 0 when nothing became slower, 1 when something did or gave a wrong result."""
    for args in runs:
        if args.kind not in _KINDS:
            raise ValueError(f"--base compares {', '.join(_KINDS)}, not {args.kind}")
    prepared = [(args, *prepare(args)) for args in runs]
    found = conditions(prepared[0][2])
    status, results = 0, []
    with _tree(runs[0].base) as (tree, commit):
        console.print(f"{describe(found)}; base {runs[0].base} is {commit}", highlight=False)
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
        if args.json:
            content = {"version": VERSION, "kind": "compare", "base": commit, "conditions": found, "results": results}
            write_json(args.json, content)
    slower = [f"{r['case']} {part}" for r in results for part, said in r["verdicts"].items() if said == "slower"]
    console.print(f"slower than {runs[0].base}: {', '.join(slower)}" if slower else "nothing became slower")
    return status


def _compare(
    problem: Problem, args: argparse.Namespace, device: torch.device, tree: Path, console: Any
) -> dict[str, Any]:
    result: dict[str, Any] = problem.described() | {"wrong": {}}
    with ExitStack() as stack:
        runners = []
        for side, root in (("here", Path(__file__).parents[2]), ("base", tree)):
            file = root / "bench" / "baselines" / "lorafuse.py"
            baseline = next(one for one in plugins.load_file(file, problem.kind, device) if one.name == "lorafuse")
            runner = RemoteRunner(side, problem, baseline, device, args.graphs, root)
            stack.callback(runner.close)
            if runner.wrong:
                result["wrong"][side] = runner.wrong
            runners.append(runner)
        if result["wrong"]:
            return result | {"verdicts": {}}
        samples: dict[str, Samples] = {}
        with console.status(f"{problem.name}: here and base in turns") as shown:
            for done, taken in enumerate(measure(runners, args.rounds, max(2, args.rounds // 10), args.seconds)):
                samples = taken
                shown.update(f"{problem.name}: here and base in turns, round {done + 1} of {args.rounds}")
    result["here"], result["base"] = samples["here"].summary(), samples["base"].summary()
    result["ratios"], result["verdicts"] = {}, {}
    for part in ("forward", "backward", "total"):
        here, base = getattr(samples["here"], part), getattr(samples["base"], part)
        ratios = [h / b for h, b in zip(here, base, strict=True)]
        low, median, high = interval(ratios)
        result["ratios"][part] = {"low": low, "median": median, "high": high}
        result["verdicts"][part] = verdict(low, median, high)
    return result


def interval(values: list[float]) -> tuple[float, float, float]:
    """The median, between the ends of its 99 % confidence interval by order statistics.

    The true median lies between the k-th smallest and the k-th largest of n values but with twice the probability of
    fewer than k heads in n throws of a coin. Below 8 values no interval has that confidence, and it is infinite.
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
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    found = Table(title=f"{result['case']}, {result['dtype']}", box=SIMPLE_HEAD)
    for column in ("", "here ms", f"{ref} ms", "ratio \\[99 % interval]", ""):
        found.add_column(column, justify="left" if not column else "right")
    for part, ratio in result.get("ratios", {}).items():
        here, base = (f"{result[side][part]['median'] * 1e3:.3f}" for side in ("here", "base"))
        spread = f"{ratio['median']:.3f} \\[{ratio['low']:.3f}-{ratio['high']:.3f}]"
        found.add_row(part, here, base, spread, result["verdicts"][part])
    found.caption = "\n".join(f"no numbers, {side}: {said}" for side, said in result["wrong"].items())
    return found


@contextmanager
def _tree(ref: str) -> Iterator[tuple[Path, str]]:
    """A work tree of the commit, as long as it is needed, and its short name. Raises ValueError with git's reason."""
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
