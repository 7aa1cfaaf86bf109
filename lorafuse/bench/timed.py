"""A problem with all of its baselines: the gate first, then times in turns, then memory; the table of its figures."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import geometric_mean
from typing import Any

import torch

from lorafuse.bench import peaks, plugins
from lorafuse.bench.limits import first_line, is_out_of_memory, out_of_memory
from lorafuse.bench.plugins import Baseline
from lorafuse.bench.problem import Problem, title, wrong
from lorafuse.bench.remote import RemoteRunner
from lorafuse.bench.result import Failed, Wrong
from lorafuse.bench.runner import Runner
from lorafuse.testing.memory import Held
from lorafuse.testing.timing import Clock, Samples, measure, percentile, timing

__all__ = ["Built", "Progress", "built", "closing", "run_case", "select", "table", "timing"]

# (done, total, text)
Progress = Callable[[int, int, str], None]


def select(kind: str, args: argparse.Namespace, device: torch.device) -> list[Baseline]:
    """The requested baselines, and always "frozen". Raises ValueError that lists the known ones."""
    baselines = plugins.load(kind, device, args.baselines)
    known = [one.name for one in baselines]
    for name in args.only or ():
        if name not in known:
            raise ValueError(f"--only {name}: it is no baseline of {kind}; the known ones: {', '.join(known)}")
    return [one for one in baselines if not args.only or one.name in (*args.only, "frozen")]


def run_case(problem: Problem, args: argparse.Namespace, device: torch.device, progress: Progress) -> dict[str, Any]:
    """Every figure of one problem. Raises Wrong for a wrong result of this project's own baselines."""
    with built(problem, args, device, progress) as variants:
        warm_up = max(2, args.rounds // 10)
        samples: dict[str, Samples] = {}
        rounds = measure(list(variants.runners.values()), args.rounds, warm_up, args.seconds, variants.drop)
        for index, samples in enumerate(rounds):  # noqa: B007
            progress(index + 1, args.rounds + warm_up, "timing")
        held = variants.memory(progress)
        figures: dict[str, Any] = {}
        for name, runner in variants.runners.items():
            figures[name] = _figures(problem, variants.baselines[name], samples, device)
            figures[name] |= {"peak_bytes": held[name].peak, "between_bytes": held[name].between}
            if runner.launched:
                figures[name]["launched"] = runner.launched
    return problem.described() | {
        "rounds": len(samples["frozen"].total), "floors": problem.floors(), "variants": figures,
        "failed": variants.failed, "absent": variants.absent,
    }  # fmt: skip


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
        unless memory ran out.
        """
        no_memory = is_out_of_memory(error)
        if name == "frozen" or not (self.baselines[name].peer or no_memory):
            raise error
        if isinstance(error, Failed | Wrong):
            self.failed[name] = str(error)
        else:
            self.failed[name] = out_of_memory(error) if no_memory else f"{type(error).__name__}: {first_line(error)}"
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
                    variant = problem.variant(one.name, one.module, given, **one.options)
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


def _figures(problem: Problem, one: Baseline, samples: dict[str, Samples], device: torch.device) -> dict[str, Any]:
    own, frozen = samples[one.name], samples["frozen"].total
    figures: dict[str, Any] = {"label": one.label, "trains": one.trains, **own.summary()}
    # ratios of calls of one round, in which the machine was in one state
    taxes = [seconds / floor - 1 for seconds, floor in zip(own.total, frozen, strict=True)]
    median = figures["total"]["median"]
    figures["tax"] = median / samples["frozen"].summary()["total"]["median"] - 1
    figures["tax_p20"], figures["tax_p80"] = percentile(taxes, 0.2), percentile(taxes, 0.8)
    if "full" in samples:
        figures["ratio_to_full"] = median / samples["full"].summary()["total"]["median"]
    work = problem.work(one.trains)
    for part in ("forward", "backward"):
        seconds = figures[part]["median"]
        figures[part] |= {"flops_per_s": work[part].flops / seconds, "bytes_per_s": work[part].bytes / seconds}
    both = work["forward"] + work["backward"]
    figures["flops_per_s"], figures["bytes_per_s"] = both.flops / median, both.bytes / median
    figures["flops_per_byte"] = both.flops / both.bytes
    figures["of_peak"] = figures["flops_per_s"] / peaks.matmul_flops(problem.torch_dtype, device)
    figures["of_copy"] = figures["bytes_per_s"] / peaks.copy_bytes(device)
    return figures


def table(result: dict[str, Any]) -> Any:
    """The figures of a result as rich's table, below it the baselines that are not in it and why."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    rows = Table(title=f"{title(result)}, {result['rounds']} rounds", box=SIMPLE_HEAD)
    columns = ("", "forward\nms", "backward\nms", "total ms\n\\[20-80 %]", "LoRA tax\n\\[20-80 %]", "of\nfull")
    for column in (*columns, "TFLOP/s", "of\npeak", "of\ncopy", "memory\nMiB"):
        rows.add_column(column, justify="left" if not column else "right", no_wrap=True)
    base = result["variants"]["frozen"]["peak_bytes"]
    for name, figure in result["variants"].items():
        digits = 2 if figure["total"]["median"] < 0.1 else 0
        ms = {part: f"{figure[part]['median'] * 1e3:.{digits}f}" for part in ("forward", "backward", "total")}
        spread = "-".join(f"{figure['total'][end] * 1e3:.{digits}f}" for end in ("p20", "p80"))
        tax = f"{figure['tax']:.1%} \\[{figure['tax_p20'] * 100:.0f}-{figure['tax_p80'] * 100:.0f}]"
        rows.add_row(
            name + ("*" if figure.get("launched") else ""),
            ms["forward"],
            ms["backward"],
            f"{ms['total']} \\[{spread}]",
            tax if figure["trains"] == "adapters" else "",
            f"{figure['ratio_to_full']:.2f}" if "ratio_to_full" in figure else "",
            f"{figure['flops_per_s'] / 1e12:.2f}",
            f"{figure['of_peak']:.0%}",
            f"{figure['of_copy']:.0%}",
            f"{(figure['peak_bytes'] - base) / 2**20:+.1f}",
        )
    floors = result["floors"]
    notes = [f"arithmetic floors: LoRA tax {floors['tax']:.1%}, of full fine-tuning {floors['ratio_to_full']:.2f}"]
    notes += [f"{name} failed and is not counted: {reason}" for name, reason in result["failed"].items()]
    notes += [
        f"* {name} is not in a CUDA graph: {figure['launched']}"
        for name, figure in result["variants"].items()
        if figure.get("launched")
    ]
    rows.caption = "\n".join(notes)
    return rows


def closing(results: list[dict[str, Any]]) -> list[str]:
    """The baselines that did not run here and why; geometric means of the variants that ran in all of several cases."""
    reasons: dict[str, list[str]] = {}
    for name, reason in (results[0]["absent"] if results else {}).items():
        reasons.setdefault(reason, []).append(name)
    lines = [f"not run: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    if len(results) < 2:
        return lines
    lines.append(f"geometric means over {len(results)} cases")
    for name in results[0]["variants"]:
        figures = [result["variants"].get(name) for result in results]
        if name in ("frozen", "full") or not all(figures):
            continue
        line = f"{name}: LoRA tax {geometric_mean([1 + figure['tax'] for figure in figures]) - 1:.1%}"
        if all("ratio_to_full" in figure for figure in figures):
            line += f", of full fine-tuning {geometric_mean([figure['ratio_to_full'] for figure in figures]):.2f}"
        peft = [result["variants"].get("peft") for result in results]
        if all(peft) and name.startswith("lorafuse"):
            ratios = [p["total"]["median"] / f["total"]["median"] for p, f in zip(peft, figures, strict=True)]
            line += f", {geometric_mean(ratios):.2f} times as fast as PEFT"
        lines.append(line)
    return lines
