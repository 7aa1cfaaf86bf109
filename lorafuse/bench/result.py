"""What a benchmark may end in besides figures, and the files its figures are written to."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["VERSION", "Failed", "Wrong", "geomean", "read", "rows", "with_adapters", "write_csv", "write_json"]

VERSION = 2


class Wrong(Exception):
    """A result that is not right: no number of it is shown."""


class Failed(Exception):
    """A variant that could not run, and why."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the file whole or not at all, so that an interrupted run leaves the former one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, path)


def read(path: Path) -> dict[str, Any]:
    """A file that `write_json` wrote. Raises ValueError, with the path and the fix, for any other one."""
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: it is not JSON ({error}); write it again with lorafuse bench --json") from error
    if content.get("version") != VERSION or "results" not in content:
        raise ValueError(f"{path}: it is not of version {VERSION}; write it again with lorafuse bench --json")
    return content


def write_csv(path: Path, content: dict[str, Any]) -> None:
    """One line for each variant of each result: the sizes, then every figure; the conditions as comments on top."""
    lines = list(rows(content))
    names = list(dict.fromkeys(name for line in lines for name in line))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        for name, value in content["conditions"].items():
            file.write(f"# {name}: {value}\n")
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(lines)


def rows(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The figures of every variant of every result as one flat mapping each; "total.median" and the like in seconds."""
    for result in content["results"]:
        sizes = {name: value for name, value in result.items() if not isinstance(value, dict | list)}
        for variant, figures in result.get("variants", {}).items():
            yield {**sizes, "variant": variant, **_flat(figures)}


def with_adapters(result: dict[str, Any], figure: str) -> list[str]:
    """The variants of a result that train adapters and have that figure; files before version 2 do not say who does."""
    return [
        name
        for name, one in result["variants"].items()
        if figure in one and one.get("trains", "adapters") == "adapters" and name not in ("frozen", "full")
    ]


def geomean(values: list[float]) -> float:
    """Geometric mean of positive values. Raises ValueError for none."""
    if not values:
        raise ValueError("no values to take the mean of")
    product = 1.0
    for value in values:
        product *= value ** (1 / len(values))
    return product


def _flat(figures: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in figures.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
