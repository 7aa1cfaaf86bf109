"""Try the findings about LoRA and full fine-tuning that this project stands on: experiments on its own layers.

Each trains a model, SmolLM2-135M or a small one pretrained here, in full and by adapters, learning rates swept for both
over the same grid, and says of each claim: held, did not hold or not decidable, by a test with its power. Finished runs
are kept as they finish; the same command goes on where an interrupted one stopped.
"""

import argparse
import importlib
import os
import time
from pathlib import Path
from typing import Any

from lorafuse import env
from lorafuse.cli import _common
from lorafuse.errors import MissingDependency
from lorafuse.files import why_no_file, why_no_folder
from lorafuse.study import STUDIES
from lorafuse.testing.conditions import conditions, describe

SUMMARY = "small experiments that test the findings about LoRA and full fine-tuning"

__all__ = ["SUMMARY", "add_arguments", "run"]

# of a GPU: small models leave it idle
_GPU_WORKERS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="+", choices=(*STUDIES, "all"), metavar="NAME", help=f"{', '.join(STUDIES)}, or all"
    )
    parser.add_argument("--quick", action="store_true", help="smaller data, fewer steps and seeds: less power")
    parser.add_argument("--seed", type=int, default=0, help="the first seed, also the small bases' (0)")
    parser.add_argument("--seeds", type=int, help="how many, 2 or more (each study's own number)")
    parser.add_argument("--device", default="", help="cuda, cpu, … (cuda where there is one)")
    parser.add_argument("--workers", type=int, help=f"processes (one a core; {_GPU_WORKERS} on a GPU)")
    parser.add_argument("--base-steps", type=int, metavar="N", help="of the bases' pretraining (1500 and 2500)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/study"), help="where NAME.json and NAME.png go (runs/study)"
    )


def run(args: argparse.Namespace) -> int:
    """0 when the studies ran, whatever they found; 130 when interrupted."""
    device = _common.device(args.device)
    if args.workers is None:
        args.workers = _GPU_WORKERS if device.type == "cuda" else len(os.sched_getaffinity(0))
    _common.check_numbers(args, "workers", "base_steps")
    # one value has no spread, and no test
    _common.check_numbers(args, "seeds", least=2)
    _common.check_numbers(args, "seed", least=0)
    try:
        import matplotlib  # noqa: F401

        console = _common.console()
    except ImportError as error:
        raise MissingDependency("lorafuse study needs rich and matplotlib: pip install 'lorafuse[cli]'") from error
    _common.check_path("--out", args.out, why_no_folder)
    names = STUDIES if "all" in args.names else dict.fromkeys(args.names)
    for file in (args.out / f"{name}.{kind}" for name in names for kind in ("json", "png")):
        _common.check_path("--out", file, why_no_file)
    _common.check_path("LORAFUSE_CACHE_DIR", env.cache_dir() / "study", why_no_folder)
    setting = conditions(device) | {"threads": f"{args.workers} processes of 1"}
    console.print(describe(setting), highlight=False)
    from lorafuse.study.record import finished_runs

    done = finished_runs(args.out, str(device))
    outcomes = {}
    for name in names:
        finding = _study(name, args, str(device), setting, done, console)
        if finding is None:
            text = f"{name}: interrupted; finished runs are in {args.out}, the same command goes on from there"
            console.print(text, markup=False)
            return 130
        outcomes[name] = finding.outcome
    if len(outcomes) > 1:
        for name, outcome in outcomes.items():
            console.print(f"{name:12s} {outcome}", highlight=False)
    return 0


def _study(
    name: str, args: argparse.Namespace, device: str, setting: dict[str, str], done: dict[str, Any], console: Any
) -> Any:
    """One study with its table, claims, file and plot; None when interrupted."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from lorafuse.study import plots, record
    from lorafuse.study.runner import Lab, Spec

    module = importlib.import_module(f"lorafuse.study.{name}")
    console.rule(f"{name}: {module.SUMMARY}")
    file = args.out / f"{name}.json"
    head: dict[str, Any] = {"study": name, "quick": args.quick, "conditions": setting}
    start = time.perf_counter()
    written, took, unsaved = 0.0, 0.0, False

    def on_done(spec: Spec, finished: int, total: int) -> None:
        nonlocal written, took, unsaved
        shown = f"{spec.task} {spec.side} rate {spec.lr:.3g} seed {spec.seed}"
        bar.update(task, completed=finished, total=total, shown=shown)
        # the file is written whole: of short runs not after each, so that it takes a twentieth of the time at most
        began = time.perf_counter()
        unsaved = began - written < 20 * took and finished < total
        if not unsaved:
            record.write(file, head, lab)
            written = time.perf_counter()
            took = written - began

    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[shown]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None, shown="pretraining the base, where it is not in the cache")
        seeds = list(range(args.seed, args.seed + (args.seeds or module.SEEDS[0 if args.quick else 1])))
        with Lab(seeds, device, args.workers, args.base_steps, done, on_done) as lab:
            try:
                finding = module.conduct(lab, args.quick)
            except KeyboardInterrupt:
                if unsaved:
                    record.write(file, head, lab)
                return None
    head |= {"seconds": round(time.perf_counter() - start, 1), "finding": finding.as_dict()}
    record.write(file, head, lab)
    size = f"{'--quick' if args.quick else 'full size'}, {len(seeds)} seeds"
    plots.draw(args.out / f"{name}.png", name, finding, f"{size}; {setting['device']}, {setting['date']}")
    _print(console, finding)
    text = f"{head['seconds']:.0f} s; wrote {name}.json and {name}.png to {args.out}"
    console.print(text, markup=False, highlight=False)
    return finding


def _print(console: Any, finding: Any) -> None:
    from rich.table import Table

    shown = {"best rate": "{:.3g}", "loss": "{:.4f}", "low": "{:.4f}", "high": "{:.4f}", "bits per parameter": "{:.2f}"}
    table = Table(*finding.conditions[0], title="at the best rate of each, mean and spread over seeds")
    for row in finding.conditions:
        table.add_row(*(shown.get(name, "{}").format(value) for name, value in row.items()))
    console.print(table)
    for one in finding.claims:
        console.print(f"{one.outcome}: {one.claim}: {one.shown}; source: {one.source}", highlight=False, markup=False)
    console.print(f"verdict: {finding.outcome}", style="bold", highlight=False)
