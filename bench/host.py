"""What the CUDA kernels cost the host: the seven linear layers of a decoder layer, in microseconds of CPU time.

    python bench/host.py [--json FILE]    on a Hopper GPU, launches included
    python bench/host.py emu              on any machine with g++: launches are counted and do not run

q, k and v, o, and the gated MLP are one operator each, in bfloat16 with fp32 adapters of rank 16, as PEFT has them, by
the plan "cuda siblings" and, for o and down, the planner's. Matrices are small: a GPU never makes the host wait. What
is "in csrc" is within lorafuse._cuda: arguments, checks, tensor maps and launches; the rest is Python and torch. Times
are the process's own, the 10th percentile of 41 rounds. The emulator's part in csrc is compiled without optimization.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from lorafuse import functional as LF
from lorafuse.backends import base
from lorafuse.files import write_text
from lorafuse.plan import override
from lorafuse.testing.conditions import conditions

CALLS, ROUNDS = 10, 41
RANK = 16


class Timed:
    """The functions of a module of csrc, with their calls and the time within them."""

    def __init__(self, module):
        self.module, self.calls, self.seconds = module, Counter(), 0.0

    def __getattr__(self, name):
        function = getattr(self.module, name)

        def call(**arguments):
            start = time.process_time()
            result = function(**arguments)
            self.seconds += time.process_time() - start
            self.calls[name] += 1
            return result

        setattr(self, name, call)
        return call


def layers(device, rows, hidden, inner):
    """`{part: a call of its results by a backend}` of the seven layers."""

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, device=device, dtype=dtype) / shape[-1] ** 0.5

    def projection(N, K):
        a, b = normal(RANK, K, dtype=torch.float32), normal(N, RANK, dtype=torch.float32)
        return LF.Projection(normal(N, K), a.requires_grad_(), b.requires_grad_(), 2.0)

    x = normal(rows, hidden).requires_grad_()
    qkv = [projection(n, hidden) for n in (hidden, hidden // 4, hidden // 4)]
    o, gate, up, down = (projection(*s) for s in ((hidden, hidden), (inner, hidden), (inner, hidden), (hidden, inner)))
    return {
        "q, k, v": lambda backend: LF.lora_linears(x, qkv, backend=backend),
        "o": lambda backend: [LF.lora_linear(x, o.weight, o.a, o.b, scale=o.scale, backend=backend)],
        "gated MLP": lambda backend: [LF.lora_gated_mlp(x, gate, up, down, backend=backend)],
    }


def measure(call, backend, timed):
    """`{"forward" and "backward": (microseconds, of those in csrc, {function: calls})}`."""
    names, us, inside = ("forward", "backward"), {}, {}
    rounds = {name: ([], []) for name in names}
    dys = [torch.ones_like(y) for y in call(backend)]
    for _ in range(ROUNDS):
        for name in names:
            us[name] = inside[name] = 0.0
        for _ in range(CALLS):
            timed.seconds, timed.calls, start = 0.0, Counter(), time.process_time()
            ys = call(backend)
            middle, within, calls = time.process_time(), timed.seconds, timed.calls
            timed.seconds, timed.calls = 0.0, Counter()
            torch.autograd.backward(ys, dys)
            us["forward"] += middle - start
            us["backward"] += time.process_time() - middle
            inside["forward"] += within
            inside["backward"] += timed.seconds
        for name in names:
            rounds[name][0].append(us[name] / CALLS * 1e6)
            rounds[name][1].append(inside[name] / CALLS * 1e6)
    counted = {"forward": calls, "backward": timed.calls}
    return {name: (*(sorted(us)[ROUNDS // 10] for us in rounds[name]), dict(counted[name])) for name in names}


def measure_all(backend, rows=16):
    """`{part: what measure returns}` of the seven layers."""
    run, device = base.load(backend), "cuda" if backend == "cuda" else "cpu"
    module = run.native
    run.native = timed = Timed(module)
    if backend == "emu":
        module.configure(runs=False, multiprocessors=132)
    try:
        with override(force_kernel="cuda siblings"):
            parts = layers(device, rows, 512, 1024)
            return {name: measure(call, backend, timed) for name, call in parts.items()}
    finally:
        run.native = module
        if backend == "emu":
            module.configure()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", nargs="?", choices=("cuda", "emu"), default="cuda")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    measured, total = measure_all(args.backend, args.rows), 0.0
    for name, passes in measured.items():
        for which, (us, within, calls) in passes.items():
            total += us
            shown = ", ".join(f"{n} {function}" for function, n in calls.items())
            print(f"{name:>10} {which:>8}  {us:6.0f} us, {within:4.0f} in csrc: {shown}")
    print(f"all seven, forward and backward: {total:.0f} us")
    if args.json:
        setting = conditions(torch.device("cuda" if args.backend == "cuda" else "cpu"))
        results = [{"name": name, "rows": args.rows, "passes": passes} for name, passes in measured.items()]
        content = {"kind": "host", "conditions": setting, "us": total, "results": results}
        write_text(args.json, json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
