"""Measurements that overrule the model, one file a GPU: the user's own, and after them those shipped with the package.

`lorafuse tune` writes `tuned/<gpu>.json` in the folder of LORAFUSE_CACHE_DIR; `plan/measured/<gpu>.json` ships, made
from bench/results/ by bench/measured.py. Both are

    {"version": 4, "entries": [{"N": 4096, "K": 4096, "R": [1, 16], "M": [1024, 16384], "dtype": "bfloat16",
      "dropout": false, "gradients": [], "kernel": "two_kernel", "seconds": 0.00037, "commit": "…", "date": "…",
      "points": [[1024, 1, 0.00005], [16384, 16, 0.00037]], "conditions": {"torch": "…", "triton": "…"},
      "format": "dense", "groups": 1, "siblings": 1, "epilogue": ""}]}

An entry applies to problems with the same N, K, dtype, dropout, gradients (none is a forward pass), format, groups,
siblings and epilogue whose M and R lie in its ranges, ends included, whose rows are aligned and whose xa is not fp32
over fp16; adapter dtype and bias do not matter. N and R of siblings are sums. One of a layer without an epilogue
applies to the same layer with one too, where none of it was measured. One of dense weights applies to quantized ones
too: whatever runs decodes them first, at the same cost. `kernel` was fastest there, or as fast as any within noise.
`points` are what was measured, `[M, R, seconds]`, and `seconds` those of the last. Version 3 has neither siblings (1
then) nor epilogue, version 2 neither format nor groups, which are dense and 1 then, version 1 neither points nor
conditions. A file that cannot be read or breaks the format counts for nothing: one warning, and plans follow the model.
"""

import json
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Container, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from lorafuse import env, files
from lorafuse.errors import one_line
from lorafuse.plan.devices import DeviceSpec
from lorafuse.plan.problem import Problem

__all__ = ["KERNELS", "Tuned", "file_name", "load", "match", "own_file", "read", "text_of", "write"]

_STEPS = ("two_kernel", "one_pass_backward", "ragged")
# the CUDA kernels do the same steps as Triton's, or xa in y's launch in three forms, or in dx's da and db, or dyb too;
# or layers of one x together, of gate and up with down's xa too
_ONE_LAUNCH = (
    "xa_in_tiles",
    "split_k",
    "fused_forward",
    "concurrent_backward",
    "fused_backward",
    "siblings",
    "siblings_ha",
)
_CUDA = tuple(f"cuda {name}" for name in (*_STEPS, *_ONE_LAUNCH, "gathered"))
KERNELS = ("aten_beta1", "aten_addmm", "grouped_mm", "loop", *_STEPS, "siblings", "packed", *_CUDA)
# names in older files; entries of "", kernels that no longer exist, are left out
_FORMER_NAMES = {
    "cuda one_launch_backward": "cuda concurrent_backward",
    "cuda single_kernel": "",
    "cuda fused_xa": "",
    "single_kernel": "",
    "fused_xa": "",
}
FOLDER = Path(__file__).parent / "measured"
_VERSION = 4
# an entry takes some 500 bytes: thousands of layers
_MOST_BYTES = 2**24
# M, R, seconds
_Point = tuple[int, int, float]


def _is_text(value: Any) -> bool:
    # reasons and reports print it
    return isinstance(value, str) and value.isprintable()


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**63


def _is_time(value: Any) -> bool:
    # NaN is not within them
    return type(value) in (int, float) and 0 < value < 1e9


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_size, value)) and value[0] <= value[1]


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_size, value[:2])) and _is_time(value[2])


def _are(of_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(of_one, value))


def _are_conditions(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(text) for item in value.items() for text in item)


_SIZE, _TEXT = (_is_size, "a whole number from 1"), (_is_text, "a text")
_RANGE = _is_range, "[lowest, highest]"
# each field: whether a value is right, and what it must be
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "N": _SIZE,
    "K": _SIZE,
    "R": _RANGE,
    "M": _RANGE,
    "dtype": _TEXT,
    "dropout": (lambda value: isinstance(value, bool), "true or false"),
    "gradients": (_are(_is_text), "a list of names"),
    "kernel": (lambda value: value in (*KERNELS, *_FORMER_NAMES), f"one of {', '.join(KERNELS)}"),
    "seconds": (_is_time, "a number above 0"),
    "commit": _TEXT,
    "date": _TEXT,
}
_SINCE_2 = {
    "points": (_are(_is_point), "a list of [M, R, seconds], all above 0"),
    "conditions": (_are_conditions, "texts by name"),
}
_SINCE_3 = _FIELDS | _SINCE_2 | {"format": _TEXT, "groups": _SIZE}
_FIELDS_OF = {1: _FIELDS, 2: _FIELDS | _SINCE_2, 3: _SINCE_3, 4: _SINCE_3 | {"siblings": _SIZE, "epilogue": _TEXT}}


@dataclass(frozen=True)
class Tuned:
    """One measured choice; `own` says that it is from the user's file."""

    N: int
    K: int
    R: tuple[int, int]
    M: tuple[int, int]
    dtype: str
    dropout: bool
    gradients: tuple[str, ...]
    kernel: str
    seconds: float
    commit: str
    date: str
    points: tuple[_Point, ...] = ()
    conditions: dict[str, str] = field(default_factory=dict)
    format: str = "dense"
    groups: int = 1
    siblings: int = 1
    epilogue: str = ""
    own: bool = False

    def is_of(self, problem: Problem) -> bool:
        """Whether it is of the problem's layer and pass, whatever their M and R."""
        p = problem
        kind = self.N, self.K, self.dtype, self.dropout, self.gradients, self.format, self.groups
        of_group = self.siblings, self.epilogue
        return kind == (p.N, p.K, p.dtype, p.dropout, p.gradients, p.format, p.groups) and of_group == (
            p.siblings, p.epilogue
        )  # fmt: skip

    def covers(self, problem: Problem) -> bool:
        """Whether it applies to the problem."""
        ranges = self.M[0] <= problem.M <= self.M[1] and self.R[0] <= problem.R <= self.R[1]
        plain = problem if problem.siblings > 1 else replace(problem, epilogue="")
        is_of = any(self.is_of(one) for one in (problem, plain, replace(plain, format="dense")))
        return ranges and is_of and problem.aligned and not problem.wide

    def reason(self, problem: Problem, device: str) -> str:
        """Why its kernel is chosen, with the time at the nearest measured point."""
        where, seconds = "", self.seconds
        if self.points:
            M, R, seconds = min(
                self.points, key=lambda p: abs(math.log(p[0] / problem.M)) + abs(math.log(p[1] / problem.R))
            )
            where = f" at M {M}, R {R}"
        if self.format != problem.format:
            where += f" of {self.format} weights"
        whose = "by lorafuse tune" if self.own else "shipped"
        by = f"{self.date}, commit {self.commit}, {whose}"
        return f"fastest within noise when measured on {device}: {seconds * 1e6:.0f} us{where} ({by})"


def file_name(model: str) -> str:
    """The name of the file of a GPU model."""
    return re.sub(r"[^a-z0-9]+", "-", model.lower()) + ".json"


def own_file(model: str) -> Path:
    """Where the user's measurements of a GPU model are kept."""
    return env.cache_dir() / "tuned" / file_name(model)


@cache
def load(model: str) -> tuple[Tuned, ...]:
    """The entries for a GPU model, the user's first, none when there is no file. Warns of a file that `read` refuses,
    whose entries are left out.
    """
    entries: tuple[Tuned, ...] = ()
    for path, own in ((own_file(model), True), (FOLDER / file_name(model), False)):
        try:
            entries += read(path, own)
        except ValueError as error:
            message = f"plans follow the model instead of measurements: {error}"
            try:
                warnings.warn(message, stacklevel=2)
            except UserWarning:
                # -W error: no step may fail for it
                logging.getLogger(__name__).warning(message)
    return entries


def read(path: Path, own: bool = False) -> tuple[Tuned, ...]:
    """The entries of a file, none when it is not there. Raises ValueError, with the file, for one that cannot be read
    or breaks the format; of the user's `own` it says how to get rid of it.
    """
    # nor is it in a folder that this user may not enter, such as the home of another
    if not os.path.lexists(path):
        return ()
    try:
        content = files.read_json(path, _MOST_BYTES)
        version = content.get("version") if isinstance(content, dict) else None
        if type(version) is not int or version not in _FIELDS_OF or not isinstance(content.get("entries"), list):
            raise ValueError(f'it must hold {{"version": {_VERSION}, "entries": […]}}')
        entries = (_entry(entry, version, own, f"entry {i}") for i, entry in enumerate(content["entries"]))
        return tuple(entry for entry in entries if entry.kernel)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        fix = "; delete it, and measure again with lorafuse tune" if own else ""
        raise ValueError(one_line(f"{path}: {reason}{fix}")) from error


def _entry(entry: Any, version: int, own: bool, where: str) -> Tuned:
    fields = _FIELDS_OF[version]
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: it is {_shown(entry)}; it must be an object")
    if entry.keys() != fields.keys():
        raise ValueError(f"{where}: it has the fields {_shown(sorted(entry))}; they must be {sorted(fields)}")
    for name, (is_right, rule) in fields.items():
        if not is_right(entry[name]):
            raise ValueError(f"{where}: {name} is {_shown(entry[name])}; it must be {rule}")
    values = entry | {name: tuple(entry[name]) for name in ("M", "R", "gradients")}
    values |= {"kernel": _FORMER_NAMES.get(entry["kernel"], entry["kernel"]), "own": own}
    return Tuned(**values | {"points": tuple(map(tuple, entry.get("points", ())))})


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def write(path: Path, entries: Iterable[Tuned]) -> None:
    """Replace a file by one of these entries, as a whole or not at all; its folder is made, every user may read it.

    Raises OSError where it cannot be written.
    """
    files.write_text(path, text_of(entries))


def text_of(entries: Iterable[Tuned]) -> str:
    """The content of a file of these entries."""
    plain = [{name: value for name, value in asdict(entry).items() if name != "own"} for entry in entries]
    lines = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in plain)
    return f'{{"version": {_VERSION}, "entries": [\n  {lines}\n]}}\n'


def match(
    problem: Problem,
    device: DeviceSpec,
    kernels: Container[str],
    own: bool = True,
    entries: Iterable[Tuned] | None = None,
) -> Tuned | None:
    """The first measurement that applies to a problem on a device and names one of `kernels`, if there is one.

    Of `entries`, or of those in files; without `own` the user's are passed over.
    """
    known = (entry for entry in (load(device.model) if entries is None else entries) if own or not entry.own)
    covering = (entry for entry in known if entry.covers(problem) and entry.kernel in kernels)
    # one of the format and epilogue themselves before the others; min returns the first of several
    return min(
        covering, key=lambda e: (e.format != problem.format) + (e.epilogue != problem.epilogue), default=None
    )  # fmt: skip
