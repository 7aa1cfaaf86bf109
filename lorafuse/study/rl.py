"""F5: in policy gradient LoRA of rank 1 to 8 equals full fine-tuning.

Source: about 1 bit is learned from an episode, and rank 1 suffices on GSM8K and MATH (LoRA Without Regret).

Done here: the base names the smaller of two numbers rightly about three times in ten, because most of the answers it
was pretrained on had a digit wrong. REINFORCE with the group's mean as baseline, reward 1 for a right answer, else
0; both sides at their best learning rate. The loss shown is the share of other problems that the policy, drawn from
at temperature 1, gets wrong.

Held when at each rank this share is at most 0.05 above full's with every seed; it did not hold when every seed is
beyond. And the policy must have learned: full's share of right answers is to rise by at least 0.2, or nothing was
compared.
"""

from lorafuse.study.finding import Finding, Panel, curve, panel_of_rates, row
from lorafuse.study.runner import Lab
from lorafuse.study.train import Spec
from lorafuse.study.verdict import INCONCLUSIVE, at_most, claim

SUMMARY = "policy gradient at rank 1, 4, 8 against full fine-tuning"
SOURCE = "rank 1 equals full fine-tuning; about 1 bit an episode"
MARGIN, LEARNED = 0.05, 0.2
RANKS = (1, 4, 8)

__all__ = ["SOURCE", "SUMMARY", "conduct"]


def conduct(lab: Lab, quick: bool) -> Finding:
    count, steps, episodes = (2000, 120, 128) if quick else (5000, 200, 256)
    rates = {0: 4e-4} | dict.fromkeys(RANKS, 1e-3)
    specs = [
        Spec("smaller", count, rank, lr, steps, seed=0, batch=episodes, episodes=steps * episodes)
        for rank, lr in rates.items()
    ]
    full, *adapted = lab.sweep(specs)
    risen = min(run["start"] - run["loss"] for run in full.runs)
    claims = []
    for one in adapted:
        gaps = [lora - base for lora, base in zip(one.losses, full.losses, strict=True)]
        outcome = at_most(gaps, MARGIN) if risen >= LEARNED else INCONCLUSIVE
        claims.append(
            claim(f"{one.spec.side} equals full fine-tuning: its share of wrong answers above full's", outcome, gaps,
                  margin=f"at most {MARGIN:g}, full having risen by {LEARNED:g} (it did by {risen:.2f})", source=SOURCE,
                  at_edge=one.at_edge or full.at_edge)
        )  # fmt: skip
    curves = [curve(one, shown=lambda wrong: 1 - wrong) for one in (full, *adapted)]
    panel = Panel("reward on other problems, at the best rates", "step", "share of right answers", curves)
    swept = [full, *adapted]
    return Finding(claims, [panel, panel_of_rates(swept, "share of wrong answers")], [row(one) for one in swept])
