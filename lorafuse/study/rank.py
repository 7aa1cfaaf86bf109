"""With paths scaled by 1 / r, the start of the learning curve and the best learning rate hardly depend on the rank.

Source: learning curves of ranks 1 to 512 coincide at the start at one learning rate; the best rate moves by less
than a factor of two from rank 4 to 512 (LoRA Without Regret).

Done here: the sweeps of `equivalence` with one more rank. The start is the first fifth of the run, at the rate that
is best for rank 8.

Held, for the start, when the losses of any two ranks, averaged over each of its five parts, differ by at most 10% of
how far the loss fell in it, with every seed; for the rate, when the highest best rate is at most twice the lowest
with every seed.
"""

from dataclasses import replace

from lorafuse.study.equivalence import sft
from lorafuse.study.finding import Finding, Panel, line, panel_of_rates, row
from lorafuse.study.rate import best_rates
from lorafuse.study.runner import Lab
from lorafuse.study.verdict import at_most, claim

SUMMARY = "the start of the curve and the best learning rate over ranks"
SOURCE = "the start of the curve is the same at every rank; the best rate moves less than 2 times"
APART, MOVED = 0.10, 2.0
RANKS = (1, 8, 64)
_PARTS = 5

__all__ = ["SOURCE", "SUMMARY", "conduct"]


def conduct(lab: Lab, quick: bool) -> Finding:
    specs = [sft(quick)[rank] for rank in RANKS]
    swept = lab.sweep(specs, every_seed=True)
    common = swept[RANKS.index(8)].best
    steps = min(100, specs[0].steps // 5)
    apart = []
    curves: dict[int, list[list[float]]] = {rank: [] for rank in RANKS}
    for seed in lab.seeds:
        runs = lab.run([replace(spec, lr=common, seed=seed) for spec in specs])
        parts = [_parts(run["early"][:steps]) for run in runs]
        fell = sum(part[0] - part[-1] for part in parts) / len(parts)
        apart.append(max(max(at) - min(at) for at in zip(*parts, strict=True)) / fell)
        for rank, run in zip(RANKS, runs, strict=True):
            curves[rank].append(run["early"][:steps])
    claims = [
        claim("the first fifth of the run: largest difference between ranks over how far the loss fell",
              at_most(apart, APART), apart, margin=f"at most {APART:.0%}", source=SOURCE)
    ]  # fmt: skip
    moved = [max(rates) / min(rates) for rates in zip(*(best_rates(one) for one in swept), strict=True)]
    claims.append(
        claim("highest best learning rate over the lowest", at_most(moved, MOVED), moved, margin=f"at most {MOVED:g}",
              source=SOURCE, at_edge=any(one.at_edge for one in swept))
    )  # fmt: skip
    lines = [line(f"LoRA r {rank}", range(1, steps + 1), list(zip(*curves[rank], strict=True))) for rank in RANKS]
    panel = Panel(f"start of training, rate {common:.3g}", "step", "training loss, nats", lines)
    return Finding(claims, [panel, panel_of_rates(swept)], [row(one) for one in swept])


def _parts(losses: list[float]) -> list[float]:
    size = len(losses) // _PARTS
    return [sum(losses[at * size : (at + 1) * size]) / size for at in range(_PARTS)]
