"""One run: a base fine-tuned on one task, in full or by adapters; the same spec gives the same bits."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.study import tasks
from lorafuse.study.model import Size, Transformer, adapt, train_rest, trained
from lorafuse.study.tasks import Data

__all__ = ["Spec", "batches", "due", "loss_of", "optimizer", "prepared", "result", "rounded", "run", "single_thread"]

# of the learning rate, then constant as in the source
_WARMUP = 10
# a run is evaluated this often; its loss is the mean of the last of them, so that one step's noise counts less
_EVALUATIONS, _LAST = 20, 4
# training losses that are kept
_EARLY = 100
# what a run that diverged counts as
DIVERGED = 1e3


@dataclass(frozen=True)
class Spec:
    """All that a run depends on.

    task: "strings", evaluated on the strings themselves; an operation of `tasks.ARITHMETIC`, evaluated on `test` other
    problems; with `episodes`, the same by policy gradient. rank 0 is full fine-tuning. `rest`, where it is not None,
    says whether embeddings, norms and unembedding are trained, as they are in full fine-tuning and not beside adapters.
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
    size: Size = field(default_factory=Size)
    base_steps: int = 0
    base_seed: int = 0
    rest: bool | None = None

    @property
    def lessons(self) -> str:
        """What the base of this task has learned."""
        return "facts" if self.task == "strings" else "arithmetic"

    @property
    def side(self) -> str:
        side = f"LoRA r {self.rank}" if self.rank else "full"
        return side if self.rest is None else f"{side} and the rest" if self.rest else f"{side}, adapted layers only"

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


def prepared(spec: Spec, base: dict[str, Tensor], device: torch.device) -> Transformer:
    """The base with its weights and, unless it is trained in full, its adapters."""
    torch.manual_seed(spec.seed)
    model = Transformer(spec.size)
    model.load_state_dict(base)
    if spec.rank:
        adapt(model, spec.rank, spec.layers)
    if spec.rest is not None:
        train_rest(model, spec.rest)
    return model.to(device)


def optimizer(model: nn.Module, lr: float) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW without decay, constant rate after a short warm-up; one rate for A and B."""
    adam = torch.optim.AdamW(trained(model), lr=lr, weight_decay=0.0, fused=True)
    return adam, torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1.0, (step + 1) / _WARMUP))


def loss_of(model: nn.Module, data: Data) -> Tensor:
    """Mean cross-entropy of the answers' characters in nats."""
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


def due(step: int, steps: int) -> bool:
    """Whether the run is evaluated after this step."""
    return step % max(1, steps // _EVALUATIONS) == 0 or step == steps


def result(
    model: nn.Module, curve: list[list[float]], early: list[float], broken: float | None = None
) -> dict[str, Any]:
    """What a run returns; `broken` is the loss of one that ended before its time.

    `loss` (mean of the last evaluations), `start` (the base's), `curve` [[step, loss]], `early` values of training and
    `trained`, the number of parameters.
    """
    last = [value for _, value in curve[1:]][-_LAST:]
    return {
        "loss": sum(last) / len(last) if broken is None else broken,
        "start": curve[0][1],
        "curve": curve,
        "early": early[:_EARLY],
        "trained": sum(parameter.numel() for parameter in trained(model)),
    }


def _examples(spec: Spec) -> tuple[Data, Data]:
    if spec.task == "strings":
        data = tasks.strings(spec.count, spec.length, spec.seed)
        return data, data
    return tasks.arithmetic(spec.task, spec.count, spec.test, spec.seed)


def run(spec: Spec, base: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """Train as the spec says; returns a `result`, a mean cross-entropy in nats as its losses."""
    model = prepared(spec, base, device)
    train, test = (data.to(device) for data in _examples(spec))
    adam, schedule = optimizer(model, spec.lr)

    def evaluate() -> float:
        with torch.no_grad():
            parts = [loss_of(model, Data(*pair)) * len(pair[0]) for pair in
                     zip(test.tokens.split(512), test.labels.split(512), strict=True)]  # fmt: skip
            value = rounded(float(sum(parts)) / len(test))
        return value if math.isfinite(value) and value < DIVERGED else DIVERGED

    curve = [[0, evaluate()]]
    losses: list[Tensor] = []
    for step, chosen in enumerate(batches(len(train), spec.batch, spec.steps, spec.seed), 1):
        loss = loss_of(model, Data(train.tokens[chosen], train.labels[chosen]))
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        losses.append(loss.detach())
        if due(step, spec.steps):
            curve.append([step, evaluate()])
            if curve[-1][1] == DIVERGED:
                break
    early = [rounded(float(value)) for value in losses[:_EARLY]]
    return result(model, curve, early, DIVERGED if curve[-1][1] == DIVERGED else None)
