"""Runs side by side in processes of one thread each, finished ones remembered; a sweep of learning rates over them."""

import functools
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lorafuse.study import policy, pretrain, train
from lorafuse.study.model import Size
from lorafuse.study.train import Spec

__all__ = ["Lab", "Swept", "key"]

Result = dict[str, Any]

# a sweep that finds its best rate at an end goes on there, up to so many rates
MOST_RATES = 8
FACTOR = 2.0


def key(spec: Spec) -> str:
    return json.dumps(spec.as_dict(), sort_keys=True)


@functools.cache
def _base(lessons: str, size: Size, steps: int, seed: int) -> dict[str, Tensor]:
    return pretrain.base(lessons, size, steps, seed)


def _work(job: tuple[Spec, str]) -> tuple[Spec, Result]:
    spec, device = job
    method = policy.run if spec.episodes else train.run
    with train.single_thread():
        return spec, method(spec, _base(spec.lessons, spec.size, spec.base_steps, spec.base_seed), torch.device(device))


def _make_base(spec: Spec) -> None:
    _base(spec.lessons, spec.size, spec.base_steps, spec.base_seed)


def _start_worker() -> None:
    # Ctrl-C is the parent's to handle; it ends the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class Swept:
    """A condition at its best rate: `losses` of each seed there, `means` of every rate that was tried."""

    spec: Spec
    rates: list[float]
    means: list[float]
    best: float
    runs: list[Result]
    # rate by rate, the loss of each seed that the sweep ran
    by_rate: list[list[float]]

    @property
    def at_edge(self) -> bool:
        return self.best in (self.rates[0], self.rates[-1])

    @property
    def losses(self) -> list[float]:
        return [float(run["loss"]) for run in self.runs]


class Lab:
    """Where a study's runs are made.

    Args:
        seeds: of the data, its order and the adapters; the base has the first one.
        device, workers: one worker is this process, more are processes of their own.
        base_steps: of its pretraining, instead of `pretrain.STEPS`.
        width: of the model, instead of that of the study's specs.
        done: finished runs by `key`, from an earlier time; new ones are added.
        on_done: called after each run with its spec, the number of finished runs of this call and of all of them.
    """

    def __init__(
        self,
        seeds: list[int],
        device: str = "cpu",
        workers: int = 1,
        base_steps: int | None = None,
        width: int | None = None,
        done: dict[str, Result] | None = None,
        on_done: Callable[[Spec, int, int], None] = lambda spec, finished, total: None,
    ) -> None:
        self.seeds, self.device, self.workers, self.base_steps, self.width = seeds, device, workers, base_steps, width
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
        # each base once, before workers ask for it at the same time
        bases = {(spec.lessons, spec.size): spec for spec in missing}
        list(self._map(_make_base, bases.values()))
        # long runs first, so that the workers end together
        jobs = sorted(missing, key=lambda spec: -spec.steps * spec.batch)
        for finished, (spec, result) in enumerate(self._map(_work, [(spec, self.device) for spec in jobs]), 1):
            self.done[key(spec)] = result
            self.on_done(spec, finished, len(jobs))
        return [self.done[key(spec)] for spec in specs]

    def _complete(self, spec: Spec) -> Spec:
        size = spec.size if self.width is None else spec.size.wide(self.width)
        steps = self.base_steps or pretrain.STEPS[spec.lessons]
        return replace(spec, size=size, base_seed=self.seeds[0], base_steps=steps)

    def sweep(self, conditions: list[Spec], every_seed: bool = False) -> list[Swept]:
        """Each condition at its best learning rate, with every seed.

        The sweep begins around the rate of the condition, in factors of 2, and goes on while the best one is at an end.
        It runs with the first seed, or with every seed, which takes longer and gives the best rate of each.
        """
        tried = self.seeds if every_seed else self.seeds[:1]
        rates = [[c.lr / FACTOR, c.lr, c.lr * FACTOR] for c in conditions]
        while True:
            losses = self._losses(conditions, rates, tried)
            means = [[sum(seeds) / len(seeds) for seeds in each] for each in losses]
            best = [row[values.index(min(values))] for row, values in zip(rates, means, strict=True)]
            grown = [self._grown(row, value) for row, value in zip(rates, best, strict=True)]
            if grown == rates:
                break
            rates = grown
        jobs = [[replace(c, lr=b, seed=s) for s in self.seeds] for c, b in zip(conditions, best, strict=True)]
        results = self.run([spec for row in jobs for spec in row])
        n = len(self.seeds)
        return [
            Swept(c, rates[i], means[i], best[i], results[i * n : (i + 1) * n], losses[i])
            for i, c in enumerate(conditions)
        ]

    def _losses(self, conditions: list[Spec], rates: list[list[float]], seeds: list[int]) -> list[list[list[float]]]:
        specs = [
            replace(condition, lr=rate, seed=seed)
            for condition, row in zip(conditions, rates, strict=True) for rate in row for seed in seeds
        ]  # fmt: skip
        found = iter([float(result["loss"]) for result in self.run(specs)])
        return [[[next(found) for _ in seeds] for _ in row] for row in rates]

    @staticmethod
    def _grown(row: list[float], best: float) -> list[float]:
        if len(row) >= MOST_RATES or best not in (row[0], row[-1]):
            return row
        return [row[0] / FACTOR, *row] if best == row[0] else [*row, row[-1] * FACTOR]
