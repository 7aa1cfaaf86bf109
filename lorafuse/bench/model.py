"""One training step of a whole model with AdamW: full fine-tuning, LoRA by PEFT, and the same LoRA patched by lorafuse.

The LoRA tax is over the frozen model: its forward, and its backward to the embedded tokens, with nothing to update.
Tokens/s, peak memory, and model FLOPs utilization: model FLOPs over time, as a share of the rate of a large
matrix product here. PEFT and patched start from the same adapters and take the same batches; where their
losses part, no number is shown. Models of real sizes have random weights and as many layers as fit; SmolLM2 is real.
After --seconds a case ends early, but not before 3 timed steps of each variant.
"""

import argparse
from dataclasses import replace
from typing import Any

import torch

from lorafuse.bench.model_run import Case, run_case
from lorafuse.bench.transformer import MODELS, Model, find, free_bytes
from lorafuse.bench.transformer_cost import VARIANTS, Sizes, Training, fitting, training_bytes
from lorafuse.testing.timing import WARM

__all__ = ["SUMMARY", "Case", "add_arguments", "cases", "run_case", "table", "timing"]

SUMMARY = "one training step of a whole model, with full fine-tuning, PEFT and lorafuse"

_USUAL = {"cuda": "llama-3.1-8b", "cpu": "smollm2-135m"}
_COMPARED = ("logits", "gradients")
_TOKENS = {"cuda": 2048, "cpu": 128}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--case", action="append", metavar="NAME", help="a model; may be repeated (smollm2-135m, llama-3.1-8b on CUDA)"
    )
    which.add_argument("--all", action="store_true", help=f"every one: {', '.join(MODELS)}")
    parser.add_argument("--layers", type=int, help="of models with random weights (as many as fit)")
    parser.add_argument("--tokens", type=int, help="of a sequence (128, 2048 on CUDA)")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a micro-batch (1)")
    parser.add_argument(
        "--accumulate", type=int, nargs="+", default=[1, 4, 16], help="micro-batches of a step (1 4 16)"
    )
    parser.add_argument("--checkpointing", choices=("both", "on", "off"), default="both", help="of activations (both)")
    parser.add_argument("--rank", type=int, default=16, help="of every adapter (16)")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help=f"to train ({' '.join(VARIANTS)})"
    )


def cases(args: argparse.Namespace) -> list[Case]:
    """Every model at every accumulation, with and without checkpointing, each model with the same layers throughout.

    Raises ValueError for unknown models, numbers that are too small, and layers a model does not have.
    """
    for option in ("layers", "tokens", "batch", "accumulate", "rank", "rounds"):
        given = getattr(args, option)
        least = 2 if option == "tokens" else 1
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < least:
                raise ValueError(f"--{option} {value}: it must be at least {least}")
    for option, used in (("only", args.only), ("baselines", args.baselines), ("no-graphs", not args.graphs)):
        if used:
            raise ValueError(f"--{option}: it is for layers and blocks; choose what trains a model by --variants")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    models = (
        list(MODELS.values()) if args.all else [find(n) for n in args.case or [_USUAL.get(device.type, _USUAL["cpu"])]]
    )
    tokens = args.tokens or _TOKENS.get(device.type, _TOKENS["cpu"])
    return [
        Case(model, sizes, accumulate, checkpointing, args.batch, tokens)
        for model, sizes in ((model, _sizes(model, args, device, args.batch * tokens)) for model in models)
        for accumulate in dict.fromkeys(args.accumulate)
        for checkpointing in _checkpointing(args)
    ]


def _checkpointing(args: argparse.Namespace) -> list[bool]:
    return {"both": [False, True], "on": [True], "off": [False]}[args.checkpointing]


def _sizes(model: Model, args: argparse.Namespace, device: torch.device, tokens: int) -> Sizes:
    """The sizes to build: the requested layers, or as many as fit for the variant that needs most memory."""
    whole = Sizes.of(model.config())
    if args.layers is not None:
        if model.real:
            raise ValueError(f"--layers {args.layers}: {model.name} is a real model of {whole.layers}; leave it out")
        if args.layers > whole.layers:
            raise ValueError(f"--layers {args.layers}: {model.name} has {whole.layers}; ask for that many at most")
        return replace(whole, layers=args.layers)
    if model.real:
        return whole
    settings = [Training(args.rank, tokens, getattr(torch, args.dtype).itemsize, on) for on in _checkpointing(args)]
    return fitting(
        whole,
        lambda cut: max(training_bytes(cut, name, one) for name in args.variants for one in settings),
        free_bytes(device),
    )


def timing(device: torch.device) -> str:
    """The timing condition of steps: caches hold the data of the step before, on GPUs too."""
    return WARM


def table(result: dict[str, Any]) -> Any:
    """The figures of a result as rich's table; below it the model, the comparison with PEFT and failures."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"{result['case']}: {result['batch']} × {result['tokens']} tokens a micro-batch, rank {result['R']}"
    rows = Table(title=f"{title}, {result['dtype']}", box=SIMPLE_HEAD)
    columns = ("", "step s\n\\[20-80 %]", "LoRA\ntax", "of\nfull", "tokens/s", "MFU", "peak\nMiB", "weights\nMiB")
    for column in (*columns, "optimizer\nMiB", "step\nMiB", "of which\ngradients"):
        rows.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, figure in result["variants"].items():
        step = figure["step"]
        memory = ("peak_bytes", "weights_bytes", "optimizer_bytes", "step_peak_bytes", "gradient_bytes")
        rows.add_row(
            name,
            f"{step['median']:.3f} \\[{step['p20']:.3f}-{step['p80']:.3f}]",
            f"{figure['tax']:.1%}" if "tax" in figure else "",
            f"{figure['ratio_to_full']:.2f}" if "ratio_to_full" in figure else "",
            f"{figure['tokens_per_s']:.0f}",
            f"{figure['mfu']:.1%}",
            *(f"{figure[key] / 2**20:.0f}" for key in memory),
        )
    rows.caption = "\n".join(_notes(result))
    return rows


def _notes(result: dict[str, Any]) -> list[str]:
    """One line each: the model that was built, the turns of its variants, their distances, failures."""
    variants, parity = result["variants"], result["parity"]
    first = next(iter(variants.values()))
    notes = [
        f"{result['weights']} weights, {result['layers']} of {result['layers_of_model']} layers, vocabulary "
        f"{result['vocabulary']} of {result['vocabulary_of_model']}, {first['parameters'] / 1e6:.1f} M parameters; "
        + ", ".join(f"{name} trains {figure['trained'] / 1e6:.1f} M" for name, figure in variants.items()),
        "steps in turns: " + ", then ".join(" and ".join(names) for names in result["turns"])
        + f"; {', '.join(str(figure['rounds']) for figure in variants.values())} steps timed; MFU of "
        f"{result['peak_flops_per_s'] / 1e12:.3f} TFLOP/s, the rate of a large product here",
    ]  # fmt: skip
    if "patched" in variants.get("lorafuse", {}):
        notes.append(
            "lorafuse: {patched} adapted layers patched, {skipped} left to PEFT".format(**variants["lorafuse"])
        )
    if micro := parity.get("first_micro_batch"):
        notes.append(
            "first micro-batch, relative distance from PEFT's: "
            + ", ".join(
                f"{what} {micro[f'{what}_error']:.1e} (bound {micro[f'{what}_bound']:.1e})" for what in _COMPARED
            )
        )
    if "largest_loss_difference" in parity:
        notes.append(f"losses of {parity['steps']} steps at most {parity['largest_loss_difference']:.1e} from PEFT's")
    if "not_compared" in parity:
        notes.append(f"lorafuse is not compared with PEFT: {parity['not_compared']}")
    return notes + [f"{name} failed: {reason}" for name, reason in result["failed"].items()]
