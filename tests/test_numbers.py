"""The numbers in README.md are those of the committed result file; a failure prints the table to paste."""

import json
from pathlib import Path

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
