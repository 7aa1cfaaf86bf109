"""The table of factors, and where others are ahead: how many times lorafuse's time each of them takes."""

from collections.abc import Iterator
from typing import Any

from result_tables import Result, label_of, milliseconds, table

from lorafuse.bench.result import with_adapters

__all__ = [
    *("PEFT_SETTINGS", "behind", "case_name", "factors", "headline", "losers", "ours", "slower_than_full"),
    "unmeasured",
]

# a case above this share of a peer's time is behind it
_BEHIND = 1.02
# settings of PEFT by variant, as the table's columns name them
PEFT_SETTINGS = {
    "peft-half": "PEFT, bf16 adapters",
    "peft-autocast": "PEFT, autocast",
    "peft-compiled": "PEFT, torch.compile",
    "peft": "PEFT's default: fp32 adapters, no autocast",
}


def ours(result: Result) -> dict[str, Any]:
    """The figures of what `lorafuse.patch` runs: groups where there are some; {} where lorafuse was not measured."""
    variants = result["variants"]
    own: dict[str, Any] = variants.get("lorafuse-group", variants.get("lorafuse", {}))
    return own


def factors(result: Result) -> dict[str, float]:
    """Time of each other variant that trains adapters / lorafuse's, the smallest first; below 1 it is ahead."""
    variants, own = result["variants"], ours(result)
    if not own:
        return {}
    adapted = with_adapters(result, "step" if result["kind"] == "model" else "total")
    ratios = {name: _seconds(variants[name]) / _seconds(own) for name in adapted if not name.startswith("lorafuse")}
    return dict(sorted(ratios.items(), key=lambda one: one[1]))


def _seconds(one: dict[str, Any]) -> float:
    median: float = (one["step"] if "step" in one else one["total"])["median"]
    return median


def headline(results: list[Result], absent: str) -> str:
    """A row for each case, the one where lorafuse gains least first; what was not measured is `absent`."""
    pairs = [(result, factors(result)) for result in results]
    pairs = sorted(((r, f) for r, f in pairs if f), key=lambda one: min(one[1].values()))
    shown = [name for name in PEFT_SETTINGS if name in ("peft-half", "peft") or any(name in f for _, f in pairs)]
    rows = []
    for result, times in pairs:
        first = next(iter(times))
        cells = [f"{times[name]:.2f}×" if name in times else absent for name in shown]
        own = milliseconds(_seconds(ours(result)))
        rows.append([case_name(result), own, f"{times[first]:.2f}× {label_of(result, first)}", *cells])
    head = ["forward and backward", "lorafuse", "fastest of the others measured"]
    return table([*head, *(PEFT_SETTINGS[name] for name in shown)], rows)


def case_name(result: Result) -> str:
    """What a case is, in words: the layer, block or model, and how many tokens."""
    if result["kind"] == "model":
        layers = f"{result['layers']} of {result['layers_of_model']} layers"
        return f"{result['model']}, a training step, {layers}, {result['tokens_per_step']} tokens"
    if result["kind"] == "moe":
        return f"{result['case']}, the experts of a block, {result['M']} tokens, {result['routing']}"
    what = "a decoder layer" if result["kind"] == "layer" else "one layer"
    return f"{result['case']}, {what}, {result['M']} tokens"


def unmeasured(results: list[Result]) -> str:
    """The settings of PEFT against which some of the cases were not measured, by the sort of case."""
    settings = {"peft-half": "bf16 adapters", "peft-autocast": "autocast", "peft": "its default"}
    missing: dict[str, list[str]] = {}
    for result in results:
        named = missing.setdefault(
            {"model": "steps", "moe": "experts", "layer": "decoder layers"}.get(result["kind"], "layers"), []
        )
        named += [text for one, text in settings.items() if one not in factors(result) and text not in named]
    lines = [f"{sort} against PEFT with {' or '.join(named)}" for sort, named in missing.items() if named]
    return "; ".join(lines) or "nothing"


def behind(result: Result) -> Iterator[tuple[str, float]]:
    """The variants more than 2 % ahead of lorafuse, and lorafuse's time / theirs, the fastest first."""
    yield from ((name, 1 / ratio) for name, ratio in factors(result).items() if 1 / ratio > _BEHIND)


def losers(results: list[Result]) -> list[str]:
    """Each case where lorafuse is behind, and whom, by how much of their time."""
    lines = []
    for result in results:
        ahead = [f"{ratio - 1:.0%} behind {label_of(result, name)}" for name, ratio in behind(result)]
        if ahead:
            lines.append(f"{_sized(result)}: {', '.join(ahead)}")
    return lines


def slower_than_full(results: list[Result]) -> list[str]:
    """Each case where lorafuse takes longer than full fine-tuning, and how many times its time."""
    ratios = [(one, ours(one).get("ratio_to_full", 0.0)) for one in results]
    return [f"{_sized(result)}: {ratio:.2f}" for result, ratio in ratios if ratio > 1]


def _sized(result: Result) -> str:
    sizes = [f"{key} {result[key]}" for key in ("M", "R") if key in result]
    return ", ".join([result["case"], *([result["routing"]] if "routing" in result else []), *sizes])
