"""Result files as plots: LoRA tax by M, by rank and by case, time against full fine-tuning, roofline, memory.

Only what the data supports is drawn. Every plot says under what conditions it was measured, a variant has the same
colour and marker in all of them, and markers and hatches differ, so that a print in grey can be read.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lorafuse.bench.problem import title
from lorafuse.bench.result import with_adapters
from lorafuse.errors import MissingDependency

__all__ = ["draw", "figures", "save"]

Result = dict[str, Any]


class Style(NamedTuple):
    colour: str
    marker: str
    hatch: str


# colours that the colour-blind tell apart (Okabe and Ito), lorafuse's own in reds
_STYLES = {
    "frozen": Style("#777777", "x", ""),
    "full": Style("#000000", "s", "...."),
    "peft": Style("#0072b2", "o", "//"),
    "peft-half": Style("#56b4e9", "^", "\\\\"),
    "peft-compiled": Style("#005a46", "v", "xx"),
    "addmm": Style("#009e73", "P", "--"),
    "split": Style("#009e73", "P", "--"),
    "lorafuse": Style("#d55e00", "D", ""),
    "lorafuse-eager": Style("#e69f00", "<", "||"),
    "lorafuse-addmm": Style("#f0c75e", "8", "--"),
    "lorafuse-triton": Style("#8c1c13", ">", "++"),
    "lorafuse-triton-single": Style("#f0a58f", "p", "oo"),
    "lorafuse-cuda": Style("#b5476b", "h", "**"),
    "lorafuse-cuda-single": Style("#e8a0bf", "d", "OO"),
    "lorafuse-cuda-concurrent": Style("#7a1f3d", "H", "oo"),
    "unsloth": Style("#cc79a7", "X", "///"),
    "axolotl": Style("#6a3d9a", "*", "\\\\\\"),
    "axolotl-scattermoe": Style("#b15928", "1", "xxx"),
    "lorafusion": Style("#4d4d00", "2", "---"),
}
# for baselines that are not this project's
_OTHERS = (
    Style("#a6761d", "3", "+++"),
    Style("#386cb0", "4", "ooo"),
)
# what the footer says, in this order; a result without those of _REQUIRED is not drawn
_CONDITIONS = ("device", "threads", "cuda", "power limit", "torch", "peft", "commit", "date")
_REQUIRED = ("device", "torch", "date")
_COLUMNS = 3
# inches: of one panel of several, the width of a single one, and beside all panels for the legend
_PANEL = (3.6, 2.9)
_ALONE = 6.0
_LEGEND = 2.6
# of saved files
_DPI = 130


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

    `only` names one that is wanted alone. Raises ValueError when the content lacks device, torch or date,
    MissingDependency without matplotlib.
    """
    said = _footer(content["conditions"])
    results = content["results"]
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
    found = {name: figure for name, figure in made.items() if figure is not None}
    for figure in found.values():
        figure.supxlabel(said, fontsize=7, color="#444444", x=0.01, ha="left")
        # left, where the legend is not
        figure.suptitle(figure.get_suptitle(), fontsize=10, x=0.01, ha="left")
    return found


def _footer(conditions: dict[str, str]) -> str:
    missing = [name for name in _REQUIRED if not conditions.get(name)]
    if missing:
        raise ValueError(f"no plot without its conditions: {', '.join(missing)} not in the result file")
    named = ("device", "date")
    parts = [
        conditions[name] if name in named else f"{name} {conditions[name]}"
        for name in _CONDITIONS
        if conditions.get(name)
    ]
    return ", ".join(parts)


def _lines(results: list[Result], by: str, key: str) -> Any:
    """A panel for each case that was measured at several values of `by`; None when there is none."""
    panels = [
        (over, rows)
        for over, rows in _grouped(results, lambda r: title({k: v for k, v in r.items() if k != by}))
        if len({row[by] for row in rows if by in row}) > 1 and any(with_adapters(row, key) for row in rows)
    ]
    if not panels:
        return None
    styles = _styles(row for _, rows in panels for row in rows)
    word = {"tax": "LoRA tax", "ratio_to_full": "step time / full fine-tuning"}[key]
    axis = {"M": "tokens M", "R": "rank"}[by]
    figure, axes = _panels(len(panels))
    for ax, (over, rows) in zip(axes, panels, strict=True):
        rows = sorted(rows, key=lambda row: row[by])
        ax.set_title(over, fontsize=8)
        for name in dict.fromkeys(name for row in rows for name in with_adapters(row, key)):
            had = [row for row in rows if name in with_adapters(row, key)]
            values, found = [row[by] for row in had], [row["variants"][name] for row in had]
            style = styles[name]
            label = found[0].get("label", name)
            own = {"color": style.colour, "zorder": 3 if name.startswith("lorafuse") else 2}
            ax.plot(
                values,
                [one[key] for one in found],
                marker=style.marker,
                markersize=4.5,
                linewidth=1.6,
                label=label,
                **own,
            )
            if all(f"{key}_p20" in one for one in found):
                low, high = ([one[f"{key}_{end}"] for one in found] for end in ("p20", "p80"))
                ax.fill_between(values, low, high, alpha=0.15, linewidth=0, **own)
        with_floor = [row for row in rows if "floors" in row]
        if with_floor:
            floors = [row["floors"][key] for row in with_floor]
            ax.plot(
                [row[by] for row in with_floor], floors, "--", color="#000000", linewidth=1, label="arithmetic floor"
            )
        if key == "ratio_to_full":
            ax.axhline(1, color="#777777", linewidth=0.8, label="full fine-tuning")
        else:
            ax.yaxis.set_major_formatter(_percent())
        _log2_ticks(ax, sorted({row[by] for row in rows}))
        ax.set_xlabel(axis, fontsize=8)
        ax.set_ylabel(word, fontsize=8)
    band = ", band 20-80 %" if key == "tax" else ""
    figure.suptitle(f"{word} by {axis}: medians{band}, lower is better")
    _legend(figure, axes)
    return figure


def _tax_by_case(results: list[Result]) -> Any:
    """A panel for each M and rank at which several cases were measured; None when there is none."""
    panels = [
        (over, rows)
        for over, rows in _grouped(results, lambda r: _sizes(r, ("M", "R", "dtype")))
        if len({_case(row) for row in rows}) > 1 and any(with_adapters(row, "tax") for row in rows)
    ]

    def value(row: Result, name: str) -> tuple[float, tuple[float, float] | None] | None:
        if name not in with_adapters(row, "tax"):
            return None
        one = row["variants"][name]
        return one["tax"], (one["tax_p20"], one["tax_p80"]) if "tax_p20" in one else None

    figure = _bars(panels, value, _case, lambda row: row.get("floors", {}).get("tax"))
    if figure is not None:
        figure.suptitle("LoRA tax by case: medians, whiskers 20-80 %, lower is better")
        for ax in figure.axes:
            ax.xaxis.set_major_formatter(_percent())
            ax.set_xlabel("LoRA tax", fontsize=8)
    return figure


def _memory(results: list[Result]) -> Any:
    """A panel for each case, a group of bars for each of its sizes; None without results."""
    panels = _grouped(results, lambda r: title({k: v for k, v in r.items() if k not in ("M", "R")}))

    def value(row: Result, name: str) -> tuple[float, None] | None:
        if name == "frozen" or name not in row["variants"]:
            return None
        return (row["variants"][name]["peak_bytes"] - row["variants"]["frozen"]["peak_bytes"]) / 2**20, None

    figure = _bars(panels, value, lambda row: _sizes(row, ("M", "R")), lambda row: None)
    if figure is not None:
        figure.suptitle("Peak memory of forward and backward over the frozen layer's, lower is better")
        for ax in figure.axes:
            ax.set_xlabel("MiB over frozen", fontsize=8)
    return figure


def _bars(
    panels: list[tuple[str, list[Result]]],
    value: Callable[[Result, str], Any],
    label: Callable[[Result], str],
    floor: Callable[[Result], float | None],
) -> Any:
    """Horizontal bars: `value` of a variant is its length and, or None, the ends of its whisker."""
    if not panels:
        return None
    styles = _styles(row for _, rows in panels for row in rows)
    names = [n for n in styles if any(value(row, n) is not None for _, rows in panels for row in rows)]
    # inches: a bar, a gap, what title and axis take
    heights = [0.13 * len(names) * len(rows) + 0.25 * len(rows) + 0.9 for _, rows in panels]
    figure, axes = _panels(len(panels), heights)
    thick = 0.8 / len(names)
    for ax, (over, rows) in zip(axes, panels, strict=True):
        ax.set_title(over, fontsize=8)
        for index, name in enumerate(names):
            had = [(at, row, value(row, name)) for at, row in enumerate(rows) if value(row, name) is not None]
            if not had:
                continue
            places = [at - 0.4 + thick * (index + 0.5) for at, _, _ in had]
            ax.barh(
                places, [v for _, _, (v, _) in had], height=thick, color=styles[name].colour, hatch=styles[name].hatch,
                edgecolor="white", linewidth=0.3, label=had[0][1]["variants"][name].get("label", name),
            )  # fmt: skip
            for place, (_, _, (_, ends)) in zip(places, had, strict=True):
                if ends is not None:
                    ax.plot(ends, [place, place], color="#222222", linewidth=0.8)
        for at, row in enumerate(rows):
            if (least := floor(row)) is not None:
                ax.plot(
                    [least, least], [at - 0.45, at + 0.45], "--", color="#000000", linewidth=1, label="arithmetic floor"
                )
        ax.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
        ax.axvline(0, color="#777777", linewidth=0.8)
        # the first case on top
        ax.invert_yaxis()
    _legend(figure, axes)
    return figure


def _roofline(results: list[Result]) -> Any:
    """A panel for each dtype: every variant of every result, under what this device reached; None without those."""
    panels = [
        (dtype, [row for row in rows if "of_peak" in _any_figure(row)])
        for dtype, rows in _grouped(results, lambda r: r["dtype"])
    ]
    panels = [(dtype, rows) for dtype, rows in panels if rows]
    if not panels:
        return None
    styles = _styles(row for _, rows in panels for row in rows)
    figure, axes = _panels(len(panels), [4.2] * len(panels))
    for ax, (dtype, rows) in zip(axes, panels, strict=True):
        ax.set_title(f"{dtype}, {len(rows)} result{'s' * (len(rows) > 1)}", fontsize=8)
        # every figure of a run was divided by the same two
        one = _any_figure(rows[0])
        peak, copy = one["flops_per_s"] / one["of_peak"], one["bytes_per_s"] / one["of_copy"]
        at = []
        for name, style in styles.items():
            points = [row["variants"][name] for row in rows if name in row["variants"]]
            if not points:
                continue
            xs, ys = [p["flops_per_byte"] for p in points], [p["flops_per_s"] for p in points]
            at += xs
            ax.plot(
                xs, ys, linestyle="", marker=style.marker, color=style.colour, markersize=5, alpha=0.85,
                label=points[0].get("label", name),
            )  # fmt: skip
        ridge = peak / copy
        low, high = min(*at, ridge) / 2, max(*at, ridge) * 2
        ax.plot([low, ridge], [low * copy, peak], color="#000000", linewidth=1.2, label=f"copy: {copy / 1e9:.3g} GB/s")
        ax.plot(
            [ridge, high],
            [peak, peak],
            "-.",
            color="#000000",
            linewidth=1.2,
            label=f"product: {peak / 1e12:.3g} TFLOP/s",
        )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("FLOPs / byte, least work of forward and backward", fontsize=8)
        ax.set_ylabel("FLOP/s", fontsize=8)
    figure.suptitle("Roofline: the roofs are a large product and a copy, measured in this run")
    _legend(figure, axes)
    return figure


def _any_figure(row: Result) -> dict[str, Any]:
    return next(iter(row["variants"].values()))


def _case(row: Result) -> str:
    return " ".join(str(row[name]) for name in ("case", "routing") if name in row)


def _sizes(row: Result, names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {row[name]}" if len(name) == 1 else str(row[name]) for name in names if name in row)


def _grouped(results: list[Result], over: Callable[[Result], str]) -> list[tuple[str, list[Result]]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(over(result), []).append(result)
    return list(groups.items())


def _styles(rows: Iterator[Result]) -> dict[str, Style]:
    """The style of each variant, in the order of the results; others' baselines get theirs by their sorted names."""
    names = list(dict.fromkeys(name for row in rows for name in row["variants"]))
    others = sorted(set(names) - _STYLES.keys())
    given = _STYLES | {name: _OTHERS[index % len(_OTHERS)] for index, name in enumerate(others)}
    return {name: given[name] for name in names}


def _panels(count: int, heights: list[float] | None = None) -> tuple[Any, list[Any]]:
    """A figure of `count` axes in a grid, each as high, in inches, as its row's highest asks for."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("plots need matplotlib: pip install 'lorafuse[cli]'") from error
    columns = min(_COLUMNS, count)
    asked = heights or [_PANEL[1]] * count
    rows = [max(asked[first : first + columns]) for first in range(0, count, columns)]
    size = max(_PANEL[0] * columns, _ALONE) + _LEGEND, max(sum(rows) + 0.6, 3.2)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=rows)
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.remove()
    for ax in axes[:count]:
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(which="both", labelsize=7)
    return figure, axes[:count]


def _legend(figure: Any, axes: list[Any]) -> None:
    """One legend right of all panels, each name once."""
    named: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=8, frameon=False)


def _log2_ticks(ax: Any, values: list[int]) -> None:
    """A logarithmic axis with a tick at each value that was measured."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(values, [str(value) for value in values])
    ax.minorticks_off()


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(xmax=1)
