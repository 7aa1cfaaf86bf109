"""F2: LoRA departs from full fine-tuning as the data outgrow its capacity, later at higher rank.

Source: LoRA keeps up with full fine-tuning until the adapter's capacity is used up, about 2 bits per parameter in long
training; beyond it learns more slowly. No hard floor.

Done here: random strings are memorized by a small transformer, each behind its key. What is held can be measured
exactly: a string of L of 16 letters is 4 L bits, and the mean cross-entropy says how many of them are missing. More and
more strings, several ranks, full fine-tuning beside them, the same number of steps for all.

Held when, at the largest number of strings, the loss of each rank lies above that of the next higher one, and that of
the highest above full fine-tuning's, seed by seed, while at the smallest number the highest rank's loss lies within 0.2
nats of full's. The bits that were held are shown, and nothing is claimed of them: a run of fixed length gives a lower
bound of what could be.
"""

import math

from lorafuse.study import tasks
from lorafuse.study.finding import Finding, Panel, line, row
from lorafuse.study.runner import Lab, Swept
from lorafuse.study.train import Spec
from lorafuse.study.verdict import EDGE, claim

SUMMARY = "random strings memorized: loss as data outgrow rank, bits per parameter"
SOURCE = "about 2 bits per adapter parameter; slower beyond"
CLOSE = 0.2
# nats; the power is stated for a difference of this size
EFFECT = 0.05
SEEDS = 4, 8

__all__ = ["SEEDS", "SOURCE", "SUMMARY", "conduct"]

_LENGTH = 8


def conduct(lab: Lab, quick: bool) -> Finding:
    counts, ranks, steps = ((32, 128), (1,), 100) if quick else ((64, 192, 576), (1, 4, 16), 450)
    sides = (0, *reversed(ranks))
    specs = [
        Spec("strings", count, rank, 8e-3, steps, seed=0, batch=64, length=_LENGTH)
        for count in counts
        for rank in sides
    ]
    swept = {(one.spec.count, one.spec.rank): one for one in lab.sweep(specs)}
    least, most = counts[0], counts[-1]
    order = [swept[most, rank] for rank in sides]
    claims = [
        claim(
            f"{most} strings: {worse.spec.side} above {better.spec.side}, nats", worse.above(better), 0.0, math.inf,
            expected=EFFECT, margin="above zero", source=SOURCE, claims=len(sides),
            bar=EDGE if worse.at_edge or better.at_edge else "",
        )
        for better, worse in zip(order, order[1:], strict=False)
    ]  # fmt: skip
    few, full = swept[least, ranks[-1]], swept[least, 0]
    claims.append(
        claim(f"{least} strings: {few.spec.side} above full, nats", few.above(full), -CLOSE, CLOSE, expected=0.0,
              margin=f"within {CLOSE:g} of zero", source=SOURCE, claims=len(sides),
              bar=EDGE if few.at_edge or full.at_edge else "")
    )  # fmt: skip
    data = [4.0 * _LENGTH * count for count in counts]
    losses = [line(swept[least, rank].spec.side, data, [swept[c, rank].losses for c in counts]) for rank in sides]
    held = [line(swept[least, rank].spec.side, data, [_bits(swept[c, rank]) for c in counts]) for rank in sides]
    rows = [row(one, strings=c, **{"bits per parameter": sum(_bits(one)) / len(lab.seeds) / one.runs[0]["trained"]})
            for c in counts for one in (swept[c, rank] for rank in sides)]  # fmt: skip
    panels = [
        Panel("loss at the best rates", "bits of the data", "loss, nats", losses, log_x=True),
        Panel("memorized", "bits of the data", "bits", held, log_x=True, log_y=True),
    ]
    return Finding(claims, panels, rows)


def _bits(swept: Swept) -> list[float]:
    return [tasks.bits(loss, swept.spec.count, swept.spec.length) for loss in swept.losses]
