"""Figures from raw rounds: medians, spreads, ratios and intervals. Nothing here measures.

`derive` computes every figure of a result from what was recorded, so that tables and tests can compute them again.
Raw seconds are lists of one list for each process: `seconds` of a layer holds those of "forward" and "backward", of a
model those of its steps. Ratios are taken in each round, whose calls met the machine in one state; the figure is their
median. "over_dense" is a ratio to lorafuse over a dense base, minus 1. The floor of a LoRA tax is the fastest frozen
variant, chosen by its median, forward and backward apart.
"""

import copy
import random
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from lorafuse.testing.timing import percentile

__all__ = ["LEAST_ROUNDS", "bootstrap", "derive", "interval", "is_noise", "merge", "raw", "summary"]

# no figure of fewer rounds is published
LEAST_ROUNDS = 10
# two processes say next to nothing of how far a third may lie
_LEAST_PROCESSES = 3
_PARTS = ("forward", "backward")
_DRAWS, _LEVEL = 1000, 0.95
# seconds are kept to the nanosecond, below the resolution of every clock here
_DIGITS = 9

Processes = Sequence[Sequence[float]]
Result = dict[str, Any]


def raw(seconds: Iterable[float]) -> list[list[float]]:
    """The seconds of one process as a result holds them."""
    return [[round(one, _DIGITS) for one in seconds]]


def bootstrap(processes: Processes) -> tuple[float, float]:
    """The 95 % interval of the median: processes are drawn with replacement, then the rounds of each.

    Deterministic. Rounds of one process share its luck (addresses, clocks, neighbours), so only several processes say
    how far another run may lie.
    """
    draw = random.Random(0)
    medians = [
        statistics.median([one for process in drawn for one in draw.choices(process, k=len(process))])
        for drawn in (draw.choices(processes, k=len(processes)) for _ in range(_DRAWS))
    ]
    return percentile(medians, (1 - _LEVEL) / 2), percentile(medians, (1 + _LEVEL) / 2)


def interval(one: dict[str, Any], figure: str = "tax") -> tuple[float, float] | None:
    """The interval of a variant's figure: over processes where several were run, else the middle 60 % of rounds."""
    for ends in (("low", "high"), ("p20", "p80")):
        if f"{figure}_{ends[0]}" in one:
            return one[f"{figure}_{ends[0]}"], one[f"{figure}_{ends[1]}"]
    return None


def is_noise(one: dict[str, Any], figure: str = "tax") -> bool:
    """Whether a tax is negative and cannot be told from zero: it is no advantage."""
    ends = interval(one, figure)
    return one[figure] < 0 and ends is not None and ends[1] >= 0


def merge(results: list[Result]) -> Result:
    """The results of one case in several processes as one; variants that failed in one of them are dropped."""
    merged = copy.deepcopy(results[0])
    for other in results[1:]:
        merged["failed"] = other["failed"] | merged["failed"]
        for name in list(merged["variants"]):
            if name not in other["variants"]:
                del merged["variants"][name]
                continue
            one, more = merged["variants"][name], other["variants"][name]
            for own, added in [(one, more)] + [(one[k], more[k]) for k in ("warm_x",) if k in one and k in more]:
                if isinstance(own["seconds"], dict):
                    for part in _PARTS:
                        own["seconds"][part] += added["seconds"][part]
                else:
                    own["seconds"] += added["seconds"]
    return derive(merged)


def derive(result: Result) -> Result:
    """The result with every figure that follows from its raw seconds, computed in place; returns it.

    Needs "variants" with "trains" and "seconds"; for a layer "work" and "peaks", for a model "model_flops" of each
    variant, "tokens_per_step", "peak_flops_per_s" and "turns".
    """
    variants = result["variants"]
    if result["kind"] == "model":
        _steps(result)
        counted = [one["seconds"] for one in variants.values()]
    else:
        result["floor"] = _layers(variants, variants, result)
        warm = {name: one["warm_x"] for name, one in variants.items() if "warm_x" in one}
        if warm:
            result["warm_floor"] = _layers(warm, variants, result)
        counted = [one["seconds"]["forward"] for one in variants.values()]
    result["processes"] = max((len(one) for one in counted), default=0)
    result["rounds"] = max((sum(map(len, one)) for one in counted), default=0)
    return result


def _pooled(processes: Processes) -> list[float]:
    return [one for process in processes for one in process]


def summary(processes: Processes) -> dict[str, float]:
    """Median, 20th and 80th percentile of all rounds."""
    values = _pooled(processes)
    return {"median": statistics.median(values), "p20": percentile(values, 0.2), "p80": percentile(values, 0.8)}


def _sum(first: Processes, second: Processes) -> list[list[float]]:
    return [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(first, second, strict=True)]


def _ratio(figure: str, own: Processes, base: Processes, less: float = 0.0) -> dict[str, float]:
    """The median of the rounds' ratios minus `less`, with its spread, and its interval over several processes."""
    ratios = [[a / b - less for a, b in zip(*pair, strict=True)] for pair in zip(own, base, strict=True)]
    spread = summary(ratios)
    figures = {figure: spread["median"], f"{figure}_p20": spread["p20"], f"{figure}_p80": spread["p80"]}
    if len(ratios) >= _LEAST_PROCESSES:
        figures[f"{figure}_low"], figures[f"{figure}_high"] = bootstrap(ratios)
    return figures


def _fastest(seconds: dict[str, Processes]) -> str:
    return min(seconds, key=lambda name: statistics.median(_pooled(seconds[name])))


def _layers(timed: dict[str, Any], described: dict[str, Any], result: Result) -> dict[str, str]:
    """Figures of the timed variants; returns the names of the floor, by pass."""
    frozen = [name for name in timed if described[name]["trains"] == "nothing"]
    floor = {part: _fastest({name: timed[name]["seconds"][part] for name in frozen}) for part in _PARTS}
    least = _sum(*(timed[floor[part]]["seconds"][part] for part in _PARTS))
    bases = {"ratio_to_full": ("full", 0.0), "over_dense": ("lorafuse-dense", 1.0)}
    if result["kind"] == "layer":
        bases["tax_over_frozen"] = ("frozen", 1.0)
    for name, one in timed.items():
        total = _sum(*(one["seconds"][part] for part in _PARTS))
        for part, seconds in (*one["seconds"].items(), ("total", total)):
            one[part] = summary(seconds)
        one |= _ratio("tax", total, least, 1.0)
        for figure, (base, less) in bases.items():
            if base in timed:
                one |= _ratio(figure, total, _sum(*timed[base]["seconds"].values()), less)
        _rates(one, result["work"][described[name]["trains"]], result["peaks"])
    return floor


def _rates(one: dict[str, Any], work: dict[str, dict[str, int]], peaks: dict[str, float]) -> None:
    for part in _PARTS:
        seconds = one[part]["median"]
        one[part] |= {f"{what}_per_s": work[part][what] / seconds for what in ("flops", "bytes")}
    flops, moved = (sum(work[part][what] for part in _PARTS) for what in ("flops", "bytes"))
    median = one["total"]["median"]
    one |= {"flops_per_s": flops / median, "bytes_per_s": moved / median, "flops_per_byte": flops / moved}
    one["of_peak"] = one["flops_per_s"] / peaks["flops_per_s"]
    one["of_copy"] = one["bytes_per_s"] / peaks["bytes_per_s"]


def _steps(result: Result) -> None:
    """Figures of a model's steps; variants that took no turns with each other have a ratio of medians, no interval."""
    variants, turns = result["variants"], result["turns"]
    seconds = {name: one["seconds"] for name, one in variants.items()}
    frozen = {name: seconds[name] for name, one in variants.items() if one["trains"] == "nothing"}
    floor = _fastest(frozen) if frozen else None
    if floor is not None:
        result["floor"] = {"step": floor}

    def over(figure: str, name: str, base: str, less: float = 0.0) -> dict[str, float]:
        if any({name, base} <= set(turn) for turn in turns):
            return _ratio(figure, seconds[name], seconds[base], less)
        medians = [statistics.median(_pooled(seconds[one])) for one in (name, base)]
        return {figure: medians[0] / medians[1] - less}

    for name, one in variants.items():
        one["step"] = summary(seconds[name])
        one["rounds"] = len(_pooled(seconds[name]))
        median = one["step"]["median"]
        one["tokens_per_s"] = result["tokens_per_step"] / median
        one["flops_per_s"] = one["model_flops"] / median
        one["mfu"] = one["flops_per_s"] / result["peak_flops_per_s"]
        if "full" in variants:
            one |= over("ratio_to_full", name, "full")
        if floor is not None and one["trains"] == "adapters":
            one |= over("tax", name, floor, 1.0)
