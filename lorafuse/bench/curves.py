"""Loss curves: every variant trains from PEFT's own initialization on the same batches, then meets held-out ones.

Two right variants round differently, so their losses part slowly. How far is printed next to what was learned, with an
interval over the steps.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from lorafuse.bench import figures
from lorafuse.bench.timed import Progress
from lorafuse.bench.training import Trainee
from lorafuse.bench.transformer import Given, Texts, set_adapters

__all__ = ["record", "summary"]

# of AdamW, constant: the demo's for adapters, a tenth of it for the base
_RATE = {"adapters": 5e-4, "base": 5e-5}


def record(
    curves: dict[str, Any], trainee: Trainee, given: Given, ids: Callable[[int], torch.Tensor], texts: Texts | None,
    steps: int, progress: Progress,
) -> None:  # fmt: skip
    """Put the losses of `steps` steps, and the held-out loss after them, into `curves` under the variant's name.

    The model of `trainee` begins anew: adapters as PEFT makes them, a trained base as the frozen one is. A base that
    was trained in place is left out.
    """
    if trainee.trains == "nothing" or (trainee.trains == "base" and given.alone):
        return
    if trainee.trains == "adapters":
        set_adapters(trainee.model, b_std=0.0)
    else:
        with torch.no_grad():
            for own, start in zip(trainee.model.parameters(), given.base.parameters(), strict=True):
                own.copy_(start)
    # the former optimizer's moments would take memory
    trainee.optimizer = None
    fresh = Trainee(trainee.name, trainee.model, trainee.trains, _RATE[trainee.trains])
    for step in range(steps):
        progress(step, steps, f"losses of {trainee.name}")
        fresh.step(ids(step))
    curves[trainee.name] = {"rate": _RATE[trainee.trains], "losses": fresh.losses}
    if texts is not None:
        curves[trainee.name]["held_out"] = statistics.fmean(fresh.evaluate(block[None]) for block in texts.held_out)


def summary(curves: dict[str, Any]) -> dict[str, Any]:
    """The curves, each with what it learned, and its difference from PEFT's of the same step: median and interval."""
    summaries = {}
    peft = curves.get("peft", {}).get("losses")
    for name, one in curves.items():
        losses = one["losses"]
        end = max(1, len(losses) // 10)
        summaries[name] = one | {"learned": statistics.fmean(losses[:end]) - statistics.fmean(losses[-end:])}
        if peft is not None and name != "peft":
            differences = [own - other for own, other in zip(losses, peft, strict=True)]
            low, high = figures.bootstrap([differences])
            summaries[name]["from_peft"] = {
                "median": statistics.median(differences), "low": low, "high": high,
                "largest": max(map(abs, differences)),
            }  # fmt: skip
    return summaries
