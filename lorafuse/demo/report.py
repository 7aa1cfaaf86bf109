"""What the demo leaves behind: figures, a plot of both loss curves, a JSON file."""

import json
import statistics
from pathlib import Path
from typing import Any

from lorafuse.demo.train import Leg
from lorafuse.files import write_text

__all__ = ["LOSS_BOUND", "figures", "plot", "write_json"]

# the two loss curves of an fp32 run must agree this closely at every step
LOSS_BOUND = 1e-3


def figures(legs: list[Leg], tokens_per_step: int) -> dict[str, Any]:
    """Per leg: median step time, tokens/s, peak memory; between them: the ratio of these medians, the median of the
    steps' ratios, which a machine that slows down for a while changes less, and the largest loss difference.

    The first step of each leg warms up and is left out of the times when there are others.
    """
    result: dict[str, Any] = {}
    for leg in legs:
        median = statistics.median(leg.seconds[1:] or leg.seconds)
        result[leg.name] = {
            "step_seconds_median": median,
            "tokens_per_second": tokens_per_step / median,
            "peak_bytes_of_a_step": leg.peak,
            "final_loss": leg.losses[-1],
        }
    first, second = legs
    ratio = result[first.name]["step_seconds_median"] / result[second.name]["step_seconds_median"]
    result["speedup"] = ratio
    ratios = [a / b for a, b in zip(first.seconds, second.seconds, strict=False)]
    result["speedup_of_steps"] = statistics.median(ratios[1:] or ratios)
    result["largest_loss_difference"] = max(abs(a - b) for a, b in zip(first.losses, second.losses, strict=False))
    return result


def plot(path: Path, legs: list[Leg], title: str) -> None:
    """Both loss curves over each other, their difference below, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    first, second = legs
    steps = range(1, min(len(first.losses), len(second.losses)) + 1)
    top.plot(steps, first.losses[: len(steps)], color="#9aa5b1", linewidth=5, label=first.name)
    top.plot(steps, second.losses[: len(steps)], color="#c2410c", linewidth=1.6, label=second.name)
    top.set_ylabel("training loss")
    top.set_title(title, fontsize=10)
    top.legend(frameon=False)
    bottom.plot(steps, [abs(a - b) for a, b in zip(first.losses, second.losses, strict=False)], color="#334155")
    bottom.set_ylabel("|difference|")
    bottom.set_xlabel("step")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write_json(path: Path, conditions: dict[str, Any], legs: list[Leg], result: dict[str, Any]) -> None:
    """Conditions, figures and every step's loss and time."""
    steps = {leg.name: {"losses": leg.losses, "seconds": leg.seconds} for leg in legs}
    write_text(path, json.dumps({"conditions": conditions, "figures": result, "steps": steps}, indent=1) + "\n")
