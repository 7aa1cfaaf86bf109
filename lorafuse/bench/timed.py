"""A problem through all of its baselines: the gate first, then times in turns, then memory. And its table."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lorafuse.bench import peaks, plugins
from lorafuse.bench.limits import is_out_of_memory
from lorafuse.bench.plugins import Baseline
from lorafuse.bench.problem import Problem, title
from lorafuse.bench.remote import RemoteRunner
from lorafuse.bench.result import Failed, Wrong
from lorafuse.bench.runner import Runner
from lorafuse.bench.variant import wrong
from lorafuse.testing.timing import Clock, Samples, measure, percentile

__all__ = ["Progress", "built", "closing", "run_case", "select", "table"]

# called with what is done, out of how much, and what that is
Progress = Callable[[int, int, str], None]


def select(kind: str, args: argparse.Namespace, device: torch.device) -> list[Baseline]:
    """The baselines that were asked for, "frozen" always. Raises ValueError that lists the known ones."""
    found = plugins.load(kind, device, args.baselines)
    known = [one.name for one in found]
    for name in args.only or ():
        if name not in known:
            raise ValueError(f"--only {name}: it is no baseline of {kind}; the known ones: {', '.join(known)}")
    return [one for one in found if not args.only or one.name in (*args.only, "frozen")]


def run_case(problem: Problem, args: argparse.Namespace, device: torch.device, progress: Progress) -> dict[str, Any]:
    """Every figure of one problem. Raises Wrong when a result of this project's own baselines is not right."""
    with built(problem, args, device, progress) as (present, runners, failed):
        warm_up = max(2, args.rounds // 10)
        samples: dict[str, Samples] = {}
        for index, taken in enumerate(measure(list(runners.values()), args.rounds, warm_up, args.seconds)):
            samples = taken
            progress(index + 1, args.rounds + warm_up, "timing")
        figures = {one.name: _figures(problem, one, samples, device) for one in present if one.name in runners}
        for index, (name, runner) in enumerate(runners.items()):
            progress(index + 1, len(runners), f"memory of {name}")
            held = runner.memory()
            figures[name] |= {"peak_bytes": held.peak, "between_bytes": held.between}
            if runner.launched:
                figures[name]["launched"] = runner.launched
    rounds = len(samples["frozen"].total)
    return problem.described() | {
        "rounds": rounds, "floors": problem.floors(), "variants": figures, "failed": failed,
        "absent": {one.name: one.absent for one in select(problem.kind, args, device) if one.absent},
    }  # fmt: skip


@contextmanager
def built(
    problem: Problem, args: argparse.Namespace, device: torch.device, progress: Progress
) -> Iterator[tuple[list[Baseline], dict[str, Runner | RemoteRunner], dict[str, str]]]:
    """The baselines that can run here, their variants that are right, the reasons of those that failed."""
    present = [one for one in select(problem.kind, args, device) if not one.absent]
    runners: dict[str, Runner | RemoteRunner] = {}
    failed: dict[str, str] = {}
    try:
        _build(problem, present, args, device, progress, runners, failed)
        yield present, runners, failed
    finally:
        for runner in runners.values():
            if isinstance(runner, RemoteRunner):
                runner.close()


def _build(
    problem: Problem,
    present: list[Baseline],
    args: argparse.Namespace,
    device: torch.device,
    progress: Progress,
    runners: dict[str, Runner | RemoteRunner],
    failed: dict[str, str],
) -> None:
    """Fill `runners` with the variants that are right, `failed` with the reasons of the others."""
    progress(0, len(present), "reference")
    given = problem.inputs(device)
    references, clock = problem.references(given), Clock(device)
    for index, one in enumerate(present):
        progress(index, len(present), f"checking {one.name}")
        try:
            if one.isolated:
                runner: Runner | RemoteRunner = RemoteRunner(one.name, problem, one, device, args.graphs)
                said = runner.wrong  # type: ignore[union-attr]
            else:
                variant = problem.variant(one.name, one.module, given, **one.options)
                said = wrong(variant, references[one.trains], problem.shaped)
                runner = Runner(variant, clock, args.graphs) if not said else None  # type: ignore[assignment]
            if said:
                if isinstance(runner, RemoteRunner):
                    runner.close()
                raise Wrong(said)
            runners[one.name] = runner
            runner.once()
        except Wrong as error:
            if not one.peer:
                raise
            failed[one.name] = str(error)
        except Exception as error:
            # what cannot run is reported and not counted; without the floor there is nothing to compare with
            if one.name == "frozen" or not (one.peer or is_out_of_memory(error)):
                raise
            what = "out of memory" if is_out_of_memory(error) else type(error).__name__
            failed[one.name] = (
                str(error) if isinstance(error, Failed) else f"{what}: {str(error).partition(chr(10))[0]}"
            )
            if isinstance(dropped := runners.pop(one.name, None), RemoteRunner):
                dropped.close()


def _figures(problem: Problem, one: Baseline, samples: dict[str, Samples], device: torch.device) -> dict[str, Any]:
    taken, frozen = samples[one.name], samples["frozen"].total
    found: dict[str, Any] = {"label": one.label, "trains": one.trains, **taken.summary()}
    # ratios of calls of one round, which met the machine in one state
    taxes = [own / floor - 1 for own, floor in zip(taken.total, frozen, strict=True)]
    median = found["total"]["median"]
    found["tax"] = (
        median / Samples(samples["frozen"].forward, samples["frozen"].backward).summary()["total"]["median"] - 1
    )
    found["tax_p20"], found["tax_p80"] = percentile(taxes, 0.2), percentile(taxes, 0.8)
    if "full" in samples:
        found["ratio_to_full"] = median / samples["full"].summary()["total"]["median"]
    work = problem.work(one.trains)
    for part in ("forward", "backward"):
        seconds = found[part]["median"]
        found[part] |= {"flops_per_s": work[part].flops / seconds, "bytes_per_s": work[part].bytes / seconds}
    both = work["forward"] + work["backward"]
    found["flops_per_s"], found["bytes_per_s"] = both.flops / median, both.bytes / median
    found["flops_per_byte"] = both.flops / both.bytes
    found["of_peak"] = found["flops_per_s"] / peaks.matmul_flops(problem.torch_dtype, device)
    found["of_copy"] = found["bytes_per_s"] / peaks.copy_bytes(device)
    return found


def table(result: dict[str, Any]) -> Any:
    """The figures of a result as rich's table, with what is not in it and why below."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    found = Table(title=f"{title(result)}, {result['rounds']} rounds", box=SIMPLE_HEAD)
    columns = ("", "forward\nms", "backward\nms", "total ms\n\\[20-80 %]", "LoRA tax\n\\[20-80 %]", "of\nfull")
    for column in (*columns, "TFLOP/s", "of\npeak", "of\ncopy", "memory\nMiB"):
        found.add_column(column, justify="left" if not column else "right", no_wrap=True)
    base = result["variants"]["frozen"]["peak_bytes"]
    for name, figure in result["variants"].items():
        digits = 2 if figure["total"]["median"] < 0.1 else 0
        ms = {part: f"{figure[part]['median'] * 1e3:.{digits}f}" for part in ("forward", "backward", "total")}
        spread = "-".join(f"{figure['total'][end] * 1e3:.{digits}f}" for end in ("p20", "p80"))
        tax = f"{figure['tax']:.1%} \\[{figure['tax_p20'] * 100:.0f}-{figure['tax_p80'] * 100:.0f}]"
        found.add_row(
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
    found.caption = "\n".join(notes)
    return found


def closing(results: list[dict[str, Any]]) -> list[str]:
    """Over all cases, for each variant that ran in all of them: geometric means of 1 + tax and of the ratio to full."""
    from lorafuse.bench.result import geomean

    lines: list[str] = []
    if len(results) < 2:
        return lines
    for name in results[0]["variants"]:
        figures = [result["variants"].get(name) for result in results]
        if name == "frozen" or any(figure is None for figure in figures):
            continue
        said = f"{name}: " + ("" if name == "full" else f"LoRA tax {geomean([1 + f['tax'] for f in figures]) - 1:.1%}")
        if all("ratio_to_full" in figure for figure in figures) and name != "full":
            said += f", of full fine-tuning {geomean([f['ratio_to_full'] for f in figures]):.2f}"
        peft = [result["variants"].get("peft") for result in results]
        if all(peft) and name.startswith("lorafuse"):
            ratios = [p["total"]["median"] / f["total"]["median"] for p, f in zip(peft, figures, strict=True)]
            said += f", {geomean(ratios):.2f} times as fast as PEFT"
        if name != "full":
            lines.append(said)
    return [f"geometric means over {len(results)} cases", *lines] if lines else []
