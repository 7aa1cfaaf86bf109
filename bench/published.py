"""Which committed result files are published, under which title, and how they are read."""

import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import result_tables as tables  # noqa: E402

from lorafuse.bench import figures  # noqa: E402
from lorafuse.bench.result import VERSION, read  # noqa: E402


@dataclass(frozen=True)
class Published:
    """The title of a result file and its pattern; the newest match is published."""

    title: str
    pattern: str


GPU_DECODER = Published("A decoder layer, H200", "h200-*-layer.json")
GPU_MODEL = Published("A training step, H200", "h200-*-model.json")
GPU_LAYERS = Published("Linear layers, H200", "h200-*-linear.json")
GPU_PEERS = Published("One linear layer beside other fused kernels, H200", "h200-*-peers.json")
GPU_ROWS = Published("One linear layer by M, H200", "h200-*-rows.json")
GPU_EXPERTS = Published("Experts, H200", "h200-*-moe.json")
# by bench/hopper.py, whose files have other forms
GPU_STEPS = Published("The CUDA kernels step by step, H200", "h200-*-hopper.json")
GPU_PROBES = Published("What columns, sums, flags and experts' loops cost, H200", "h200-*-probes.json")
CPU_DECODER = Published("A decoder layer, float32", "cpu-epyc-*-layer.json")
LAYERS = Published("One linear layer", "cpu-xeon-amx-2026-11-24.json")
EXPERTS = Published("Experts", "cpu-xeon-amx-2026-11-24-moe.json")
CACHE = Published("Experts, a larger cache of oneDNN's kernels", "cpu-xeon-amx-2026-11-24-moe-zipf-cache.json")
# a CPU without instructions for bfloat16, in float32
NEWER_LAYERS = Published("One linear layer by M and rank, float32", "cpu-epyc-*-linear.json")
ALL_LAYERS = Published("Named linear layers, float32", "cpu-epyc-*-linear-all.json")
CPU_MODEL = Published("A training step, float32", "cpu-epyc-*-model.json")
REPEATED = (
    Published("The same command twice: first", "cpu-epyc-*-repeated-1.json"),
    Published("The same command twice: second", "cpu-epyc-*-repeated-2.json"),
)
DEMO = {
    "float32": Published("make demo, float32", "cpu-xeon-amx-2026-11-24-demo-float32.json"),
    "bfloat16": Published("make demo, bfloat16", "cpu-xeon-amx-2026-11-24-demo-bfloat16.json"),
}
# in the order of bench/README.md; other files of version 2 with CUDA in their conditions follow
GPUS = (GPU_DECODER, GPU_MODEL, GPU_LAYERS, GPU_PEERS, GPU_ROWS, GPU_EXPERTS)
_ON_CPUS = (CPU_DECODER, LAYERS, EXPERTS, CACHE, NEWER_LAYERS, ALL_LAYERS, CPU_MODEL, *REPEATED)
PUBLISHED = (*GPUS, GPU_STEPS, GPU_PROBES, *_ON_CPUS)


def source_of(root: Path, one: Published) -> Path | None:
    """The file that matches, the last by name where several do, or None."""
    files = sorted((root / "bench" / "results").glob(one.pattern))
    return files[-1] if files else None


def load(path: Path) -> dict:
    """A result file; those before version 2, which lack it, as they are. Raises ValueError without conditions."""
    content = json.loads(path.read_text())
    missing = [key for key in ("device", "torch", "date", "commit") if not content.get("conditions", {}).get(key)]
    if missing:
        raise ValueError(f"{path}: no number without its conditions, and {', '.join(missing)} is not in the file")
    if "version" in content:
        content = read(path)
    if content.get("version", 0) >= VERSION:
        for result in content["results"]:
            if (
                "seconds" in next(iter(result.get("variants", {}).values()), {})
                and figures.derive(copy.deepcopy(result)) != result
            ):
                raise ValueError(f"{path}: figures of {result['case']} do not follow from its raw rounds")
    return tables.published(content)


def on_gpus(root: Path) -> list[Path]:
    """Files of version 2 that were measured with CUDA, by name."""
    contents = {path: json.loads(path.read_text()) for path in sorted((root / "bench" / "results").glob("*.json"))}
    return [path for path, one in contents.items() if "version" in one and "cuda" in one.get("conditions", {})]


def named(root: Path, file: Path) -> str:
    """A file's path in the checkout."""
    return file.relative_to(root).as_posix()
