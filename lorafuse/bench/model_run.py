"""One case of `lorafuse bench model`: build and check its variants, time steps in turns, then memory and losses."""

import argparse
import gc
import math
import random
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch

from lorafuse.bench import curves, figures, peaks, plugins, training
from lorafuse.bench.limits import first_line, is_out_of_memory, out_of_memory
from lorafuse.bench.plugins import Baseline
from lorafuse.bench.remote import RemoteTrainee
from lorafuse.bench.result import Failed, Wrong
from lorafuse.bench.timed import Progress
from lorafuse.bench.training import Seen, Trainee
from lorafuse.bench.transformer import Given, Model, Texts, free_bytes
from lorafuse.bench.transformer_cost import Sizes, Training, fits, step_flops, together_bytes

__all__ = ["Case", "chosen", "run_case"]

_T = TypeVar("_T")
# the files of bench/baselines that leave the base as it is to PEFT, bitsandbytes or lorafuse
_QUANTIZED = ("frozen", "peft", "peft_autocast", "peft_compiled", "peft_half", "lorafuse")
# what a variant without adapters is, in messages
_BEGINS = {"base": "full fine-tuning", "nothing": "the frozen model"}


@dataclass(frozen=True)
class Case:
    """A model of those sizes, `accumulate` micro-batches of `batch` sequences of `tokens` a step.

    `steps`: of the loss curves, from PEFT's own initialization; 0 for none. `quant`: how a library stores the base.
    """

    model: Model
    sizes: Sizes
    accumulate: int
    checkpointing: bool
    batch: int
    tokens: int
    steps: int = 0
    quant: str | None = None

    @property
    def name(self) -> str:
        model = f"{self.model.name} over {self.quant}" if self.quant else self.model.name
        return f"{model}, accumulate {self.accumulate}, checkpointing {'on' if self.checkpointing else 'off'}"

    @property
    def tokens_per_step(self) -> int:
        """Of all micro-batches."""
        return self.accumulate * self.batch * self.tokens

    @property
    def title(self) -> str:
        """The case and its layers."""
        return f"{self.name}, {self.sizes.layers} layers"


def chosen(args: argparse.Namespace, device: torch.device) -> list[Baseline]:
    """The baselines of `--variants`, or all, also those that cannot run. Raises ValueError with the known ones."""
    baselines = plugins.load("model", device, args.baselines, args.dtype)
    known = [one.name for one in baselines]
    for name in args.variants or ():
        if name not in known:
            raise ValueError(f"--variants {name}: it trains no model; the known ones: {', '.join(known)}")
    selected = [one for one in baselines if not args.variants or one.name in args.variants]
    if not args.quant:
        return selected
    # the others train the base, read its weight, or load one of their own
    reason = f"it does not run over a base in {args.quant}"
    return [one if one.file.stem in _QUANTIZED else replace(one, absent=one.absent or reason) for one in selected]


@dataclass
class _Run:
    """The state of a case: its options, and the results of each variant so far."""

    case: Case
    args: argparse.Namespace
    device: torch.device
    progress: Progress
    baselines: dict[str, Baseline]
    recorded: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    # those of the failed ones for which memory ran out
    no_memory: set[str] = field(default_factory=set)
    parity: dict[str, Any] = field(default_factory=dict)
    built: dict[str, Any] = field(default_factory=dict)
    # losses of every timed step, also of variants that failed later
    losses: dict[str, list[float]] = field(default_factory=dict)
    # loss of the first micro-batch: "base" is the PEFT model without adapters, the others are variants without them
    first: dict[str, float] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.args.dtype)

    @cached_property
    def texts(self) -> Texts | None:
        """The data of a real model; random weights learn nothing from it."""
        if not self.case.model.real:
            return None
        return Texts(max(self.case.steps, 2 * self.args.rounds), self._size, self.device)

    @property
    def _size(self) -> tuple[int, int, int]:
        return self.case.accumulate, self.case.batch, self.case.tokens

    def ids(self, step: int) -> torch.Tensor:
        """Token ids `[accumulate, batch, tokens]` of a step: text for a real model, else random."""
        if self.texts is not None:
            return self.texts(step)
        return training.batches(self.case.sizes.vocabulary, self._size, step, self.device)

    def attempt(self, name: str, run: Callable[[], _T]) -> _T | None:
        """The result of `run()`; None, with the reason in `failed`, when memory runs out or a peer fails."""
        try:
            return run()
        except Exception as error:
            if is_out_of_memory(error):
                self.no_memory.add(name)
                reason = out_of_memory(error)
            elif isinstance(error, Failed):
                reason = str(error)
            elif self.baselines[name].peer:
                reason = f"{type(error).__name__}: {first_line(error)}"
            else:
                raise
            self.failed.setdefault(name, reason)
        _release(self.device)
        return None

    def reject(self, name: str, reason: str) -> None:
        """A wrong result: raises Wrong for this project's own variants; a peer is reported and not counted."""
        if not self.baselines[name].peer:
            raise Wrong(reason)
        self.failed.setdefault(name, reason)


def run_case(case: Case, args: argparse.Namespace, device: torch.device, progress: Progress) -> dict[str, Any]:
    """Figures of every variant. Raises Wrong when losses differ, MemoryError when no variant fits.

    A variant that runs out of memory is in "failed" and the others continue. When full fine-tuning was in the same
    process, the case runs again with full fine-tuning alone.
    """
    if not case.sizes.layers:
        raise MemoryError(f"not one layer of {case.model.name} fits in the {free_bytes(device) / 2**30:.1f} GiB free")
    selected = chosen(args, device)
    baselines = {one.name: one for one in selected if not one.absent}
    # PEFT calls methods that transformers renamed, and looks for a config.json next to a GGUF file
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Could not find a config file in", category=UserWarning)
        names = list(baselines)
        apart = [group for group in (["full"] if "full" in names else [], [n for n in names if n != "full"]) if group]
        train = Training(args.rank, case.batch * case.tokens, getattr(torch, args.dtype).itemsize, case.checkpointing)
        isolated = [name for name in names if baselines[name].isolated]
        turns = [names] if fits(together_bytes(case.sizes, names, train, isolated), free_bytes(device)) else apart
        run = _run_turns(turns, case, args, device, progress, baselines)
        if run.no_memory and turns != apart:
            turns = apart
            run = _run_turns(turns, case, args, device, progress, baselines)
    if not run.recorded:
        raise MemoryError("; ".join(f"{name}: {reason}" for name, reason in run.failed.items()))
    return _result(run, turns) | {"absent": {one.name: one.absent for one in selected if one.absent}}


def _run_turns(
    turns: list[list[str]], case: Case, args: argparse.Namespace, device: torch.device, progress: Progress,
    baselines: dict[str, Baseline],
) -> _Run:  # fmt: skip
    run = _Run(case, args, device, progress, baselines)
    for names in turns:
        try:
            _run_group(run, names, args.seconds / len(turns))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # in memory that the variants share
            for name in names:
                run.failed.setdefault(name, out_of_memory(error))
                run.no_memory.add(name)
        _release(device)
    base = run.first.pop("base", None)
    if base is None:
        return run
    for name, loss in run.first.items():
        difference, bound = abs(loss - base), training.loss_bound(run.dtype, base)
        if not difference <= bound:
            raise Wrong(
                f"{_BEGINS[baselines[name].trains]} begins at a loss of {loss:.6f}, the base without adapters has "
                f"{base:.6f}: above {bound:.1e} apart"
            )
        run.parity[f"{name}_from_base"] = difference
    return run


def _run_group(run: _Run, names: list[str], seconds: float) -> None:
    """Build and check variants, time their steps in turns, measure memory and losses; `run` receives all results."""
    with ExitStack() as stack:
        given, trainees = _build(run, names, stack)
        warm_up = max(1, run.args.rounds // 10)
        total, order, end = warm_up + run.args.rounds, random.Random(0), time.monotonic() + seconds
        for index in range(total):
            if index >= warm_up + min(figures.LEAST_ROUNDS, run.args.rounds) and time.monotonic() > end:
                break
            ids = run.ids(index)
            for trainee in order.sample(trainees, len(trainees)):
                run.progress(index, total, f"{trainee.name}, step {index + 1}")
                run.attempt(trainee.name, lambda trainee=trainee, ids=ids: trainee.step(ids))  # type: ignore[misc]
                if trainee.name in run.failed and trainee.optimizer is not None:
                    # its gradients must not take memory of the others
                    trainee.optimizer.zero_grad()
            trainees = [trainee for trainee in trainees if trainee.name not in run.failed]
        _check_losses(run)
        for trainee in [one for one in trainees if one.name not in run.failed]:
            run.progress(total, total, f"memory of {trainee.name}")
            memory = run.attempt(trainee.name, lambda trainee=trainee: trainee.memory(run.ids(0)))  # type: ignore[misc]
            if memory is not None:
                run.recorded[trainee.name] = _recorded(run, trainee, warm_up) | memory | run.built[trainee.name]
        if run.case.steps:
            local = [one for one in trainees if isinstance(one, Trainee) and one.name in run.recorded]
            for trainee in local:
                run.attempt(
                    trainee.name,
                    lambda trainee=trainee: curves.record(  # type: ignore[misc]
                        run.curves, trainee, given, run.ids, run.texts, run.case.steps, run.progress
                    ),
                )


class _Reference:
    """PEFT as shipped on the first micro-batch, and what its own rounding to the base's dtype changes there."""

    def __init__(self, run: _Run, given: Given, micro: torch.Tensor) -> None:
        self.model, self._micro, self._dtype = given.adapted(), micro, run.dtype
        self.without = training.without_adapters(self.model, micro)
        run.first["base"] = self.without.loss
        # also without PEFT among the variants: the others are compared with it
        self.seen = run.attempt("peft", lambda: training.observe(self.model, micro))

    @cached_property
    def half(self) -> Seen:
        return training.half_adapters(self.model, self._micro, self._dtype)

    def check(self, run: _Run, name: str, seen: Seen) -> None:
        """Note how far a variant is from PEFT. Raises Wrong, unless it is a peer, where that is too far."""
        if self.seen is None:
            run.parity["not_compared"] = "PEFT ran out of memory on the first micro-batch"
            return
        distances = training.compare(seen, self.seen, self.without, lambda: self.half, run.dtype)
        if wrong := distances.pop("wrong"):
            run.reject(name, f"{name}: {wrong}")
        run.parity.setdefault("first_micro_batch", {})[name] = distances


def _build(run: _Run, names: list[str], stack: ExitStack) -> tuple[Given, list[Trainee | RemoteTrainee]]:
    """The variants that fit, checked on the first micro-batch: adapted ones against PEFT, the others by their loss."""
    run.progress(0, 1, f"building {run.case.model.name}")
    micro, case = run.ids(0)[0], run.case
    alone = names == ["full"]
    given = Given(
        case.model, case.sizes, run.dtype, run.device, run.args.rank, case.tokens, case.checkpointing, alone, case.quant
    )
    reference = None if alone else _Reference(run, given, micro)
    trainees: list[Trainee | RemoteTrainee] = []
    for name in names:
        run.progress(0, 1, f"checking {name}")
        one = run.baselines[name]
        if one.isolated:
            made = run.attempt(name, lambda one=one: stack.enter_context(_remote(run, one)))  # type: ignore[misc]
            if made is None or reference is None or reference.seen is None:
                continue
            loss = run.attempt(name, lambda made=made: made.loss(micro))  # type: ignore[misc]
            if loss is None or not abs(loss - reference.seen.loss) <= training.loss_bound(run.dtype, loss):
                run.failed.setdefault(name, f"it begins at a loss of {loss}, PEFT at {reference.seen.loss:.6f}")
                continue
            facts = made.facts
        else:
            if name == "peft" and (reference is None or reference.seen is None):
                continue
            built = run.attempt(name, lambda one=one: _local(run, one, given, reference, micro))  # type: ignore[misc]
            if built is None:
                continue
            made, facts = built
        trainees.append(made)
        run.losses[name] = made.losses
        trained = sum(p.numel() for p in made.trained) if isinstance(made, Trainee) else facts.pop("trained")
        run.built[name] = {"parameters": given.parameters, "trained": trained, **facts}
    return given, trainees


def _remote(run: _Run, one: Baseline) -> Any:
    """A model in a process of its own, as a context that ends it."""
    case = run.case
    model = {
        "model": asdict(case.model), "sizes": asdict(case.sizes), "dtype": run.args.dtype, "rank": run.args.rank,
        "sequence": case.tokens, "checkpointing": case.checkpointing,
    }  # fmt: skip
    return RemoteTrainee(one, model, run.device, run.args.timeout)


def _local(
    run: _Run, one: Baseline, given: Given, reference: _Reference | None, micro: torch.Tensor
) -> tuple[Trainee, dict[str, Any]]:
    """A variant in this process, checked. Raises Wrong where it is wrong."""
    if one.name == "peft":
        assert reference is not None
        return Trainee(one.name, reference.model), {}
    made, facts = training.built(one, given)
    if one.trains == "base":
        run.first[one.name] = training.observe(made.model, micro, gradients=False).loss
    elif one.trains == "nothing":
        run.first[one.name], gradient = training.input_gradient(made.model, micro)
        if gradient is None or not (gradient.any() and gradient.isfinite().all()):
            raise Wrong(f"{one.name}: no gradient reaches the embedded tokens")
    else:
        if facts.get("patched") == 0:
            raise Wrong(f"{one.name}: nothing was patched")
        assert reference is not None
        reference.check(run, one.name, training.observe(made.model, micro))
    return made, facts


def _check_losses(run: _Run) -> None:
    """Reject variants whose losses are not finite, or differ from PEFT's by more than `loss_bound`."""
    losses = run.losses
    for name, steps in losses.items():
        for step, loss in enumerate(steps):
            if not math.isfinite(loss):
                run.reject(name, f"{name}: the loss of step {step + 1} is {loss}")
                break
    for name in losses.keys() - {"peft"} if "peft" in losses else ():
        if run.baselines[name].trains != "adapters":
            continue
        pairs = list(zip(losses[name], losses["peft"], strict=False))
        for step, (own, peft) in enumerate(pairs):
            bound = training.loss_bound(run.dtype, peft)
            if not abs(own - peft) <= bound:
                run.reject(
                    name, f"step {step + 1}: {name} has loss {own:.6f}, PEFT {peft:.6f}: above {bound:.1e} apart"
                )
                break
        if pairs:
            largest = max(abs(own - peft) for own, peft in pairs)
            run.parity.setdefault("losses", {})[name] = {"steps": len(pairs), "largest_difference": largest}


def _recorded(run: _Run, trainee: Trainee | RemoteTrainee, warm_up: int) -> dict[str, Any]:
    one, case = run.baselines[trainee.name], run.case
    flops = step_flops(case.sizes, trainee.name, run.args.rank, case.tokens_per_step, case.tokens)
    return {
        "label": one.label, "trains": one.trains, "seconds": figures.raw(trainee.seconds[warm_up:]),
        "model_flops": flops, "first_loss": trainee.losses[0], "last_loss": trainee.losses[-1],
    }  # fmt: skip


def _result(run: _Run, turns: list[list[str]]) -> dict[str, Any]:
    case, args = run.case, run.args
    whole = Sizes.of(case.model.config())
    flops = {
        name: step_flops(case.sizes, name, args.rank, case.tokens_per_step, case.tokens)
        for name in ("frozen", "full", "lorafuse")
    }
    return figures.derive({
        "kind": "model", "case": case.name, "model": case.model.name,
        "weights": "real" if case.model.real else "random",
        "data": "gsm_symbolic" if case.model.real else "random tokens",
        "optimizer": "AdamW, fused, moments in each parameter's dtype",
        "layers": case.sizes.layers, "layers_of_model": whole.layers,
        "vocabulary": case.sizes.vocabulary, "vocabulary_of_model": whole.vocabulary,
        "accumulate": case.accumulate, "batch": case.batch, "tokens": case.tokens,
        "tokens_per_step": case.tokens_per_step,
        "checkpointing": case.checkpointing, "R": args.rank, "dtype": args.dtype,
        **({"quant": case.quant} if case.quant else {}),
        "peak_flops_per_s": peaks.matmul_flops(run.dtype, run.device),
        "floors": {
            "tax": flops["lorafuse"] / flops["frozen"] - 1, "ratio_to_full": flops["lorafuse"] / flops["full"],
        },
        "turns": turns, "parity": run.parity, "curves": curves.summary(run.curves),
        "variants": {name: run.recorded[name] for name in run.baselines if name in run.recorded},
        "failed": {name: reason for name, reason in run.failed.items() if name in run.baselines},
    })  # fmt: skip


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
