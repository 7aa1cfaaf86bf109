"""What is published is what the committed files and the model say; `make numbers` brings it in step."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from bench_content import CONDITIONS, content, tax
from published_tree import RESULTS, block, check, copied, put

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import publish  # noqa: E402
import published  # noqa: E402

pytestmark = pytest.mark.no_poison


@pytest.fixture
def tree(tmp_path):
    return copied(tmp_path)


PAGE = "docs/benchmarks.md"
NEWER = "bench/results/cpu-epyc-2026-11-27-linear.json"


def test_what_is_published_is_in_step(capsys):
    assert publish.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_result_files_say_their_conditions(file):
    actual = json.loads(file.read_text())["conditions"]
    assert all(actual.get(key) for key in ("device", "torch", "date", "commit"))


def test_every_file_that_is_quoted_exists_and_every_file_is_quoted():
    quoted = {
        name for page in ("docs/benchmarks.md", "bench/README.md") for name in quoted_files((ROOT / page).read_text())
    }
    assert quoted == {file.name for file in RESULTS}


def quoted_files(text):
    return re.findall(r"bench/results/([\w.-]+\.json)", text)


@pytest.mark.parametrize("file", [file.name for file in RESULTS if "xeon" in file.name])
def test_a_changed_number_is_seen(tree, file, capsys):
    assert check(tree, capsys) == (0, "in step\n")
    path = f"bench/results/{file}"
    written = json.loads((tree / path).read_text())
    if "figures" in written:
        one, key = written["figures"]["patched by lorafuse"], "step_seconds_median"
    else:
        one, key = written["results"][0]["variants"]["lorafuse"], "tax"
    one[key] *= 1.5
    put(tree, path, written)
    status, message = check(tree, capsys)
    assert status == 1
    assert "+++ bench/README.md (generated)" in message
    assert publish.main([], tree) == 0
    assert check(tree, capsys)[0] == 0


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md", "bench/README.md", "docs/performance.md"])
def test_a_number_changed_by_hand_is_seen(tree, page, capsys):
    # README's tables are of a GPU
    shutil.copy(ROOT / "bench" / "results" / "h200-2026-11-26-rows.json", tree / "bench" / "results")
    assert publish.main([], tree) == 0
    text = (tree / page).read_text()
    begin = re.search(r"<!-- [a-z-]+ -->\n", text).end()
    at = re.compile(r"\d").search(text, text.index("|---", begin)).start()
    (tree / page).write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
    status, message = check(tree, capsys)
    assert status == 1
    assert f"+++ {page} (generated)" in message


@pytest.mark.parametrize(
    ("one", "title"),
    [(published.LAYERS, "One linear layer"), (published.EXPERTS, "Experts")],
    ids=["layers", "experts"],
)
def test_a_missing_file_is_not_yet_measured(tree, one, title):
    (tree / "bench" / "results" / one.pattern).unlink()
    assert publish.main([], tree) == 0
    section = block(tree, "bench/README.md", "results").split(f"### {title}\n")[1].split("### ")[0]
    assert section.strip() == "Not yet measured."
    assert one.pattern not in block(tree, PAGE)


def test_slots_are_not_yet_measured(tree):
    page = block(tree, PAGE)
    assert "LoRA tax as a graph: not yet measured." in page
    modelled = block(tree, "docs/performance.md", "layers-model")
    assert modelled.count("| not yet measured | not yet measured | not yet measured |") == 4
    page = block(tree, "bench/README.md", "results")
    for one in (published.NEWER_LAYERS, published.GPU_STEPS, *published.GPUS):
        assert f"### {one.title}\n\nNot yet measured.\n" in page


def test_tables_hold_the_files_numbers(tree):
    written = json.loads((tree / "bench" / "results" / published.LAYERS.pattern).read_text())
    for result in written["results"]:
        row = f"| {result['case']}, N {result['N']}, K {result['K']} | " + " | ".join(
            f"{result['variants'][name]['tax']:.0%}" for name in ("peft", "peft-half", "addmm", "lorafuse")
        )
        # the brackets are missing: the first file kept no rounds
        assert row in block(tree, "bench/README.md", "results")


def test_a_newer_file_fills_its_slot_with_tables_and_a_graph(tree, capsys):
    written = content(("wide", "narrow"), (64,), (4, 16))
    for result in written["results"]:
        result["variants"]["other"] = result["variants"]["frozen"] | {"label": "no adapter", "trains": "nothing"}
    put(tree, NEWER, written)
    assert check(tree, capsys)[0] == 1
    assert publish.main([], tree) == 0
    assert check(tree, capsys)[0] == 0
    first, page = block(tree, PAGE), block(tree, "bench/README.md", "results")
    assert "](tax-by-rank.png)" in first
    assert (tree / "docs" / "tax-by-rank.png").exists()
    assert NEWER in first
    assert "over the frozen layer as torch runs it" in " ".join(first.split())
    assert CONDITIONS["commit"] in first
    value = tax("lorafuse", 64, 4)
    assert f"{value:.0%} ({(value - 0.1) * 100:.0f} to {(value + 0.2) * 100:.0f})" in page
    assert "Not measured: unsloth: unsloth not installed." in page
    assert "not over the fastest frozen; a ratio of medians" in " ".join(page.split())
    head = "| LoRA tax | floor | GEMM + addmm_ | PEFT as shipped | lorafuse |"
    assert head in page
    assert "| time | frozen | full fine-tuning | GEMM + addmm_ | PEFT as shipped | lorafuse | no adapter |" in page


def test_a_graph_of_other_data_is_seen(tree, capsys):
    put(tree, NEWER, content(ranks=(4, 16)))
    assert publish.main([], tree) == 0
    written = json.loads((tree / NEWER).read_text())
    # in no table, but in the graph
    written["results"][0]["variants"]["lorafuse"]["forward"] = {"median": 1}
    put(tree, NEWER, written)
    status, message = check(tree, capsys)
    assert status == 1
    assert "docs/tax-by-rank.png: SHA-256" in message
    assert publish.main([], tree) == 0
    (tree / "docs" / "tax-by-rank.png").unlink()
    assert "not drawn yet" in check(tree, capsys)[1]
    assert publish.main([], tree) == 0
    (tree / NEWER).unlink()
    assert "no published file supports it" in check(tree, capsys)[1]
    assert publish.main([], tree) == 0
    assert not (tree / "docs" / "tax-by-rank.png").exists()


@pytest.mark.parametrize(("sizes", "name"), [({"ms": (64, 256)}, "tax-by-m"), ({}, None)])
def test_the_graph_follows_the_data(tree, sizes, name):
    put(tree, NEWER, content(**sizes))
    assert publish.main([], tree) == 0
    assert [path.stem for path in (tree / "docs").glob("tax-*.png")] == [name] * (name is not None)


@pytest.mark.parametrize(("device", "filled"), [("NVIDIA H200", True), ("NVIDIA H100", False)])
def test_a_file_of_a_gpu_is_published_by_itself(tree, device, filled, capsys):
    written = content(device=device, cuda="13.0")
    written["results"][0] |= {"M": 8192, "N": 4096, "K": 4096}
    variants = written["results"][0]["variants"]
    for name in variants:
        variants[name] |= {"forward": {"median": 1.5}, "backward": {"median": 2.5}}
    variants["lorafuse-triton"] = variants["lorafuse"] | {"label": "lorafuse, triton", "forward": {"median": 1.234}}
    put(tree, "bench/results/gpu-2026-12-01.json", written)
    assert publish.main([], tree) == 0
    assert check(tree, capsys)[0] == 0
    page = block(tree, "bench/README.md", "results")
    assert f"### linear, {device}" in page
    table = block(tree, "docs/performance.md", "layers-model").splitlines()
    modelled = next(line for line in table if line.startswith("| lorafuse, Triton |"))
    forward = written["results"][0]["variants"]["lorafuse-triton"]["forward"]["median"]
    assert (f"| {forward * 1e6:.0f} |" in modelled) == filled
    assert ("not yet measured" in modelled) != filled


def test_whole_models_are_tabled(tree):
    """Their figures have steps, and a LoRA tax where the frozen model took turns."""
    built = {
        "frozen": {"step": {"median": 1.0, "p20": 0.9, "p80": 1.1}, "ratio_to_full": 0.5, "peak_bytes": 2**28},
        "full": {"step": {"median": 2.0, "p20": 1.9, "p80": 2.1}, "ratio_to_full": 1.0, "peak_bytes": 2**30},
        "lorafuse": {
            "step": {"median": 1.2, "p20": 1.1, "p80": 1.3},
            "ratio_to_full": 0.6,
            "peak_bytes": 2**29,
            "tax": 0.2,
        },
    }
    result = {"kind": "model", "case": "smollm2-135m", "R": 16, "dtype": "float32", "variants": built, "failed": {}}
    put(tree, "bench/results/gpu-2026-12-01-model.json", content(cuda="13.0") | {"kind": "model", "results": [result]})
    assert publish.main([], tree) == 0
    page = block(tree, "bench/README.md", "results").split("### model, a CPU")[1]
    assert "| smollm2-135m | 1000 ms (900 to 1100) | 2000 ms (1900 to 2100) | 1200 ms (1100 to 1300) |" in page
    assert "| LoRA tax | lorafuse |\n|---|---:|\n| smollm2-135m | 20% |" in page
    assert "| time / full fine-tuning | lorafuse |\n|---|---:|\n| smollm2-135m | 0.60 |" in page
    assert "| smollm2-135m | 256 | 1024 | 512 |" in page
    assert "over frozen" not in page


def test_goals_and_the_grid_say_what_is_not_measured(tree):
    """Layers of one shape share a figure; another GPU's says nothing; a peer that is ahead is named."""
    goals, grid = (block(tree, "bench/README.md", name) for name in ("goals", "grid"))
    assert goals.count("| not yet measured |") == 13
    assert "| llama-3.1-8b.q |" + 5 * " not yet measured |" in grid
    written = content(ms=(8192,), cuda="13.0", device="NVIDIA H200")
    written["results"][0] |= {"case": "llama-3.1-8b.k", "N": 1024, "K": 4096}
    for device in ("NVIDIA H100", "NVIDIA H200"):
        written["conditions"]["device"] = device
        put(tree, "bench/results/gpu-2026-12-01-linear.json", written)
        assert publish.main([], tree) == 0
        goals, grid = (block(tree, "bench/README.md", name) for name in ("goals", "grid"))
        shown = f"{tax('lorafuse', 8192, 16):.0%}" if device == "NVIDIA H200" else "not yet measured"
        for layer in "kv":
            assert f"| llama-3.1-8b.{layer} | not yet measured | not yet measured | {shown} |" in grid
    ratio = (1 + tax("lorafuse", 8192, 16)) / (1 + tax("addmm", 8192, 16))
    second = (1 + tax("lorafuse", 8192, 16)) / (1 + tax("peft", 8192, 16))
    behind = f"{ratio - 1:.0%} behind GEMM + addmm_, {second - 1:.0%} behind PEFT as shipped"
    assert f"| none | llama-3.1-8b.k, M 8192, R 16: {behind} |" in goals
    assert f"| {shown}, of 2 of 35 cases |" in goals


def layers(**conditions):
    """A file of one decoder layer, whose tax is higher layer by layer than in groups."""
    written = content(ms=(8192,), kind="layer", **conditions)
    (result,) = written["results"]
    result |= {"kind": "layer", "case": "llama-3.1-8b.layer"}
    alone = result["variants"]["lorafuse"] | {"tax_over_frozen": 0.3}
    result["variants"] |= {"lorafuse": alone, "lorafuse-group": result["variants"]["peft"] | {"tax_over_frozen": -0.1}}
    return written


def test_a_decoder_layer_is_the_headline(tree):
    """By groups, which `patch` runs: the first of the claim and of the goals."""
    put(tree, "bench/results/cpu-epyc-2026-12-01-layer.json", layers(device="AMD EPYC"))
    assert publish.main([], tree) == 0
    claim, front = block(tree, marker="claim"), block(tree)
    ours, least = (tax(name, 8192, 16) for name in ("peft", "addmm"))
    text = f"on CPUs a decoder layer **{(1 + least) / (1 + ours):.2f}×** (LoRA tax {ours:.0%}), one layer"
    assert text in " ".join(claim.split())
    assert "| AMD EPYC: a decoder layer (llama-3.1-8b; 8192 tokens, bfloat16) | 1 |" in front
    goals = block(tree, "bench/README.md", "goals")
    assert "| the same, over the frozen layer as transformers runs it | ≤ 0% | not yet measured |" in goals
    put(tree, "bench/results/h200-2026-12-01-layer.json", layers(device="NVIDIA H200", cuda="13.0"))
    assert publish.main([], tree) == 0
    goals = block(tree, "bench/README.md", "goals").splitlines()
    assert goals[2] == f"| LoRA tax of a decoder layer of llama-3.1-8b, 8192 tokens, r 16 | ≤ 4% | {ours:.0%} |"
    assert goals[3] == "| the same, over the frozen layer as transformers runs it | ≤ 0% | -10% |"
    assert "an NVIDIA H200 a decoder layer" in " ".join(block(tree, marker="claim").split())
    assert "| llama-3.1-8b.layer, a decoder layer, 8192 tokens |" in block(tree, PAGE)


def test_memory_is_tabled(tree):
    written = content(kind="memory", cuda="13.0")
    put(tree, "bench/results/gpu-2026-12-01-memory.json", written)
    assert publish.main([], tree) == 0
    page = block(tree, "bench/README.md", "results").split("### memory, a CPU")[1]
    over = written["results"][0]["variants"]
    mib = (over["lorafuse"]["peak_bytes"] - over["frozen"]["peak_bytes"]) / 2**20
    assert "| peak MiB, over frozen |" in page
    assert f"{mib:+.1f} |" in page


def test_a_file_without_conditions_is_refused(tree, capsys):
    put(tree, NEWER, content(commit=""))
    assert publish.main([], tree) == 2
    assert "no number without its conditions, and commit is not in the file" in capsys.readouterr().err


def test_a_missing_marker_is_refused(tree, capsys):
    path = tree / "README.md"
    path.write_text(path.read_text().replace("<!-- /numbers -->", ""))
    assert publish.main(["--check"], tree) == 2
    assert "<!-- /numbers -->" in capsys.readouterr().err
