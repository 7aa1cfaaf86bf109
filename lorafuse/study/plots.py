"""A study's plot: its panels side by side, mean and spread over seeds, with the outcome on top."""

from pathlib import Path

from lorafuse.errors import MissingDependency
from lorafuse.study.finding import Finding

__all__ = ["draw"]

# colours that the colour-blind tell apart (Okabe and Ito), full fine-tuning in black
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
# more points than these are drawn as a line only
_MARKED = 12


def draw(file: Path, name: str, finding: Finding, conditions: str) -> None:
    """Write the plot as PNG. Raises MissingDependency without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError as error:
        raise MissingDependency("plots need matplotlib: pip install 'lorafuse[cli]'") from error
    figure = Figure(figsize=(4.4 * len(finding.panels), 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(line.name for panel in finding.panels for line in panel.lines))
    adapted = [name for name in names if name != "full"]
    for axes, panel in zip(figure.subplots(1, len(finding.panels), squeeze=False)[0], finding.panels, strict=True):
        for line in panel.lines:
            at = adapted.index(line.name) if line.name in adapted else -1
            colour = "#000000" if at < 0 else _COLOURS[at % len(_COLOURS)]
            marker = _MARKERS[(at + 1) % len(_MARKERS)] if len(line.x) <= _MARKED else ""
            axes.plot(line.x, line.y, color=colour, marker=marker, markersize=4, linewidth=1.5, label=line.name)
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(panel.title, fontsize=9)
        axes.set_xlabel(panel.x, fontsize=8)
        axes.set_ylabel(panel.y, fontsize=8)
        if panel.log_x:
            axes.set_xscale("log", base=2 if panel.x == "batch" else 10)
        if panel.log_y:
            axes.set_yscale("log")
        for axis, log in ((axes.xaxis, panel.log_x and panel.x != "batch"), (axes.yaxis, panel.log_y)):
            if log:
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", labelsize=7)
        axes.legend(frameon=False, fontsize=7)
    figure.suptitle(f"{name}: {finding.outcome}; bands are the spread over seeds\n{conditions}", fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
