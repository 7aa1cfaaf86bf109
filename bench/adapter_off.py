"""A patched layer whose adapter is disabled, over the frozen layer: forward without gradients, as a reference runs.

    python bench/adapter_off.py [--rounds 200] [--m 1 64 1024] [--size 1024]

Calls are interleaved in one process on one thread; times are the process's CPU time, a ratio is the median over rounds.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable

import peft
import torch
from torch import nn

import lorafuse
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
    if not torch.equal(layer(x), expected):
        raise ValueError("a disabled adapter changes y")
    return {"frozen": lambda: frozen(x), "disabled": lambda: layer(x)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--m", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--size", type=int, default=1024)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.write(describe(conditions(torch.device("cpu"))) + "\n")
    order = random.Random(0)
    for m in args.m:
        seconds: dict[str, list[float]] = {"frozen": [], "disabled": []}
        both = calls(m, args.size)
        with torch.no_grad():
            for _ in range(args.rounds):
                for name in order.sample(list(both), 2):
                    start = time.process_time()
                    both[name]()
                    seconds[name].append(time.process_time() - start)
        ratios = [d / f for d, f in zip(seconds["disabled"], seconds["frozen"], strict=True)]
        text = f"{1e6 * percentile(seconds['frozen'], 0.5):9.1f} us, disabled {percentile(ratios, 0.5):.3f} x"
        sys.stdout.write(f"M {m:5}, N = K {args.size}, fp32: frozen {text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
