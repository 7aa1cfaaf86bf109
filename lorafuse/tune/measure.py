"""Measure every candidate of the planner for a pass.

A pass is the forward or the backward of one LoRA linear layer at M tokens and rank R; the two are planned separately.
Every candidate is first compared with the formula in fp64; one that is wrong is not timed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lorafuse.errors import BackendUnavailable
from lorafuse.formats.sizes import is_decoded_in_loop
from lorafuse.functional import lora_linear
from lorafuse.operands import Weight
from lorafuse.philox import keep_mask, rescaled, row_chunks
from lorafuse.plan import Candidate, DeviceSpec, Problem, modelled, override, select, tuned
from lorafuse.plan.configs_triton import MOST_PACKED_ROWS
from lorafuse.testing.cases import Case
from lorafuse.testing.check_linear import LinearCase, Operands, make_operands
from lorafuse.testing.numerics import lora_formula, relative_l2, tolerance
from lorafuse.testing.timing import captured, measure_calls, percentile
from lorafuse.tune.stored import random_weight

__all__ = ["PASSES", "Outcome", "Target", "is_measured", "is_tunable", "measure", "passes", "usual"]

# the gradients of each pass, in a training step whose x needs a gradient
PASSES: dict[str, tuple[str, ...]] = {"forward": (), "backward": ("dx", "da", "db")}
_SEED = 7
_SCALE = 2.0


@dataclass(frozen=True)
class Target:
    """The GPU to tune: torch's device, the planner's figures for it, and `available` as the argument of `select`."""

    device: torch.device
    spec: DeviceSpec
    available: tuple[tuple[str, str], ...]

    def candidates(self, problem: Problem) -> dict[str, Candidate]:
        """Every candidate for a problem, by its name in `tuned.KERNELS`."""
        plan = select(problem, self.spec, self.available)
        return {one.name: one for one in plan.candidates}


@dataclass
class Outcome:
    """The measurement of one pass: seconds of every call of each correct candidate, the reasons of the others.

    `before` is the candidate of a plan without the user's measurements.
    """

    problem: Problem
    before: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def fastest(self) -> str:
        """The candidate with the least median."""
        return min(self.seconds, key=lambda name: median(self.seconds[name]))

    def winner(self) -> str:
        """The candidate to record.

        That is the fastest where its 80th percentile is below the 20th of `before`; where the two overlap the
        difference may be noise, and `before` stays. Where `before` is wrong or failed it is the fastest.
        """
        fastest, before = self.fastest(), self.seconds.get(self.before)
        if before is None or percentile(self.seconds[fastest], 0.8) < percentile(before, 0.2):
            return fastest
        return self.before


def passes(case: Case, M: int, R: int, dtype: str, dropout: bool, format: str = "dense") -> list[Problem]:
    """Forward and backward of a layer, with fp32 adapters as PEFT's are, and operands as torch allocates them.

    `format` is "dense", or one of `lorafuse.tune.stored.FORMATS`.
    """
    packed = M <= MOST_PACKED_ROWS and is_decoded_in_loop(format, case.K)
    problem = Problem(M, case.N, case.K, R, dtype, "float32", dropout=dropout, format=format, packed=packed)

    def aligned(*columns: int) -> bool:
        return all(size * problem.itemsize % 16 == 0 for size in columns)

    # forward reads rows of x and w, backward rows of dy and w; a quantized w is decoded to where rows are aligned
    rows = {"forward": (case.K,), "backward": (case.N, case.K) if format == "dense" else (case.N,)}
    return [replace(problem, gradients=gradients, aligned=aligned(*rows[name])) for name, gradients in PASSES.items()]


def usual(problem: Problem, target: Target) -> str:
    """The candidate of a plan without the user's measurements: the shipped table's, or else the model's."""
    candidates = target.candidates(problem)
    shipped = tuned.match(problem, target.spec, candidates, own=False)
    if shipped:
        return shipped.kernel
    return modelled(list(candidates.values())).name


def is_tunable(problem: Problem, target: Target) -> bool:
    """Whether there is a choice that plans look up: measured tables cover rows on 16-byte boundaries only."""
    return problem.aligned and len(target.candidates(problem)) > 1


def is_measured(problem: Problem, entries: Iterable[tuned.Tuned]) -> bool:
    """Whether an entry has a measurement at this M and R, or is of version 1 and its ranges cover them.

    One of dense weights, which plans of quantized ones follow where there is no other, is none of these.
    """
    return any(
        entry.is_of(problem)
        and entry.covers(problem)
        and (not entry.points or any((M, R) == (problem.M, problem.R) for M, R, _ in entry.points))
        for entry in entries
    )


def measure(target: Target, problems: Sequence[Problem], p: float, rounds: int) -> list[Outcome]:
    """Measure passes of one layer, M and R that share their operands. `p` is the probability of dropout.

    No candidate is timed before its results are right. One that runs out of memory or does not launch is left out,
    with its reason in the outcome; operands that do not fit leave all out. Raises BackendUnavailable when the device
    cannot run anything after a failure.
    """
    outcomes = [Outcome(problem, usual(problem, target)) for problem in problems]
    first = problems[0]
    # events are recorded on the current device
    with torch.cuda.device(target.device) if target.device.type == "cuda" else nullcontext():
        try:
            dtype = getattr(torch, first.dtype)
            layer = LinearCase((first.M,), first.N, first.K, first.R, dtype, torch.float32, bias=False)
            given = make_operands(layer, device=target.device)
            weight: Tensor | Weight = given.w
            if first.format != "dense":
                weight = random_weight(first.format, first.N, first.K, dtype, target.device)
                given.w = weight.decoded(dtype).data
            seed = torch.tensor([_SEED], dtype=torch.int64, device=target.device) if p else None
            expected = _reference(given, p, seed)
            for tensor in (given.x, given.a, given.b):
                tensor.requires_grad_()
        except torch.OutOfMemoryError as error:
            text = _first_line(error)
            return [replace(outcome, failed={"operands and reference": text}) for outcome in outcomes]
        finally:
            _release(target.device)
        for outcome in outcomes:
            calls = _right_calls(outcome, target, given, weight, expected, p, seed)
            # five rounds at least: a GPU that idled takes some time to its full clock
            outcome.seconds = _time(outcome, calls, target.device, rounds, max(5, rounds // 10))
    return outcomes


def _reference(given: Operands, p: float, seed: Tensor | None) -> dict[str, Tensor]:
    scale, keep = _SCALE, None
    if seed is not None:
        M, K = given.x.shape
        scale = rescaled(_SCALE, p)
        keep = torch.cat([keep_mask(seed, p, rows, K) for rows in row_chunks(M, K, given.x.device)])
    expected = lora_formula(given.x, given.w, given.a, given.b, given.dy, scale, keep)
    # a comparison with zeros would show nothing
    assert all(tensor.any() for tensor in expected.values())
    return expected


def _right_calls(
    outcome: Outcome, target: Target, given: Operands, weight: Tensor | Weight, expected: dict[str, Tensor], p: float,
    seed: Tensor | None,
) -> dict[str, Callable[[], object]]:  # fmt: skip
    """The calls of all correct candidates, on GPUs as CUDA graphs; the reasons of the others go into the outcome."""
    calls: dict[str, Callable[[], object]] = {}
    stream = torch.cuda.Stream() if target.device.type == "cuda" else None
    for name, candidate in target.candidates(outcome.problem).items():
        try:
            with nullcontext() if stream is None else _on_stream(stream):
                call: Callable[[], Any] = _call(name, candidate, outcome.problem.gradients, given, weight, p, seed)
                results = dict(zip(outcome.problem.gradients or ("y",), call(), strict=True))
                wrong = _wrong(results, expected, tolerance(given.x.dtype))
                del results
            if stream is not None and not wrong:
                call = captured(call, stream)
        except _failures() as error:
            outcome.failed[name] = _first_line(error)
            _check_alive(name, error, target.device)
            continue
        if wrong:
            outcome.wrong[name] = wrong
        else:
            calls[name] = call
    return calls


@contextmanager
def _on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Make `stream` current: it waits for the former stream first, which waits for it at the end."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _call(
    name: str, candidate: Candidate, gradients: tuple[str, ...], given: Operands, weight: Tensor | Weight, p: float,
    seed: Tensor | None,
) -> Callable[[], tuple[Tensor, ...]]:  # fmt: skip
    """One pass of the public operator with a forced candidate; backward repeats over one forward."""

    # fp16 trains under autocast; without it fp32 adapters keep the low-rank path in fp32
    half = given.x.dtype is torch.float16

    def forward() -> tuple[Tensor]:
        with override(force_kernel=name), torch.autocast(given.x.device.type, given.x.dtype, enabled=half):
            operands = given.x, weight, given.a, given.b
            return (lora_linear(*operands, scale=_SCALE, dropout_p=p, seed=seed, backend=candidate.backend),)

    if not gradients:
        return forward
    (y,) = forward()
    leaves = {"dx": given.x, "da": given.a, "db": given.b}

    def backward() -> tuple[Tensor, ...]:
        with override(force_kernel=name):
            return torch.autograd.grad(y, [leaves[g] for g in gradients], given.dy, retain_graph=True)

    return backward


def _wrong(results: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> str:
    for name, tensor in results.items():
        error = relative_l2(tensor, expected[name])
        if error > bound:
            return f"{name} is wrong by {error:.2e} relative, the bound is {bound:.0e}"
    return ""


class _CallFailed(Exception):
    """A call that was correct before failed while it was timed."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(name, error)
        self.name, self.error = name, error


def _time(
    outcome: Outcome, calls: dict[str, Callable[[], object]], device: torch.device, rounds: int, warm_up: int
) -> dict[str, list[float]]:
    """Seconds of every call, in interleaved rounds; when one fails, its reason is kept and the others start again."""

    def named(name: str, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            try:
                return call()
            except _failures() as error:
                raise _CallFailed(name, error) from error

        return run

    while calls:
        try:
            return measure_calls({name: named(name, call) for name, call in calls.items()}, rounds, warm_up, device)
        except torch.OutOfMemoryError as error:
            # of the buffer that empties L2
            outcome.failed |= dict.fromkeys(calls, _first_line(error))
            return {}
        except _CallFailed as call:
            outcome.failed[call.name] = _first_line(call.error)
            del calls[call.name]
            _check_alive(call.name, call.error, device)
    return {}


def _failures() -> tuple[type[Exception], ...]:
    """Exceptions of a launch: torch and CUDA raise RuntimeError, Triton its own classes."""
    # not at the top: every command imports this module, also without Triton
    from triton import TritonError

    return RuntimeError, TritonError


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _release(device: torch.device) -> None:
    """Return cached memory to the device, since the next layer has other sizes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _check_alive(name: str, error: BaseException, device: torch.device) -> None:
    """Raises BackendUnavailable when the device cannot run anything, as after an illegal memory access."""
    _release(device)
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError as lost:
        raise BackendUnavailable(
            f"{device} runs nothing any more since {name} failed ({_first_line(error)}); what was measured before is "
            "kept: run it again in a new process"
        ) from lost
