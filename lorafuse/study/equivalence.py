"""F1: on small and medium sets LoRA of high rank equals full fine-tuning.

Source: on Tulu3 and OpenThoughts3 the learning curves of full fine-tuning and of high-rank LoRA coincide; lower ranks
leave them when their capacity is used up (LoRA Without Regret).

Done here: SmolLM2-135M with its real weights, one epoch of templated word problems, every token of them trained, both
sides at their best learning rate; adapters on all linear layers, full fine-tuning of everything.

Held when LoRA's test loss less full fine-tuning's, over what full fine-tuning learned (counted from the base's loss),
lies within 5% of zero. Rank 1 is shown, and nothing is claimed of it.
"""

from lorafuse.study.finding import Finding, Panel, curve, line, panel_of_rates, row
from lorafuse.study.runner import Lab, Swept
from lorafuse.study.train import Spec
from lorafuse.study.verdict import EDGE, Claim, claim

SUMMARY = "LoRA's test loss against full fine-tuning's, SmolLM2-135M"
SOURCE = "learning curves of full fine-tuning and high-rank LoRA coincide"
MARGIN = 0.05
RANKS = (16, 128)
SEEDS = 6, 8
# with --quick: five steps, which `rate` and `rank` have, leave LoRA's start (B is zero) in sight and decide nothing
QUICK_STEPS = 10
# where the grids lie: the best rates of a pilot of one seed and 8 steps
RATES = {0: 2e-4, 1: 2e-3}

__all__ = ["RATES", "SEEDS", "SOURCE", "SUMMARY", "conduct", "gap", "sft"]


def sft(lab: Lab, rank: int, quick: bool, quick_steps: int = 5) -> Spec:
    """Supervised fine-tuning of SmolLM2 as the studies equivalence, rate and rank share it at full size.

    32 rows of 128 tokens a step on a GPU, four of 64 for a night of two cores.
    """
    gpu = lab.device.startswith("cuda")
    steps, batch, length, test = (quick_steps, 2, 64, 8) if quick else (200, 32, 128, 128) if gpu else (128, 4, 64, 32)
    return Spec(
        "problems", steps * batch, rank, RATES[min(rank, 1)], steps, 0, batch, length=length, test=test,
        evaluations=1 if quick else 8,
    )  # fmt: skip


def gap(lora: Swept, full: Swept, text: str, margin: float, source: str, claims: int, bar: str = "") -> Claim:
    """The claim that LoRA's loss is within `margin` of full fine-tuning's, over what this learned."""
    values = [apart / learned for apart, learned in zip(lora.above(full), full.learned, strict=True)]
    bar = bar or (EDGE if lora.at_edge or full.at_edge else "")
    return claim(text, values, -margin, margin, expected=0.0, margin=f"within {margin:.0%} of zero", source=source,
                 claims=claims, bar=bar)  # fmt: skip


def conduct(lab: Lab, quick: bool) -> Finding:
    ranks = RANKS[:1] if quick else RANKS
    full, *adapted = lab.sweep([sft(lab, rank, quick, QUICK_STEPS) for rank in (0, *ranks, *(() if quick else (1,)))])
    claims = []
    for one in adapted[: len(ranks)]:
        fraction = one.runs[0]["trained"] / full.runs[0]["trained"]
        text = f"{one.spec.side} ({fraction:.1%} of the parameters): its loss above full's, over what full learned"
        claims.append(gap(one, full, text, MARGIN, SOURCE, len(ranks)))
    swept = [full, *adapted]
    panel = Panel("validation loss at the best rates", "step", "loss, nats", [curve(one) for one in swept])
    if quick:
        # too short to be evaluated on the way
        starts = [(one, list(zip(*(run["early"] for run in one.runs), strict=False))) for one in swept]
        lines = [line(one.spec.side, range(1, len(losses) + 1), losses) for one, losses in starts]
        panel = Panel("training loss at the best rates", "step", "loss, nats", lines)
    return Finding(claims, [panel, panel_of_rates(swept)], [row(one) for one in swept])
