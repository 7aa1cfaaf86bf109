"""The numbers in README.md are those of the committed result file; a failure prints the table to paste."""

import json
from dataclasses import replace
from pathlib import Path

from lorafuse.plan import Problem, cost, find, select
from lorafuse.plan.experts import WAYS, ExpertsProblem

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu-xeon-amx-2026-11-24.json"
COLUMNS = {
    "peft": "PEFT as shipped",
    "peft-half": "PEFT, bf16 adapters",
    "addmm": "GEMM + `addmm_`",
    "lorafuse": "lorafuse",
}


def table(written):
    lines = ["| layer (N × K) | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for result in written["results"]:
        taxes = (f"{result['variants'][name]['tax']:.0%}" for name in COLUMNS)
        lines.append(f"| {result['case']} ({result['N']} × {result['K']}) | " + " | ".join(taxes) + " |")
    return "\n".join(lines)


def test_readme_quotes_the_result_file():
    written = json.loads(RESULTS.read_text())
    readme = (ROOT / "README.md").read_text()
    assert table(written) in readme, table(written)
    for key in ("device", "torch", "peft", "commit"):
        assert written["conditions"][key] in readme, (key, written["conditions"][key])


def moe_table(written):
    lines = [
        "| routing | full fine-tuning | PEFT as shipped | split grouped GEMM | lorafuse |",
        "|---|---:|---:|---:|---:|",
    ]
    for result in written["results"]:
        times = [result["variants"][name]["total"]["median"] * 1e3 for name in ("full", "peft", "split", "lorafuse")]
        taxes = [f"{result['variants'][name]['tax']:.0%}" for name in ("peft", "split", "lorafuse")]
        cells = [f"{times[0]:.0f} ms", *(f"{ms:.0f} ms, {tax}" for ms, tax in zip(times[1:], taxes, strict=True))]
        frozen = result["variants"]["frozen"]["total"]["median"] * 1e3
        lines.append(f"| {result['routing']} (frozen {frozen:.0f} ms) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_readme_quotes_the_experts():
    written = json.loads(RESULTS.with_name(f"{RESULTS.stem}-moe.json").read_text())
    assert moe_table(written) in (ROOT / "README.md").read_text(), moe_table(written)


def test_result_files_say_their_conditions():
    files = list(RESULTS.parent.glob("*.json"))
    assert RESULTS in files
    for file in files:
        found = json.loads(file.read_text())["conditions"]
        assert all(found.get(key) for key in ("device", "torch", "date", "commit")), file


def demo_line(full, half):
    def of(figures, key):
        return [figures[name][key] for name in ("PEFT as shipped", "patched by lorafuse")]

    figures = half["figures"]
    steps = " → ".join(f"{seconds * 1e3:.0f}" for seconds in of(figures, "step_seconds_median"))
    peaks = " → ".join(f"{peak / 2**20:.0f}" for peak in of(figures, "peak_bytes_of_a_step"))
    return (
        f"bf16 step {steps} ms ({figures['speedup']:.2f}×), peak memory {peaks} MiB; fp32 step "
        f"{full['figures']['speedup']:.2f}×, loss curves equal within {full['figures']['largest_loss_difference']:.0e}"
    )


def test_readme_quotes_the_demo_reports():
    full, half = (
        json.loads(RESULTS.with_name(f"{RESULTS.stem}-demo-{dtype}.json").read_text())
        for dtype in ("float32", "bfloat16")
    )
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert demo_line(full, half) in readme, demo_line(full, half)


def gpu_table():
    """What the model says of one layer on an H200, in microseconds, as README.md shows it while nothing is measured."""
    device, forward = find("H200"), Problem(8192, 4096, 4096, 16, "bfloat16", "float32")
    problems = forward, replace(forward, gradients=("dx", "da", "db"))
    plans = [select(problem, device, (("eager", ""), ("triton", ""))) for problem in problems]
    rows = {name: [cost.total(way(problem, device)) for problem in problems] for name, way in cost.BASELINES.items()}
    base = sum(rows["frozen"])
    for name, kernels in {
        "lorafuse, eager": ("aten_beta1", "aten_beta1"),
        "lorafuse, Triton": ("two_kernel", "one_pass_backward"),
        "lorafuse, Triton, forward in a single kernel": ("single_kernel", "one_pass_backward"),
    }.items():
        ways = [{way.kernel: way.seconds for way in plan.candidates} for plan in plans]
        rows[name] = [way[kernel] for way, kernel in zip(ways, kernels, strict=True)]
    lines = []
    for name, (forward, backward) in rows.items():
        tax = f"{(forward + backward) / base - 1:.1%}"
        lines.append(f"| {name} | {forward * 1e6:.0f} µs | {backward * 1e6:.0f} µs | {tax} | not yet measured |")
    return "\n".join(lines)


def test_readme_quotes_the_model():
    assert gpu_table() in (ROOT / "README.md").read_text(), gpu_table()


def experts_table():
    """What the model says of one block's experts on an H200, as docs/performance.md shows it."""
    block, device = ExpertsProblem(8192, 128, 8, 2048, 768, 16, "bfloat16", "float32"), find("H200")
    times = {n: [cost.total(way(block, device, backward)) for backward in (False, True)] for n, way in WAYS.items()}
    base = sum(times["frozen"])
    lines = []
    for name, (forward, backward) in times.items():
        label = "frozen, torch's grouped_mm" if name == "frozen" else name
        tax = f" {(forward + backward) / base - 1:.1%}".replace("%", " %") if name != "frozen" else ""
        lines.append(f"| {label} | {forward * 1e6:.0f} | {backward * 1e6:.0f} |{tax} |")
    return "\n".join(lines)


def test_the_model_of_experts_is_quoted():
    assert experts_table() in (ROOT / "docs" / "performance.md").read_text(), experts_table()
