"""Runs side by side in processes of one thread each, finished ones remembered; a sweep of learning rates over them."""

import functools
import json
import math
import multiprocessing
import os
import signal
import statistics
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
# a grid whose best rate is at an end goes on there, by so many rates at most
FURTHER = 6
# the first of the seeds by which rates are chosen, which no claim and no base (`tasks`) uses
SELECTION = 10**5
# so many seeds choose for a small model, whose runs differ by more than its valley is deep: the first runs every rate,
# the others its best `KEPT`. SmolLM2's losses are smooth over the rate, and its runs take long: one
SELECTIONS, KEPT = 3, 5


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
    """A condition at its best rate: `runs` of each seed there, and in `validation` what every rate of the grid gave.

    The latter is one loss, or those of all selection seeds.
    """

    spec: Spec
    rates: list[float]
    validation: list[list[float]]
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

    def sweep(self, conditions: list[Spec]) -> list[Swept]:
        """Each condition at its best learning rate, with every seed.

        The rate is the best of the `grid` around the condition's, on the validation split of the selection seeds. The
        grid goes on at its end while the best rate is there, `FURTHER` rates at most.
        """
        grids: list[list[float]] = []
        wider = [grid(condition.lr) for condition in conditions]
        while wider != grids:
            grids = wider
            tried = self._tried(conditions, grids)
            best = [_best(losses) for losses in tried]
            wider = [_widened(rates, rate) for rates, rate in zip(grids, best, strict=True)]
        jobs = [replace(c, lr=rate, seed=seed) for c, rate in zip(conditions, best, strict=True) for seed in self.seeds]
        results, n = self.run(jobs), len(self.seeds)
        return [
            Swept(condition, grids[i], list(tried[i].values()), best[i], results[i * n : (i + 1) * n])
            for i, condition in enumerate(conditions)
        ]

    def _tried(self, conditions: list[Spec], grids: list[list[float]]) -> list[dict[float, list[float]]]:
        """Of each condition, the validation losses by rate: of the first selection seed or, of its best, of all."""
        tried: list[dict[float, list[float]]] = [{rate: [] for rate in rates} for rates in grids]
        for turn in range(SELECTIONS):
            jobs = [
                (losses[rate], replace(condition, lr=rate, seed=SELECTION + turn))
                for condition, losses in zip(conditions, tried, strict=True) if turn < _selections(condition)
                for rate in (sorted(losses, key=lambda rate: losses[rate][0])[:KEPT] if turn else losses)
            ]  # fmt: skip
            for (losses, _), result in zip(jobs, self.run([spec for _, spec in jobs]), strict=True):
                losses.append(float(result["validation"]))
        return tried


def _selections(condition: Spec) -> int:
    return 1 if condition.lessons == "language" else SELECTIONS


def _best(losses: dict[float, list[float]]) -> float:
    """Of the rates that all selection seeds ran: the least mean of the two worst losses.

    So a lucky run wins nothing, and one that diverges counts.
    """
    most = max(map(len, losses.values()))
    complete = [rate for rate in losses if len(losses[rate]) == most]
    return min(complete, key=lambda rate: statistics.fmean(sorted(losses[rate])[-2:]))


def _widened(rates: list[float], best: float) -> list[float]:
    """The rates and, where the best is at an end, two more beyond it."""
    if len(rates) >= 2 * REACH + 1 + FURTHER:
        return rates
    if best == rates[0]:
        return [best / FACTOR**2, best / FACTOR, *rates]
    return [*rates, best * FACTOR, best * FACTOR**2] if best == rates[-1] else rates
