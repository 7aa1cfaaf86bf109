"""The best learning rate of LoRA is about ten times that of full fine-tuning, at every width.

Source: 9.8 times, fitted over 14 models, about 15 times for runs of under 100 steps (LoRA Without Regret). Its own
argument from the parametrization gives hidden / (2 alpha) instead, which, as it says, does not match what it measured:
1 at width 64, 9 at 576, 64 at 4096.

Done here: SmolLM2-135M (width 576) as in `equivalence`, and small transformers of several widths, each fine-tuned on
2,000 problems. The best rate of a seed is the vertex of a parabola through the validation losses at half of, at and at
twice the rate that the grid's sweep chose, over the logarithm of the rate, at most a factor of two away.

Held when the ratio on SmolLM2 lies between 5 and 20, a factor of two about 10, and when the slope of its logarithm over
that of the small models' width lies within 0.5 of zero: 1 is what the argument gives, 0 what the source measured.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from lorafuse.study.equivalence import sft
from lorafuse.study.finding import Finding, Panel, line, panel_of_rates, row
from lorafuse.study.model import Size
from lorafuse.study.runner import Lab, Swept
from lorafuse.study.train import Spec
from lorafuse.study.verdict import EDGE, claim

SUMMARY = "the best learning rate of LoRA over that of full fine-tuning, over the width"
SOURCE = "9.8 times over 14 models, whatever their width"
RATIO, SLOPE = 2.0, 0.5
RANK, TIMES = 16, 10.0
SEEDS = 4, 8
WIDTHS = {True: (64, 128), False: (64, 128, 256, 512)}

__all__ = ["SEEDS", "SOURCE", "SUMMARY", "best_rates", "conduct", "slope", "small", "vertex"]


def small(width: int, rank: int, quick: bool) -> Spec:
    """Fine-tuning of a small model on the task that the others of `lorafuse.study` use."""
    rate = (1e-3 if rank else 6e-4) * math.sqrt(64 / width)
    return Spec("smaller", 2000, rank, rate, 60 if quick else 400, 0, size=Size().wide(width))


def vertex(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate between the first and the last of three, in equal factors, at which the parabola through the losses over
    log rate is least."""
    before, middle, after = losses
    bend = before - 2 * middle + after
    if bend <= 0:
        return rates[0] if before < after else rates[2]
    moved = min(1.0, max(-1.0, 0.5 * (before - after) / bend))
    return math.exp(math.log(rates[1]) + moved * math.log(rates[2] / rates[1]))


def best_rates(lab: Lab, swept: Swept) -> list[float]:
    """Of each seed, around the rate that the sweep chose."""
    rates = [swept.best / 2, swept.best, swept.best * 2]
    runs = lab.run([replace(swept.spec, lr=rate, seed=seed) for seed in lab.seeds for rate in rates])
    losses = [float(run["validation"]) for run in runs]
    return [vertex(rates, losses[at : at + 3]) for at in range(0, len(losses), 3)]


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least squares."""
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    return sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / sum((a - x_mean) ** 2 for a in x)


def conduct(lab: Lab, quick: bool) -> Finding:
    widths = WIDTHS[quick]
    specs = [sft(lab, rank, quick) for rank in (0, RANK)]
    specs += [small(width, rank, quick) for width in widths for rank in (0, RANK)]
    swept = lab.sweep(specs)
    rates = [best_rates(lab, one) for one in swept]
    # of SmolLM2, then of each width: the logarithm of the ratio, seed by seed
    ratios = [[math.log(b / a) for a, b in zip(*pair, strict=True)]
              for pair in zip(rates[::2], rates[1::2], strict=True)]  # fmt: skip
    edges = [any(one.at_edge for one in swept[at : at + 2]) for at in range(0, len(swept), 2)]
    slopes = [slope([math.log(width) for width in widths], seeds) for seeds in zip(*ratios[1:], strict=True)]
    centre = math.log(TIMES)
    claims = [
        claim(
            f"SmolLM2-135M: logarithm of the best rate of LoRA r {RANK} over full fine-tuning's", ratios[0],
            centre - math.log(RATIO), centre + math.log(RATIO), expected=centre, source=SOURCE, claims=2,
            margin=f"ln {TIMES / RATIO:g} to ln {TIMES * RATIO:g}", bar=EDGE if edges[0] else "",
        ),
        claim(
            f"widths {', '.join(map(str, widths))}: slope of that logarithm over the width's", slopes, -SLOPE, SLOPE,
            expected=0.0, source=SOURCE, claims=2, margin=f"within {SLOPE:g} of zero; hidden / (2 alpha) has slope 1",
            bar=EDGE if any(edges[1:]) else "",
        ),
    ]  # fmt: skip
    shown = [[math.exp(value) for value in seeds] for seeds in ratios]
    names = [f"{where}, {one.spec.side}" for where, one in zip(
        [name for name in ("SmolLM2", *(f"width {width}" for width in widths)) for _ in (0, RANK)], swept, strict=True
    )]  # fmt: skip
    by_width = Panel(
        "ratio of the best rates", "width", "LoRA over full",
        [line("small models", widths, shown[1:]), line("SmolLM2-135M", [576], shown[:1])], log_x=True, log_y=True,
    )  # fmt: skip
    rows = [row(one, model=name.partition(",")[0]) for one, name in zip(swept, names, strict=True)]
    return Finding(claims, [by_width, panel_of_rates(swept, names)], rows)
