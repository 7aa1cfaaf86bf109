"""Measure what LoRA costs on this machine: layers, blocks, whole models; against the frozen layer, PEFT and others.

LoRA tax = time(adapted) / time(fastest frozen) - 1, forward and backward. No number is printed for a wrong result.
With --base REF the same cases run in this checkout and in that commit's, in turns; slower passes are reported.
"""

import argparse
import importlib
import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from lorafuse.bench import figures, peaks
from lorafuse.bench.limits import is_out_of_memory, out_of_memory, within_memory
from lorafuse.bench.remote import TIMEOUT
from lorafuse.bench.result import VERSION, Wrong, write_csv, write_json
from lorafuse.cli import _common
from lorafuse.cli._common import DTYPES
from lorafuse.errors import MissingDependency
from lorafuse.files import why_no_file, why_no_folder
from lorafuse.testing.conditions import conditions, describe

SUMMARY = "measure the LoRA tax of layers, blocks and models against PEFT, others and full fine-tuning"
KINDS = ("linear", "quantized", "group", "multi", "layer", "moe", "model", "memory")

__all__ = ["KINDS", "SUMMARY", "add_arguments", "prepared", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND")
    for kind in KINDS:
        module = _module(kind)
        sub = kinds.add_parser(kind, help=module.SUMMARY, description=module.__doc__)
        module.add_arguments(sub)
        _add_common(sub)
    # again for `lorafuse bench --base REF` without a kind
    parser.add_argument("--base", metavar="REF", help="compare with that commit, every kind's usual cases")
    parser.set_defaults(again=lambda argv: parser.parse_args(argv))


def _module(kind: str) -> Any:
    """The module of a kind: `SUMMARY`, `add_arguments` and `cases`."""
    return importlib.import_module(f"lorafuse.bench.{kind}")


def _engine(kind: str) -> Any:
    """The module that runs a kind's cases: `run_case` and `table`, maybe `select`, `timing` and `closing`."""
    return _module(kind if kind in ("model", "memory") else "timed")


def _add_common(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("how")
    how.add_argument("--dtype", choices=DTYPES, help="of the base (bfloat16; float32 on CPUs that are faster in it)")
    how.add_argument("--device", default="", help="cuda, cpu, … (cuda where there is one)")
    how.add_argument("--rounds", type=int, default=40, help="timed calls of each variant (40)")
    how.add_argument("--seconds", type=float, default=120.0, help="of one case, then fewer rounds, ten at least (120)")
    how.add_argument("--processes", type=int, default=1, help="that measure each case, for an interval over them (1)")
    how.add_argument(
        "--warm-x",
        action=argparse.BooleanOptionalAction,
        help="of layers and blocks: also with x and dy just written, as in training (on GPUs)",
    )
    how.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        help=f"seconds for an answer of a baseline's own process ({TIMEOUT:g})",
    )
    how.add_argument("--only", nargs="+", metavar="NAME", help="these baselines, and frozen (all)")
    how.add_argument("--baselines", type=Path, metavar="DIR", help="folder of baselines (bench/baselines)")
    how.add_argument("--no-graphs", dest="graphs", action="store_false", help="on GPUs: launch, without CUDA graphs")
    how.add_argument("--base", metavar="REF", default=argparse.SUPPRESS, help="compare lorafuse with that commit's")
    out = parser.add_argument_group("what is written")
    out.add_argument("--json", type=Path, metavar="FILE", help="every figure and the raw rounds, after each case")
    out.add_argument("--csv", type=Path, metavar="FILE", help="the same as a table, one line for each variant")
    out.add_argument("--plot", type=Path, metavar="DIR", help="tax by M and by rank, ratio to full, roofline as PNG")


def run(args: argparse.Namespace) -> int:
    """0 when every result was right; 1 when one was wrong or nothing could run; 130 when interrupted."""
    if args.kind is None and args.base is None:
        raise ValueError(f"name what to measure: lorafuse bench {{{','.join(KINDS)}}}, or --base REF")
    # not imported here: that takes seconds, and baselines without PEFT need none of it
    if missing := [name for name in ("peft", "rich") if importlib.util.find_spec(name) is None]:
        raise MissingDependency(f"lorafuse bench needs {' and '.join(missing)}: pip install 'lorafuse[peft,cli]'")
    console = _common.console()
    if args.base is not None:
        from lorafuse.bench import compare

        runs = [args.again([*argv, "--base", args.base]) for argv in compare.USUAL] if args.kind is None else [args]
        return compare.run(runs, console, prepared)
    cases, device = prepared(args)
    kind = _engine(args.kind)
    setting = conditions(device)
    if hasattr(kind, "timing"):
        setting["timing"] = kind.timing(device)
    console.print(describe(setting), highlight=False)
    content: dict[str, Any] = {"version": VERSION, "kind": args.kind, "conditions": setting}
    content |= {"results": [], "not_run": {}}
    status = _run_cases(kind, cases, args, device, console, content)
    for line in getattr(kind, "closing", lambda results: [])(content["results"]):
        console.print(line, highlight=False)
    if args.plot is not None and content["results"]:
        from lorafuse.bench import plots

        for file in plots.draw(content, args.plot):
            console.print(f"drawn: {file}", markup=False, highlight=False)
    return status


def prepared(args: argparse.Namespace) -> tuple[list[Any], torch.device]:
    """The cases and the device. Raises ValueError for every mistake in the options."""
    numbers = "m", "rank", "rounds", "seconds", "timeout", "processes", "layers", "tokens", "batch", "accumulate"
    _common.check_numbers(args, *(name for name in numbers if hasattr(args, name)))
    device = _common.device(args.device)
    for name, why_not in (("json", why_no_file), ("csv", why_no_file), ("plot", why_no_folder)):
        if getattr(args, name) is not None:
            _common.check_path(f"--{name}", getattr(args, name), why_not)
    if args.dtype is None:
        args.dtype = peaks.usual_dtype(device)
    if hasattr(engine := _engine(args.kind), "select"):
        engine.select(args.kind, args, device)
    return _module(args.kind).cases(args), device


def _run_cases(
    kind: Any, cases: list[Any], args: argparse.Namespace, device: torch.device, console: Any, content: dict[str, Any]
) -> int:
    """Run every case, print its table, and write what is done after each."""
    status = 0
    bounded = within_memory() if device.type == "cpu" else nullcontext()
    try:
        with bounded:
            for case in cases:
                try:
                    with _progress(console, case.name) as progress:
                        result = _run_case(kind, case, args, device, progress)
                except Wrong as error:
                    console.print(
                        f"{case.title}: no numbers, the run stops: {error}", style="red", markup=False, highlight=False
                    )
                    content["not_run"][case.title] = str(error)
                    return 1
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    reason = out_of_memory(error)
                    console.print(f"{case.title}: no numbers, {reason}", style="red", markup=False, highlight=False)
                    content["not_run"][case.title] = reason
                else:
                    content["results"].append(result)
                    console.print(kind.table(result))
                _write(args, content)
    except KeyboardInterrupt:
        console.print("interrupted; what is done is kept")
        status = 130
    finally:
        _write(args, content)
    return status or int(not content["results"])


def _run_case(kind: Any, case: Any, args: argparse.Namespace, device: torch.device, progress: Any) -> dict[str, Any]:
    """The result of a case: of this process, or of as many fresh ones as asked for, one after the other."""
    if args.processes == 1:
        result: dict[str, Any] = kind.run_case(case, args, device, progress)
        return result
    own = argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in ("run", "again")})
    results = []
    for index in range(args.processes):
        progress(index, args.processes, f"process {index + 1} of {args.processes}")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            result, rates = pool.submit(_in_process, kind.__name__, case, own, device, peaks.RATES).result()
        # the first one measures what the device reaches
        peaks.RATES.update(rates)
        results.append(result)
    return figures.merge(results)


def _in_process(
    kind: str, case: Any, args: argparse.Namespace, device: torch.device, rates: dict[Any, float]
) -> tuple[dict[str, Any], dict[Any, float]]:
    peaks.RATES.update(rates)
    with within_memory() if device.type == "cpu" else nullcontext():
        return importlib.import_module(kind).run_case(case, args, device, lambda *_: None), peaks.RATES


def _write(args: argparse.Namespace, content: dict[str, Any]) -> None:
    if args.json is not None:
        write_json(args.json, content)
    if args.csv is not None:
        write_csv(args.csv, content)


@contextmanager
def _progress(console: Any, name: str) -> Iterator[Callable[[int, int, str], None]]:
    """A live line of progress, until the case ends."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(name, total=None)

        def progress(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{name}: {text}")

        yield progress
