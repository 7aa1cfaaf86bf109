"""With paths scaled by 1 / r, the start of the learning curve and the best learning rate hardly depend on the rank.

Source: learning curves of different ranks coincide at the start at one learning rate; the best rate moves by less than
a factor of two from rank 4 to 512 (LoRA Without Regret).

Done here: SmolLM2-135M as in `equivalence`, with other ranks. The start is the first fifth of the run, at least five
steps, at the rate that is best for rank 16.

Held, for the start, when the mean training loss of each rank less that of rank 16, over how far it fell, lies within
10% of zero; for the rate, when the binary logarithm of each rank's best rate over that of rank 16 lies within 1 of
zero.
"""

import math
from dataclasses import replace

from lorafuse.study.equivalence import sft
from lorafuse.study.finding import Finding, Panel, line, panel_of_rates, row
from lorafuse.study.rate import best_rates
from lorafuse.study.runner import Lab
from lorafuse.study.verdict import EDGE, claim

SUMMARY = "the start of the curve and the best learning rate over ranks, SmolLM2-135M"
SOURCE = "the start of the curve is the same at every rank; the best rate moves less than 2 times"
APART, MOVED = 0.10, 1.0
BASIS = 16
RANKS = {True: (64,), False: (4, 128)}
SEEDS = 4, 8

__all__ = ["SEEDS", "SOURCE", "SUMMARY", "conduct"]


def conduct(lab: Lab, quick: bool) -> Finding:
    ranks = (BASIS, *RANKS[quick])
    specs = [sft(lab, rank, quick) for rank in ranks]
    swept = lab.sweep(specs)
    common = swept[0].best
    steps = max(5, specs[0].steps // 5)
    starts = [
        [run["early"][:steps] for run in lab.run([replace(spec, lr=common, seed=seed) for seed in lab.seeds])]
        for spec in specs
    ]
    rates = [best_rates(lab, one) for one in swept]
    claims = []
    for index, rank in enumerate(ranks[1:], 1):
        apart = [(sum(a) - sum(b)) / len(b) / (b[0] - min(b)) for a, b in zip(starts[index], starts[0], strict=True)]
        claims.append(
            claim(f"r {rank}, the first {steps} steps: mean loss above r {BASIS}'s, over how far that fell", apart,
                  -APART, APART, expected=0.0, margin=f"within {APART:.0%} of zero", source=SOURCE,
                  claims=2 * (len(ranks) - 1))
        )  # fmt: skip
        moved = [math.log2(a / b) for a, b in zip(rates[index], rates[0], strict=True)]
        claims.append(
            claim(f"r {rank}: binary logarithm of its best rate over r {BASIS}'s", moved, -MOVED, MOVED, expected=0.0,
                  margin=f"within {MOVED:g} of zero", source=SOURCE, claims=2 * (len(ranks) - 1),
                  bar=EDGE if swept[index].at_edge or swept[0].at_edge else "")
        )  # fmt: skip
    lines = [
        line(one.spec.side, range(1, steps + 1), list(zip(*losses, strict=True)))
        for one, losses in zip(swept, starts, strict=True)
    ]
    panel = Panel(f"start of training, rate {common:.3g}", "step", "training loss, nats", lines)
    return Finding(claims, [panel, panel_of_rates(swept)], [row(one) for one in swept])
