"""F5: in policy gradient LoRA of rank 1 equals full fine-tuning.

Source: about 1 bit is learned from an episode, and rank 1 suffices on GSM8K and MATH (LoRA Without Regret).

Done here: the base of a small transformer names the smaller of two numbers rightly about three times in ten, because
most of the answers it was pretrained on had a digit wrong. REINFORCE with the group's mean as baseline, reward 1 for a
right answer, else 0; both sides at their best learning rate. The loss is the expected share of wrong answers to other
problems, exactly: an answer has two characters, so its probability is a product.

Held when at each rank this share less full fine-tuning's lies within 0.05 of zero. The policy must have learned: full
fine-tuning's share of right answers is to rise by at least 0.2 with every seed, or nothing was compared.
"""

from lorafuse.study.finding import Finding, Panel, curve, panel_of_rates, row
from lorafuse.study.runner import Lab
from lorafuse.study.train import Spec
from lorafuse.study.verdict import EDGE, claim

SUMMARY = "policy gradient at low ranks against full fine-tuning, exact rewards"
SOURCE = "rank 1 equals full fine-tuning; about 1 bit an episode"
MARGIN, LEARNED = 0.05, 0.2
SEEDS = 6, 16

__all__ = ["SEEDS", "SOURCE", "SUMMARY", "conduct"]


def conduct(lab: Lab, quick: bool) -> Finding:
    count, steps, episodes, ranks = (2000, 120, 128, (1,)) if quick else (5000, 200, 256, (1, 4, 8))
    rates = {0: 4e-4} | dict.fromkeys(ranks, 1e-3)
    specs = [
        Spec("smaller", count, rank, lr, steps, seed=0, batch=episodes, episodes=steps * episodes)
        for rank, lr in rates.items()
    ]
    full, *adapted = lab.sweep(specs)
    risen = min(full.learned)
    claims = []
    for one in adapted:
        bar = EDGE if one.at_edge or full.at_edge else ""
        bar = bar or (f"full rose by {risen:.2f} only, of {LEARNED:g}" if risen < LEARNED else "")
        claims.append(
            claim(f"{one.spec.side}: its share of wrong answers above full's", one.above(full), -MARGIN, MARGIN,
                  expected=0.0, margin=f"within {MARGIN:g} of zero", source=SOURCE, claims=len(ranks), bar=bar)
        )  # fmt: skip
    swept = [full, *adapted]
    curves = [curve(one, shown=lambda wrong: 1 - wrong) for one in swept]
    panel = Panel("expected reward on other problems, at the best rates", "step", "share of right answers", curves)
    rates_panel = panel_of_rates(swept, y="expected share of wrong answers")
    return Finding(claims, [panel, rates_panel], [row(one) for one in swept])
