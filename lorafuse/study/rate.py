"""The best learning rate of LoRA is about ten times that of full fine-tuning.

Source: 9.8 times, fitted over 14 models; about 15 times for runs of under 100 steps (LoRA Without Regret).

Done here: the sweeps of `equivalence`. The best rate of a seed is the vertex of a parabola through the best rate
tried and its two neighbours, over the logarithm of the rate; the ratio is taken seed by seed.

Held when the ratio is between 5 and 20, a factor of two about 10, with every seed; it did not hold when every seed
is outside on the same side.
"""

import math
from collections.abc import Sequence

from lorafuse.study.equivalence import sft
from lorafuse.study.finding import Finding, panel_of_rates, row
from lorafuse.study.runner import Lab, Swept
from lorafuse.study.verdict import claim, inside

SUMMARY = "the best learning rate of LoRA over that of full fine-tuning"
SOURCE = "9.8 times over 14 models"
RATIO = (5.0, 20.0)
RANKS = (8, 16)

__all__ = ["SOURCE", "SUMMARY", "best_rates", "conduct", "vertex"]


def vertex(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at which the parabola through the least loss and its neighbours, over log rate, is least.

    Rates are in equal factors. At an end of the sweep, and beside a run that diverged, it is the rate itself.
    """
    at = min(range(len(losses)), key=lambda index: losses[index])
    if not 0 < at < len(losses) - 1:
        return rates[at]
    before, least, after = losses[at - 1 : at + 2]
    bend = before - 2 * least + after
    moved = 0.5 * (before - after) / bend if bend > 0 else 0.0
    return math.exp(math.log(rates[at]) + moved * math.log(rates[at + 1] / rates[at]))


def best_rates(swept: Swept) -> list[float]:
    """Of each seed, from a sweep that ran with every seed."""
    return [vertex(swept.rates, losses) for losses in zip(*swept.by_rate, strict=True)]


def conduct(lab: Lab, quick: bool) -> Finding:
    specs = sft(quick)
    full, *adapted = lab.sweep([specs[0], *(specs[rank] for rank in RANKS)], every_seed=True)
    claims = []
    for one in adapted:
        ratios = [lora / base for lora, base in zip(best_rates(one), best_rates(full), strict=True)]
        claims.append(
            claim(f"{one.spec.side}: best learning rate over full fine-tuning's", inside(ratios, *RATIO), ratios,
                  margin=f"{RATIO[0]:g} to {RATIO[1]:g}", source=SOURCE, at_edge=one.at_edge or full.at_edge)
        )  # fmt: skip
    return Finding(claims, [panel_of_rates([full, *adapted])], [row(one) for one in (full, *adapted)])
