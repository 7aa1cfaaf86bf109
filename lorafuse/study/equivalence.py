"""F1: on small and medium sets LoRA of rank 8 to 16 equals full fine-tuning.

Source: learning curves of LoRA and full fine-tuning coincide until the adapter's capacity is used up (LoRA Without
Regret; Alpaca, GSM8K, Dolly-15k at rank 8 to 16, up to 99% fewer parameters).

Done here: the base, which can add, subtract, compare and reverse, is fine-tuned on an operation it has not seen, and
tested on other problems of it. Both sides at their best learning rate.

Held when LoRA's test loss is at most 5% of what full fine-tuning learned above it with every seed; what was learned
counts from the loss of digits drawn at random, ln 10, because the base's own loss also holds the format. It did not
hold when every seed is beyond that. LoRA being better counts as held. At this width an adapter cannot be as small a
share of the model as in the source.
"""

import math

from lorafuse.study.finding import Finding, Panel, line, panel_of_rates, row
from lorafuse.study.runner import Lab
from lorafuse.study.train import Spec
from lorafuse.study.verdict import at_most, claim

SUMMARY = "LoRA's test loss against full fine-tuning's on a small set"
SOURCE = "curves coincide at rank 8 to 16 with up to 99% fewer parameters"
MARGIN = 0.05
RANKS = (1, 8)

__all__ = ["SOURCE", "SUMMARY", "conduct", "sft"]


def sft(quick: bool) -> dict[int, Spec]:
    """Supervised fine-tuning as the studies equivalence, rate and rank share it; rates where the sweeps begin."""
    count, steps = (2000, 200) if quick else (2000, 1000)
    ranks = {0: 1e-3, 1: 4e-3, 8: 4e-3, 64: 4e-3}
    return {rank: Spec("mirrored", count, rank, lr, steps, seed=0) for rank, lr in ranks.items()}


def conduct(lab: Lab, quick: bool) -> Finding:
    specs = sft(quick)
    full, *adapted = lab.sweep([specs[0], *(specs[rank] for rank in RANKS)], every_seed=True)
    claims = []
    for one in adapted:
        gaps = [(lora - base) / (math.log(10) - base) for lora, base in zip(one.losses, full.losses, strict=True)]
        share = one.runs[0]["trained"] / full.runs[0]["trained"]
        claims.append(
            claim(
                f"{one.spec.side} ({share:.1%} of the parameters) equals full fine-tuning: its loss above full's, over "
                "what full learned",
                at_most(gaps, MARGIN), gaps, margin=f"at most {MARGIN:.0%}", source=SOURCE,
                at_edge=one.at_edge or full.at_edge,
            )
        )  # fmt: skip
    curves = [
        line(one.spec.side, [step for step, _ in one.runs[0]["curve"]],
             [[run["curve"][at][1] for run in one.runs] for at in range(len(one.runs[0]["curve"]))])
        for one in (full, *adapted)
    ]  # fmt: skip
    panel = Panel("test loss at the best rates", "step", "loss, nats", curves, log_y=True)
    return Finding(claims, [panel, panel_of_rates([full, *adapted])], [row(one) for one in (full, *adapted)])
