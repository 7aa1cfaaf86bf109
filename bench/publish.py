"""The published numbers, generated from committed result files and the planner's model: `make numbers`.

    python bench/publish.py            write README.md, bench/README.md, docs/performance.md between their markers,
                                       the graph under docs/, and the tables that plans follow (bench/measured.py)
    python bench/publish.py --check    write nothing; 1 with a diff when one of them is not in step

What is not in `bench/results/` is "not yet measured". The sentences around README's tables are in `bench/numbers.md`.
"""

import argparse
import copy
import difflib
import hashlib
import json
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from string import Template

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import goals  # noqa: E402
import headline  # noqa: E402
import measured  # noqa: E402
import model_tables  # noqa: E402
import result_tables as tables  # noqa: E402

from lorafuse.bench import figures, plots  # noqa: E402
from lorafuse.bench.result import VERSION, read  # noqa: E402
from lorafuse.plan import tuned  # noqa: E402


@dataclass(frozen=True)
class Published:
    """The title of a result file and its pattern; the newest match is published."""

    title: str
    pattern: str


GPU_MODEL = Published("A training step, H200", "h200-*-model.json")
GPU_LAYERS = Published("Linear layers, H200", "h200-*-linear.json")
GPU_PEERS = Published("One linear layer beside other fused kernels, H200", "h200-*-peers.json")
GPU_ROWS = Published("One linear layer by M, H200", "h200-*-rows.json")
GPU_EXPERTS = Published("Experts, H200", "h200-*-moe.json")
# by bench/hopper.py, whose files have another form
GPU_STEPS = Published("The CUDA kernels step by step, H200", "h200-*-hopper.json")
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
GPUS = (GPU_MODEL, GPU_LAYERS, GPU_PEERS, GPU_ROWS, GPU_EXPERTS)
PUBLISHED = (*GPUS, GPU_STEPS, LAYERS, EXPERTS, CACHE, NEWER_LAYERS, ALL_LAYERS, CPU_MODEL, *REPEATED)
# README's rows: one layer by its rows and the layers of other shapes, by file, and the first block of experts
HEADLINE = {
    GPU_ROWS: ("llama-3.1-8b.q",),
    GPU_LAYERS: ("llama-3.1-8b.q", "llama-3.1-8b.k", "llama-3.1-8b.down"),
    GPU_EXPERTS: ("qwen3-30b-a3b",),
    GPU_MODEL: None,
}
# README's tables by placeholder
README = {"gpu_model": (GPU_MODEL, tables.training_steps), "gpu_experts": (GPU_EXPERTS, tables.experts)}
# README's graph: the first of these for which a file has the data
GRAPHS = ("tax-by-rank", "tax-by-m", "tax-by-case")
ABSENT = "not yet measured"
WIDTH = 120


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """0 when all is written or in step, 1 when --check finds a difference, 2 for files that cannot be published."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    args = parser.parse_args(argv)
    try:
        texts, graph = generate(root), graph_source(root)
    except ValueError as error:
        print(f"bench/publish.py: {error}", file=sys.stderr)
        return 2
    differences = [*_changed_texts(root, texts), *_changed_graphs(root, graph)]
    if args.check:
        print(
            "\n".join(
                [*differences, "not in step with bench/results: run make numbers"] if differences else ["in step"]
            )
        )
        return int(bool(differences))
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for stale in _graphs(root):
        if graph is None or stale.stem != graph[0]:
            stale.unlink()
    if graph is not None and _changed_graphs(root, graph):
        name, file = graph
        plots.save(plots.figures(read(file), only=name)[name], root / "docs" / f"{name}.png", metadata(root, file))
    print("\n".join(differences) or "everything was in step")
    return 0


def generate(root: Path) -> dict[Path, str]:
    """Each document as it should be. Raises ValueError for files without their conditions and for missing markers."""
    on_gpu = [load(file) for file in on_gpus(root)]
    blocks = {
        "README.md": dict(zip(("numbers", "details"), readme(root), strict=True)),
        "bench/README.md": {
            "goals": _wrapped(goals.goals(on_gpu, ABSENT)),
            "grid": _wrapped(goals.grid(on_gpu, ABSENT)),
            "results": results(root),
        },
        "docs/performance.md": {
            "layers-model": model_tables.layers_model(on_gpu, ABSENT),
            "experts-model": model_tables.experts_model(on_gpu, ABSENT),
        },
    }
    documents = {}
    for name, named in blocks.items():
        path = root / name
        text = path.read_text()
        for marker, content in named.items():
            text = _replaced(text, marker, content, path)
        documents[path] = text
    for model, entries in measured.tables(on_gpu).items():
        documents[root / measured.FOLDER / tuned.file_name(model)] = tuned.text_of(entries)
    return documents


def _replaced(text: str, marker: str, content: str, path: Path) -> str:
    begin, end = f"<!-- {marker} -->\n", f"<!-- /{marker} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{path}: it must hold {begin.strip()} and {end} once each")
    return text[: text.index(begin) + len(begin)] + content + "\n" + text[text.index(end) :]


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


def readme(root: Path) -> list[str]:
    """README's blocks: the parts of `bench/numbers.md` with their numbers filled in, paragraphs wrapped."""
    template = (root / "bench" / "numbers.md").read_text()
    values = dict.fromkeys(re.findall(r"\$(\w+)", template), ABSENT)
    for name, (one, table) in README.items():
        if (file := source_of(root, one)) is not None:
            content = load(file)
            values |= {
                f"{name}_table": table(content),
                f"{name}_sizes": tables.common(content["results"]),
                f"{name}_rounds": tables.rounds(content["results"]),
                f"{name}_conditions": tables.conditions(content),
                f"{name}_file": _named(root, file),
            }
    values |= _headline(root)
    if (file := source_of(root, GPU_MODEL)) is not None:
        values["losses"] = tables.evidence(load(file))
    values["demo"] = _demo(root)
    values["graph"] = _graph(root)
    return [_wrapped(Template(part).substitute(values)) for part in template.split("\n---\n")]


def _headline(root: Path) -> dict[str, str]:
    """README's first table, the cases where others are ahead, and the files of both."""
    rows, files = [], []
    for one, cases in HEADLINE.items():
        if (file := source_of(root, one)) is not None:
            results = load(file)["results"]
            rows += [result for result in results if cases is None or result["case"] in cases]
            files.append(file)
    if not files:
        return {}
    on_gpu = [result for file in on_gpus(root) for result in load(file)["results"] if result["kind"] != "memory"]
    on_cpu = [
        (load(file), _named(root, file))
        for one in (LAYERS, ALL_LAYERS, EXPERTS)
        if (file := source_of(root, one)) is not None
    ]
    ahead = headline.losers(on_gpu)
    for content, name in on_cpu:
        lost = [result for result in content["results"] if list(headline.behind(result))]
        if lost:
            ahead.append(
                f"{content['conditions']['device']}: {len(lost)} of {len(content['results'])} cases (`{name}`)"
            )
    slower = headline.slower_than_full(on_gpu)
    for content, _ in on_cpu:
        if lost := headline.slower_than_full(content["results"]):
            slower.append(f"{content['conditions']['device']}: {'; '.join(lost)}")
    return {
        "headline": headline.headline(rows, ABSENT),
        "headline_conditions": tables.conditions(load(files[0])),
        "headline_files": ", ".join(f"`{_named(root, file)}`" for file in files),
        "losers": "; ".join(ahead) or "none",
        "slower": "; ".join(slower) or "none",
        "unmeasured": headline.unmeasured(rows),
        "layer_half": _between(rows, "peft-half"),
        "layer_full": _between(rows, "full"),
    }


def _between(results: list[dict], name: str) -> str:
    """The range over single layers: of times / lorafuse's for a setting of PEFT, of lorafuse's / full fine-tuning's."""
    layers = [result for result in results if result["kind"] == "linear" and "lorafuse" in result["variants"]]
    if name == "full":
        values = [one["variants"]["lorafuse"].get("ratio_to_full") for one in layers]
    else:
        values = [headline.factors(one).get(name) for one in layers]
    ordered = sorted(value for value in values if value is not None)
    return f"{ordered[0]:.2f} to {ordered[-1]:.2f}" if ordered else ABSENT


def _demo(root: Path) -> str:
    files = {dtype: source_of(root, one) for dtype, one in DEMO.items()}
    if None in files.values():
        return f"`make demo`: {ABSENT}."
    text = tables.demo(*(load(file) for file in files.values()))
    named = " and ".join(f"`{_named(root, file)}`" for file in files.values())
    return f"{text} ({named}; [loss curves](docs/demo-loss.png))."


def _graph(root: Path) -> str:
    graph = graph_source(root)
    if graph is None:
        return f"LoRA tax as a graph: {ABSENT}."
    name, file = graph
    shown = load(file)
    over = "" if shown["version"] >= VERSION else "over the frozen layer as torch runs it; "
    source = f"`{_named(root, file)}`: {over}{tables.common(shown['results'])}; {tables.conditions(shown)}"
    return f"![LoRA tax: {name}](docs/{name}.png)\n\nThe graph is of {source}."


def results(root: Path) -> str:
    """bench/README.md's section: of every published file the conditions, then its tables."""
    parts = []
    listed = [(one.title, source_of(root, one)) for one in PUBLISHED]
    known = [file for _, file in listed]
    for file in on_gpus(root):
        if file not in known:
            content = load(file)
            listed.append((f"{content['kind']}, {content['conditions']['device']}", file))
    for title, file in listed:
        table = tables.kernel_steps if title == GPU_STEPS.title else tables.everything
        text = f"{ABSENT.capitalize()}." if file is None else table(load(file), _named(root, file))
        parts.append(f"### {title}\n\n{text}")
    for one in DEMO.values():
        file = source_of(root, one)
        text = f"{ABSENT.capitalize()}." if file is None else tables.all_conditions(load(file), _named(root, file))
        parts.append(f"### {one.title}\n\n{text}" + ("" if file is None else f"\n\n{tables.demo_steps(load(file))}"))
    return _wrapped("\n\n".join(parts))


def _named(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix()


def _wrapped(text: str) -> str:
    """Paragraphs in lines of at most WIDTH; tables, headings and images unchanged."""
    lines = []
    for part in map(str.strip, re.split(r"\n{2,}", text.strip())):
        kept = part.startswith(("|", "#", "!"))
        lines.append(part if kept else textwrap.fill(part, WIDTH, break_long_words=False, break_on_hyphens=False))
    return "\n\n".join(lines)


def graph_source(root: Path) -> tuple[str, Path] | None:
    """Name and source of README's graph: the first file, GPUs first, with data for one."""
    files = [*on_gpus(root), *(file for file in [source_of(root, NEWER_LAYERS)] if file is not None)]
    for file in files:
        content = load(file)
        for name in GRAPHS:
            if content["kind"] == "linear" and plots.figures(content, only=name):
                return name, file
    return None


def metadata(root: Path, file: Path) -> dict[str, str]:
    """The source of a graph, for its PNG text: pixels differ between versions of libraries, the data must not."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"Source": _named(root, file), "Commit": load(file)["conditions"]["commit"], "SHA-256": digest}


def _graphs(root: Path) -> list[Path]:
    return [path for name in GRAPHS if (path := root / "docs" / f"{name}.png").exists()]


def _changed_texts(root: Path, texts: dict[Path, str]) -> list[str]:
    changed = []
    for path, text in texts.items():
        name = _named(root, path)
        lines = (path.read_text() if path.exists() else "").splitlines(), text.splitlines()
        changed += difflib.unified_diff(*lines, f"{name} (committed)", f"{name} (generated)", lineterm="")
    return changed


def _changed_graphs(root: Path, graph: tuple[str, Path] | None) -> list[str]:
    from PIL import Image

    wrong = [f"docs/{path.name}: no published file supports it" for path in _graphs(root) if not graph]
    if graph is None:
        return wrong
    name, file = graph
    path, expected = root / "docs" / f"{name}.png", metadata(root, file)
    wrong += [f"docs/{other.name}: README shows {name}.png" for other in _graphs(root) if other != path]
    if not path.exists():
        return [*wrong, f"docs/{name}.png: not drawn yet"]
    with Image.open(path) as image:
        text = {key: image.info.get(key) for key in expected}
    wrong += [
        f"docs/{name}.png: {key} {text[key]}, should be {value}"
        for key, value in expected.items()
        if text[key] != value
    ]
    return wrong


if __name__ == "__main__":
    sys.exit(main())
