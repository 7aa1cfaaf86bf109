"""What `lorafuse tune` does: measure every way that the planner knows to run a pass, and keep which one to take.

A pass is the forward or the backward of one LoRA linear at M tokens and rank R; the two are planned apart. Every
candidate is first compared with the formula in fp64: none that is wrong anywhere in a layer is recorded for it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lorafuse.errors import BackendUnavailable
from lorafuse.functional import lora_linear
from lorafuse.philox import keep_mask, rescaled, row_chunks
from lorafuse.plan import Candidate, DeviceSpec, Problem, modelled, override, select, tuned
from lorafuse.plan.ranges import rectangles
from lorafuse.testing.cases import Case
from lorafuse.testing.check_linear import LinearCase, Operands, make_operands
from lorafuse.testing.numerics import lora_formula, relative_l2, tolerance
from lorafuse.testing.timing import captured, measure_calls, percentile

__all__ = ["PASSES", "Outcome", "Target", "is_there", "is_tunable", "measure", "passes", "record", "usual"]

# the gradients of each pass; those of a training step whose x needs one
PASSES: dict[str, tuple[str, ...]] = {"forward": (), "backward": ("dx", "da", "db")}
_SEED = 7
_SCALE = 2.0
# between what several runs said of one condition
_AND = " and "
# of the conditions, what a kernel's speed depends on
_CONDITIONS = ("device", "cuda", "power limit", "driver", "torch", "triton", "lorafuse")


@dataclass(frozen=True)
class Target:
    """The GPU that is tuned: torch's device, what the planner knows of it, and `available` as `select` takes it."""

    device: torch.device
    spec: DeviceSpec
    available: tuple[tuple[str, str], ...]

    def candidates(self, problem: Problem) -> dict[str, Candidate]:
        """Every way to run a problem, by its name in `tuned.KERNELS`."""
        plan = select(problem, self.spec, self.available)
        return {way.name: way for way in plan.candidates}


@dataclass
class Outcome:
    """What was found of one pass: seconds of every call of each right candidate; of others, what is wrong or failed.

    `before` is what a plan takes without the user's measurements.
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


def passes(case: Case, M: int, R: int, dtype: str, dropout: bool) -> list[Problem]:
    """Forward and backward of a layer, with fp32 adapters as PEFT's are, and operands as torch allocates them."""
    found = Problem(M, case.N, case.K, R, dtype, "float32", dropout=dropout)

    def aligned(*columns: int) -> bool:
        return all(size * found.itemsize % 16 == 0 for size in columns)

    # forward is told of the rows of x and w, backward of those of dy and w
    rows = {"forward": (case.K,), "backward": (case.N, case.K)}
    return [replace(found, gradients=gradients, aligned=aligned(*rows[name])) for name, gradients in PASSES.items()]


def usual(problem: Problem, target: Target) -> str:
    """The candidate that a plan takes without the user's measurements: the one shipped as fastest, or the model's."""
    ways = target.candidates(problem)
    shipped = tuned.match(problem, target.spec, ways, own=False)
    if shipped:
        return shipped.kernel
    return modelled(list(ways.values())).name


def is_tunable(problem: Problem, target: Target) -> bool:
    """Whether there is a choice, and plans look it up: `tuned` does not speak of rows off 16-byte boundaries."""
    return problem.aligned and len(target.candidates(problem)) > 1


def is_there(problem: Problem, entries: Iterable[tuned.Tuned]) -> bool:
    """Whether some entry holds this very problem as measured; of version 1, whether one speaks for it."""
    return any(
        entry.covers(problem)
        and (not entry.points or any((M, R) == (problem.M, problem.R) for M, R, _ in entry.points))
        for entry in entries
    )


def measure(target: Target, problems: Sequence[Problem], p: float, rounds: int) -> list[Outcome]:
    """Measure passes of one layer, M and R that share their operands. `p` is the probability of dropout.

    Nothing is timed before it is right. A candidate that runs out of memory or does not launch is left out, and the
    outcome says so; operands that do not fit leave all out. Raises BackendUnavailable when a failure has left the
    device unable to run anything.
    """
    outcomes = [Outcome(problem, usual(problem, target)) for problem in problems]
    first = problems[0]
    # events are recorded on the current device
    with torch.cuda.device(target.device) if target.device.type == "cuda" else nullcontext():
        try:
            dtype = getattr(torch, first.dtype)
            layer = LinearCase((first.M,), first.N, first.K, first.R, dtype, torch.float32, bias=False)
            given = make_operands(layer, device=target.device)
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
            calls = _right_calls(outcome, target, given, expected, p, seed)
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
    # a comparison with zeros would say nothing
    assert all(tensor.any() for tensor in expected.values())
    return expected


def _right_calls(
    outcome: Outcome, target: Target, given: Operands, expected: dict[str, Tensor], p: float, seed: Tensor | None
) -> dict[str, Callable[[], object]]:
    """The calls of all candidates that are right, on GPUs as CUDA graphs; the others are noted in the outcome."""
    calls: dict[str, Callable[[], object]] = {}
    stream = torch.cuda.Stream() if target.device.type == "cuda" else None
    for name, way in target.candidates(outcome.problem).items():
        try:
            with nullcontext() if stream is None else _beside(stream):
                call: Callable[[], Any] = _call(name, way.backend, outcome.problem.gradients, given, p, seed)
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
def _beside(stream: torch.cuda.Stream) -> Iterator[None]:
    """The stream is current and waits for the one that was, which waits for it afterwards."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _call(
    name: str, backend: str, gradients: tuple[str, ...], given: Operands, p: float, seed: Tensor | None
) -> Callable[[], tuple[Tensor, ...]]:
    """One pass of the public operator, held to a candidate; backward runs again and again over one forward."""

    # fp16 is trained under autocast; outside of it fp32 adapters keep the low-rank path in fp32
    half = given.x.dtype is torch.float16

    def forward() -> tuple[Tensor]:
        with override(force_kernel=name), torch.autocast(given.x.device.type, given.x.dtype, enabled=half):
            operands = given.x, given.w, given.a, given.b
            return (lora_linear(*operands, scale=_SCALE, dropout_p=p, seed=seed, backend=backend),)

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
    """A call that was right before failed while it was timed."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(name, error)
        self.name, self.error = name, error


def _time(
    outcome: Outcome, calls: dict[str, Callable[[], object]], device: torch.device, rounds: int, warm_up: int
) -> dict[str, list[float]]:
    """Seconds of every call, in interleaved rounds; one that fails now is noted, and the others start again."""

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
    """What a launch raises: torch and CUDA a RuntimeError, Triton errors of its own."""
    # not at the top: every command imports this module, also where there is no Triton
    from triton import TritonError

    return RuntimeError, TritonError


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _release(device: torch.device) -> None:
    """Give memory that torch keeps for later back, where what comes next has other sizes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _check_alive(name: str, error: BaseException, device: torch.device) -> None:
    """Raises BackendUnavailable when the device runs nothing any more, as after an illegal memory access."""
    _release(device)
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError as lost:
        raise BackendUnavailable(
            f"{device} runs nothing any more since {name} failed ({_first_line(error)}); what was measured before is "
            "kept: run it again in a new process"
        ) from lost


def record(
    entries: Sequence[tuned.Tuned], outcomes: Sequence[Outcome], found: dict[str, str]
) -> tuple[tuned.Tuned, ...]:
    """`entries` with the outcomes' winners, over ranges as `plan.ranges` cuts them; `found` are the conditions.

    Earlier points of the same layer and pass stay, unless measured again now or of a kernel that was wrong now; an
    entry of points of several runs names the conditions of all.
    """
    commit = found.get("commit") or f"of release {found['lorafuse']}"
    conditions = {name: found[name] for name in _CONDITIONS if name in found}
    new: list[tuned.Tuned] = []
    kinds = {replace(outcome.problem, M=1, R=1): None for outcome in outcomes}
    for kind in kinds:
        of_kind = [outcome for outcome in outcomes if replace(outcome.problem, M=1, R=1) == kind]
        wrong = {name for outcome in of_kind for name in outcome.wrong}
        former = [entry for entry in entries if entry.is_of(kind)]
        points = {
            point[:2]: replace(entry, points=(point,), seconds=point[2])
            for entry in former
            if entry.kernel not in wrong
            for point in entry.points
        }
        for outcome in of_kind:
            M, R = outcome.problem.M, outcome.problem.R
            right = {name: taken for name, taken in outcome.seconds.items() if name not in wrong}
            if not right:
                points.pop((M, R), None)
                continue
            winner = replace(outcome, seconds=right).winner()
            # to the nanosecond
            seconds = round(median(right[winner]), 9)
            points[M, R] = tuned.Tuned(
                kind.N, kind.K, (R, R), (M, M), kind.dtype, kind.dropout, kind.gradients, winner, seconds, commit,
                found["date"], ((M, R, seconds),), conditions,
            )  # fmt: skip
        for of_m, of_r, _ in rectangles({size: entry.kernel for size, entry in points.items()}):
            inside = [points[M, R] for M, R in sorted(points) if of_m[0] <= M <= of_m[1] and of_r[0] <= R <= of_r[1]]
            new.append(replace(_merged(inside), M=of_m, R=of_r))
        # of version 1 there is nothing but the range; what is measured now comes before it
        new += [entry for entry in former if not entry.points and entry.kernel not in wrong]
    return (*new, *(entry for entry in entries if not any(entry.is_of(kind) for kind in kinds)))


def _merged(points: Sequence[tuned.Tuned]) -> tuned.Tuned:
    """One entry of entries of one point each and one kernel, in their order."""

    def joined(values: Iterable[str]) -> str:
        return _AND.join(dict.fromkeys(part for value in values for part in value.split(_AND)))

    names = dict.fromkeys(name for point in points for name in point.conditions)
    return replace(
        points[-1],
        points=tuple(single for point in points for single in point.points),
        commit=joined(point.commit for point in points),
        date=max(point.date for point in points),
        conditions={name: joined(p.conditions[name] for p in points if name in p.conditions) for name in names},
    )
