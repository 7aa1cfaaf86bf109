"""A copy of what is published and of what that is made from, which tests change and publish again."""

import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import publish  # noqa: E402

RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))


def copied(tmp_path):
    """A copy of what is published and of what that is made from, without the newer files' slots filled."""
    for name in ("README.md", "docs/benchmarks.md", "bench/README.md", "bench/numbers.md", "docs/performance.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bench" / "results").mkdir()
    for file in RESULTS:
        if "xeon" in file.name:
            shutil.copy(file, tmp_path / "bench" / "results")
    assert publish.main([], tmp_path) == 0
    return tmp_path


def check(tree, capsys):
    """Status of --check and what it printed; it writes nothing."""
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    capsys.readouterr()
    status = publish.main(["--check"], tree)
    assert before == {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    return status, capsys.readouterr().out


def block(tree, name="README.md", marker="numbers"):
    return re.search(rf"<!-- {marker} -->\n(.*)<!-- /{marker} -->", (tree / name).read_text(), re.DOTALL)[1]


def put(tree, name, written):
    (tree / name).write_text(json.dumps(written))
