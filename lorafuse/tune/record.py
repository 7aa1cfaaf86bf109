"""Measured outcomes as entries of the table that plans follow."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median

from lorafuse.plan import Problem, tuned
from lorafuse.tune.measure import Outcome
from lorafuse.tune.ranges import rectangles

__all__ = ["record"]

# joins the conditions of several runs
_AND = " and "
# the conditions that a kernel's speed depends on
_CONDITIONS = ("device", "cuda", "power limit", "driver", "torch", "triton", "lorafuse")


def record(
    entries: Sequence[tuned.Tuned], outcomes: Sequence[Outcome], conditions: dict[str, str]
) -> tuple[tuned.Tuned, ...]:
    """`entries` with the outcomes' winners, over the ranges of `tune.ranges`, measured under `conditions`.

    Earlier points of the same layer and pass stay, unless they are measured again or their kernel was wrong now. An
    entry with points of several runs names the conditions of all.
    """
    commit = conditions.get("commit") or f"of release {conditions['lorafuse']}"
    kept = {name: conditions[name] for name in _CONDITIONS if name in conditions}
    new: list[tuned.Tuned] = []
    kinds: dict[Problem, list[Outcome]] = {}
    for outcome in outcomes:
        # whether a kernel can decode in its main loop is a matter of M
        kinds.setdefault(replace(outcome.problem, M=1, R=1, packed=False), []).append(outcome)
    for kind, of_kind in kinds.items():
        wrong = {name for outcome in of_kind for name in outcome.wrong}
        former = [entry for entry in entries if entry.is_of(kind)]
        points = {
            point[:2]: replace(entry, points=(point,), seconds=point[2])
            for entry in former
            if entry.kernel not in wrong
            for point in entry.points
        }
        for outcome in of_kind:
            M, R = outcome.problem.M, outcome.problem.R
            right = {name: seconds for name, seconds in outcome.seconds.items() if name not in wrong}
            if not right:
                points.pop((M, R), None)
                continue
            winner = replace(outcome, seconds=right).winner()
            # to the nanosecond
            seconds = round(median(right[winner]), 9)
            points[M, R] = tuned.Tuned(
                kind.N, kind.K, (R, R), (M, M), kind.dtype, kind.dropout, kind.gradients, winner, seconds, commit,
                conditions["date"], ((M, R, seconds),), kept, kind.format, kind.groups,
                kind.siblings, kind.epilogue,
            )  # fmt: skip
        for of_m, of_r, _ in rectangles({size: entry.kernel for size, entry in points.items()}):
            inside = [points[M, R] for M, R in sorted(points) if of_m[0] <= M <= of_m[1] and of_r[0] <= R <= of_r[1]]
            new.append(replace(_merged(inside), M=of_m, R=of_r))
        # entries of version 1 have a range and no points; new measurements come before them
        new += [entry for entry in former if not entry.points and entry.kernel not in wrong]
    return (*new, *(entry for entry in entries if not any(entry.is_of(kind) for kind in kinds)))


def _merged(points: Sequence[tuned.Tuned]) -> tuned.Tuned:
    """One entry from entries of one point each and one kernel, in their order."""

    def joined(values: Iterable[str]) -> str:
        return _AND.join(dict.fromkeys(part for value in values for part in value.split(_AND)))

    names = dict.fromkeys(name for point in points for name in point.conditions)
    return replace(
        points[-1],
        points=tuple(single for point in points for single in point.points),
        commit=joined(point.commit for point in points),
        date=max(point.date for point in points),
        conditions={name: joined(p.conditions[name] for p in points if name in p.conditions) for name in names},
    )
