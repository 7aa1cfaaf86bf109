"""The output of `lorafuse tune`: the work of a dry run, a table for each shape, totals before and after."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lorafuse.plan import Problem, tuned
from lorafuse.testing.cases import Case
from lorafuse.testing.timing import percentile
from lorafuse.tune.measure import PASSES, Outcome, Target, is_measured, usual

__all__ = ["Totals", "print_layer", "print_totals", "print_work", "shape"]


def shape(case: Case) -> str:
    """A layer as text: its name, out and in features."""
    return f"{case.name} ({case.N} × {case.K})" if case.name else f"{case.N} × {case.K}"


def _pass(problem: Problem) -> str:
    return next(name for name, gradients in PASSES.items() if gradients == problem.gradients)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}"


def _measured(seconds: Sequence[float]) -> str:
    return f"{_us(median(seconds))} [{_us(percentile(seconds, 0.2))}-{_us(percentile(seconds, 0.8))}]"


def _modelled(target: Target, problem: Problem) -> dict[str, float]:
    return {name: one.seconds for name, one in target.candidates(problem).items()}


def print_work(console: Any, target: Target, work: Mapping[Case, Sequence[Sequence[Problem]]], rounds: int) -> None:
    """Every pass to measure, its candidates with their modelled times, and the sum of all."""
    from rich.table import Table

    console.print(f"on {target.spec.name}, {rounds} rounds of each candidate:", highlight=False)
    total, count = 0.0, 0
    for case, groups in work.items():
        if not groups:
            continue
        table = Table(title=shape(case), title_justify="left")
        for column in ("pass", "M", "R", "without tuning", "candidates, us (model)"):
            table.add_column(column)
        for problem in (problem for group in groups for problem in group):
            modelled = _modelled(target, problem)
            shown = ", ".join(f"{name} {_us(seconds)}" for name, seconds in modelled.items())
            table.add_row(_pass(problem), str(problem.M), str(problem.R), usual(problem, target), shown)
            total += sum(modelled.values()) * rounds
            count += 1
        console.print(table)
    console.print(
        f"{count} passes; their kernels alone would run {total:.2g} s (model); compiling them, checking the results "
        "and emptying caches takes longer",
        highlight=False,
    )


def _recorded(problem: Problem, entries: Sequence[tuned.Tuned]) -> str:
    """The kernel that the file holds for a measured pass, "" where it holds none."""
    return next((entry.kernel for entry in entries if is_measured(problem, [entry])), "")


def print_layer(
    console: Any, case: Case, count: int, outcomes: Sequence[Outcome], entries: Sequence[tuned.Tuned], target: Target
) -> None:
    """The measurements of one shape, the recorded kernels, and why others were wrong or did not run."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    layers = f", {count} layers" if count > 1 else ""
    problem = outcomes[0].problem
    stored = "" if problem.format == "dense" else f" over {problem.format}"
    title = f"{shape(case)}{layers}, {problem.dtype}{stored}; times in us, median [20-80 %]"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("pass", "M", "R", "before", "(model)", "fastest", "gain"):
        # a narrow terminal folds long cells, and cuts nothing off
        table.add_column(column, justify="right" if column in ("M", "R", "(model)") else "left", overflow="fold")
    for outcome in outcomes:
        problem, before = outcome.problem, outcome.before
        modelled = _us(_modelled(target, problem)[before])
        sizes = _pass(problem), str(problem.M), str(problem.R)
        fastest = outcome.fastest() if outcome.seconds else ""
        cells = _timed(outcome, before), modelled, _timed(outcome, fastest), _gain(outcome, _recorded(problem, entries))
        table.add_row(*sizes, *cells)
    console.print(table)
    for outcome in outcomes:
        where = f"{shape(case)}, {_pass(outcome.problem)}, M {outcome.problem.M}, R {outcome.problem.R}"
        for name, why in outcome.wrong.items():
            console.print(f"{where}: {name} is not recorded, {why}", style="red", highlight=False, markup=False)
        for name, why in outcome.failed.items():
            console.print(f"{where}: {name} is left out, {why}", style="yellow", highlight=False, markup=False)


def _timed(outcome: Outcome, name: str) -> str:
    """A candidate with its measured time in a second line."""
    return f"{name}\n{_measured(outcome.seconds[name]) if name in outcome.seconds else 'not measured'}"


def _gain(outcome: Outcome, recorded: str) -> str:
    """The gain of the recorded kernel over the one before; names it where it is not the fastest."""
    if recorded not in outcome.seconds:
        return "none recorded"
    if outcome.before not in outcome.seconds:
        return recorded
    gain = f"{median(outcome.seconds[outcome.before]) / median(outcome.seconds[recorded]):.2f}×"
    return gain if recorded == outcome.fastest() else f"{gain}, {recorded} recorded"


@dataclass
class Totals:
    """Sums of median seconds over all layers of all passes of which both sides were measured, and their gains."""

    before: float = 0.0
    after: float = 0.0
    layers: int = 0
    logarithms: float = 0.0
    changed: int = 0
    passes: int = 0

    def add(self, count: int, outcomes: Sequence[Outcome], entries: Sequence[tuned.Tuned]) -> None:
        """Add the outcomes of a shape that `count` layers have."""
        for outcome in outcomes:
            recorded = _recorded(outcome.problem, entries)
            if recorded in outcome.seconds and outcome.before in outcome.seconds:
                before, after = (median(outcome.seconds[name]) for name in (outcome.before, recorded))
                self.before += count * before
                self.after += count * after
                self.logarithms += count * math.log(before / after)
                self.layers += count
                self.passes += 1
                self.changed += recorded != outcome.before


def print_totals(console: Any, totals: Totals, path: Path, followed: bool) -> None:
    """Times before and after, and the file; `followed`: plans read it."""
    if totals.passes:
        console.print(
            f"before → after, measured: {totals.before * 1e3:.3f} → {totals.after * 1e3:.3f} ms, the sum of "
            f"{totals.passes} passes over all their layers; gain {math.exp(totals.logarithms / totals.layers):.3f}× "
            f"(geometric mean); {totals.changed} passes have another kernel now",
            highlight=False,
        )
    if not path.exists():
        console.print("nothing was recorded")
        return
    use = "plans of processes that start from now on follow it" if followed else "plans do not look there"
    console.print(f"{path}: {use}", markup=False, highlight=False, soft_wrap=True)
