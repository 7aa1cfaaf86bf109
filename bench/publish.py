"""The published numbers, generated from committed result files and the planner's model: `make numbers`.

    python bench/publish.py            write README.md, docs/benchmarks.md, bench/README.md, docs/performance.md between
                                       their markers, the graphs under docs/, and the tables that plans follow
    python bench/publish.py --check    write nothing; 1 with a diff when one of them is not in step

What is not in `bench/results/` is "not yet measured". The sentences around the tables of README.md and
docs/benchmarks.md are in `bench/numbers.md`.
"""

import argparse
import difflib
import hashlib
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import front_page  # noqa: E402
import goals  # noqa: E402
import headline  # noqa: E402
import measured  # noqa: E402
import model_tables  # noqa: E402
import result_tables as tables  # noqa: E402
from published import (  # noqa: E402
    ALL_LAYERS,
    CPU_DECODER,
    CPU_MODEL,
    DEMO,
    EXPERTS,
    GPU_DECODER,
    GPU_EXPERTS,
    GPU_LAYERS,
    GPU_MODEL,
    GPU_PROBES,
    GPU_ROWS,
    GPU_STEPS,
    LAYERS,
    NEWER_LAYERS,
    PUBLISHED,
    load,
    named,
    on_gpus,
    source_of,
)

from lorafuse.bench import plots  # noqa: E402
from lorafuse.bench.result import VERSION, read  # noqa: E402
from lorafuse.plan import tuned  # noqa: E402

# rows of docs/benchmarks.md's table of factors, all cases of these files; README's graph shows them
HEADLINE = (GPU_DECODER, GPU_ROWS, GPU_LAYERS, GPU_EXPERTS, GPU_MODEL)
# README's rows likewise
FRONT = (*HEADLINE, CPU_DECODER, LAYERS, EXPERTS, ALL_LAYERS, NEWER_LAYERS, CPU_MODEL)
SPEED = "speed"
# docs/benchmarks.md's tables by placeholder
DETAILS = {"gpu_model": (GPU_MODEL, tables.training_steps), "gpu_experts": (GPU_EXPERTS, tables.experts)}
# docs/benchmarks.md's graph: the first of these for which a file has the data
GRAPHS = ("tax-by-rank", "tax-by-m", "tax-by-case")
ABSENT = "not yet measured"
WIDTH = 120


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """0 when all is written or in step, 1 when --check finds a difference, 2 for files that cannot be published."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    args = parser.parse_args(argv)
    try:
        texts, graphs = generate(root), drawings(root)
    except ValueError as error:
        print(f"bench/publish.py: {error}", file=sys.stderr)
        return 2
    differences = [*_changed_texts(root, texts), *_changed_graphs(root, graphs)]
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
        if stale.stem not in graphs:
            stale.unlink()
    for name, one in graphs.items():
        if _changed_graph(root, name, one):
            plots.save(one.draw(), root / "docs" / f"{name}.png", metadata(root, one.files))
    print("\n".join(differences) or "everything was in step")
    return 0


def generate(root: Path) -> dict[Path, str]:
    """Each document as it should be. Raises ValueError for files without their conditions and for missing markers."""
    on_gpu, texts = [load(file) for file in on_gpus(root)], parts(root)
    blocks = {
        "README.md": dict(zip(("claim", "numbers"), texts[:2], strict=True)),
        "docs/benchmarks.md": dict(zip(("numbers", "details"), texts[2:], strict=True)),
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
    for name, marked in blocks.items():
        path = root / name
        text = path.read_text()
        for marker, content in marked.items():
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


def parts(root: Path) -> list[str]:
    """The parts of `bench/numbers.md`, README's first, with their numbers filled in, paragraphs wrapped."""
    template = (root / "bench" / "numbers.md").read_text()
    values = dict.fromkeys(re.findall(r"\$(\w+)", template), ABSENT)
    for name, (one, table) in DETAILS.items():
        if (file := source_of(root, one)) is not None:
            content = load(file)
            values |= {
                f"{name}_table": table(content),
                f"{name}_sizes": tables.common(content["results"]),
                f"{name}_rounds": tables.rounds(content["results"]),
                f"{name}_conditions": tables.conditions(content),
                f"{name}_file": named(root, file),
            }
    values |= _headline(root) | _front(root)
    if (file := source_of(root, GPU_MODEL)) is not None:
        values["losses"] = tables.evidence(load(file))
    values["demo"] = _demo(root)
    values["graph"] = _graph(root)
    return [_wrapped(Template(part).substitute(values)) for part in template.split("\n---\n")]


def _front(root: Path) -> dict[str, str]:
    """README's claim, its table and its graph."""
    files = [file for one in FRONT if (file := source_of(root, one)) is not None]
    if not files:
        return {}
    contents = [load(file) for file in files]
    given = front_page.sorts(contents)
    graph = drawings(root).get(SPEED)
    image = f"![times of the others over lorafuse's, by case](docs/{SPEED}.png)"
    return {
        "claim": front_page.claim(given, ABSENT),
        "summary": front_page.summary(given, ABSENT),
        "summary_conditions": front_page.conditions(contents),
        "speed": f"Speed as a graph: {ABSENT}." if graph is None else image,
    }


def _headline(root: Path) -> dict[str, str]:
    """The table of factors, the cases where others are ahead, and the files of both."""
    rows, files = [], []
    for one in HEADLINE:
        if (file := source_of(root, one)) is not None:
            rows += load(file)["results"]
            files.append(file)
    if not files:
        return {}
    on_gpu = [result for file in on_gpus(root) for result in load(file)["results"] if result["kind"] != "memory"]
    on_cpu = [
        (load(file), named(root, file))
        for one in (CPU_DECODER, LAYERS, ALL_LAYERS, EXPERTS)
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
        "headline_files": ", ".join(f"`{named(root, file)}`" for file in files),
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
    sources = " and ".join(f"`{named(root, file)}`" for file in files.values())
    return f"{text} ({sources}; [loss curves](demo-loss.png))."


def _graph(root: Path) -> str:
    graph = graph_source(root)
    if graph is None:
        return f"LoRA tax as a graph: {ABSENT}."
    name, file = graph
    shown = load(file)
    over = "" if shown["version"] >= VERSION else "over the frozen layer as torch runs it; "
    source = f"`{named(root, file)}`: {over}{tables.common(shown['results'])}; {tables.conditions(shown)}"
    return f"![LoRA tax: {name}]({name}.png)\n\nThe graph is of {source}."


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
        table = {GPU_STEPS.title: tables.kernel_steps, GPU_PROBES.title: tables.probes}.get(title, tables.everything)
        text = f"{ABSENT.capitalize()}." if file is None else table(load(file), named(root, file))
        parts.append(f"### {title}\n\n{text}")
    for one in DEMO.values():
        file = source_of(root, one)
        text = f"{ABSENT.capitalize()}." if file is None else tables.all_conditions(load(file), named(root, file))
        parts.append(f"### {one.title}\n\n{text}" + ("" if file is None else f"\n\n{tables.demo_steps(load(file))}"))
    return _wrapped("\n\n".join(parts))


def _wrapped(text: str) -> str:
    """Paragraphs in lines of at most WIDTH; tables, headings and images unchanged."""
    lines = []
    for part in map(str.strip, re.split(r"\n{2,}", text.strip())):
        kept = part.startswith(("|", "#", "!"))
        lines.append(part if kept else textwrap.fill(part, WIDTH, break_long_words=False, break_on_hyphens=False))
    return "\n\n".join(lines)


@dataclass(frozen=True)
class Drawing:
    """A graph under docs/: the files whose data it shows, and what draws it."""

    files: list[Path]
    draw: Callable[[], Any]


def graph_source(root: Path) -> tuple[str, Path] | None:
    """Name and source of docs/benchmarks.md's graph: the first file, GPUs first, with data for one."""
    files = [*on_gpus(root), *(file for file in [source_of(root, NEWER_LAYERS)] if file is not None)]
    for file in files:
        content = load(file)
        for name in GRAPHS:
            if content["kind"] == "linear" and plots.figures(content, only=name):
                return name, file
    return None


def drawings(root: Path) -> dict[str, Drawing]:
    """The graphs that published files support, by name."""
    drawn = {}
    if (graph := graph_source(root)) is not None:
        name, source = graph
        drawn[name] = Drawing([source], lambda: plots.figures(read(source), only=name)[name])
    files = [file for one in HEADLINE if (file := source_of(root, one)) is not None]
    contents = [load(file) for file in files]
    if front_page.sorts(contents):
        drawn[SPEED] = Drawing(files, lambda: front_page.figure(contents))
    return drawn


def metadata(root: Path, files: list[Path]) -> dict[str, str]:
    """The sources of a graph, for its PNG text: pixels differ between versions of libraries, the data must not."""
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    commits = dict.fromkeys(load(file)["conditions"]["commit"] for file in files)
    return {"Source": ", ".join(named(root, file) for file in files), "Commit": ", ".join(commits), "SHA-256": digest}


def _graphs(root: Path) -> list[Path]:
    return [path for name in (*GRAPHS, SPEED) if (path := root / "docs" / f"{name}.png").exists()]


def _changed_texts(root: Path, texts: dict[Path, str]) -> list[str]:
    changed = []
    for path, text in texts.items():
        name = named(root, path)
        lines = (path.read_text() if path.exists() else "").splitlines(), text.splitlines()
        changed += difflib.unified_diff(*lines, f"{name} (committed)", f"{name} (generated)", lineterm="")
    return changed


def _changed_graphs(root: Path, graphs: dict[str, Drawing]) -> list[str]:
    stale = [f"docs/{path.name}: no published file supports it" for path in _graphs(root) if path.stem not in graphs]
    return stale + [line for name, one in graphs.items() for line in _changed_graph(root, name, one)]


def _changed_graph(root: Path, name: str, one: Drawing) -> list[str]:
    from PIL import Image

    path, expected = root / "docs" / f"{name}.png", metadata(root, one.files)
    if not path.exists():
        return [f"docs/{name}.png: not drawn yet"]
    with Image.open(path) as image:
        text = {key: image.info.get(key) for key in expected}
    return [
        f"docs/{name}.png: {key} {text[key]}, should be {value}"
        for key, value in expected.items()
        if text[key] != value
    ]


if __name__ == "__main__":
    sys.exit(main())
