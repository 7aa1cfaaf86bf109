"""What a decoder layer's seven linear layers cost the host, forward and backward, in microseconds of CPU time.

    python bench/host.py [--json FILE]    on a Hopper GPU, launches included
    python bench/host.py emu              on any machine with g++: launches are counted and do not run

The layers are those of a PEFT model in bfloat16 with fp32 adapters of rank 16, PEFT's default: q, k and v of one x, o,
and the gated MLP. Measured are the model without adapters, with PEFT's, and patched, by the plan "cuda siblings" and,
for o and down, the planner's: with every pass in Python, and repeated from recordings, as it runs after two steps.
"floor" is three autograd functions of the same tensors, which allocate the same results and launch nothing.
Matrices are small, so that a GPU never makes the host wait; on a CPU their products are within the first two figures.

"in csrc" is within lorafuse._cuda: arguments, checks, tensor maps and launches; the rest is Python and torch. Times are
the process's own, the 10th percentile of the rounds. The emulator's part in csrc is compiled without optimization.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorafuse
from lorafuse.backends import base
from lorafuse.files import write_text
from lorafuse.ops import repeat
from lorafuse.plan import override
from lorafuse.testing.conditions import conditions

CALLS, ROUNDS, WARMUP = 10, 41, 4
RANK, ROWS, HIDDEN, INNER = 16, 512, 64, 128
LAYERS = "q", "k", "v", "o", "gate", "up", "down"


class Linears(nn.Module):
    """The linear layers of a decoder layer, as transformers calls them, and what lies between gate, up and down."""

    def __init__(self):
        super().__init__()
        for name, K, N in (
            ("q", HIDDEN, HIDDEN), ("k", HIDDEN, HIDDEN // 4), ("v", HIDDEN, HIDDEN // 4), ("o", HIDDEN, HIDDEN),
        ):  # fmt: skip
            setattr(self, name, nn.Linear(K, N, bias=False))
        self.mlp = MLP()

    def forward(self, x, out):
        return self.q(x), self.k(x), self.v(x), self.o(out), self.mlp(x)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.down, self.act_fn = nn.Linear(INNER, HIDDEN, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down(self.act_fn(self.gate(x)) * self.up(x))


class Floor(torch.autograd.Function):
    """An operator that allocates its results, those of forward and its gradients, and computes nothing."""

    @staticmethod
    def forward(ctx, x, sizes, *tensors):
        ctx.save_for_backward(x, *(made := [x.new_empty(size) for size in sizes]), *tensors)
        ctx.count = len(tensors)
        ctx.mark_non_differentiable(*(y for y in made if y.dim() == 2))
        return tuple(made)

    @staticmethod
    def backward(ctx, *_):
        x, *saved = ctx.saved_tensors
        grads = (t.new_empty(t.shape) if t.requires_grad else None for t in saved[-ctx.count :])
        return torch.empty_like(x), None, *grads


def floor(model):
    """A call of such operators in place of those of a patched model."""
    of = dict(model.named_modules())
    layers = {name.split(".")[-1]: module for name, module in of.items() if name.split(".")[-1] in LAYERS}
    tensors = {name: list(layers[name].parameters()) for name in LAYERS}

    def run(x, out):
        rows = x.shape[:2]
        qkv = [(*rows, HIDDEN), (*rows, HIDDEN // 4), (*rows, HIDDEN // 4), (ROWS, 3 * RANK)]
        mlp = [(*rows, HIDDEN), (ROWS, INNER), (ROWS, INNER), (ROWS, 2 * RANK), (ROWS, RANK)]
        *of_qkv, _ = Floor.apply(x, qkv, *tensors["q"], *tensors["k"], *tensors["v"])
        of_o, _ = Floor.apply(out, [(*rows, HIDDEN), (ROWS, RANK)], *tensors["o"])
        return *of_qkv, of_o, Floor.apply(x, mlp, *tensors["gate"], *tensors["up"], *tensors["down"])[0]

    run.zero_grad = model.zero_grad
    return run


class Timed:
    """A module of csrc, or what a recording launches, with the calls of its functions and the time within them."""

    calls, seconds = Counter(), 0.0

    def __init__(self, of):
        self.of = of

    def __len__(self):
        return len(self.of)

    def __getattr__(self, name):
        function = getattr(self.of, name)

        def call(*arguments, **named):
            if name == "Launches":
                return Timed(function())
            start = time.process_time()
            result = function(*arguments, **named)
            Timed.seconds += time.process_time() - start
            Timed.calls[name] += 1
            return result

        setattr(self, name, call)
        return call


def measure(model, inputs):
    """`{"forward" and "backward": (microseconds, of those in csrc, {function: calls})}` of a model."""
    rounds, counted = {"forward": [], "backward": []}, {}
    douts = [torch.ones_like(y) for y in model(*inputs)]
    for _ in range(WARMUP):
        torch.autograd.backward(model(*inputs), douts)
    for _ in range(ROUNDS):
        spent = {name: [0.0, 0.0] for name in rounds}
        for _ in range(CALLS):
            model.zero_grad()
            for x in inputs:
                x.grad = None
            ys = None
            for name in rounds:
                Timed.seconds, Timed.calls, start = 0.0, Counter(), time.process_time()
                if ys is None:
                    ys = model(*inputs)
                else:
                    torch.autograd.backward(ys, douts)
                spent[name][0] += time.process_time() - start
                spent[name][1] += Timed.seconds
                counted[name] = dict(Timed.calls)
        for name, each in spent.items():
            rounds[name].append([seconds / CALLS * 1e6 for seconds in each])
    least = {name: [sorted(each)[ROUNDS // 10] for each in zip(*of, strict=True)] for name, of in rounds.items()}
    return {name: (*of, counted[name]) for name, of in least.items()}


def in_bfloat16(model, inputs):
    """The same with base and inputs in bfloat16."""
    for p in model.parameters():
        p.data = p.data if p.requires_grad else p.data.bfloat16()
    return model, [x.detach().bfloat16().requires_grad_() for x in inputs]


def measure_all(backend):
    """`{name: what measure returns}`."""
    run, device = base.load(backend), "cuda" if backend == "cuda" else "cpu"
    module, repeats = run.native, run.repeats
    torch.manual_seed(0)
    model = Linears().to(device).requires_grad_(False)
    inputs = [torch.randn(1, ROWS, HIDDEN, device=device).requires_grad_() for _ in range(2)]
    # a CPU may emulate products in bfloat16
    if device == "cuda":
        model, inputs = in_bfloat16(model, inputs)
    measured = {"frozen": measure(model, inputs)}
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules=[*LAYERS]))
    measured["PEFT"] = measure(model, inputs)
    model, inputs = in_bfloat16(model, inputs)
    measured["floor"] = measure(floor(model), inputs)
    run.native = Timed(module)
    if backend == "emu":
        module.configure(runs=False, multiprocessors=132)
    try:
        with override(force_kernel="cuda siblings"):
            lorafuse.patch(model, backend=backend)
            for name, run.repeats in (("lorafuse, in Python", False), ("lorafuse", True)):
                repeat.clear()
                measured[name] = measure(model, inputs)
    finally:
        run.native, run.repeats = module, repeats
        # they hold what is timed
        repeat.clear()
        if backend == "emu":
            module.configure()
    return measured


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", nargs="?", choices=("cuda", "emu"), default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    measured = measure_all(args.backend)
    for name, passes in measured.items():
        total = sum(us for us, _, _ in passes.values())
        shown = " + ".join(f"{us:.0f} {which} ({within:.0f} in csrc)" for which, (us, within, _) in passes.items())
        print(f"{name:>20}  {total:6.0f} us = {shown}")
        for which, (_, _, calls) in passes.items():
            if calls:
                print(f"{'':>20}  {which}: {', '.join(f'{n} {function}' for function, n in calls.items())}")
    if args.json:
        setting = conditions(torch.device("cuda" if args.backend == "cuda" else "cpu"))
        results = [{"name": name, "passes": passes} for name, passes in measured.items()]
        content = {"kind": "host", "conditions": setting, "rows": ROWS, "results": results}
        write_text(args.json, json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
