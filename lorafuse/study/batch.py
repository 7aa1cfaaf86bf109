"""F3: LoRA tolerates large batches less than full fine-tuning, at every rank.

Source: on 10,000 examples the gap between LoRA and full fine-tuning grows with the batch, independent of rank (LoRA
Without Regret).

Done here: the same number of examples in batches of growing size, so that the steps become fewer; both sides at the
best rate of each batch size.

Held when at each rank the gap of LoRA's test loss over full's is larger at the largest batch than at the smallest,
with spreads that do not overlap; it did not hold when it is smaller in the same sense. That the growth is the same
at every rank is held when the ranks' growths differ by at most half of their mean with every seed.
"""

import math

from lorafuse.study.finding import Finding, Panel, line, row
from lorafuse.study.runner import Lab
from lorafuse.study.train import Spec
from lorafuse.study.verdict import above, at_most, claim

SUMMARY = "the gap between LoRA and full fine-tuning as the batch grows"
SOURCE = "the penalty grows with the batch, independent of rank"
ALIKE = 0.5
# nats; a growth below is none
_NOTHING = 1e-3

__all__ = ["SOURCE", "SUMMARY", "conduct"]


def conduct(lab: Lab, quick: bool) -> Finding:
    batches, examples, ranks = ((16, 64, 256), 4096, (1, 8)) if quick else ((16, 64, 256, 1024), 16384, (1, 8, 32))
    specs = [
        # a larger batch wants a larger rate, about as its square root
        Spec("smaller", 2000, rank, (2e-3 if rank else 4e-4) * math.sqrt(batch / 64), examples // batch, 0, batch)
        for batch in batches for rank in (0, *ranks)
    ]  # fmt: skip
    found = {(one.spec.batch, one.spec.rank): one for one in lab.sweep(specs)}
    gaps = {
        (batch, rank): [a - b for a, b in zip(found[batch, rank].losses, found[batch, 0].losses, strict=True)]
        for batch in batches for rank in ranks
    }  # fmt: skip
    first, last = batches[0], batches[-1]
    growths = {rank: [b - a for a, b in zip(gaps[first, rank], gaps[last, rank], strict=True)] for rank in ranks}
    edges = {rank: any(found[batch, side].at_edge for batch in (first, last) for side in (0, rank)) for rank in ranks}
    claims = [
        claim(
            f"LoRA r {rank}: the gap over full grows from batch {first} to {last}, nats",
            above(gaps[last, rank], gaps[first, rank]), growths[rank],
            margin="spreads apart", source=SOURCE, at_edge=edges[rank],
        )
        for rank in ranks
    ]  # fmt: skip
    means = [sum(seeds) / len(seeds) for seeds in zip(*growths.values(), strict=True)]
    apart = [
        (max(seeds) - min(seeds)) / max(abs(mean), _NOTHING)
        for seeds, mean in zip(zip(*growths.values(), strict=True), means, strict=True)
    ]
    claims.append(
        claim("the growth is the same at every rank: largest difference over the mean", at_most(apart, ALIKE), apart,
              margin=f"at most {ALIKE:.0%}", source=SOURCE, at_edge=any(edges.values()))
    )  # fmt: skip
    losses = [
        line("full" if rank == 0 else f"LoRA r {rank}", batches, [found[batch, rank].losses for batch in batches])
        for rank in (0, *ranks)
    ]
    widening = [line(f"LoRA r {rank}", batches, [gaps[batch, rank] for batch in batches]) for rank in ranks]
    panels = [
        Panel("test loss at the best rates", "batch", "loss, nats", losses, log_x=True),
        Panel("gap over full", "batch", "nats", widening, log_x=True),
    ]
    return Finding(claims, panels, [row(one, batch=one.spec.batch) for one in found.values()])
