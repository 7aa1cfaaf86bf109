"""What a run of bench/gpu.py left in its folders: a short table, and the files of bench/results made of it."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from measured import device_of
from result_tables import tax_text

from lorafuse.bench.result import write_json

__all__ = ["collect", "contents", "lines"]

Content = dict[str, Any]
_RESULTS = Path("bench") / "results"
# files of another form than those of `lorafuse bench`, by the step's name
_SCRIPTS = ("probes", "hopper", "decode")
# rows of the layers that a file of their own holds; other rows and ranks are in one too
_USUAL_ROWS = 8192


def contents(folders: Iterable[Path]) -> list[Content]:
    """The files of `lorafuse bench` in those folders."""
    files = [file for folder in folders for file in sorted(folder.glob("*.json"))]
    loaded = [json.loads(file.read_text()) for file in files]
    return [one for one in loaded if "version" in one]


def lines(folders: Iterable[Path]) -> Iterator[str]:
    """One line for each measured layer, block or model: tax, or tokens/s, of every variant."""
    for content in contents(folders):
        for result in content["results"]:
            if content["kind"] == "model":
                rates = "  ".join(
                    f"{name} {one['tokens_per_s']:.0f}" + (f" (tax {tax_text(one)})" if "tax" in one else "")
                    for name, one in result["variants"].items()
                )
                yield f"{result['case']}, tokens/s: {rates}"
                continue
            frozen = result["variants"]["frozen"]["total"]["median"] * 1e6
            taxes = "  ".join(
                f"{name} {tax_text(one)}" for name, one in result["variants"].items() if one["trains"] == "adapters"
            )
            yield f"{result['case']} M {result['M']} R {result['R']}: frozen {frozen:.0f} us, tax: {taxes}"


def collect(folders: list[Path], root: Path) -> list[Path]:
    """Write the results of those folders as `bench/results/<gpu>-<date>-<kind>.json`, and return the files.

    Results of one size replace those that such a file holds. Raises ValueError for a device that the planner does not
    know, and where files of one kind were measured under several conditions: each then needs a call of its own, since
    a file says its conditions once.
    """
    merged: dict[str, Content] = {}
    dates: dict[str, str] = {}
    for folder in folders:
        for file in sorted(folder.glob("*.json")):
            if file.name == "gpu.json":
                continue
            content = json.loads(file.read_text())
            for kind, part in _by_kind(file.stem, content):
                _merge(merged, kind, part, file)
                date = content["conditions"]["date"]
                dates[kind] = min(dates.get(kind, date), date)
    if not merged:
        raise ValueError(f"{', '.join(map(str, folders))}: no results are there")
    written = []
    for kind, content in merged.items():
        device = device_of(content["conditions"]["device"])
        if device is None:
            raise ValueError(f"{content['conditions']['device']}: the planner does not know it; add it to its devices")
        content["conditions"]["date"] = dates[kind]
        slug = re.sub(r"\W+", "-", device.model.lower())
        path = root / _RESULTS / f"{slug}-{dates[kind].split()[0]}-{kind}.json"
        if path.exists():
            _merge(earlier := {kind: json.loads(path.read_text())}, kind, content, path)
            content = earlier[kind]
        write_json(path, content)
        written.append(path)
    return written


def _by_kind(name: str, content: Content) -> Iterator[tuple[str, Content]]:
    """The parts of a step's file by the name of the file they go into."""
    if name in _SCRIPTS:
        yield name, content
        return
    for kind in (content["kind"], "rows"):
        results = [one for one in content["results"] if _kind_of(content["kind"], one) == kind]
        if results:
            yield kind, content | {"results": results}


def _kind_of(kind: str, result: Content) -> str:
    return "rows" if kind == "linear" and result["M"] != _USUAL_ROWS else kind


def _merge(merged: dict[str, Content], kind: str, part: Content, file: Path) -> None:
    if kind not in merged:
        merged[kind] = part | {"conditions": dict(part["conditions"])}
        return
    into = merged[kind]
    ours, theirs = ({k: v for k, v in one["conditions"].items() if k != "date"} for one in (into, part))
    if ours != theirs:
        differing = sorted(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
        parts = (f"{key} {ours.get(key)} and {theirs.get(key)}" for key in differing)
        raise ValueError(f"{file}: {kind} was measured with {'; '.join(parts)}: collect them one by one")
    names = {_size(one) for one in part["results"]}
    into["results"] = [one for one in into["results"] if _size(one) not in names] + part["results"]
    if "not_run" in into:
        into["not_run"] |= part["not_run"]


def _size(result: Content) -> tuple[Any, ...]:
    """What tells the results of one kind apart; N of groups and R of many adapters are lists."""
    return tuple(str(result.get(key)) for key in ("case", "name", "M", "N", "K", "R", "routing", "storage"))
