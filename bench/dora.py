"""DoRA's time over LoRA's, of a patched layer and of PEFT's: forward and backward of one linear layer.

    python bench/dora.py [--json FILE] [--rounds 30] [--m 256 1024] [--size 1024] [--rank 16] [--device cpu]

Every result and gradient is compared with the formula in fp64 first; nothing is timed that differs. Calls are
interleaved in one process; a ratio is the median of the ratios of each round. On a CPU the time is that of the process,
on one thread, which other work on the machine lengthens less than the time on the wall. With dropout PEFT's DoRA
multiplies by the weight twice, and so does lorafuse: LoRA's one product is no bound there.
"""

import argparse
import copy
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import lorafuse
from lorafuse.files import write_text
from lorafuse.testing.conditions import conditions, describe
from lorafuse.testing.numerics import relative_l2, tolerance
from lorafuse.testing.timing import measure_calls, percentile, timing

P = 0.05
# what each is divided by
OVER = "lorafuse LoRA"


def layer(size: int, rank: int, p: float, use_dora: bool, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, target_modules=["0"], use_dora=use_dora, lora_dropout=p)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(size, size)), config).to(device).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def step(model: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    y = model(x)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [y, *torch.autograd.grad(y, [x, *trained], dy)]


def check(name: str, model: nn.Module, x: Tensor, dy: Tensor) -> None:
    """Raises ValueError where a result without dropout is not the formula's, as PEFT computes it in fp64."""
    exact = copy.deepcopy(model)
    lorafuse.unpatch(exact)
    expected = step(exact.double(), x.detach().double().requires_grad_(), dy.double())
    errors = [relative_l2(actual, t) for actual, t in zip(step(model, x, dy), expected, strict=True)]
    if max(errors) > tolerance(x.dtype) or not all(t.count_nonzero() for t in expected):
        raise ValueError(f"{name} differs from the formula: {errors}")


def on_cpu(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU of every call by name, each made once a round, in a new order each round."""
    order, seconds = random.Random(0), {name: [] for name in calls}
    for index in range(3 + rounds):
        for name in order.sample(list(calls), len(calls)):
            start = time.process_time()
            calls[name]()
            if index >= 3:
                seconds[name].append(time.process_time() - start)
    return seconds


def measure(m: int, size: int, rank: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Medians in seconds, and of the ratios to lorafuse's LoRA with their 20th and 80th percentile."""
    x = torch.randn(m, size, device=device, requires_grad=True)
    dy = torch.randn(m, size, device=device)
    frozen = nn.Linear(size, size, device=device).requires_grad_(False)
    calls = {"frozen": lambda: torch.autograd.grad(frozen(x), x, dy)}
    for p in (0.0, P):
        for use_dora in (False, True):
            for who in ("lorafuse", "PEFT"):
                model = layer(size, rank, p, use_dora, device)
                if who == "lorafuse":
                    lorafuse.patch(model, strict=True)
                name = f"{who} {'DoRA' if use_dora else 'LoRA'}{f' p={p}' if p else ''}"
                if not p:
                    check(name, model, x, dy)
                calls[name] = lambda model=model: step(model, x, dy)
    seconds = measure_calls(calls, rounds, 3, device) if device.type == "cuda" else on_cpu(calls, rounds)
    ratios = {name: [s / t for s, t in zip(one, seconds[OVER], strict=True)] for name, one in seconds.items()}
    return {
        "m": m, "n": size, "k": size, "rank": rank, "dtype": "float32", "rounds": rounds,
        "variants": {
            name: {
                "median_s": percentile(seconds[name], 0.5), "over_lora": percentile(one, 0.5),
                "spread": [percentile(one, 0.2), percentile(one, 0.8)], "raw_s": [round(s, 7) for s in seconds[name]],
            }
            for name, one in ratios.items()
        },
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--m", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    is_cuda = device.type == "cuda"
    torch.set_num_threads(torch.get_num_threads() if is_cuda else 1)
    setting = conditions(device) | {"timing": timing(device) if is_cuda else "interleaved, CPU time of the process"}
    sys.stdout.write(describe(setting) + "\n")
    results = [measure(m, args.size, args.rank, args.rounds, device) for m in args.m]
    for result in results:
        sys.stdout.write(f"\nM {result['m']}, N = K {result['n']}, rank {result['rank']}, {result['dtype']}\n")
        for name, one in result["variants"].items():
            low, high = one["spread"]
            text = f"{1e3 * one['median_s']:8.2f} ms  {one['over_lora']:5.2f} x LoRA [{low:.2f}, {high:.2f}]"
            sys.stdout.write(f"  {name:20} {text}\n")
    if args.json:
        write_text(args.json, json.dumps({"kind": "dora", "conditions": setting, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
