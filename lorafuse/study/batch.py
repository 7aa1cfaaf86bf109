"""F3: LoRA tolerates large batches less than full fine-tuning.

Source: in some settings, shown on 10,000 examples, the gap between LoRA and full fine-tuning grows with the batch, and
not less at higher ranks; both sides do best at smaller batches; no threshold is given (LoRA Without Regret).

Done here: one epoch of the same examples in batches of growing size, so that the steps become fewer, in a small
transformer of width 128; both sides at the best rate of each batch size.

A rank is compared only where LoRA equals full fine-tuning at the smallest batch, by the test of `equivalence` with its
margin of 5% of what full learned; otherwise nothing is said of it. Held when the gap of its test loss over full's grows
from the smallest batch to the largest one, seed by seed.
"""

import math
from dataclasses import replace

from lorafuse.study.equivalence import MARGIN, gap
from lorafuse.study.finding import Finding, Panel, line, row
from lorafuse.study.model import Size
from lorafuse.study.runner import Lab
from lorafuse.study.train import Spec
from lorafuse.study.verdict import EDGE, HELD, claim

SUMMARY = "the gap between LoRA and full fine-tuning as the batch grows"
SOURCE = "in some settings the penalty grows with the batch, at every rank"
# nats; the power is stated for a growth of this size
GROWTH = 0.02
SEEDS = 4, 8

__all__ = ["SEEDS", "SOURCE", "SUMMARY", "conduct"]


def conduct(lab: Lab, quick: bool) -> Finding:
    batches, examples, ranks = ((16, 256), 2048, (8,)) if quick else ((16, 64, 256, 1024), 8192, (1, 8, 32))
    basis = Spec("smaller", examples, 0, 0.0, 0, 0, size=Size().wide(128))
    specs = [
        # a larger batch wants a larger rate, about as its square root
        replace(basis, rank=rank, lr=(2e-3 if rank else 4e-4) * math.sqrt(batch / 64), steps=examples // batch,
                batch=batch)
        for batch in batches for rank in (0, *ranks)
    ]  # fmt: skip
    swept = {(one.spec.batch, one.spec.rank): one for one in lab.sweep(specs)}
    gaps = {(batch, rank): swept[batch, rank].above(swept[batch, 0]) for batch in batches for rank in ranks}
    first, last = batches[0], batches[-1]
    claims = []
    for rank in ranks:
        equal = gap(swept[first, rank], swept[first, 0], "", MARGIN, SOURCE, 1)
        bar = "" if equal.outcome == HELD else f"not equal at batch {first}: {equal.shown}"
        ends = [swept[batch, side] for batch in (first, last) for side in (0, rank)]
        claims.append(
            claim(
                f"LoRA r {rank}: how much its gap over full grows from batch {first} to {last}, nats",
                [b - a for a, b in zip(gaps[first, rank], gaps[last, rank], strict=True)], 0.0, math.inf,
                expected=GROWTH, margin="above zero", source=SOURCE, claims=len(ranks),
                bar=bar or (EDGE if any(one.at_edge for one in ends) else ""),
            )
        )  # fmt: skip
    losses = [
        line("full" if rank == 0 else f"LoRA r {rank}", batches, [swept[batch, rank].losses for batch in batches])
        for rank in (0, *ranks)
    ]
    widening = [line(f"LoRA r {rank}", batches, [gaps[batch, rank] for batch in batches]) for rank in ranks]
    panels = [
        Panel("test loss at the best rates", "batch", "loss, nats", losses, log_x=True),
        Panel("gap over full", "batch", "nats", widening, log_x=True),
    ]
    return Finding(claims, panels, [row(one, batch=one.spec.batch) for one in swept.values()])
