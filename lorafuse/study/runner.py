"""Runs side by side in processes of one thread each, finished ones remembered; a sweep of learning rates over them."""

import functools
import json
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import nn

from lorafuse.study import policy, pretrain, train
from lorafuse.study.model import Size
from lorafuse.study.train import Spec

__all__ = ["Lab", "Swept", "grid", "key"]

Result = dict[str, Any]

# rates in factors of sqrt(2), so many to each side of the one that a study names: two decades and a little more
FACTOR, REACH = math.sqrt(2), 7
# seeds by which rates are chosen, and which no claim and no base (`tasks`) uses
SELECTION = 10**5


def key(spec: Spec) -> str:
    return json.dumps(spec.as_dict(), sort_keys=True)


@functools.cache
def pretrained(lessons: str, size: Size, steps: int, seed: int) -> nn.Module:
    if lessons == "language":
        # transformers and the weights' package are loaded only where they are used
        from lorafuse.study import language

        return language.load()
    return pretrain.base(lessons, size, steps, seed)


def _work(job: tuple[Spec, str]) -> tuple[Spec, Result]:
    spec, device = job
    if device.startswith("cuda"):
        # TF32 for SmolLM2; some CPUs would follow too
        torch.set_float32_matmul_precision("high")
    method = policy.run if spec.episodes else train.run
    with train.single_thread():
        return spec, method(
            spec, pretrained(spec.lessons, spec.size, spec.base_steps, spec.base_seed), torch.device(device)
        )


def _make_base(spec: Spec) -> None:
    pretrained(spec.lessons, spec.size, spec.base_steps, spec.base_seed)


def _start_worker() -> None:
    # Ctrl-C is the parent's to handle; it ends the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # a parent that is killed cannot, and its workers would go on with their runs
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@dataclass(frozen=True)
class Swept:
    """A condition at its best rate: `runs` of each seed there, and what every rate of the grid gave in `validation`."""

    spec: Spec
    rates: list[float]
    validation: list[float]
    best: float
    runs: list[Result]

    @property
    def at_edge(self) -> bool:
        return self.best in (self.rates[0], self.rates[-1])

    @property
    def losses(self) -> list[float]:
        """Of the test split, seed by seed."""
        return [float(run["loss"]) for run in self.runs]

    @property
    def learned(self) -> list[float]:
        """How far the test loss fell from the base's, seed by seed."""
        return [float(run["start"]) - float(run["loss"]) for run in self.runs]

    def above(self, other: "Swept") -> list[float]:
        """Differences of the test losses, seed by seed: the same data, in the same order, for both."""
        return [a - b for a, b in zip(self.losses, other.losses, strict=True)]


def grid(rate: float) -> list[float]:
    """Rates around one, two decades and a little more."""
    return [rate * FACTOR**step for step in range(-REACH, REACH + 1)]


class Lab:
    """Where a study's runs are made.

    Args:
        seeds: of the data, its order and the adapters; the small base has the first one.
        device, workers: one worker is this process, more are processes of their own.
        base_steps: of its pretraining, instead of `pretrain.STEPS`.
        done: finished runs by `key`, from an earlier time; new ones are added.
        on_done: called after each run with its spec, the number of finished runs of this call and of all of them.
    """

    def __init__(
        self,
        seeds: list[int],
        device: str = "cpu",
        workers: int = 1,
        base_steps: int | None = None,
        done: dict[str, Result] | None = None,
        on_done: Callable[[Spec, int, int], None] = lambda spec, finished, total: None,
    ) -> None:
        self.seeds, self.device, self.workers, self.base_steps = seeds, device, workers, base_steps
        self.done: dict[str, Result] = {} if done is None else done
        self.on_done = on_done
        # what the study has asked for, in its order
        self.asked: dict[str, Spec] = {}
        self._pool: Any = None

    def __enter__(self) -> "Lab":
        if self.workers > 1:
            # its server imports torch once for all workers, and has no threads or CUDA state that a fork would break
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            self._pool = context.Pool(self.workers, _start_worker)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()

    def _map(self, function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterable[Any]:
        return map(function, jobs) if self._pool is None else self._pool.imap_unordered(function, jobs)

    def run(self, specs: list[Spec]) -> list[Result]:
        """The result of each spec, in their order; what is done already is not run again."""
        specs = [self._complete(spec) for spec in specs]
        self.asked |= {key(spec): spec for spec in specs}
        missing = list({key(spec): spec for spec in specs if key(spec) not in self.done}.values())
        # each base is trained once, before workers ask for it at the same time
        bases = {(spec.lessons, spec.size): spec for spec in missing if spec.lessons in pretrain.STEPS}
        list(self._map(_make_base, bases.values()))
        # long runs first, so that the workers end together
        jobs = sorted(missing, key=lambda spec: -spec.steps * spec.batch)
        for finished, (spec, result) in enumerate(self._map(_work, [(spec, self.device) for spec in jobs]), 1):
            self.done[key(spec)] = result
            self.on_done(spec, finished, len(jobs))
        return [self.done[key(spec)] for spec in specs]

    def _complete(self, spec: Spec) -> Spec:
        if spec.lessons not in pretrain.STEPS:
            return spec
        return replace(spec, base_seed=self.seeds[0], base_steps=self.base_steps or pretrain.STEPS[spec.lessons])

    def sweep(self, conditions: list[Spec], selections: int = 1) -> list[Swept]:
        """Each condition at its best learning rate, with every seed.

        The rate is the one of the `grid` around the condition's that is best on the validation split, on the average of
        `selections` seeds that no claim uses.
        """
        rates = [grid(condition.lr) for condition in conditions]
        seeds = range(SELECTION, SELECTION + selections)
        specs = [
            replace(condition, lr=rate, seed=seed)
            for condition, row in zip(conditions, rates, strict=True) for rate in row for seed in seeds
        ]  # fmt: skip
        losses = iter([float(result["validation"]) for result in self.run(specs)])
        means = [[sum(next(losses) for _ in seeds) / selections for _ in row] for row in rates]
        best = [row[values.index(min(values))] for row, values in zip(rates, means, strict=True)]
        jobs = [replace(c, lr=rate, seed=seed) for c, rate in zip(conditions, best, strict=True) for seed in self.seeds]
        results, n = self.run(jobs), len(self.seeds)
        return [
            Swept(condition, rates[i], means[i], best[i], results[i * n : (i + 1) * n])
            for i, condition in enumerate(conditions)
        ]
