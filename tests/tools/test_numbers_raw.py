"""What is published follows from raw rounds, and no number is better than it was: noise, few rounds, weak factors."""

import json
import random
import re
import shutil
import statistics
import sys
from pathlib import Path

import pytest
from bench_content import content
from published_tree import RESULTS, block, copied, put

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import headline  # noqa: E402
import publish  # noqa: E402
import published  # noqa: E402
import result_tables as tables  # noqa: E402

from lorafuse.bench import figures  # noqa: E402

pytestmark = pytest.mark.no_poison


@pytest.fixture
def tree(tmp_path):
    return copied(tmp_path)


def measured(**changes):
    """A file as `lorafuse bench` writes it, of two layers in three processes; lorafuse is as fast as frozen."""
    draw = random.Random(0)
    results = []
    for case in ("llama-3.1-8b.q", "llama-3.1-8b.o"):
        variants = {}
        for name, seconds in (("frozen", 2e-4), ("peft", 4e-4), ("peft-half", 3e-4), ("lorafuse", 2e-4)):
            trains = "nothing" if name == "frozen" else "adapters"
            rounds = {
                part: [[round(seconds * draw.uniform(0.95, 1.05), 9) for _ in range(12)] for _ in range(3)]
                for part in ("forward", "backward")
            }
            variants[name] = {"label": name, "trains": trains, "seconds": rounds, "peak_bytes": 1, "between_bytes": 1}
        made = content(("wide",), (8192,), cuda="13.0", device="NVIDIA H200", **changes)
        work = {
            trains: {p: {"flops": 10**9, "bytes": 10**6} for p in ("forward", "backward")}
            for trains in ("nothing", "adapters")
        }
        result = made["results"][0] | {"case": case, "N": 4096, "K": 4096, "variants": variants, "work": work}
        results.append(figures.derive(result | {"peaks": {"flops_per_s": 1e13, "bytes_per_s": 1e12}}))
    return made | {"version": 3, "results": results}


PAGE = "docs/benchmarks.md"
RAW = "bench/results/h200-2026-12-01-linear.json"


def test_tables_follow_from_raw_rounds(tree, capsys):
    written = measured()
    put(tree, RAW, written)
    assert publish.main([], tree) == 0
    page = block(tree, "bench/README.md", "results")
    one = written["results"][0]["variants"]["peft-half"]
    pairs = [[a + b for a, b in zip(f, s, strict=True)] for f, s in zip(*one["seconds"].values(), strict=True)]
    frozen = written["results"][0]["variants"]["frozen"]["seconds"]
    floor = [[a + b for a, b in zip(f, s, strict=True)] for f, s in zip(*frozen.values(), strict=True)]
    ratios = [[a / b - 1 for a, b in zip(*pair, strict=True)] for pair in zip(pairs, floor, strict=True)]
    median = statistics.median([value for process in ratios for value in process])
    low, high = figures.bootstrap(ratios)
    assert f"{median:.0%} ({low * 100:.0f} to {high * 100:.0f})" in page
    message = " ".join(page.split())
    assert "over the fastest frozen (frozen forward, frozen backward), the median of the rounds' ratios" in message
    assert "95 % interval over 3 processes" in message
    # its one file has no raw rounds of another kind, and no figure is taken on trust
    for path in (("tax",), ("total", "median"), ("forward", "flops_per_s")):
        changed = json.loads(json.dumps(written))
        figure = changed["results"][1]["variants"]["lorafuse"]
        for key in path[:-1]:
            figure = figure[key]
        figure[path[-1]] *= 1.001
        put(tree, RAW, changed)
        assert publish.main([], tree) == 2
        assert "figures of llama-3.1-8b.o do not follow from its raw rounds" in capsys.readouterr().err


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_committed_files_follow_from_their_raw_rounds_or_say_that_they_have_none(file):
    """`load` refuses the others; those before version 3 have no rounds to say."""
    loaded = published.load(file)
    raw = [
        one for result in loaded.get("results", []) for one in result.get("variants", {}).values() if "seconds" in one
    ]
    assert bool(raw) == (loaded.get("version", 0) >= 3)


def test_a_negative_tax_that_straddles_zero_is_no_advantage(tree):
    written = measured()
    ours = written["results"][0]["variants"]["lorafuse"]
    assert ours["tax"] < 0 <= ours["tax_high"]
    put(tree, RAW, written)
    assert publish.main([], tree) == 0
    pages = block(tree, "bench/README.md", "results"), block(tree, "bench/README.md", "grid"), block(tree, PAGE)
    assert f"≈ 0 ({ours['tax_low'] * 100:.0f} to {ours['tax_high'] * 100:.0f})" in pages[0]
    assert all("| ≈ 0" in page for page in pages[:2])
    assert all(re.search(r"\| -\d+%", page) is None for page in pages)


def test_nothing_published_calls_a_tax_within_noise_an_advantage():
    """Of every committed file: a negative tax is shown only where its whole interval is below zero."""
    shown = 0
    for file in RESULTS:
        loaded = published.load(file)
        for result in loaded.get("results", []):
            for one in result.get("variants", {}).values():
                if one.get("tax", 0) < 0 and (ends := figures.interval(one)) is not None:
                    shown += 1
                    cell = tables._spread(one, result)
                    assert cell.startswith("≈ 0" if ends[1] >= 0 else "-"), (file.name, result["case"], cell)
    assert shown


def test_fewer_than_ten_rounds_are_not_published(tree):
    written = content(("wide", "narrow"), cuda="13.0", device="NVIDIA H200")
    written["results"][0]["rounds"] = 9
    put(tree, RAW, written)
    assert publish.main([], tree) == 0
    page = block(tree, "bench/README.md", "results").split(f"### {published.GPU_LAYERS.title}")[1].split("### ")[0]
    assert "| narrow" not in page.split("Not measured")[1]
    assert "wide, N 4096: 9 rounds, fewer than the 10 of published numbers" in " ".join(page.split())
    assert "| wide" not in page


def test_the_first_screen_has_the_weakest_factor_first_and_every_loser(tree):
    for name in ("rows", "linear", "moe", "model", "peers"):
        shutil.copy(ROOT / "bench" / "results" / f"h200-2026-11-26-{name}.json", tree / "bench" / "results")
    assert publish.main([], tree) == 0
    text = block(tree, PAGE)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "×" in line]
    factors = [float(row[2].partition("×")[0]) for row in rows]
    assert factors == sorted(factors)
    assert factors[0] < 1
    first = json.loads((ROOT / "bench/results/h200-2026-11-26-rows.json").read_text())["results"][1]["variants"]
    ours = first["lorafuse"]["total"]["median"]
    for label, name in (("GEMM + addmm_", "addmm"), ("PEFT, adapters in the base's dtype", "peft-half")):
        assert f"{ours / first[name]['total']['median'] - 1:.0%} behind {label}" in " ".join(text.split())
    # a step was measured against PEFT's default alone
    (step,) = [row for row in rows if "a training step" in row[0]]
    assert step[3:] == ["not yet measured", "1.40× |"]
    assert "of the data sheet" in block(tree, PAGE, "details")
    assert "-57%" not in text + block(tree, PAGE, "details")
    assert "| LoRA tax, experts of qwen3-30b-a3b, over the fastest frozen block | ≤ 8% | not yet measured |" in block(
        tree, "bench/README.md", "goals"
    )


def test_the_readme_names_the_weakest_factor_of_every_machine_and_leads_to_every_loser():
    readme, page = (ROOT / "README.md").read_text(), (ROOT / PAGE).read_text()
    assert len(readme.splitlines()) <= 120
    claim = " ".join(readme.partition("<!-- claim -->")[2].partition("<!-- /claim -->")[0].split())
    weakest: dict[tuple[bool, str], float] = {}
    for file in filter(None, (published.source_of(ROOT, one) for one in publish.FRONT)):
        content = published.load(file)
        for result in content["results"]:
            if factors := headline.factors(result):
                kind = result["kind"] or ("moe" if "routing" in result else "linear")
                key = "cuda" in content["conditions"], kind
                weakest[key] = min(weakest.get(key, 9.0), *factors.values())
    gpu, cpu = claim.split("; on CPUs")
    assert {(on_gpu, f"**{value:.2f}×**" in (gpu if on_gpu else cpu)) for (on_gpu, _), value in weakest.items()} == {
        (True, True),
        (False, True),
    }
    assert min(weakest.values()) < 1
    assert "(docs/benchmarks.md)" in readme
    assert "**Where others are more than 2% ahead**: llama-3.1-8b.q, M 512, R 16: 8% behind" in page
    assert "**Slower than full fine-tuning**" in page


def test_a_row_of_a_peer_says_which_projection_it_is():
    (result,) = published.load(ROOT / "bench/results/h200-2026-11-26-peers.json")["results"]
    assert result["variants"]["unsloth"]["label"] == "Unsloth, o_proj's LoRA_W"
    assert result["variants"]["axolotl"]["label"] == "Axolotl, o_proj's apply_lora_o"


def test_loss_curves_are_the_evidence_where_there_are_some(tree):
    """Without them random losses are called a check."""
    file = "bench/results/h200-2026-12-01-model.json"
    old = json.loads((ROOT / "bench/results/h200-2026-11-26-model.json").read_text())
    put(tree, file, old)
    assert publish.main([], tree) == 0
    details = " ".join(block(tree, PAGE, "details").split())
    assert "a check and no evidence: weights and tokens were random. AdamW was torch's default" in details
    apart = {"median": 1e-4, "low": -2e-4, "high": 3e-4, "largest": 1e-3}
    curve = {"rate": 5e-4, "losses": [2.5, 2.0, 1.5], "learned": 1.0, "held_out": 1.75}
    curves = {"peft": curve, "lorafuse": curve | {"from_peft": apart}}
    for result in old["results"]:
        result |= {"data": "gsm_symbolic", "optimizer": "AdamW, fused", "curves": curves}
    put(tree, file, old)
    assert publish.main([], tree) == 0
    details = " ".join(block(tree, PAGE, "details").split())
    assert "3 steps on gsm_symbolic: the loss fell by 1.000; lorafuse's is +1.0e-04 (-2.0e-04 to +3.0e-04)" in details
    page = block(tree, "bench/README.md", "results")
    assert ", lorafuse | 3 | 2.5000 | 1.5000 | 1.7500 | +1.0e-04 (-2.0e-04 to +3.0e-04) |" in page
