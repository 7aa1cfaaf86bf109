"""Result files, and the exceptions of results that have no figures."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lorafuse.files import read_json, write_text

__all__ = ["VERSION", "Failed", "Wrong", "read", "rows", "shown", "with_adapters", "write_csv", "write_json"]

# of what is written; files of version 2 have no raw rounds, and taxes that are ratios of medians
VERSION = 3
_READABLE = (2, 3)


class Wrong(Exception):
    """A wrong result: none of its numbers is shown."""


class Failed(Exception):
    """A variant could not run; the message is the reason."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the file atomically: an interrupted run leaves the former one."""
    text = json.dumps(content, indent=1)
    # the raw rounds of a process on one line
    text = re.sub(r"\[[\d.,\seE+-]+\]", lambda match: " ".join(match[0].split()), text)
    write_text(path, text + "\n")


def read(path: Path) -> dict[str, Any]:
    """A file that `write_json` wrote. Raises ValueError, with the path and the fix, for any other one."""
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: it is not JSON ({error}); write it again with lorafuse bench --json") from error
    if not isinstance(content, dict) or content.get("version") not in _READABLE or "results" not in content:
        versions = " or ".join(map(str, _READABLE))
        raise ValueError(f"{path}: it is not of version {versions}; write it again with lorafuse bench --json")
    return content


def write_csv(path: Path, content: dict[str, Any]) -> None:
    """One line for each variant of each result: the sizes, then every figure; the conditions as comments on top."""
    lines = list(rows(content))
    names = list(dict.fromkeys(name for line in lines for name in line))
    file = io.StringIO(newline="")
    for name, value in content["conditions"].items():
        file.write(f"# {name}: {value}\n")
    writer = csv.DictWriter(file, names, restval="")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, file.getvalue())


def rows(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The figures of every variant of every result as one flat mapping each; "total.median" and the like in seconds."""
    for result in content["results"]:
        sizes = {name: value for name, value in result.items() if not isinstance(value, dict | list)}
        for variant, figures in result.get("variants", {}).items():
            yield {**sizes, "variant": variant, **_flat(figures)}


def with_adapters(result: dict[str, Any], figure: str) -> list[str]:
    """The variants of a result that train adapters and have that figure (files before version 2 have no "trains")."""
    return [
        name
        for name, one in result["variants"].items()
        if figure in one and one.get("trains", "adapters") == "adapters" and name not in ("frozen", "full")
    ]


def shown(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], notes: list[str], wrap: bool = True
) -> Any:
    """rich's table; columns with a head are numbers, and stand right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, caption="\n".join(notes), box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=not wrap)
    for row in rows:
        table.add_row(*row)
    return table


def _flat(figures: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in figures.items():
        if name == "seconds":
            # raw rounds are in the JSON alone
            continue
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
