"""One run: a base fine-tuned on one task, in full or by adapters; the same spec gives the same bits on a CPU."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.study import tasks
from lorafuse.study.model import ALPHA, Size, trained
from lorafuse.study.tasks import Data

__all__ = ["Spec", "batches", "fit", "loss_of", "prepared", "rounded", "run", "single_thread"]

# training losses that are kept
_EARLY = 100
# what a run that diverged counts as
DIVERGED = 1e3
# of an evaluation's parts, so that SmolLM2's logits stay below half a gigabyte
_TOKENS = 2048


@dataclass(frozen=True)
class Spec:
    """All that a run depends on.

    task: "problems", word problems for SmolLM2, `length` tokens a row; "strings", evaluated on the strings themselves;
    an operation of `tasks.ARITHMETIC`; with `episodes`, the same by policy gradient. `test` others each are evaluated
    to choose the rate and for the claim, the former `evaluations` times. rank 0 is full fine-tuning.
    """

    task: str
    count: int
    rank: int
    lr: float
    steps: int
    seed: int
    batch: int = 32
    layers: str = "all"
    length: int = 8
    test: int = 512
    episodes: int = 0
    evaluations: int = 20
    size: Size = field(default_factory=Size)
    base_steps: int = 0
    base_seed: int = 0

    @property
    def lessons(self) -> str:
        """What the base of this task has learned."""
        return {"problems": "language", "strings": "facts"}.get(self.task, "arithmetic")

    @property
    def side(self) -> str:
        return f"LoRA r {self.rank}" if self.rank else "full"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def rounded(value: float) -> float:
    """To six digits, so that files stay small."""
    return float(f"{value:.6g}")


@contextmanager
def single_thread() -> Iterator[None]:
    """The order of sums, and so their last bits, depend on the number of threads: one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def prepared(spec: Spec, base: nn.Module, device: torch.device) -> nn.Module:
    """A copy of the base with, unless it is trained in full, its adapters."""
    torch.manual_seed(spec.seed)
    model: Any = copy.deepcopy(base)
    if spec.rank:
        model.adapt(spec.rank, spec.layers, ALPHA)
    return model.to(device)


def loss_of(model: nn.Module, data: Data) -> Tensor:
    """Mean cross-entropy of the labels in nats."""
    return nn.functional.cross_entropy(model(data.tokens).flatten(0, 1), data.labels.flatten())


def batches(count: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of each step: epoch after epoch, every example once in each, in a new order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        chosen, order = order[:batch], order[batch:]
        yield chosen


def fit(
    spec: Spec,
    model: nn.Module,
    splits: tuple[Data, Data, Data],
    batch: int,
    objective: Callable[[Tensor], tuple[Tensor, Tensor]],
    measure: Callable[[Data], float],
    worst: float,
) -> dict[str, Any]:
    """Train by AdamW without decay, at a constant rate from the first step on, as in the source; one rate for A and B.

    `objective` gives a batch's loss and what of it is kept, `measure` the figure of a split; a run that diverges counts
    as `worst`. Returns `validation` and `loss` (of the test split) at the end, `start` (the base's), `curve`
    [[step, validation]], `early` kept values and `trained`, the number of parameters.
    """
    training, validation, test = splits
    adam = torch.optim.AdamW(trained(model), lr=spec.lr, weight_decay=0.0, fused=True)
    every = max(1, spec.steps // spec.evaluations)
    start, curve, kept = rounded(measure(test)), [], []
    broken = False
    for step, chosen in enumerate(batches(len(training), batch, spec.steps, spec.seed), 1):
        loss, value = objective(chosen)
        broken = not math.isfinite(loss.item())
        if not broken:
            adam.zero_grad()
            loss.backward()
            adam.step()
            kept.append(rounded(float(value)))
        if broken or step % every == 0 or step == spec.steps:
            found = worst if broken else measure(validation)
            # NaN compares as false
            broken = not found < worst
            curve.append([step, worst if broken else rounded(found)])
        if broken:
            break
    return {
        "validation": curve[-1][1],
        "loss": worst if broken else rounded(measure(test)),
        "start": start,
        "curve": curve,
        "early": kept[:_EARLY],
        "trained": sum(parameter.numel() for parameter in trained(model)),
    }


def _splits(spec: Spec) -> tuple[Data, Data, Data]:
    if spec.task == "problems":
        # what needs transformers and the weights' package is loaded where it is used
        from lorafuse.study import language

        counts = spec.count, spec.test, spec.test
        train, validation, test = (language.problems(n, spec.length, 3 * spec.seed + i) for i, n in enumerate(counts))
        return train, validation, test
    if spec.task == "strings":
        data = tasks.strings(spec.count, spec.length, spec.seed)
        return data, data, data
    return tasks.arithmetic(spec.task, spec.count, spec.test, spec.seed)


def run(spec: Spec, base: nn.Module, device: torch.device) -> dict[str, Any]:
    """Train as the spec says, by cross-entropy; returns `fit`'s result, in nats."""
    model = prepared(spec, base, device)
    train, validation, test = (data.to(device) for data in _splits(spec))

    def objective(chosen: Tensor) -> tuple[Tensor, Tensor]:
        loss = loss_of(model, Data(train.tokens[chosen], train.labels[chosen]))
        return loss, loss.detach()

    def measure(data: Data) -> float:
        rows = max(1, _TOKENS // data.tokens.shape[1])
        with torch.no_grad():
            parts = [loss_of(model, Data(*pair)) * len(pair[0]) for pair in
                     zip(data.tokens.split(rows), data.labels.split(rows), strict=True)]  # fmt: skip
        return float(sum(parts)) / len(data)

    return fit(spec, model, (train, validation, test), spec.batch, objective, measure, DIVERGED)
