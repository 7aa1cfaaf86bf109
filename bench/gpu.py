"""Everything that needs an NVIDIA GPU, in one command and under nine minutes: checks first, then times.

    python bench/gpu.py --out DIR [--minutes 9]        (or: make gpu ARGS="--out DIR")
    python bench/gpu.py --out DIR --grid               what bench/README.md lists as not yet measured, and no checks

It runs from a bare checkout with the torch and triton that are there: nothing is installed, nothing is fetched. Checks
run side by side, since they wait for compilers; what is timed runs alone after them, the most valuable first, each
within what is left of the time, so that a run that is cut off is still worth keeping. Every step's output is a file in
DIR, `gpu.json` is the summary, and a short table is printed last.
"""

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# seconds: one layer in all variants, with its fp64 reference and the first compilation of its kernels
_CASE = 75
_BUILD = [sys.executable, "csrc/build.py", "cuda"]
# models of the grid, with so many layers
_LAYERS = {"llama-3.1-8b": 8, "qwen3-30b-a3b": 4}


@dataclass
class Step:
    """One command: `name` of its output file, what it shows, and the most seconds it may take.

    Steps of one `stage` run side by side, those of none alone.
    """

    name: str
    command: list[str]
    seconds: int
    stage: int = 0
    outcome: str = "not started: no time was left"
    took: float = 0.0


class _Bench:
    """Steps that measure, each into a file of its own."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def _step(self, name: str, seconds: int, kind: str, *options: object) -> Step:
        command = [sys.executable, "-m", "lorafuse", "bench", kind, *map(str, options)]
        return Step(name, [*command, "--json", str(self._out / f"{name}.json")], seconds)

    def layer(self, m: int, rank: int, *cases: str) -> Step:
        # the first layer of the list names the file: several steps have the same sizes
        named = [part for case in cases for part in ("--case", case)]
        sizes = "--m", m, "--rank", rank
        return self._step(f"layers-m{m}-r{rank}-{cases[0]}", _CASE * len(cases), "linear", *named, *sizes)

    def group(self, m: int, *cases: str) -> Step:
        named = [part for case in cases for part in ("--case", case)]
        return self._step(f"groups-m{m}-{cases[0]}", _CASE * len(cases), "group", *named, "--m", m)

    def decoder(self, m: int, case: str) -> Step:
        return self._step(f"decoder-m{m}-{case}", 4 * _CASE, "layer", "--case", case, "--m", m)

    def experts(self, m: int, case: str, routing: str) -> Step:
        name = f"experts-m{m}-{case}-{routing}"
        return self._step(name, 2 * _CASE, "moe", "--case", case, "--m", m, "--routing", routing)

    def model(self, case: str, accumulate: int = 1, checkpointing: bool = False) -> Step:
        on = "on" if checkpointing else "off"
        options = "--layers", _LAYERS[case], "--accumulate", accumulate, "--checkpointing", on, "--rounds", 10
        return self._step(f"model-{case}-{accumulate}-{on}", 3 * _CASE, "model", "--case", case, *options)

    def losses(self) -> Step:
        """The loss curves of the real model."""
        options = "--accumulate", 1, "--checkpointing", "off", "--tokens", 512, "--rounds", 10
        return self._step("model-smollm2-135m-1-off", 2 * _CASE, "model", "--case", "smollm2-135m", *options)


def steps(out: Path) -> list[Step]:
    python, bench = sys.executable, _Bench(out)
    layer, experts, model = bench.layer, bench.experts, bench.model
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=25"]

    xdist = importlib.util.find_spec("xdist") is not None

    def parallel(processes: int) -> list[str]:
        # where pytest-xdist is installed, kernels compile on several cores
        return ["-n", str(processes)] if xdist else []

    llama = [f"llama-3.1-8b.{name}" for name in ("q", "k", "gate", "down")]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    smoke = [*pytest, "tests/kernels/test_triton_linear.py", "-k", "gate or test_dropout"]
    cuda_smoke = [*pytest, "tests/ops/test_gpu.py", "-k", "every_rank_of_the_cuda or one_cuda_launch and not 8192"]
    experts_smoke = [*pytest, "tests/kernels/test_triton_experts.py", "-k", "several_tiles or every_activation"]
    linear, experts_file = (f"tests/kernels/test_triton_{name}.py" for name in ("linear", "experts"))
    on_gpu = "tests/ops/test_gpu.py"
    quantized = "tests/ops/test_gpu_quantized.py", "tests/kernels/test_decode.py"
    return [
        Step("doctor", [python, "-m", "lorafuse", "doctor"], 60, 1),
        Step("cuda-build", _BUILD, 150, 1),
        Step("gate", [*pytest, linear, "-k", "gate or integers", *parallel(4)], 120, 1),
        Step("experts-gate", [*pytest, experts_file, "-k", "layout or activation", *parallel(3)], 120, 1),
        Step("gpu-tests", [*pytest, on_gpu, "-k", "not cuda and not offsets", *parallel(3)], 120, 1),
        Step("gpu-experts-tests", [*pytest, "tests/ops/test_gpu_experts.py", *parallel(2)], 120, 1),
        Step("gpu-quantized-tests", [*pytest, *quantized, *parallel(3)], 90, 2),
        Step("cuda-gate", [*pytest, on_gpu, "-k", "cuda and not offsets", *parallel(3)], 90, 2),
        Step("decode-gate", [*pytest, "tests/ops/test_gpu_decode.py", *parallel(3)], 90, 2),
        layer(8192, 16, *llama),
        bench.decoder(8192, "llama-3.1-8b.layer"),
        experts(8192, "qwen3-30b-a3b", "balanced"),
        model("llama-3.1-8b"),
        bench.group(8192, "llama-3.1-8b.qkv", "llama-3.1-8b.mlp"),
        bench.losses(),
        Step("hopper", [python, "bench/hopper.py", "--json", str(out / "hopper.json")], 60),
        Step("decode", [python, "bench/decode.py", "--json", str(out / "decode.json")], 45),
        layer(2048, 16, *llama),
        experts(8192, "qwen3-30b-a3b", "zipf"),
        layer(8192, 64, "llama-3.1-8b.q"),
        layer(512, 16, "llama-3.1-8b.q"),
        layer(16384, 16, "llama-3.1-8b.q"),
        Step("all-kernel-tests", [*pytest, linear, "tests/ops/test_philox.py", *parallel(8)], 180, 3),
        Step("all-experts-tests", [*pytest, experts_file, *parallel(5)], 180, 3),
        Step("offsets", [*pytest, on_gpu, "-k", "offsets"], 90, 3),
        Step("memcheck", [*sanitizer, "memcheck", *smoke], 120, 4),
        *(
            Step(f"cuda-{tool}", [*sanitizer, tool, *cuda_smoke], 120, 4)
            for tool in ("memcheck", "racecheck", "synccheck")
        ),
        Step("racecheck", [*sanitizer, "racecheck", *smoke], 120, 4),
        Step("experts-memcheck", [*sanitizer, "memcheck", *experts_smoke], 120, 4),
    ]


def grid(out: Path, done: list[dict[str, Any]]) -> list[Step]:
    """The steps that fill the grid of bench/README.md, but for what `done` has: layers first, then models, experts."""
    # not at the top, where there may be no torch
    import goals

    from lorafuse.bench.moe import ROUTINGS
    from lorafuse.testing.cases import CASES

    bench = _Bench(out)

    def missing(**fields: object) -> bool:
        # what was measured before the fastest frozen was the floor is measured again
        return goals.find([result for result in done if "floor" in result], **fields) is None

    layers = {layer: CASES[f"llama-3.1-8b.{layer}"] for layer in ("q", "k", "gate", "down")}
    plan = []
    for m in goals.ROWS:
        sized = {"kind": "linear", "M": m, "R": 16}
        if cases := [case.name for case in layers.values() if missing(**sized, N=case.N, K=case.K)]:
            plan.append(bench.layer(m, 16, *cases))
    groups = "llama-3.1-8b.qkv", "llama-3.1-8b.mlp"
    if cases := [name for name in groups if missing(case=name, M=8192, R=16)]:
        plan.append(bench.group(8192, *cases))
    q = {"kind": "linear", "M": 8192, "N": layers["q"].N, "K": layers["q"].K}
    ranks = [rank for rank in goals.RANKS if rank != 16 and missing(**q, R=rank)]
    plan += [bench.layer(8192, rank, layers["q"].name) for rank in ranks]
    for (accumulate, on), name in itertools.product(goals.SETTINGS, _LAYERS):
        if missing(kind="model", model=name, accumulate=accumulate, checkpointing=on):
            plan.append(bench.model(name, accumulate, on))
    for routing, block in itertools.product(ROUTINGS, goals.BLOCKS):
        if missing(kind="moe", case=block.name, routing=routing):
            plan.append(bench.experts(8192, block.name, routing))
    return plan


def measured(device: str) -> list[dict[str, Any]]:
    """The results in bench/results that were measured on that device."""
    import goals
    import published

    return goals.results_of(device, [published.load(file) for file in published.on_gpus(ROOT)])


def grouped(plan: list[Step]) -> list[list[Step]]:
    """The steps in their order, those of one stage together."""
    groups: list[list[Step]] = []
    for step in plan:
        if step.stage and groups and groups[-1][0].stage == step.stage:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def run(step: Step, out: Path, left: float) -> None:
    """Run a step for at most `left` seconds and keep what it prints."""
    if left < 15:
        return
    if shutil.which(step.command[0]) is None:
        step.outcome = f"skipped: there is no {step.command[0]}"
        return
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    start = time.monotonic()
    with open(out / f"{step.name}.log", "w") as log:
        try:
            done = subprocess.run(
                step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                timeout=min(left, step.seconds),
            )  # fmt: skip
            step.outcome = "passed" if done.returncode == 0 else f"failed with status {done.returncode}"
        except subprocess.TimeoutExpired:
            step.outcome = f"cut off after {min(left, step.seconds):.0f} s"
    step.took = time.monotonic() - start
    print(f"{step.name}: {step.outcome}, {step.took:.0f} s", flush=True)
    if step.outcome.startswith("failed"):
        print((out / f"{step.name}.log").read_text()[-3000:], flush=True)


def table(out: Path) -> list[str]:
    """One line for each measured layer, block or model: tax, or tokens/s, of every variant."""
    lines = []
    for file in sorted(
        file for kind in ("layers", "groups", "decoder", "experts") for file in out.glob(f"{kind}-*.json")
    ):
        for result in json.loads(file.read_text())["results"]:
            frozen = result["variants"]["frozen"]["total"]["median"] * 1e6
            taxes = "  ".join(
                f"{name} {v['tax']:.1%}" for name, v in result["variants"].items() if v["trains"] == "adapters"
            )
            lines.append(f"{result['case']} M {result['M']} R {result['R']}: frozen {frozen:.0f} us, tax: {taxes}")
    for file in sorted(out.glob("model-*.json")):
        for result in json.loads(file.read_text())["results"]:
            rates = "  ".join(
                f"{name} {one['tokens_per_s']:.0f}" + (f" (tax {one['tax']:.1%})" if "tax" in one else "")
                for name, one in result["variants"].items()
            )
            lines.append(f"{result['case']}, tokens/s: {rates}")
    return lines


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the results (build/gpu)")
    parser.add_argument("--minutes", type=float, default=8.5, help="stop after so many (8.5)")
    parser.add_argument(
        "--grid", action="store_true", help="times alone: of the grid, what bench/results does not have"
    )
    return parser


def main() -> int:
    """0 when every step that ran passed, or when there is no GPU; 1 otherwise."""
    args = arguments().parse_args()
    try:
        import torch
    except ImportError:
        if shutil.which("nvidia-smi") is None:
            print("there is no NVIDIA GPU here: nothing to run")
            return 0
        print(f"{sys.executable} has no torch: name a Python that has it, make gpu PYTHON=…")
        return 1
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no NVIDIA GPU here: nothing to run")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT))
    from lorafuse.backends import native
    from lorafuse.testing.conditions import conditions

    end, setting = time.monotonic() + args.minutes * 60, conditions(torch.device("cuda"))
    if args.grid:
        plan = [Step("cuda-build", _BUILD, 150), *grid(args.out, measured(setting["device"]))]
    else:
        plan = steps(args.out)
    if native.built("_cuda") and not native.stale("_cuda"):
        plan = [step for step in plan if step.name != "cuda-build"]
    for group in grouped(plan):
        with ThreadPoolExecutor(len(group)) as pool:
            list(pool.map(lambda step: run(step, args.out, end - time.monotonic()), group))
        done = [{k: v for k, v in asdict(s).items() if k != "command"} for s in plan]
        (args.out / "gpu.json").write_text(json.dumps({"conditions": setting, "steps": done}, indent=1) + "\n")
    print("\n" + "\n".join(table(args.out)))
    print("\n".join(f"{step.name:<20} {step.took:5.0f} s  {step.outcome}" for step in plan))
    return int(any(step.outcome.startswith("failed") for step in plan))


if __name__ == "__main__":
    sys.exit(main())
