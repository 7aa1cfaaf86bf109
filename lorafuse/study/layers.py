"""F4: adapt all layers, above all MLP and experts; attention alone is worse at as many parameters.

Source: MLP-only is about as good as all layers; attention-only at rank 256 (0.25 B parameters) loses to MLP-only at
rank 128 (0.24 B) on Llama-3.1-8B (LoRA Without Regret).

Done here: random strings are memorized through adapters on attention, on the MLP (dense or experts) or on all
layers, at ranks chosen so that attention-only has at least as many parameters as each of the others; full fine-
tuning beside them. Memorizing, because there the adapter's capacity is what counts.

Held, for the dense model and for the mixture of experts each, when attention-only's loss lies above that of MLP-only
and above that of all layers, seed by seed.
"""

import math
from dataclasses import replace

from lorafuse.study.finding import Finding, Panel, curve, row
from lorafuse.study.model import Size, adapter_parameters
from lorafuse.study.runner import Lab
from lorafuse.study.train import Spec
from lorafuse.study.verdict import EDGE, claim

SUMMARY = "attention-only, MLP-only and all layers at as many parameters, dense and experts"
SOURCE = "attention-only r 256 (0.25 B) loses to MLP-only r 128 (0.24 B)"
SIZES = {"dense": Size(), "experts": Size(experts=4, inner=64)}

# nats; the power is stated for a difference of this size
EFFECT = 0.05
SEEDS = 4, 8

__all__ = ["SEEDS", "SIZES", "SOURCE", "SUMMARY", "conduct", "matched"]


def matched(size: Size, rank: int) -> dict[str, int]:
    """The rank of each choice of layers: MLP-only at `rank`, all layers at the highest that is no larger, and attention
    at the lowest that is no smaller than both."""
    target = adapter_parameters(size, rank, "mlp")
    everything = max(
        (r for r in range(1, rank + 1) if adapter_parameters(size, r, "all") <= target),
        key=lambda r: (adapter_parameters(size, r, "all"), -r),
        default=1,
    )
    most = max(target, adapter_parameters(size, everything, "all"))
    attention = next(r for r in range(1, 10 * most) if adapter_parameters(size, r, "attention") >= most)
    return {"attention": attention, "mlp": rank, "all": everything}


def conduct(lab: Lab, quick: bool) -> Finding:
    count, steps, rank = (128, 60, 4) if quick else (512, 400, 4)
    rates = {"full": 8e-3, "attention": 2e-3, "mlp": 8e-3, "all": 4e-3}
    # full fine-tuning is shown and not claimed
    shown = list(rates)[quick:]
    specs = []
    for size in SIZES.values():
        ranks = {"full": 0, **matched(size, rank)}
        for layers in shown:
            spec = Spec("strings", count, ranks[layers], rates[layers], steps, seed=0, batch=64, size=size)
            specs.append(spec if layers == "full" else replace(spec, layers=layers))
    swept = iter(lab.sweep(specs))
    claims, rows, panels = [], [], []
    for name in SIZES:
        by = {layers: next(swept) for layers in shown}
        for other in ("mlp", "all"):
            a, b = by["attention"], by[other]
            claims.append(
                claim(
                    f"{name}: attention-only ({a.runs[0]['trained']:,} parameters) above "
                    f"{'MLP-only' if other == 'mlp' else 'all layers'} ({b.runs[0]['trained']:,}), nats",
                    a.above(b), 0.0, math.inf, expected=EFFECT, margin="above zero", source=SOURCE,
                    claims=2 * len(SIZES), bar=EDGE if a.at_edge or b.at_edge else "",
                )
            )  # fmt: skip
        rows += [row(one, model=name, layers=layers) for layers, one in by.items()]
        curves = [curve(one, layers) for layers, one in by.items()]
        panels.append(Panel(f"{name}, at the best rates", "step", "loss, nats", curves))
    return Finding(claims, panels, rows)
