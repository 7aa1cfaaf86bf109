"""F2: LoRA departs from full fine-tuning as the data outgrow its capacity, later at higher rank; about 2 bits a
parameter.

Source: LoRA keeps up with full fine-tuning until the adapter's capacity, about 2 bits per parameter, is used up;
beyond it learns more slowly. No hard floor.

Done here: random strings are memorized, each behind its key. What is held can be measured exactly: a string of L of
16 letters is 4 L bits, and the mean cross-entropy says how many of them are missing. More and more strings, several
ranks, full fine-tuning beside them; the same epochs' worth of steps for all at one number of strings.

Held when, at the largest number of strings, the losses of full fine-tuning and of each rank, from the highest to the
lowest, are in that order with spreads that do not overlap, while at the smallest number the highest rank's loss is
at most 0.2 nats above full's. Bits per parameter: the most that a seed of the lowest rank held at any number of
strings, inside 1 to 4, a factor of two about the source's 2. A run of fixed length shows what was learned in it, a
lower bound of what could be held: strings are few enough that each is seen 100 times. With 512 strings and 150
steps, 19 times each, rank 1 had learned nothing yet.
"""

from lorafuse.study import tasks
from lorafuse.study.finding import Finding, Panel, line, row
from lorafuse.study.runner import Lab, Swept
from lorafuse.study.train import Spec
from lorafuse.study.verdict import above, at_most, claim, inside

SUMMARY = "random strings memorized: loss as data outgrow rank, bits per parameter"
SOURCE = "about 2 bits per adapter parameter; slower beyond"
CLOSE = 0.2
BITS = (1.0, 4.0)

__all__ = ["SOURCE", "SUMMARY", "conduct"]

_LENGTH = 8


def conduct(lab: Lab, quick: bool) -> Finding:
    counts, ranks, steps = ((64, 192), (1, 4), 300) if quick else ((64, 192, 576), (1, 4, 16), 450)
    sides = (0, *reversed(ranks))
    rates = {0: 0.016} | dict.fromkeys(ranks, 0.008)
    faster = dict.fromkeys(counts, 1) | {counts[0]: 2}
    specs = [
        Spec("strings", count, rank, rates[rank] * faster[count], steps, seed=0, batch=64, length=_LENGTH)
        for count in counts for rank in sides
    ]  # fmt: skip
    found = {(one.spec.count, one.spec.rank): one for one in lab.sweep(specs)}
    least, most = counts[0], counts[-1]

    order = [found[most, rank] for rank in sides]
    claims = [
        claim(
            f"{most} strings: {worse.spec.side} is above {better.spec.side}",
            above(worse.losses, better.losses),
            [a - b for a, b in zip(worse.losses, better.losses, strict=True)],
            margin="spreads apart", source=SOURCE, at_edge=worse.at_edge or better.at_edge,
        )
        for better, worse in zip(order, order[1:], strict=False)
    ]  # fmt: skip
    few, full = found[least, ranks[-1]], found[least, 0]
    gaps = [a - b for a, b in zip(few.losses, full.losses, strict=True)]
    claims.append(
        claim(f"{least} strings: {few.spec.side} keeps up with full, nats above it", at_most(gaps, CLOSE), gaps,
              margin=f"at most {CLOSE} nats", source=SOURCE, at_edge=few.at_edge or full.at_edge)
    )  # fmt: skip
    lowest = [found[count, ranks[0]] for count in counts]
    densities = [max(held) / lowest[0].runs[0]["trained"] for held in zip(*map(_bits, lowest), strict=True)]
    claims.append(
        claim(f"{lowest[0].spec.side}: most bits per parameter", inside(densities, *BITS), densities,
              margin=f"{BITS[0]:g} to {BITS[1]:g}", source=SOURCE, at_edge=any(one.at_edge for one in lowest))
    )  # fmt: skip
    data = [4.0 * _LENGTH * count for count in counts]
    losses = [line(found[least, rank].spec.side, data, [found[c, rank].losses for c in counts]) for rank in sides]
    held = [line(found[least, rank].spec.side, data, [_bits(found[c, rank]) for c in counts]) for rank in sides]
    rows = [row(found[c, r], strings=c, bits=sum(_bits(found[c, r])) / len(lab.seeds)) for c in counts for r in sides]
    panels = [
        Panel("loss at the best rates", "bits of the data", "loss, nats", losses, log_x=True),
        Panel("memorized", "bits of the data", "bits", held, log_x=True, log_y=True),
    ]
    return Finding(claims, panels, rows)


def _bits(swept: Swept) -> list[float]:
    return [tasks.bits(loss, swept.spec.count, swept.spec.length) for loss in swept.losses]
