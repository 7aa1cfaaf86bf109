"""Result files as plots: LoRA tax by M, by rank and by case, time against full fine-tuning, roofline, memory.

Only what the data supports is drawn, with its conditions below it. A variant has one colour and marker in all plots;
markers and hatches differ, so that a print in grey can be read.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lorafuse.bench.figures import interval
from lorafuse.bench.problem import title
from lorafuse.bench.result import with_adapters
from lorafuse.errors import MissingDependency

__all__ = ["colour", "draw", "figures", "save"]

Result = dict[str, Any]
# a name above its axes, and the results in it
Panel = tuple[str, list[Result]]


class Style(NamedTuple):
    colour: str
    marker: str
    hatch: str


# colours that the colour-blind tell apart (Okabe and Ito), lorafuse's own in reds
_STYLES = {
    "frozen": Style("#777777", "x", ""),
    "frozen-lorafuse": Style("#999999", "+", ""),
    "frozen-lorafuse-triton": Style("#aaaaaa", "+", "|"),
    "frozen-lorafuse-cuda": Style("#bbbbbb", "+", "-"),
    "full": Style("#000000", "s", "...."),
    "peft": Style("#0072b2", "o", "//"),
    "peft-half": Style("#56b4e9", "^", "\\\\"),
    "peft-autocast": Style("#003f63", "$a$", "/"),
    "peft-compiled": Style("#005a46", "v", "xx"),
    "addmm": Style("#009e73", "P", "--"),
    "addmm-saved": Style("#66c2a5", "$s$", "-"),
    "addmm-saved-fp32": Style("#1b7837", "$f$", "---"),
    "split": Style("#009e73", "P", "--"),
    "lorafuse": Style("#d55e00", "D", ""),
    "lorafuse-half": Style("#f4a582", "$h$", "."),
    "lorafuse-autocast": Style("#b2182b", "$c$", ".."),
    "lorafuse-eager": Style("#e69f00", "<", "||"),
    "lorafuse-addmm": Style("#f0c75e", "8", "--"),
    "lorafuse-triton": Style("#8c1c13", ">", "++"),
    "lorafuse-cuda": Style("#b5476b", "h", "**"),
    "lorafuse-cuda-tiles": Style("#c25b8a", "p", "O."),
    "lorafuse-cuda-split": Style("#a34e74", "^", "O-"),
    "lorafuse-cuda-forward": Style("#8e4585", "<", "O|"),
    "lorafuse-cuda-concurrent": Style("#7a1f3d", "H", "oo"),
    "lorafuse-cuda-backward": Style("#54162b", "v", "o."),
    "lorafuse-cuda-gathered": Style("#3a0d1c", "s", "o|"),
    "unsloth": Style("#cc79a7", "X", "///"),
    "axolotl": Style("#6a3d9a", "*", "\\\\\\"),
    "axolotl-scattermoe": Style("#b15928", "1", "xxx"),
}
# for baselines that are not this project's
_OTHERS = (Style("#a6761d", "3", "+++"), Style("#386cb0", "4", "ooo"))
# the footer, in this order; a result without those of _REQUIRED is not drawn
_CONDITIONS = ("device", "threads", "cuda", "power limit", "torch", "peft", "commit", "date")
_REQUIRED = ("device", "torch", "date")
_COLUMNS = 3
# inches: of one panel of several, the width of a single one, and beside all panels for the legend
_PANEL, _ALONE, _LEGEND = (3.6, 2.9), 6.0, 2.6
# of saved files
_DPI = 130
_FLOOR = "arithmetic floor"


def colour(name: str) -> str:
    """The colour that a variant of this project's has in every plot."""
    return _STYLES[name].colour


def draw(content: dict[str, Any], folder: Path) -> list[Path]:
    """Write every plot that the content of a result file supports as PNG into a folder; the files, by name.

    Raises ValueError when the folder cannot be written to or the content lacks its conditions, MissingDependency
    without matplotlib.
    """
    written = []
    for name, figure in figures(content).items():
        save(figure, folder / f"{name}.png")
        written.append(folder / f"{name}.png")
    return written


def save(figure: Any, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write one figure as PNG with text chunks of `metadata`. Raises ValueError when the path cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the library's version would change the file with every update
        figure.savefig(path, dpi=_DPI, metadata={"Software": None, **(metadata or {})})
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}; name another folder") from error


def figures(content: dict[str, Any], only: str = "") -> dict[str, Any]:
    """matplotlib's Figure of each plot that the content of a result file supports, by the name of its file.

    `only` is the name of a single one. Raises ValueError when the content lacks device, torch or date,
    MissingDependency without matplotlib.
    """
    footer, results = _footer(content["conditions"]), content["results"]
    makers: dict[str, Callable[[], Any]] = {
        "tax-by-m": lambda: _lines(results, "M", "tax"),
        "tax-by-rank": lambda: _lines(results, "R", "tax"),
        "full-by-rank": lambda: _lines(results, "R", "ratio_to_full"),
        "tax-by-case": lambda: _tax_by_case(results),
        "roofline": lambda: _roofline(results),
    }
    if content["kind"] == "memory":
        makers = {"memory": lambda: _memory(results)}
    made = {name: make() for name, make in makers.items() if only in ("", name)}
    drawn = {name: figure for name, figure in made.items() if figure is not None}
    for figure in drawn.values():
        figure.supxlabel(footer, fontsize=7, color="#444444", x=0.01, ha="left")
        # left, where the legend is not
        figure.suptitle(figure.get_suptitle(), fontsize=10, x=0.01, ha="left")
    return drawn


def _footer(conditions: dict[str, str]) -> str:
    if missing := [name for name in _REQUIRED if not conditions.get(name)]:
        raise ValueError(f"no plot without its conditions: {', '.join(missing)} not in the result file")
    given = {name: conditions[name] for name in _CONDITIONS if conditions.get(name)}
    return ", ".join(value if name in ("device", "date") else f"{name} {value}" for name, value in given.items())


def _lines(results: list[Result], by: str, key: str) -> Any:
    """A panel for each case that was measured at several values of `by`; None when there is none."""
    panels = [
        (over, sorted(rows, key=lambda row: row[by]))
        for over, rows in _grouped(results, lambda r: title({k: v for k, v in r.items() if k != by}))
        if len({row[by] for row in rows if by in row}) > 1 and any(with_adapters(row, key) for row in rows)
    ]
    if not panels:
        return None
    is_tax = key == "tax"
    word, axis = "LoRA tax" if is_tax else "step time / full fine-tuning", {"M": "tokens M", "R": "rank"}[by]
    figure, axes, styles = _panels(panels, axis, word)
    for ax, (_, rows) in zip(axes, panels, strict=True):
        for name in dict.fromkeys(name for row in rows for name in with_adapters(row, key)):
            had = [row for row in rows if name in with_adapters(row, key)]
            values, measured = [row[by] for row in had], [row["variants"][name] for row in had]
            own = {"color": styles[name].colour, "zorder": 3 if name.startswith("lorafuse") else 2}
            look = {"marker": styles[name].marker, "markersize": 4.5, "linewidth": 1.6, **own}
            ax.plot(values, [one[key] for one in measured], label=measured[0].get("label", name), **look)
            ends = [limits for one in measured if (limits := interval(one, key)) is not None]
            if len(ends) == len(measured):
                ax.fill_between(values, *zip(*ends, strict=True), alpha=0.15, linewidth=0, **own)
        if floors := [(row[by], row["floors"][key]) for row in rows if "floors" in row]:
            ax.plot(*zip(*floors, strict=True), "--", color="#000000", linewidth=1, label=_FLOOR)
        if is_tax:
            ax.yaxis.set_major_formatter(_percent())
        else:
            ax.axhline(1, color="#777777", linewidth=0.8, label="full fine-tuning")
        _log2_ticks(ax, sorted({row[by] for row in rows}))
    return _finished(figure, axes, f"{word} by {axis}: medians{', bands of spread' * is_tax}, lower is better")


def _tax_by_case(results: list[Result]) -> Any:
    """A panel for each M and rank at which several cases were measured; None when there is none."""
    panels = [
        (over, rows)
        for over, rows in _grouped(results, lambda r: _sizes(r, ("M", "R", "dtype")))
        if len({_case(row) for row in rows}) > 1 and any(with_adapters(row, "tax") for row in rows)
    ]

    def value(row: Result, name: str) -> tuple[float, tuple[float, float] | None] | None:
        one = row["variants"].get(name)
        return (one["tax"], interval(one)) if name in with_adapters(row, "tax") else None

    figure = _bars(panels, value, _case, "LoRA tax", "LoRA tax by case: medians, whiskers of spread, lower is better")
    for ax in figure.axes if figure is not None else ():
        ax.xaxis.set_major_formatter(_percent())
    return figure


def _memory(results: list[Result]) -> Any:
    """A panel for each case, a group of bars for each of its sizes; None without results."""
    panels = _grouped(results, lambda r: title({k: v for k, v in r.items() if k not in ("M", "R")}))

    def value(row: Result, name: str) -> tuple[float, None] | None:
        variants = row["variants"]
        if name == "frozen" or name not in variants:
            return None
        return (variants[name]["peak_bytes"] - variants["frozen"]["peak_bytes"]) / 2**20, None

    above = "Peak memory of forward and backward over the frozen layer's, lower is better"
    return _bars(panels, value, lambda row: _sizes(row, ("M", "R")), "MiB over frozen", above)


def _bars(
    panels: list[Panel], value: Callable[[Result, str], Any], label: Callable[[Result], str], word: str, above: str
) -> Any:
    """Horizontal bars: `value` of a variant is its length and, or None, the ends of its whisker."""
    if not panels:
        return None
    names = [n for n in _styles(panels) if any(value(row, n) is not None for _, rows in panels for row in rows)]
    # inches: a bar, a gap, what title and axis take
    heights = [0.13 * len(names) * len(rows) + 0.25 * len(rows) + 0.9 for _, rows in panels]
    figure, axes, styles = _panels(panels, word, "", heights)
    thick = 0.8 / len(names)
    for ax, (_, rows) in zip(axes, panels, strict=True):
        for index, name in enumerate(names):
            had = [(at, row, bar) for at, row in enumerate(rows) if (bar := value(row, name)) is not None]
            if not had:
                continue
            places = [at - 0.4 + thick * (index + 0.5) for at, _, _ in had]
            ax.barh(
                places, [length for _, _, (length, _) in had], height=thick, color=styles[name].colour,
                hatch=styles[name].hatch, edgecolor="white", linewidth=0.3,
                label=had[0][1]["variants"][name].get("label", name),
            )  # fmt: skip
            for place, (_, _, (_, ends)) in zip(places, had, strict=True):
                if ends is not None:
                    ax.plot(ends, [place, place], color="#222222", linewidth=0.8)
        for at, row in enumerate(rows):
            if word == "LoRA tax" and "floors" in row:
                least, span = row["floors"]["tax"], [at - 0.45, at + 0.45]
                ax.plot([least, least], span, "--", color="#000000", linewidth=1, label=_FLOOR)
        ax.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
        ax.axvline(0, color="#777777", linewidth=0.8)
        # the first case on top
        ax.invert_yaxis()
    return _finished(figure, axes, above)


def _roofline(results: list[Result]) -> Any:
    """A panel for each dtype: every variant of every result, under what this device reached; None without those."""
    rated = [row for row in results if "of_peak" in next(iter(row["variants"].values()))]
    groups = _grouped(rated, lambda r: r["dtype"])
    if not groups:
        return None
    panels = [(f"{dtype}, {len(rows)} result{'s' * (len(rows) > 1)}", rows) for dtype, rows in groups]
    words = "FLOPs / byte, least work of forward and backward", "FLOP/s"
    figure, axes, styles = _panels(panels, *words, [4.2] * len(panels))
    for ax, (_, rows) in zip(axes, panels, strict=True):
        # every figure of a run was divided by the same two
        one = next(iter(rows[0]["variants"].values()))
        peak, copy = one["flops_per_s"] / one["of_peak"], one["bytes_per_s"] / one["of_copy"]
        at = [peak / copy]
        for name, style in styles.items():
            points = [row["variants"][name] for row in rows if name in row["variants"]]
            if points:
                xs, ys = ([p[key] for p in points] for key in ("flops_per_byte", "flops_per_s"))
                at += xs
                look = {"marker": style.marker, "color": style.colour, "markersize": 5, "alpha": 0.85}
                ax.plot(xs, ys, linestyle="", label=points[0].get("label", name), **look)
        low, ridge, high = min(at) / 2, peak / copy, max(at) * 2
        roof = {"color": "#000000", "linewidth": 1.2}
        ax.plot([low, ridge], [low * copy, peak], label=f"copy: {copy / 1e9:.3g} GB/s", **roof)
        ax.plot([ridge, high], [peak, peak], "-.", label=f"product: {peak / 1e12:.3g} TFLOP/s", **roof)
        ax.set_xscale("log")
        ax.set_yscale("log")
    return _finished(figure, axes, "Roofline: the roofs are a large product and a copy, measured in this run")


def _case(row: Result) -> str:
    return " ".join(str(row[name]) for name in ("case", "routing") if name in row)


def _sizes(row: Result, names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {row[name]}" if len(name) == 1 else str(row[name]) for name in names if name in row)


def _grouped(results: Iterable[Result], over: Callable[[Result], str]) -> list[Panel]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(over(result), []).append(result)
    return list(groups.items())


def _styles(panels: list[Panel]) -> dict[str, Style]:
    """The style of each variant, in the order of the results; others' baselines get theirs by their sorted names."""
    names = list(dict.fromkeys(name for _, rows in panels for row in rows for name in row["variants"]))
    others = sorted(set(names) - _STYLES.keys())
    given = _STYLES | {name: _OTHERS[index % len(_OTHERS)] for index, name in enumerate(others)}
    return {name: given[name] for name in names}


def _panels(
    panels: list[Panel], across: str, up: str, heights: list[float] | None = None
) -> tuple[Any, list[Any], dict[str, Style]]:
    """A figure with axes for each panel in a grid, each as high, in inches, as the highest of its row; the styles."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("plots need matplotlib: pip install 'lorafuse[cli]'") from error
    columns = min(_COLUMNS, len(panels))
    asked = heights or [_PANEL[1]] * len(panels)
    rows = [max(asked[first : first + columns]) for first in range(0, len(panels), columns)]
    size = max(_PANEL[0] * columns, _ALONE) + _LEGEND, max(sum(rows) + 0.6, 3.2)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(len(rows), columns, squeeze=False, height_ratios=rows).flat)
    for spare in axes[len(panels) :]:
        spare.remove()
    for ax, (name, _) in zip(axes, panels, strict=False):
        ax.set_title(name, fontsize=8)
        ax.set_xlabel(across, fontsize=8)
        ax.set_ylabel(up, fontsize=8)
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(which="both", labelsize=7)
    return figure, axes[: len(panels)], _styles(panels)


def _finished(figure: Any, axes: list[Any], above: str) -> Any:
    """The figure with its title, and one legend right of all panels, each name once."""
    figure.suptitle(above)
    named: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _log2_ticks(ax: Any, values: list[int]) -> None:
    """A logarithmic axis with a tick at each value that was measured."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(values, [str(value) for value in values])
    ax.minorticks_off()


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(xmax=1)
