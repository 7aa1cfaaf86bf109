"""One case of `lorafuse bench model`: build and check its variants, time their steps in turns, then their memory."""

import argparse
import copy
import gc
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from lorafuse.bench import peaks, training
from lorafuse.bench.limits import is_out_of_memory, out_of_memory
from lorafuse.bench.result import Wrong
from lorafuse.bench.timed import Progress
from lorafuse.bench.training import Trainee
from lorafuse.bench.transformer import Model, adapted, build, free_bytes, frozen, twin
from lorafuse.bench.transformer_cost import VARIANTS, Sizes, Training, fits, step_flops, together_bytes
from lorafuse.integrations import patch
from lorafuse.testing.timing import percentile

__all__ = ["Case", "run_case"]

_T = TypeVar("_T")

# the fewest steps of which a median is taken
_LEAST_ROUNDS = 3
# variants whose first loss must equal the base's
_BEGINS = {"full": "full fine-tuning", "frozen": "the frozen model"}


@dataclass(frozen=True)
class Case:
    """A model of those sizes, `accumulate` micro-batches of `batch` sequences of `tokens` a step."""

    model: Model
    sizes: Sizes
    accumulate: int
    checkpointing: bool
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.model.name}, accumulate {self.accumulate}, checkpointing {'on' if self.checkpointing else 'off'}"

    @property
    def tokens_per_step(self) -> int:
        """Of all micro-batches."""
        return self.accumulate * self.batch * self.tokens

    @property
    def title(self) -> str:
        """The case and its layers."""
        return f"{self.name}, {self.sizes.layers} layers"


@dataclass
class _Run:
    """The state of a case: its options, and the results of each variant so far."""

    case: Case
    args: argparse.Namespace
    device: torch.device
    progress: Progress
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    built: dict[str, Any] = field(default_factory=dict)
    # losses of every step, also of variants that failed later
    losses: dict[str, list[float]] = field(default_factory=dict)
    # loss of the first micro-batch: "base" is the PEFT model without adapters, "full" before its first step, "frozen"
    first: dict[str, float] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.args.dtype)

    def ids(self, step: int) -> torch.Tensor:
        size = (self.case.accumulate, self.case.batch, self.case.tokens)
        return training.batches(self.case.sizes.vocabulary, size, step, self.device)

    def attempt(self, name: str, run: Callable[[], _T]) -> _T | None:
        """The result of `run()`; None, with the reason in `failed`, when it runs out of memory."""
        try:
            return run()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.failed[name] = out_of_memory(error)
        _release(self.device)
        return None


def run_case(case: Case, args: argparse.Namespace, device: torch.device, progress: Progress) -> dict[str, Any]:
    """Figures of every variant. Raises Wrong when losses differ, MemoryError when no variant fits.

    A variant that runs out of memory is in "failed" and the others continue. When full fine-tuning was in the same
    process, the case runs again with full fine-tuning alone.
    """
    if not case.sizes.layers:
        raise MemoryError(f"not one layer of {case.model.name} fits in the {free_bytes(device) / 2**30:.1f} GiB free")
    # PEFT calls methods that transformers renamed, and looks for a config.json next to a GGUF file
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Could not find a config file in", category=UserWarning)
        apart = [group for group in (["full"], ["frozen", "peft", "lorafuse"]) if set(group) & set(args.variants)]
        apart = [[name for name in group if name in args.variants] for group in apart]
        together = [[name for name in VARIANTS if name in args.variants]]
        train = Training(args.rank, case.batch * case.tokens, getattr(torch, args.dtype).itemsize, case.checkpointing)
        turns = together if fits(together_bytes(case.sizes, together[0], train), free_bytes(device)) else apart
        run = _run_turns(turns, case, args, device, progress)
        if run.failed and turns != apart:
            turns = apart
            run = _run_turns(turns, case, args, device, progress)
    if not run.figures:
        raise MemoryError("; ".join(f"{name}: {reason}" for name, reason in run.failed.items()))
    return _result(run, turns)


def _run_turns(
    turns: list[list[str]], case: Case, args: argparse.Namespace, device: torch.device, progress: Progress
) -> _Run:
    run = _Run(case, args, device, progress)
    for names in turns:
        try:
            _run_group(run, names, args.seconds / len(turns))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # in memory that the variants share
            for name in names:
                run.failed.setdefault(name, out_of_memory(error))
        _release(device)
    base = run.first.pop("base", None)
    if base is None:
        return run
    for name, loss in run.first.items():
        difference, bound = abs(loss - base), training.loss_bound(run.dtype, base)
        if not difference <= bound:
            raise Wrong(
                f"{_BEGINS[name]} begins at a loss of {loss:.6f}, the base without adapters has {base:.6f}: above "
                f"{bound:.1e} apart"
            )
        run.parity[f"{name}_from_base"] = difference
    return run


def _run_group(run: _Run, names: list[str], seconds: float) -> None:
    """Build and check variants, time their steps in turns, measure memory; `run` receives all results."""
    trainees = _build(run, names)
    warm_up = max(1, run.args.rounds // 10)
    total, order, end = warm_up + run.args.rounds, random.Random(0), time.monotonic() + seconds
    for index in range(total):
        if index >= warm_up + min(_LEAST_ROUNDS, run.args.rounds) and time.monotonic() > end:
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
    for trainee in trainees:
        run.progress(total, total, f"memory of {trainee.name}")
        memory = run.attempt(trainee.name, lambda trainee=trainee: trainee.memory(run.ids(0)))  # type: ignore[misc]
        if memory is not None:
            run.figures[trainee.name] = _figures(run, trainee, warm_up) | memory | run.built[trainee.name]


def _build(run: _Run, names: list[str]) -> list[Trainee]:
    """The variants that fit, checked on the first micro-batch: patched against PEFT, full and frozen by their loss."""
    run.progress(0, 1, f"building {run.case.model.name}")
    micro = run.ids(0)[0]
    base = build(run.case.model, run.case.sizes, run.dtype, run.device)
    parameters = sum(p.numel() for p in base.parameters())
    if run.case.checkpointing:
        # non-reentrant: inputs need no gradient for it
        base.gradient_checkpointing_enable({"use_reentrant": False})
    trainees: list[Trainee] = []

    def add(name: str, model: Any, **facts: Any) -> None:
        trainee = Trainee(name, model)
        trainees.append(trainee)
        run.losses[name] = trainee.losses
        run.built[name] = {"parameters": parameters, "trained": sum(p.numel() for p in trainee.trained), **facts}

    if "full" in names:
        full = base if names == ["full"] else run.attempt("full", lambda: copy.deepcopy(base))
        seen = run.attempt("full", lambda: training.observe(full, micro, gradients=False)) if full is not None else None
        if seen is not None:
            run.first["full"] = seen.loss
            add("full", full)
    if names == ["full"]:
        return trainees
    if "frozen" in names:
        floor = frozen(base)
        reached = run.attempt("frozen", lambda: training.input_gradient(floor, micro))
        if reached is not None:
            run.first["frozen"], gradient = reached
            if gradient is None or not (gradient.any() and gradient.isfinite().all()):
                raise Wrong("frozen: no gradient reaches the embedded tokens")
            add("frozen", floor)
    run.progress(0, 1, "comparing patched with PEFT")
    stock = adapted(base, run.args.rank)
    patched = twin(stock) if "lorafuse" in names else None
    without = training.without_adapters(stock, micro)
    run.first["base"] = without.loss
    # also without PEFT among the variants: patched is compared with it
    peft = run.attempt("peft", lambda: training.observe(stock, micro))
    if peft is not None and "peft" in names:
        add("peft", stock)
    if patched is None:
        return trainees
    report = patch(patched)
    if not report.patched:
        raise Wrong(f"nothing was patched: {report}")
    ours = run.attempt("lorafuse", lambda: training.observe(patched, micro))
    if ours is None:
        return trainees
    add("lorafuse", patched, patched=len(report.patched), skipped=len(report.skipped))
    if peft is None:
        run.parity["not_compared"] = "PEFT ran out of memory on the first micro-batch"
    else:
        distances = training.compare(
            ours, peft, without, lambda: training.half_adapters(stock, micro, run.dtype), run.dtype
        )
        if wrong := distances.pop("wrong"):
            raise Wrong(str(wrong))
        run.parity["first_micro_batch"] = distances
    return trainees


def _check_losses(run: _Run) -> None:
    """Raises Wrong for a loss that is not finite, and when PEFT's and patched differ by more than `loss_bound`."""
    losses = run.losses
    for name, steps in losses.items():
        for step, loss in enumerate(steps):
            if not math.isfinite(loss):
                raise Wrong(f"{name}: the loss of step {step + 1} is {loss}")
    if not {"peft", "lorafuse"} <= losses.keys():
        return
    pairs = list(zip(losses["lorafuse"], losses["peft"], strict=False))
    for step, (ours, peft) in enumerate(pairs):
        bound = training.loss_bound(run.dtype, peft)
        if not abs(ours - peft) <= bound:
            raise Wrong(f"step {step + 1}: lorafuse has loss {ours:.6f}, PEFT {peft:.6f}: above {bound:.1e} apart")
    if pairs:
        run.parity |= {"steps": len(pairs), "largest_loss_difference": max(abs(ours - peft) for ours, peft in pairs)}


def _figures(run: _Run, trainee: Trainee, warm_up: int) -> dict[str, Any]:
    seconds = trainee.seconds[warm_up:]
    median = statistics.median(seconds)
    case, tokens = run.case, run.case.tokens_per_step
    flops = step_flops(case.sizes, trainee.name, run.args.rank, tokens, case.tokens)
    return {
        "step": {"median": median, "p20": percentile(seconds, 0.2), "p80": percentile(seconds, 0.8)},
        "rounds": len(seconds),
        "tokens_per_s": tokens / median,
        "model_flops": flops,
        "flops_per_s": flops / median,
        "mfu": flops / median / peaks.matmul_flops(run.dtype, run.device),
        "first_loss": trainee.losses[0],
        "last_loss": trainee.losses[-1],
    }


def _result(run: _Run, turns: list[list[str]]) -> dict[str, Any]:
    case, args = run.case, run.args
    whole = Sizes.of(case.model.config())
    flops = {name: step_flops(case.sizes, name, args.rank, case.tokens_per_step, case.tokens) for name in VARIANTS}
    variants = {name: run.figures[name] for name in VARIANTS if name in run.figures}
    medians = {name: figure["step"]["median"] for name, figure in variants.items()}
    for name, figure in variants.items():
        if "full" in medians:
            figure["ratio_to_full"] = medians[name] / medians["full"]
        if "frozen" in medians and name in ("peft", "lorafuse"):
            figure["tax"] = medians[name] / medians["frozen"] - 1
    return {
        "kind": "model", "case": case.name, "model": case.model.name,
        "weights": "real" if case.model.real else "random",
        "layers": case.sizes.layers, "layers_of_model": whole.layers,
        "vocabulary": case.sizes.vocabulary, "vocabulary_of_model": whole.vocabulary,
        "accumulate": case.accumulate, "batch": case.batch, "tokens": case.tokens,
        "tokens_per_step": case.tokens_per_step,
        "checkpointing": case.checkpointing, "R": args.rank, "dtype": args.dtype,
        "peak_flops_per_s": peaks.matmul_flops(run.dtype, run.device),
        "floors": {
            "tax": flops["lorafuse"] / flops["frozen"] - 1, "ratio_to_full": flops["lorafuse"] / flops["full"],
        },
        "turns": turns, "parity": run.parity, "variants": variants,
        "failed": {name: reason for name, reason in run.failed.items() if name in args.variants},
    }  # fmt: skip


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
