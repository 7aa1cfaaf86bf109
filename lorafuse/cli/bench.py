"""Measure what a LoRA adapter costs: forward and backward of one layer, run in every way that is compared.

LoRA tax = time(adapted) / time(frozen) - 1, forward and backward. No number is printed for a result that is not right.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from lorafuse.cli import _bench_moe, _common
from lorafuse.cli._common import DTYPES
from lorafuse.errors import MissingDependency
from lorafuse.testing.cases import CASES, Case, find
from lorafuse.testing.conditions import conditions, describe

SUMMARY = "measure the LoRA tax of layers against PEFT, addmm_ and full fine-tuning"

__all__ = ["SUMMARY", "add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    linear = kinds.add_parser("linear", help="one linear layer", description=__doc__)
    which = linear.add_mutually_exclusive_group()
    which.add_argument("--case", action="append", metavar="NAME", help="a layer by name; may be repeated (square-2048)")
    which.add_argument("--all", action="store_true", help="every named layer")
    which.add_argument("--shape", metavar="N,K", help="out and in features of a layer")
    linear.add_argument("--m", type=int, default=1024, help="tokens (1024)")
    linear.add_argument("--rank", type=int, default=16, help="of the adapter (16)")
    linear.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the base (bfloat16)")
    linear.add_argument("--device", default="", help="cuda, cpu, … (cuda where there is one)")
    linear.add_argument("--rounds", type=int, default=40, help="timed calls of each variant (40)")
    linear.add_argument("--json", type=Path, metavar="FILE", help="write every median and spread there")
    _bench_moe.add_arguments(kinds.add_parser("moe", help="a mixture-of-experts block", description=_bench_moe.__doc__))


def run(args: argparse.Namespace) -> int:
    """0 when every result was right; 1, and no numbers for that case, when one was not."""
    if args.json and args.json.is_dir():
        raise ValueError(f"--json {args.json}: it is a folder; name a file")
    moe = args.kind == "moe"
    cases: list[Any] = list(_bench_moe.cases(args) if moe else _cases(args))
    device = _common.device(args.device)
    try:
        import peft  # noqa: F401

        console = _common.console()
    except ImportError as error:
        raise MissingDependency("lorafuse bench needs peft and rich: pip install 'lorafuse[peft,cli]'") from error
    from lorafuse.testing.timing import CACHE_NOTE

    found = conditions(device) | {"timing": CACHE_NOTE.get(device.type, "caches as they are")}
    console.print(describe(found), highlight=False)
    results: list[dict[str, Any]] = []
    status = 0
    try:
        for case in cases:
            wrong, result = (_bench_moe.run_case if moe else _run_case)(console, case, args, device)
            if result is None:
                console.print(f"{case.name}: no numbers, {wrong}", style="red", highlight=False)
                status = 1
            else:
                results.append(result)
    except KeyboardInterrupt:
        console.print("interrupted; what is done is kept")
        status = 130
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"conditions": found, "results": results}, indent=1) + "\n")
    return status


def _cases(args: argparse.Namespace) -> list[Case]:
    _common.check_at_least_one(args, "m", "rank", "rounds")
    if args.shape:
        sizes = args.shape.split(",")
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
            raise ValueError(f"--shape {args.shape}: it must be two sizes, out and in features: --shape 4096,4096")
        return [Case(f"{sizes[0]}x{sizes[1]}", int(sizes[0]), int(sizes[1]))]
    return list(CASES.values()) if args.all else [find(name) for name in args.case or ["square-2048"]]


def _run_case(
    console: Any, case: Case, args: argparse.Namespace, device: torch.device
) -> tuple[str, dict[str, Any] | None]:
    """What is wrong, or the figures of the case, printed as a table."""
    from rich.progress import track

    from lorafuse.testing.baselines import build, check, inputs, reference, variants
    from lorafuse.testing.memory import peak_bytes
    from lorafuse.testing.timing import measure

    given = inputs(case, args.m, args.rank, DTYPES[args.dtype], device)
    built = [build(name, given) for name in variants(device)]
    expected = reference(given)
    for variant in built:
        wrong = check(variant, expected)
        if wrong:
            return wrong, None
    del expected
    warm_up = max(3, args.rounds // 10)
    rounds = measure(built, args.rounds, warm_up, device)
    shown = track(rounds, case.name, args.rounds + warm_up, console=console, transient=True)
    *_, samples = shown
    figures: dict[str, Any] = {name: taken.summary() for name, taken in samples.items()}
    for variant in built:
        figures[variant.name]["peak_bytes"] = peak_bytes(lambda v=variant: v.backward(v.forward()), device)  # type: ignore[misc]
    frozen, full = (figures[name]["total"]["median"] for name in ("frozen", "full"))
    for figure in figures.values():
        figure["tax"] = figure["total"]["median"] / frozen - 1
        figure["ratio_to_full"] = figure["total"]["median"] / full
    result = {"case": case.name, "M": args.m, "N": case.N, "K": case.K, "R": args.rank, "dtype": args.dtype}
    result |= {"rounds": args.rounds, "variants": figures}
    _print_table(console, result)
    return "", result


def _print_table(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    m, n, k, r = (result[size] for size in "MNKR")
    table = Table(title=f"{result['case']}: M {m}, N {n}, K {k}, R {r}, {result['dtype']}")
    for column in ("", "forward ms", "backward ms", "total ms [20-80 %]", "LoRA tax", "of full", "memory over frozen"):
        table.add_column(column, justify="left" if not column else "right")
    base = result["variants"]["frozen"]["peak_bytes"]
    for name, figure in result["variants"].items():
        ms = {part: figure[part]["median"] * 1e3 for part in ("forward", "backward", "total")}
        spread = f"{figure['total']['p20'] * 1e3:.2f}-{figure['total']['p80'] * 1e3:.2f}"
        table.add_row(
            name,
            f"{ms['forward']:.2f}",
            f"{ms['backward']:.2f}",
            f"{ms['total']:.2f} [{spread}]",
            "" if name in ("frozen", "full") else f"{figure['tax']:.1%}",
            f"{figure['ratio_to_full']:.2f}",
            f"{(figure['peak_bytes'] - base) / 2**20:+.2f} MiB",
        )
    floor_tax, floor_full = 3 * r * (k + n) / (2 * k * n), 2 / 3 + r * (n + k) / (n * k)
    table.caption = f"arithmetic floors: LoRA tax {floor_tax:.1%}, of full fine-tuning {floor_full:.2f}"
    console.print(table)
