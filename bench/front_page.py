"""README's first screen: the claim with its weakest factor, one row for each sort of case, and the graph of factors."""

from typing import Any

import result_tables as tables
from headline import PEFT_SETTINGS, case_name, factors, ours
from result_tables import Content, Result, table

from lorafuse.bench import plots

__all__ = ["Sort", "claim", "conditions", "figure", "sorts", "summary"]

# what a row of README's table and a panel of its graph are about: device, kind, its results
Sort = tuple[str, str, list[Result]]
_KINDS = {
    "layer": "a decoder layer",
    "linear": "one layer",
    "moe": "the experts of a block",
    "model": "a training step",
}
_FASTEST = "fastest of the others measured"


def sorts(contents: list[Content]) -> list[Sort]:
    """The results of each device and kind, where another implementation was measured."""
    grouped: dict[tuple[str, str], list[Result]] = {}
    for content in contents:
        for result in filter(factors, content["results"]):
            # files before version 2 do not say their kind
            kind = result["kind"] or ("moe" if "routing" in result else "linear")
            grouped.setdefault((content["conditions"]["device"], kind), []).append(result)
    return [(device, kind, results) for (device, kind), results in grouped.items()]


def _range(values: list[float], absent: str) -> str:
    ordered = sorted(values)
    if not ordered:
        return absent
    low, high = f"{ordered[0]:.2f}×", f"{ordered[-1]:.2f}×"
    return low if low == high else f"{low} to {high}"


def _setting(results: list[Result], name: str) -> list[float]:
    return [times[name] for times in map(factors, results) if name in times]


def _fastest(results: list[Result]) -> list[float]:
    return [min(factors(result).values()) for result in results]


def _sizes(results: list[Result]) -> str:
    tokens = sorted({result["tokens_per_step"] if result["kind"] == "model" else result["M"] for result in results})
    many = f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
    return f"{many} tokens, {', '.join(sorted({result['dtype'] for result in results}))}"


def _models(results: list[Result]) -> str:
    """Models by the names of their cases; of a step that has fewer layers than its model, how many."""
    named = []
    for result in results:
        if result["kind"] == "model":
            named.append(f"{result['model']}, {result['layers']} of {result['layers_of_model']} layers")
        else:
            named.append(result["case"].rpartition(".")[0] or result["case"])
    return ", ".join(dict.fromkeys(named))


def summary(given: list[Sort], absent: str) -> str:
    """A row for each sort: how many cases, and the range of the others' times / lorafuse's."""
    rows = []
    for device, kind, results in given:
        what = f"{device}: {_KINDS[kind]} ({_models(results)}; {_sizes(results)})"
        settings = [_range(_setting(results, name), absent) for name in ("peft-half", "peft")]
        rows.append([what, str(len(results)), _range(_fastest(results), absent), *settings])
    head = ["forward and backward, time / lorafuse's", "cases", _FASTEST]
    return table([*head, "PEFT, adapters in the base's dtype", PEFT_SETTINGS["peft"]], rows)


def claim(given: list[Sort], absent: str) -> str:
    """The sentence below README's title: the range of each kind on GPUs and on CPUs, its weakest factor in bold, and
    the LoRA tax of decoder layers.
    """
    machines: dict[str, dict[str, list[Result]]] = {}
    for device, kind, results in given:
        place = f"an {device}" if device.startswith("NVIDIA") else "CPUs"
        machines.setdefault(place, {}).setdefault(kind, []).extend(results)
    parts = []
    for place, kinds in machines.items():
        texts = []
        for kind, results in kinds.items():
            low, _, high = _range(_fastest(results), absent).partition(" to ")
            alone = " against PEFT's default alone" * ({name for one in results for name in factors(one)} == {"peft"})
            texts.append(f"{_KINDS[kind]} **{low}**" + f" to {high}" * bool(high) + alone + _taxes(kind, results))
        parts.append(f"on {place} {', '.join(texts)}")
    return f"Speed over the fastest alternative measured in each case: {'; '.join(parts) or absent}."


def _taxes(kind: str, results: list[Result]) -> str:
    """The least and the largest LoRA tax of decoder layers, in words."""
    if kind != "layer":
        return ""
    least, most = (tables.tax_text(end(map(ours, results), key=lambda one: one["tax"])) for end in (min, max))
    return f" (LoRA tax {least}" + f" to {most}" * (most != least) + ")"


def conditions(contents: list[Content]) -> str:
    """Devices with their settings, the days and commits of the measurements."""
    settings = [content["conditions"] for content in contents]
    bare = [{"conditions": {k: v for k, v in one.items() if k not in ("date", "commit")}} for one in settings]
    days = sorted(one["date"].partition(" ")[0] for one in settings)
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    commits = ", ".join(dict.fromkeys(one["commit"] for one in settings))
    return f"{'; '.join(dict.fromkeys(map(tables.conditions, bare)))}; {when}; commits {commits}"


def figure(contents: list[Content]) -> Any:
    """matplotlib's Figure: for each case the others' times / lorafuse's as points; left of 1 another is faster."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = [result for content in contents for result in content["results"] if factors(result)]
    # the weakest on top
    cases.sort(key=lambda one: -min(factors(one).values()))
    drawn = Figure(figsize=(8.6, 0.36 * len(cases) + 1.5), layout="constrained")
    FigureCanvasAgg(drawn)
    ax = drawn.subplots()
    for at, result in enumerate(cases):
        times = factors(result).values()
        ax.plot([min(times), max(times)], [at, at], color="#bbbbbb", linewidth=2, zorder=1)
    for name, marker, size in (("peft", "o", 70), ("peft-half", "^", 70)):
        points = [(factors(one)[name], at) for at, one in enumerate(cases) if name in factors(one)]
        if points:
            look = {"color": plots.colour(name), "marker": marker, "s": size, "zorder": 3}
            ax.scatter(*zip(*points, strict=True), label=PEFT_SETTINGS[name], **look)
    fastest = [min(factors(one).values()) for one in cases]
    # smaller than the setting of PEFT that it may be, and over it
    ax.scatter(fastest, range(len(cases)), label=_FASTEST, color="#000000", marker="D", s=22, zorder=4)
    ax.axvline(1, color=plots.colour("lorafuse"), linewidth=2, label="lorafuse")
    left, right = min(0.8, *fastest), ax.get_xlim()[1]
    ax.axvspan(left, 1, color="#777777", alpha=0.15, linewidth=0)
    ax.set_xlim(left, right)
    ax.set_yticks(range(len(cases)), [case_name(one) for one in cases])
    ax.xaxis.set_major_formatter("{x:.1f}×")
    ax.grid(axis="x", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    ax.legend(loc="upper right", fontsize=8, frameon=False)
    above = "Time of the others / lorafuse's, forward and backward; left of 1× (grey) another is faster"
    drawn.suptitle(above, fontsize=10, x=0.01, ha="left")
    drawn.supxlabel(conditions(contents), fontsize=7, color="#444444", x=0.01, ha="left")
    return drawn
