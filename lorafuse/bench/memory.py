"""Memory of layers and experts in training, with every baseline, without times.

"peak" is the most that one forward and backward hold beyond inputs and weights; "between" is alive between them, the
output included. No number is printed for a wrong result.
"""

import argparse
from typing import Any

import torch

from lorafuse.bench import group, layer, linear, moe, quantized, timed
from lorafuse.bench.problem import Problem, title
from lorafuse.bench.result import shown
from lorafuse.bench.timed import Progress
from lorafuse.testing.cases import CASES, DECODERS, GROUPS, MOE_CASES, find_any

SUMMARY = "peak memory of layers and experts"
_DEFAULT = ("llama-3.1-8b.q", "llama-3.1-8b.down", "moe-64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--case", action="append", metavar="NAME", help=f"by name; may be repeated ({', '.join(_DEFAULT)})"
    )
    which.add_argument("--all", action="store_true", help="every named layer, group and block")
    parser.add_argument("--m", type=int, nargs="+", default=[512, 2048], help="tokens (512 2048)")
    parser.add_argument("--rank", type=int, nargs="+", default=[16], help="of the adapters (16)")
    parser.add_argument("--quant", choices=quantized.TYPES, nargs="+", help="of linear layers alone: type of the base")


def cases(args: argparse.Namespace) -> list[Problem]:
    """Every case at every M and rank. Raises ValueError for unknown names, ranks above the layers', and a quantized
    base of what is no linear layer.
    """
    every = [*CASES] if args.quant else [*CASES, *GROUPS, *DECODERS, *MOE_CASES]
    names = every if args.all else args.case or (_DEFAULT[:2] if args.quant else _DEFAULT)
    problems: list[Problem] = []
    for name in names:
        kind = find_any(name)
        if args.quant and kind != "linear":
            raise ValueError(f"--quant: {name!r} is no linear layer; name one with --case: {', '.join(CASES)}")
        module: Any = {"linear": linear, "group": group, "layer": layer, "moe": moe}[kind]
        module = quantized if args.quant else module
        options = {"case": [name], "all": False, "shape": None, "routing": ["balanced"]}
        problems += module.cases(argparse.Namespace(**vars(args) | options))
    return problems


def run_case(problem: Problem, args: argparse.Namespace, device: torch.device, progress: Progress) -> dict[str, Any]:
    """Bytes of every variant. Raises Wrong for a wrong result of this project's own baselines."""
    with timed.built(problem, args, device, progress) as variants:
        figures = {
            name: {"label": variants.baselines[name].label, "peak_bytes": held.peak, "between_bytes": held.between}
            for name, held in variants.memory(progress).items()
        }
    return problem.described() | {"variants": figures, "failed": variants.failed, "absent": variants.absent}


def table(result: dict[str, Any]) -> Any:
    """The figures of a result as rich's table."""
    floor, rows = result["variants"]["frozen"], []
    for name, figure in result["variants"].items():
        cells = []
        for key in ("peak_bytes", "between_bytes"):
            cells += [f"{figure[key] / 2**20:.2f}", f"{(figure[key] - floor[key]) / 2**20:+.2f}"]
        rows.append([name, *cells])
    notes = [f"{name} failed and is not counted: {why}" for name, why in result["failed"].items()]
    return shown(title(result), ("", "peak MiB", "over frozen", "between MiB", "over frozen"), rows, notes)
