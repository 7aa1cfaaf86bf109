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
        assert {"device", "torch", "date", "commit"} <= json.loads(file.read_text())["conditions"].keys(), file
