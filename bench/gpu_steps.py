"""The steps of `make gpu`, in the order of their worth: probes, correctness, layers, a decoder layer, a training step,
experts, peers, then what is left; and those of `make gpu ARGS=--grid`, which fill the cells that no file holds yet.

Every step has a budget in seconds. It does not start where less is left, so that a lease ends with whole results. All
fit a GPU of 80 GB: models have so few layers, and `lorafuse bench` runs one case after the other.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["LAYERS", "Step", "grid", "steps"]

# seconds: one layer in all variants, with its fp64 reference and the first compilation of its kernels
_CASE = 75
_BUILD = [sys.executable, "csrc/build.py", "cuda"]
# models of the grid, with so many layers
LAYERS = {"llama-3.1-8b": 8, "qwen3-30b-a3b": 4}
_LLAMA = tuple(f"llama-3.1-8b.{name}" for name in ("q", "k", "gate", "down"))


@dataclass
class Step:
    """One command: `name` of its output file, what it shows, and the most seconds it may take.

    Steps of one `stage` run side by side, those of none alone. `outcome` is "" until it was tried.
    """

    name: str
    command: list[str]
    seconds: int
    stage: int = 0
    outcome: str = ""
    took: float = 0.0
    date: str = ""


class _Bench:
    """Steps that measure, each into a file of its own."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def _step(self, name: str, seconds: int, kind: str, *options: object) -> Step:
        command = [sys.executable, "-m", "lorafuse", "bench", kind, *map(str, options)]
        return Step(name, [*command, "--json", str(self._out / f"{name}.json")], seconds)

    def layer(self, m: int, rank: int, case: str) -> Step:
        return self._step(f"layers-m{m}-r{rank}-{case}", _CASE, "linear", "--case", case, "--m", m, "--rank", rank)

    def group(self, m: int, case: str) -> Step:
        return self._step(f"groups-m{m}-{case}", _CASE, "group", "--case", case, "--m", m)

    def decoder(self, m: int, case: str) -> Step:
        return self._step(f"decoder-m{m}-{case}", 2 * _CASE, "layer", "--case", case, "--m", m)

    def experts(self, m: int, case: str, routing: str) -> Step:
        name = f"experts-m{m}-{case}-{routing}"
        return self._step(name, 2 * _CASE, "moe", "--case", case, "--m", m, "--routing", routing)

    def quantized(self, m: int, case: str) -> Step:
        return self._step(f"quantized-m{m}-{case}", _CASE, "quantized", "--case", case, "--m", m)

    def model(self, case: str, accumulate: int = 1, checkpointing: bool = False) -> Step:
        on = "on" if checkpointing else "off"
        options = "--layers", LAYERS[case], "--accumulate", accumulate, "--checkpointing", on, "--rounds", 10
        return self._step(f"model-{case}-{accumulate}-{on}", 3 * _CASE, "model", "--case", case, *options)

    def losses(self) -> Step:
        """The loss curves of the real model."""
        options = "--accumulate", 1, "--checkpointing", "off", "--tokens", 512, "--rounds", 10
        return self._step("model-smollm2-135m-1-off", 2 * _CASE, "model", "--case", "smollm2-135m", *options)

    def multi(self, adapters: int, rows: int, case: str) -> Step:
        options = "--case", case, "--adapters", adapters, "--rows", rows
        return self._step(f"multi-{adapters}x{rows}-{case}", _CASE, "multi", *options)

    def script(self, name: str, seconds: int, file: str, *options: str) -> Step:
        command = [sys.executable, f"bench/{file}.py", *options, "--json", str(self._out / f"{name}.json")]
        return Step(name, command, seconds)


def steps(out: Path, built: bool = False) -> list[Step]:
    """All steps; where lorafuse._cuda is not `built` yet, checks that do without it run while it is."""
    python, bench = sys.executable, _Bench(out)
    layer, experts = bench.layer, bench.experts
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=25"]
    xdist = importlib.util.find_spec("xdist") is not None

    def parallel(processes: int) -> list[str]:
        # where pytest-xdist is installed, kernels compile on several cores
        return ["-n", str(processes)] if xdist else []

    linear, experts_file = (f"tests/kernels/test_triton_{name}.py" for name in ("linear", "experts"))
    on_gpu, of_steps = "tests/ops/test_gpu.py", "tests/integrations/test_step_graph.py"
    quantized = "tests/ops/test_gpu_quantized.py", "tests/kernels/test_decode.py"
    multi = "tests/ops/test_multi.py", "tests/ops/test_multi_forms.py"
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    smoke = [*pytest, linear, "-k", "gate or test_dropout"]
    cuda_smoke = [*pytest, on_gpu, "-k", "every_rank_of_the_cuda or one_cuda_launch and not 8192"]
    experts_smoke = [*pytest, experts_file, "-k", "several_tiles or every_activation"]
    doctor = Step("doctor", [python, "-m", "lorafuse", "doctor"], 60, 1)
    probes = bench.script("probes", 180, "hopper", "--probes")
    checks = [
        Step("gate", [*pytest, linear, "-k", "gate or integers", *parallel(4)], 120, 1),
        Step("experts-gate", [*pytest, experts_file, "-k", "layout or activation", *parallel(3)], 120, 1),
        Step("gpu-tests", [*pytest, on_gpu, of_steps, "-k", "not cuda and not offsets", *parallel(3)], 120, 1),
        Step("gpu-experts-tests", [*pytest, "tests/ops/test_gpu_experts.py", *parallel(2)], 120, 1),
    ]
    of_cuda = [
        Step("cuda-gate", [*pytest, on_gpu, "-k", "cuda and not offsets", *parallel(3)], 90, 2),
        Step("gpu-quantized-tests", [*pytest, *quantized, *parallel(3)], 90, 2),
        Step("decode-gate", [*pytest, "tests/ops/test_gpu_decode.py", *parallel(3)], 90, 2),
    ]
    build = Step("cuda-build", _BUILD, 150, 1)
    return [
        *([doctor, probes, *checks] if built else [doctor, build, *checks, probes]),
        *of_cuda,
        *(layer(8192, 16, case) for case in _LLAMA),
        *(layer(512, 16, case) for case in _LLAMA[:2]),
        bench.decoder(8192, "llama-3.1-8b.layer"),
        bench.model("llama-3.1-8b"),
        experts(8192, "qwen3-30b-a3b", "balanced"),
        *(bench.group(8192, f"llama-3.1-8b.{name}") for name in ("qkv", "mlp")),
        bench.losses(),
        bench.script("hopper", 60, "hopper"),
        bench.script("decode", 45, "decode"),
        bench.multi(32, 16, _LLAMA[0]),
        bench.script("dora", 60, "dora", "--device", "cuda"),
        bench.script("host", 45, "host"),
        *(bench.quantized(m, _LLAMA[0]) for m in (8192, 512, 16)),
        *(layer(2048, 16, case) for case in _LLAMA),
        experts(8192, "qwen3-30b-a3b", "zipf"),
        layer(8192, 64, _LLAMA[0]),
        layer(16384, 16, _LLAMA[0]),
        Step("all-kernel-tests", [*pytest, linear, "tests/ops/test_philox.py", *parallel(8)], 180, 3),
        Step("all-experts-tests", [*pytest, experts_file, *parallel(5)], 180, 3),
        Step("multi-tests", [*pytest, *multi, "-k", "triton", *parallel(4)], 180, 3),
        Step("offsets", [*pytest, on_gpu, "-k", "offsets"], 90, 3),
        Step("memcheck", [*sanitizer, "memcheck", *smoke], 120, 4),
        *(
            Step(f"cuda-{tool}", [*sanitizer, tool, *cuda_smoke], 120, 4)
            for tool in ("memcheck", "racecheck", "synccheck")
        ),
        Step("racecheck", [*sanitizer, "racecheck", *smoke], 120, 4),
        Step("experts-memcheck", [*sanitizer, "memcheck", *experts_smoke], 120, 4),
    ]


def grid(out: Path, done: list[dict[str, Any]], built: bool = False) -> list[Step]:
    """A step for each cell of the grid of bench/README.md that `done` lacks, by worth: the sizes of the goals first."""
    # not at the top, where there may be no torch
    import goals

    from lorafuse.bench.moe import ROUTINGS
    from lorafuse.testing.cases import CASES

    bench = _Bench(out)

    def missing(**fields: object) -> bool:
        # what was measured before the fastest frozen was the floor is measured again
        return goals.find([result for result in done if "floor" in result], **fields) is None

    def layers(m: int) -> list[Step]:
        sized = {"kind": "linear", "M": m, "R": 16}
        cases = [CASES[name] for name in _LLAMA]
        return [bench.layer(m, 16, one.name) for one in cases if missing(**sized, N=one.N, K=one.K)]

    def blocks(first: bool) -> list[Step]:
        cells = ((routing, block.name) for routing in ROUTINGS for block in goals.BLOCKS)
        return [
            bench.experts(8192, block, routing)
            for routing, block in cells
            if (block == "qwen3-30b-a3b") == first and missing(kind="moe", case=block, routing=routing)
        ]

    models = [
        bench.model(name, accumulate, on)
        for (accumulate, on) in goals.SETTINGS
        for name in LAYERS
        if missing(kind="model", model=name, accumulate=accumulate, checkpointing=on)
    ]
    decoders = [bench.decoder(goals.DECODER["M"], goals.DECODER["case"])] if missing(**goals.DECODER) else []
    groups = [name for name in ("llama-3.1-8b.qkv", "llama-3.1-8b.mlp") if missing(case=name, M=8192, R=16)]
    square = CASES[_LLAMA[0]]
    q = {"kind": "linear", "M": 8192, "N": square.N, "K": square.K}
    rows = sorted(goals.ROWS, key=lambda m: m != 8192)
    return [
        *([] if built else [Step("cuda-build", _BUILD, 150)]),
        *(step for m in rows for step in layers(m)),
        *decoders,
        *models[:1],
        *blocks(first=True),
        *(bench.group(8192, name) for name in groups),
        *(bench.layer(8192, rank, square.name) for rank in goals.RANKS if rank != 16 and missing(**q, R=rank)),
        *models[1:],
        *blocks(first=False),
    ]
