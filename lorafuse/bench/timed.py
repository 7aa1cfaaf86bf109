"""A problem with all of its baselines: the gate first, then times in turns, then memory; the table of its figures."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import geometric_mean
from typing import Any

import torch

from lorafuse.bench import figures, peaks, plugins
from lorafuse.bench.limits import first_line, is_out_of_memory, out_of_memory
from lorafuse.bench.plugins import Baseline
from lorafuse.bench.problem import Problem, title, wrong
from lorafuse.bench.remote import RemoteRunner
from lorafuse.bench.result import Failed, Wrong, shown
from lorafuse.bench.runner import Runner
from lorafuse.testing.memory import Held
from lorafuse.testing.timing import Clock, Samples, Timed, measure, timing

__all__ = ["Built", "Progress", "built", "closing", "run_case", "select", "table", "timing"]

# a turn of a runner whose x is warm
_WARM = ", x warm"

# (done, total, text)
Progress = Callable[[int, int, str], None]


def select(kind: str, args: argparse.Namespace, device: torch.device) -> list[Baseline]:
    """The requested baselines, and always "frozen". Raises ValueError that lists the known ones."""
    baselines = plugins.load(kind, device, args.baselines, args.dtype)
    known = [one.name for one in baselines]
    for name in args.only or ():
        if name not in known:
            raise ValueError(f"--only {name}: it is no baseline of {kind}; the known ones: {', '.join(known)}")
    return [one for one in baselines if not args.only or one.name in (*args.only, "frozen")]


@dataclass(frozen=True)
class _WarmX:
    """A runner whose calls find x, or the outputs' gradients, as the layer before has just written them."""

    runner: Runner | RemoteRunner

    @property
    def name(self) -> str:
        return self.runner.name + _WARM

    def once(self) -> tuple[float, float]:
        return self.runner.once(warm=True)


def run_case(problem: Problem, args: argparse.Namespace, device: torch.device, progress: Progress) -> dict[str, Any]:
    """Every figure of one problem. Raises Wrong for a wrong result of this project's own baselines.

    On GPUs, or with `args.warm_x`, calls with a warm x take turns with those that find all caches cold.
    """
    is_warm = device.type == "cuda" if args.warm_x is None else args.warm_x
    with built(problem, args, device, progress) as variants:
        warm_up = max(2, args.rounds // 10)
        samples: dict[str, Samples] = {}
        runners = list(variants.runners.values())
        timed: list[Timed] = [*runners, *(_WarmX(one) for one in runners if is_warm)]
        rounds = measure(timed, args.rounds, warm_up, args.seconds, variants.drop)
        for index, samples in enumerate(rounds):  # noqa: B007
            progress(index + 1, args.rounds + warm_up, "timing")
        held = variants.memory(progress)
        recorded: dict[str, Any] = {}
        for name, runner in variants.runners.items():
            one = variants.baselines[name]
            recorded[name] = {"label": one.label, "trains": one.trains, "seconds": _raw(samples[name])}
            if is_warm:
                recorded[name]["warm_x"] = {"seconds": _raw(samples[name + _WARM])}
            recorded[name] |= {"peak_bytes": held[name].peak, "between_bytes": held[name].between}
            if runner.launched:
                recorded[name]["launched"] = runner.launched
    trained = {one["trains"] for one in recorded.values()}
    peak, copied = peaks.matmul_flops(problem.torch_dtype, device), peaks.copy_bytes(device)
    return figures.derive(problem.described() | {
        "floors": problem.floors(),
        "work": {trains: {part: asdict(work) for part, work in problem.work(trains).items()} for trains in trained},
        "peaks": {"flops_per_s": peak, "bytes_per_s": copied},
        "variants": recorded, "failed": variants.failed, "absent": variants.absent,
    })  # fmt: skip


def _raw(samples: Samples) -> dict[str, Any]:
    return {"forward": figures.raw(samples.forward), "backward": figures.raw(samples.backward)}


@dataclass
class Built:
    """The baselines of a problem by name, the runners of those that passed the gate, and the reasons of the others."""

    baselines: dict[str, Baseline]
    # why a baseline cannot run here
    absent: dict[str, str]
    runners: dict[str, Runner | RemoteRunner] = field(default_factory=dict)
    # why a baseline is not counted
    failed: dict[str, str] = field(default_factory=dict)

    def drop(self, name: str, error: Exception) -> None:
        """Drop a baseline, with its error as the reason.

        Raises the error again for "frozen", from which all others are measured, and for this project's own baselines
        unless memory ran out or the layer is one that they do not take.
        """
        name, no_memory = name.removesuffix(_WARM), is_out_of_memory(error)
        if name == "frozen" or not (self.baselines[name].peer or no_memory or isinstance(error, Failed)):
            raise error
        reason = out_of_memory(error) if no_memory else f"{type(error).__name__}: {first_line(error)}"
        # the first error is the reason: a process that has ended raises at its warm turn too
        self.failed.setdefault(name, str(error) if isinstance(error, Failed | Wrong) else reason)
        if isinstance(runner := self.runners.pop(name, None), RemoteRunner):
            runner.close()

    def memory(self, progress: Progress) -> dict[str, Held]:
        """The memory of every variant; one that raises is dropped."""
        held: dict[str, Held] = {}
        for index, (name, runner) in enumerate(list(self.runners.items())):
            progress(index, len(self.baselines), f"memory of {name}")
            try:
                held[name] = runner.memory()
            except Exception as error:
                self.drop(name, error)
        return held


@contextmanager
def built(problem: Problem, args: argparse.Namespace, device: torch.device, progress: Progress) -> Iterator[Built]:
    """Runners of the baselines that pass the gate; their processes end with the context.

    Raises Wrong for a wrong result of this project's own baselines.
    """
    selected = select(problem.kind, args, device)
    variants = Built(
        {one.name: one for one in selected if not one.absent}, {one.name: one.absent for one in selected if one.absent}
    )
    try:
        progress(0, len(variants.baselines), "reference")
        given = problem.inputs(device)
        references, clock = problem.references(given), Clock(device)
        for index, one in enumerate(variants.baselines.values()):
            progress(index, len(variants.baselines), f"checking {one.name}")
            try:
                if one.isolated:
                    variants.runners[one.name] = remote = RemoteRunner(
                        one.name, problem, one, device, args.graphs, timeout=args.timeout
                    )
                    reason = remote.wrong
                else:
                    variant = one.variant(problem, given)
                    reason = wrong(variant, references[one.trains], problem.shaped)
                if reason:
                    raise Wrong(reason)
                if not one.isolated:
                    variants.runners[one.name] = Runner(variant, clock, args.graphs)
                variants.runners[one.name].once()
            except Exception as error:
                variants.drop(one.name, error)
        # fp64: larger than all operands together
        del references
        yield variants
    finally:
        for runner in variants.runners.values():
            if isinstance(runner, RemoteRunner):
                runner.close()


def table(result: dict[str, Any]) -> Any:
    """The figures of a result as rich's table, below it the baselines that are not in it and why."""
    is_warm, variants = "warm_floor" in result, result["variants"]
    is_layer = result["kind"] == "layer"
    spread = "\\[95 %]" if "tax_low" in variants["frozen"] else "\\[20-80 %]"
    columns = ["", "forward\nms", "backward\nms", "total ms\n\\[20-80 %]", f"LoRA tax\n{spread}", "of\nfull"]
    has_dense = "lorafuse-dense" in variants
    columns += [
        *(["over\nfrozen"] if is_layer else []),
        *(["over\ndense"] if has_dense else []),
        *(["tax,\nx warm"] if is_warm else []),
        "TFLOP/s",
        "of\npeak",
        "of\ncopy",
        "memory\nMiB",
    ]
    base, rows = variants["frozen"]["peak_bytes"], []
    for name, figure in variants.items():
        digits = 2 if figure["total"]["median"] < 0.1 else 0
        ms = {part: f"{figure[part]['median'] * 1e3:.{digits}f}" for part in ("forward", "backward", "total")}
        ends = "-".join(f"{figure['total'][end] * 1e3:.{digits}f}" for end in ("p20", "p80"))
        low, high = figures.interval(figure) or (0.0, 0.0)
        tax = "within noise" if figures.is_noise(figure) else f"{figure['tax']:.1%}"
        adapted = figure["trains"] == "adapters"
        rows.append([
            name + ("*" if figure.get("launched") else ""), ms["forward"], ms["backward"], f"{ms['total']} \\[{ends}]",
            f"{tax} \\[{low * 100:.0f}-{high * 100:.0f}]" if adapted else "",
            f"{figure['ratio_to_full']:.2f}" if "ratio_to_full" in figure else "",
            *([f"{figure['tax_over_frozen']:.1%}" if adapted else ""] if is_layer else []),
            *([f"{figure['over_dense']:+.1%}"] if has_dense else []),
            *([f"{figure['warm_x']['tax']:.1%}" if adapted else ""] if is_warm else []),
            f"{figure['flops_per_s'] / 1e12:.2f}", f"{figure['of_peak']:.0%}", f"{figure['of_copy']:.0%}",
            f"{(figure['peak_bytes'] - base) / 2**20:+.1f}",
        ])  # fmt: skip
    floors = result["floors"]
    notes = [
        "LoRA tax over the fastest frozen: " + ", ".join(f"{name} {part}" for part, name in result["floor"].items()),
        f"arithmetic floors: LoRA tax {floors['tax']:.1%}, of full fine-tuning {floors['ratio_to_full']:.2f}",
    ]
    notes += [f"{name} failed and is not counted: {reason}" for name, reason in result["failed"].items()]
    launched = {name: one["launched"] for name, one in variants.items() if one.get("launched")}
    notes += [f"* {name} is not in a CUDA graph: {reason}" for name, reason in launched.items()]
    return shown(f"{title(result)}, {result['rounds']} rounds", columns, rows, notes, wrap=False)


def closing(results: list[dict[str, Any]]) -> list[str]:
    """The baselines that did not run here and why; geometric means of the variants that ran in all of several cases."""
    reasons: dict[str, list[str]] = {}
    for name, reason in (results[0]["absent"] if results else {}).items():
        reasons.setdefault(reason, []).append(name)
    lines = [f"not run: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    if len(results) < 2:
        return lines
    lines.append(f"geometric means over {len(results)} cases")
    everywhere = [n for n in results[0]["variants"] if all(n in result["variants"] for result in results)]
    for name in everywhere:
        if name.startswith("frozen") or name == "full":
            continue
        own = [result["variants"][name] for result in results]
        line = f"{name}: LoRA tax {geometric_mean([1 + one['tax'] for one in own]) - 1:.1%}"
        if all("ratio_to_full" in one for one in own):
            line += f", of full fine-tuning {geometric_mean([one['ratio_to_full'] for one in own]):.2f}"
        if name.startswith("lorafuse"):
            line += "".join(
                f", {ratio:.2f} times as fast as {peft}" for ratio, peft in _over_peft(name, everywhere, results)
            )
        lines.append(line)
    return lines


def _over_peft(name: str, everywhere: list[str], results: list[dict[str, Any]]) -> list[tuple[float, str]]:
    """How many times as fast a variant is as each setting of PEFT, the smallest factor first."""

    def ratio(peft: str) -> float:
        totals = ([result["variants"][one]["total"]["median"] for one in (peft, name)] for result in results)
        return geometric_mean([peft_seconds / own for peft_seconds, own in totals])

    return sorted((ratio(peft), peft) for peft in everywhere if peft == "peft" or peft.startswith("peft-"))
