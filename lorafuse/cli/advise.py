"""Say how much LoRA a model needs for its data: rank, learning rate, batch, memory, time, and the code to start with.

Every line says how sure it is and where it comes from. A model's directory or config.json is enough; weights are read
only by --probe.
"""

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lorafuse.advise import plan_adapter, probe_ranks
from lorafuse.advise.configuration import load_model
from lorafuse.advise.data import load_tokenizer, read_rows
from lorafuse.cli import _common

SUMMARY = "rank, learning rate, batch, memory and time for a model and its data"

__all__ = ["SUMMARY", "add_arguments", "run"]

# far above any, and exact in arithmetic with floats
_MOST_DATA, _MOST_EPOCHS = 10**15, 10**6
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


def _number(text: str) -> int:
    unit = _UNITS.get(text[-1:].lower(), 1)
    digits = text[:-1] if unit > 1 else text
    try:
        return round(float(digits.replace("_", "")) * unit)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number like 250000, 250k or 10M") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="a model's directory, or its config.json")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--tokens", type=_number, metavar="N", help="supervised tokens of one epoch: 250k, 10M")
    data.add_argument("--episodes", type=_number, metavar="N", help="policy-gradient episodes of the run")
    data.add_argument(
        "--data", type=Path, metavar="FILE", help="JSON lines, an array or .txt: messages, prompts, pairs, text"
    )
    parser.add_argument("--goal", choices=("sft", "rl"), help="(rl with --episodes, else sft)")
    parser.add_argument("--rank", type=int, help="use this rank instead of the advised one")
    parser.add_argument("--gpu", help="whether it fits there, and the step time: H200, A100, …")
    parser.add_argument("--loss", type=float, help="mean loss of a first epoch, nats a token: what the data teaches")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence (2048)")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of a device at a time, at most (4)")
    parser.add_argument("--devices", type=int, default=1, help="devices that train together (1)")
    parser.add_argument("--nodes", type=int, help="machines that these devices are in (8 in each, if that can be)")
    parser.add_argument("--batch", type=int, help="sequences of an optimizer step (32, or 32 prompts)")
    parser.add_argument("--epochs", type=float, default=1, help="passes over the data (1)")
    parser.add_argument("--rollouts", type=int, help="episodes of a prompt with --goal rl (16)")
    parser.add_argument("--active-experts", type=int, metavar="N", help="of a token, where the model does not say it")
    parser.add_argument(
        "--probe", type=int, metavar="N", help="ranks by layer, from the gradients of N lines of --data"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(args: argparse.Namespace) -> int:
    """0; raises ValueError and FileNotFoundError for what cannot be."""
    sizes = "rank", "length", "micro_batch", "devices", "nodes", "batch", "rollouts", "active_experts", "probe"
    _common.check_numbers(args, *sizes)
    _common.check_numbers(args, "tokens", "episodes", most=_MOST_DATA)
    if not 0 < args.epochs <= _MOST_EPOCHS:
        raise ValueError(f"--epochs {args.epochs}: it must be above 0 and at most {_MOST_EPOCHS}")
    names = "tokens", "episodes", "data", "goal", "rank", "gpu", "loss", "length", "batch", "epochs"
    numbers = "micro_batch", "devices", "nodes", "rollouts", "active_experts"
    given = {name: getattr(args, name) for name in (*names, *numbers)}
    advice = plan_adapter(args.model, **given)
    if args.probe is not None:
        patterns = _probe(args, advice.rank)
        advice = plan_adapter(args.model, **given | patterns)
    print(json.dumps(advice.as_dict(), indent=1) if args.json else advice)
    return 0


def _probe(args: argparse.Namespace, rank: int) -> dict[str, Any]:
    if args.data is None or not args.model.is_dir():
        raise ValueError("--probe needs --data FILE and --model DIRECTORY with weights")
    rows = islice(read_rows(args.data, load_tokenizer(args.model)), args.probe)
    model = load_model(args.model)
    batches = []
    for row in rows:
        ids = torch.tensor(row.ids[: args.length])
        labels = torch.where(torch.tensor(row.supervised[: args.length]), ids, -100)
        batches.append({"input_ids": ids[None], "labels": labels[None]})
    probe = probe_ranks(model, batches, rank)
    return {"rank_pattern": probe.rank_pattern, "alpha_pattern": probe.alpha_pattern}
