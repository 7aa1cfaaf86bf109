"""Training steps of a whole model with AdamW, side by side: frozen, in full, by PEFT in all its settings, by others,
and the same LoRA patched by lorafuse.

The LoRA tax is over the fastest frozen model: its forward, and its backward to the embedded tokens, with nothing to
update. Tokens/s, peak memory, and model FLOPs utilization: model FLOPs over time, as a share of the rate of a large
matrix product here. Adapted variants start from the same adapters and take the same batches; where their losses part
from PEFT's, no number is shown. Models of real sizes have random weights, random tokens and as many layers as fit;
SmolLM2 has its own weights and is trained on word problems, whose loss curves are recorded. After --seconds a case ends
early, but not before 10 timed steps of each variant.
"""

import argparse
import itertools
from dataclasses import replace
from typing import Any

import torch

from lorafuse.bench import figures
from lorafuse.bench.model_run import Case, chosen, run_case
from lorafuse.bench.result import shown
from lorafuse.bench.transformer import MODELS, Model, find, free_bytes
from lorafuse.bench.transformer_cost import Sizes, Training, fitting, training_bytes
from lorafuse.demo.quantized import TYPES, bits_of_bitsandbytes
from lorafuse.testing.timing import WARM

__all__ = ["SUMMARY", "Case", "add_arguments", "cases", "run_case", "table", "timing"]

SUMMARY = "one training step of a whole model, with full fine-tuning, PEFT and lorafuse"

_USUAL = {"cuda": "llama-3.1-8b", "cpu": "smollm2-135m"}
_COMPARED = ("logits", "gradients")
# steps of the loss curves of a real model
_STEPS = {"cuda": 200, "cpu": 30}
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
    parser.add_argument("--quant", choices=TYPES, help="how the linear layers are stored; --dtype computes")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="what to train, as bench/baselines names it (all)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="of loss curves from PEFT's initialization (30, 200 on CUDA, of a real model's first case)",
    )


def cases(args: argparse.Namespace) -> list[Case]:
    """Every model at every accumulation, with and without checkpointing, each model with the same layers throughout.

    Raises ValueError for unknown models, numbers that are too small, layers a model does not have, and LLM.int8.
    """
    for option in ("layers", "tokens", "batch", "accumulate", "rank", "rounds", "steps"):
        given = getattr(args, option)
        least = {"tokens": 2, "steps": 0}.get(option, 1)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < least:
                raise ValueError(f"--{option} {value}: it must be at least {least}")
    for option, used in (("only", args.only), ("no-graphs", not args.graphs), ("warm-x", args.warm_x)):
        if used:
            raise ValueError(f"--{option}: it is for layers and blocks; choose what trains a model by --variants")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if bits_of_bitsandbytes(args.quant) == 8 and device.type != "cpu":
        raise ValueError(
            f"--quant {args.quant}: bitsandbytes rounds x to 8 bits on this device and lorafuse does not, so that "
            "their losses part; measure --quant int8_torchao, or --device cpu"
        )
    models = (
        list(MODELS.values()) if args.all else [find(n) for n in args.case or [_USUAL.get(device.type, _USUAL["cpu"])]]
    )
    tokens = args.tokens or _TOKENS.get(device.type, _TOKENS["cpu"])
    cases = []
    for model in models:
        sizes = sizes_of(model, args, device, args.batch * tokens)
        settings = itertools.product(dict.fromkeys(args.accumulate), _checkpointing(args))
        for index, (accumulate, checkpointing) in enumerate(settings):
            steps = args.steps
            if steps is None:
                steps = _STEPS.get(device.type, _STEPS["cpu"]) if model.real and index == 0 else 0
            cases.append(Case(model, sizes, accumulate, checkpointing, args.batch, tokens, steps, args.quant))
    return cases


def _checkpointing(args: argparse.Namespace) -> list[bool]:
    return {"both": [False, True], "on": [True], "off": [False]}[args.checkpointing]


def sizes_of(model: Model, args: argparse.Namespace, device: torch.device, tokens: int) -> Sizes:
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
    names = [one.name for one in chosen(args, device) if not one.absent]
    settings = [Training(args.rank, tokens, getattr(torch, args.dtype).itemsize, on) for on in _checkpointing(args)]
    return fitting(
        whole,
        lambda cut: max(training_bytes(cut, name, one) for name in names for one in settings),
        free_bytes(device),
    )


def timing(device: torch.device) -> str:
    """The timing condition of steps: caches hold the data of the step before, on GPUs too."""
    return WARM


def table(result: dict[str, Any]) -> Any:
    """The figures of a result as rich's table; below it the model, the comparison with PEFT and failures."""
    columns = ["", "step s\n\\[20-80 %]", "LoRA\ntax", "of\nfull", "tokens/s", "MFU", "peak\nMiB", "weights\nMiB"]
    columns += ["optimizer\nMiB", "step\nMiB", "of which\ngradients"]
    memory = ("peak_bytes", "weights_bytes", "optimizer_bytes", "step_peak_bytes", "gradient_bytes")
    rows = []
    for name, figure in result["variants"].items():
        step, tax = figure["step"], ""
        if "tax" in figure:
            tax = "noise" if figures.is_noise(figure) else f"{figure['tax']:.1%}"
        rows.append([
            name, f"{step['median']:.3f} \\[{step['p20']:.3f}-{step['p80']:.3f}]", tax,
            f"{figure['ratio_to_full']:.2f}" if "ratio_to_full" in figure else "", f"{figure['tokens_per_s']:.0f}",
            f"{figure['mfu']:.1%}", *(f"{figure[key] / 2**20:.0f}" for key in memory),
        ])  # fmt: skip
    title = f"{result['case']}: {result['batch']} × {result['tokens']} tokens a micro-batch, rank {result['R']}"
    return shown(f"{title}, {result['dtype']}", columns, rows, _notes(result))


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
    for name in ("lorafuse", "addmm-saved"):
        if "skipped" in variants.get(name, {}):
            notes.append(
                "{name}: {patched} adapted layers patched, {skipped} left to PEFT".format(name=name, **variants[name])
            )
    for name, micro in parity.get("first_micro_batch", {}).items():
        errors = (f"{what} {micro[f'{what}_error']:.1e} (bound {micro[f'{what}_bound']:.1e})" for what in _COMPARED)
        notes.append(f"{name}, first micro-batch, relative distance from PEFT's: {', '.join(errors)}")
    for name, one in parity.get("losses", {}).items():
        notes.append(f"{name}: losses of {one['steps']} steps at most {one['largest_difference']:.1e} from PEFT's")
    for name, one in result["curves"].items():
        first, last = one["losses"][0], one["losses"][-1]
        text = f"{name}: {len(one['losses'])} steps from PEFT's initialization, loss {first:.4f} to {last:.4f}"
        if "from_peft" in one:
            text += ", {median:+.1e} ({low:+.1e} to {high:+.1e}) from PEFT's".format(**one["from_peft"])
        notes.append(text + (f", held out {one['held_out']:.4f}" if "held_out" in one else ""))
    if "not_compared" in parity:
        notes.append(f"nothing is compared with PEFT: {parity['not_compared']}")
    reasons: dict[str, list[str]] = {}
    for name, reason in result["absent"].items():
        reasons.setdefault(reason, []).append(name)
    notes += [f"not run: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return notes + [f"{name} failed: {reason}" for name, reason in result["failed"].items()]
