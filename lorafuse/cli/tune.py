"""Measure every candidate of the planner for a model's LoRA layers on this GPU; plans then follow the fastest.

A result that differs from the formula in fp64 is reported and never recorded. Records stay in the folder of
LORAFUSE_CACHE_DIR, one file per GPU model; an interrupted run continues where it stopped.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorafuse import env, files
from lorafuse.backends import base
from lorafuse.backends.problems import device_spec
from lorafuse.cli import _common
from lorafuse.cli._common import DTYPES
from lorafuse.errors import MissingDependency
from lorafuse.plan import Problem, clear_cache, find, tuned
from lorafuse.testing.cases import Case, sizes
from lorafuse.testing.cases import find as find_case
from lorafuse.testing.conditions import conditions, describe
from lorafuse.testing.model_layers import linear_layers
from lorafuse.testing.timing import timing
from lorafuse.tune import measure, report
from lorafuse.tune.measure import Outcome, Target, is_measured, is_tunable, passes
from lorafuse.tune.record import record
from lorafuse.tune.stored import FORMATS

SUMMARY = "measure what is fastest for a model on this GPU, and let plans follow it"

__all__ = ["SUMMARY", "add_arguments", "run"]

# passes of one layer at one M and R, which share their operands
_Group = list[Problem]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, metavar="DIR", help="the layers of a model directory or its config.json")
    which.add_argument("--case", action="append", metavar="NAME", help="a layer by name; may be repeated")
    which.add_argument("--shape", action="append", metavar="N,K", help="out and in features; may be repeated")
    parser.add_argument("--m", type=int, nargs="+", help="tokens (512 2048 8192; with --quant 16 and 64 too)")
    parser.add_argument("--rank", type=int, nargs="+", default=[16], help="of the adapter (16)")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the base (bfloat16)")
    parser.add_argument(
        "--quant",
        choices=FORMATS,
        default="dense",
        help="how the base is stored; few rows may decode it in the product",
    )
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="of the adapter (0)")
    parser.add_argument("--device", default="", help="cuda, cuda:1, … (cuda)")
    parser.add_argument("--rounds", type=int, default=40, help="timed calls of each candidate (40)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep measurements there, where plans do not look")
    parser.add_argument("--again", action="store_true", help="measure also what is there already")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured; nothing runs")
    parser.add_argument("--gpu", metavar="NAME", help="with --dry-run: as on an H200, A100, … (the GPU here)")


def run(args: argparse.Namespace) -> int:
    """0; 1 when a candidate was wrong; 130 when interrupted. Raises ValueError for bad options, MissingDependency."""
    if args.m is None:
        args.m = [512, 2048, 8192] if args.quant == "dense" else [16, 64, 512, 2048, 8192]
    _check(args)
    layers, experts = _named(args), 0
    target = _planned(args.gpu) if args.gpu is not None else live_target(args.device)
    if args.model is not None:
        layers, experts = _of_model(args.model)
    path = tuned.own_file(target.spec.model) if args.out is None else args.out
    entries = tuned.read(path, own=args.out is None)
    work = {case: _groups(case, args, target, () if args.again else entries) for case in layers}
    console = _console()
    if experts:
        console.print(f"experts in {experts} layers are planned by the model and not tuned: this is of linear layers")
    _say_what_is_left_out(console, layers, args, target, entries)
    if args.dry_run:
        report.print_work(console, target, work, args.rounds)
        return 0
    if not any(work.values()):
        text = f"nothing left to measure: {path} holds it; --again measures it again"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return 0
    _check_writable(path, own=args.out is None)
    setting = conditions(target.device) | {"timing": timing(target.device)}
    console.print(f"{describe(setting)}, {args.rounds} rounds", highlight=False)
    return _measure_all(console, args, target, {case: (layers[case], work[case]) for case in work}, path, setting)


def _check(args: argparse.Namespace) -> None:
    _common.check_numbers(args, "m", "rank", "rounds")
    if not 0.0 <= args.dropout < 1.0:
        raise ValueError(f"--dropout {args.dropout}: it must be at least 0 and below 1")
    if args.gpu is not None and not args.dry_run:
        raise ValueError(
            f"--gpu {args.gpu}: measuring needs the GPU itself; add --dry-run to see what would be measured"
        )

    if args.out is not None and args.out.is_dir():
        raise ValueError(f"--out {args.out}: it is a folder; name a file")


def _planned(name: str) -> Target:
    """A GPU that need not be here, with every backend. Raises ValueError that lists the known ones."""
    return Target(torch.device("meta"), find(name), tuple((backend, "") for backend in base.BACKENDS))


def live_target(name: str) -> Target:
    """The GPU of that name here. Raises ValueError where plans have nothing to choose from."""
    device = _common.device(name)
    available = tuple((backend, base.availability(backend).reason) for backend in base.BACKENDS)
    why = dict(available)["triton"] if device.type == "cuda" else f"plans on {device.type} take it for every problem"
    if why:
        raise ValueError(
            f"there is nothing to tune: eager is the only backend on {device} ({why}). Run this where a GPU is, or say "
            "what would be measured on one: --dry-run --gpu H200"
        )
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    spec = device_spec(device)
    assert spec is not None
    return Target(device, spec, available)


def _of_model(path: Path) -> tuple[dict[Case, int], int]:
    """`({shape: how many layers have it}, number of layers with experts)`."""
    try:
        return linear_layers(path)
    except ImportError as error:
        raise MissingDependency("--model needs peft and transformers: pip install 'lorafuse[peft]'") from error


def _named(args: argparse.Namespace) -> dict[Case, int]:
    """`{shape: 1}` of what --case and --shape name, each shape once."""
    cases = [find_case(name) for name in args.case or ()]
    for text in args.shape or ():
        cases.append(Case("", *sizes(text, 2, 2, "two sizes, out and in features", "4096,4096")))
    by_shape: dict[tuple[int, int], Case] = {}
    for case in cases:
        by_shape.setdefault((case.N, case.K), case)
    return dict.fromkeys(by_shape.values(), 1)


def _console() -> Any:
    try:
        return _common.console()
    except ImportError as error:
        raise MissingDependency("lorafuse tune needs rich: pip install 'lorafuse[cli]'") from error


def _groups(case: Case, args: argparse.Namespace, target: Target, entries: Sequence[tuned.Tuned]) -> list[_Group]:
    """The passes of a layer to measure: those with a choice that plans can look up, and that are not there yet."""
    groups = []
    for M in sorted(set(args.m)):
        for R in sorted(set(args.rank)):
            every = passes(case, M, R, args.dtype, args.dropout > 0, args.quant)
            group = [p for p in every if is_tunable(p, target) and not is_measured(p, entries)]
            if group:
                groups.append(group)
    return groups


def _say_what_is_left_out(
    console: Any, layers: dict[Case, int], args: argparse.Namespace, target: Target, entries: Sequence[tuned.Tuned]
) -> None:
    """What no measurement can help, and how much is there. Raises ValueError when nothing could be tuned at all."""
    every = {case: _groups(case, args, target, ()) for case in layers}
    for case, groups in every.items():
        if not groups:
            console.print(
                f"{report.shape(case)}: left out; {target.spec.name} has one candidate for it, or its rows are off "
                "16-byte boundaries, which measurements do not cover",
                highlight=False,
            )
    if not any(every.values()):
        raise ValueError(
            f"there is nothing to tune: plans on {target.spec.name} have no choice for any of these layers"
        )
    there = sum(is_measured(problem, entries) for groups in every.values() for group in groups for problem in group)
    if there and not args.again:
        console.print(f"{there} passes are measured already; --again measures them again", highlight=False)


def _check_writable(path: Path, own: bool) -> None:
    """Before anything is measured. Raises ValueError where no file can be written, or plans would not find it."""
    if not own:
        _common.check_path("--out", path, files.why_no_file)
        return
    if path.parts[0].startswith("~"):
        raise ValueError(f"{path}: the home folder is not known; name another file by --out or LORAFUSE_CACHE_DIR")
    if not path.is_absolute():
        raise ValueError(
            f"LORAFUSE_CACHE_DIR {env.cache_dir()}: processes that start in another folder would not find it; give the "
            "whole path"
        )
    if reason := files.why_no_file(path):
        raise ValueError(f"{path}: {reason} by --out or LORAFUSE_CACHE_DIR")


def _measure_all(
    console: Any,
    args: argparse.Namespace,
    target: Target,
    work: dict[Case, tuple[int, list[_Group]]],
    path: Path,
    setting: dict[str, str],
) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    status, totals = 0, report.Totals()
    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    total = sum(len(group) for _, groups in work.values() for group in groups)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        for case, (count, groups) in work.items():
            outcomes: list[Outcome] = []
            try:
                for group in groups:
                    sizes = f"{report.shape(case)}, M {group[0].M}, R {group[0].R}"
                    bar.update(task, description=sizes)
                    outcomes += measure.measure(target, group, args.dropout, args.rounds)
                    bar.advance(task, len(group))
            except KeyboardInterrupt:
                console.print("interrupted; what is done is kept")
                status = 130
            finally:
                entries = _keep(path, outcomes, setting, own=args.out is None)
            if outcomes:
                report.print_layer(console, case, count, outcomes, entries, target)
                totals.add(count, outcomes, entries)
            if status == 130:
                break
            status = max(status, int(any(outcome.wrong for outcome in outcomes)))
    report.print_totals(console, totals, path, args.out is None)
    return status


def _keep(path: Path, outcomes: list[Outcome], setting: dict[str, str], own: bool) -> tuple[tuned.Tuned, ...]:
    """Record outcomes in the file, read anew so that entries of a concurrent run stay; the entries that it holds.

    Plans made after this, in this process too, follow them.
    """
    entries = tuned.read(path, own)
    if outcomes:
        entries = record(entries, outcomes, setting)
        tuned.write(path, entries)
        clear_cache()
    return entries
