"""Measure what LoRA on the experts of a mixture-of-experts block costs, run in every way that is compared.

LoRA tax = time(adapted) / time(frozen) - 1, forward and backward, where frozen is transformers' own grouped_mm block.
No number is printed for a result that is not right.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from lorafuse.cli import _common
from lorafuse.cli._common import DTYPES
from lorafuse.testing.cases import MOE_CASES, MoECase, find_moe

__all__ = ["add_arguments", "cases", "run_case"]

_ROUTINGS = ("balanced", "zipf", "one-hot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--case", action="append", metavar="NAME", help="experts by name; may be repeated (moe-64)")
    which.add_argument("--all", action="store_true", help="every named one")
    parser.add_argument("--m", type=int, default=512, help="tokens (512)")
    parser.add_argument("--rank", type=int, default=16, help="of each expert's adapters (16)")
    parser.add_argument("--routing", default="balanced", choices=_ROUTINGS, help="of tokens to experts (balanced)")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the base (bfloat16)")
    parser.add_argument("--device", default="", help="cuda, cpu, … (cuda where there is one)")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each variant (20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every median and spread there")


def cases(args: argparse.Namespace) -> list[MoECase]:
    """The blocks that were asked for. Raises ValueError for an unknown name or a number below 1."""
    _common.check_at_least_one(args, "m", "rank", "rounds")
    return list(MOE_CASES.values()) if args.all else [find_moe(name) for name in args.case or ["moe-64"]]


def run_case(
    console: Any, case: MoECase, args: argparse.Namespace, device: torch.device
) -> tuple[str, dict[str, Any] | None]:
    """What is wrong, or the figures of the case, printed as a table."""
    from rich.progress import track

    from lorafuse.testing.memory import peak_bytes
    from lorafuse.testing.moe_baselines import VARIANTS, build, check, inputs, reference
    from lorafuse.testing.timing import measure

    given = inputs(case, args.m, args.rank, args.routing, DTYPES[args.dtype], device)
    built = [build(name, given) for name in VARIANTS]
    expected, base = reference(given), reference(given, adapted=False)
    for variant in built:
        wrong = check(variant, expected, base)
        if wrong:
            return wrong, None
    del expected, base
    warm_up = max(2, args.rounds // 10)
    rounds = measure(built, args.rounds, warm_up, device)
    *_, samples = track(rounds, case.name, args.rounds + warm_up, console=console, transient=True)
    figures: dict[str, Any] = {name: taken.summary() for name, taken in samples.items()}
    for variant in built:
        figures[variant.name]["peak_bytes"] = peak_bytes(lambda v=variant: v.backward(v.forward()), device)  # type: ignore[misc]
    frozen, full = (figures[name]["total"]["median"] for name in ("frozen", "full"))
    # forward and input gradient of both projections
    useful = 2 * 2 * args.m * case.k * 3 * case.I * case.H
    for figure in figures.values():
        seconds = figure["total"]["median"]
        figure |= {"tax": seconds / frozen - 1, "ratio_to_full": seconds / full, "useful_flops": useful / seconds}
    sizes = {"M": args.m, "E": case.E, "k": case.k, "H": case.H, "I": case.I, "R": args.rank}
    result = {"case": case.name, **sizes, "routing": args.routing, "dtype": args.dtype, "rounds": args.rounds}
    result["variants"] = figures
    _print_table(console, result)
    return "", result


def _print_table(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    sizes = ", ".join(f"{size} {result[size]}" for size in ("M", "E", "k", "H", "I", "R"))
    table = Table(title=f"{result['case']}: {sizes}, {result['routing']}, {result['dtype']}")
    columns = (
        "",
        "forward ms",
        "backward ms",
        "total ms [20-80 %]",
        "LoRA tax",
        "of full",
        "TFLOP/s",
        "memory over frozen",
    )
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    base = result["variants"]["frozen"]["peak_bytes"]
    for name, figure in result["variants"].items():
        ms = {part: figure[part]["median"] * 1e3 for part in ("forward", "backward", "total")}
        spread = f"{figure['total']['p20'] * 1e3:.0f}-{figure['total']['p80'] * 1e3:.0f}"
        table.add_row(
            name,
            f"{ms['forward']:.1f}",
            f"{ms['backward']:.1f}",
            f"{ms['total']:.1f} [{spread}]",
            "" if name in ("frozen", "full") else f"{figure['tax']:.1%}",
            f"{figure['ratio_to_full']:.2f}",
            f"{figure['useful_flops'] / 1e12:.2f}",
            f"{(figure['peak_bytes'] - base) / 2**20:+.0f} MiB",
        )
    console.print(table)
