"""A patched layer whose adapter is disabled, over the frozen layer: forward without gradients, as a reference runs.

    python bench/adapter_off.py [--json FILE] [--rounds 200] [--m 1 64 1024] [--size 1024]

Calls are interleaved in one process on one thread; times are the process's CPU time, a ratio is the median over rounds.
Nothing is timed that gives another y than the frozen layer, or saves anything for backward.
"""

import argparse
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
from lorafuse.testing.timing import percentile


def calls(m: int, size: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(size, size))
    x, frozen = torch.randn(m, size), base[0]
    model = peft.get_peft_model(base, peft.LoraConfig(r=16, target_modules=["0"], init_lora_weights=False))
    expected = frozen(x)
    lorafuse.patch(model, strict=True)
    layer = model.base_model.model[0]
    layer.enable_adapters(False)
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    if not torch.equal(y, expected) or saved:
        raise ValueError(f"a disabled adapter changes y, or saves {len(saved)} tensors for backward")
    return {"frozen": lambda: frozen(x), "disabled": lambda: layer(x)}


def measure(m: int, size: int, rounds: int) -> dict[str, Any]:
    """Medians in seconds, and of the ratios of each round with their 20th and 80th percentile."""
    order, both = random.Random(0), calls(m, size)
    seconds: dict[str, list[float]] = {name: [] for name in both}
    with torch.no_grad():
        for index in range(3 + rounds):
            for name in order.sample(list(both), 2):
                start = time.process_time()
                both[name]()
                if index >= 3:
                    seconds[name].append(time.process_time() - start)
    ratios = [d / f for d, f in zip(seconds["disabled"], seconds["frozen"], strict=True)]
    return {
        "m": m, "n": size, "k": size, "dtype": "float32", "rounds": rounds,
        "frozen_s": percentile(seconds["frozen"], 0.5), "disabled_s": percentile(seconds["disabled"], 0.5),
        "over_frozen": percentile(ratios, 0.5), "spread": [percentile(ratios, 0.2), percentile(ratios, 0.8)],
        "raw_s": {name: [round(s, 7) for s in one] for name, one in seconds.items()},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--m", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--size", type=int, default=1024)
    args = parser.parse_args()
    torch.set_num_threads(1)
    setting = conditions(torch.device("cpu")) | {"timing": "interleaved, CPU time of the process"}
    sys.stdout.write(describe(setting) + "\n")
    results = [measure(m, args.size, args.rounds) for m in args.m]
    for one in results:
        low, high = one["spread"]
        text = f"{1e6 * one['frozen_s']:9.1f} us, disabled {one['over_frozen']:.3f} x [{low:.2f}, {high:.2f}]"
        sys.stdout.write(f"M {one['m']:5}, N = K {args.size}, fp32: frozen {text}\n")
    if args.json:
        content = {"kind": "adapter_off", "conditions": setting, "results": results}
        write_text(args.json, json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
