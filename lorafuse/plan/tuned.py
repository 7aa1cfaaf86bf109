"""Measurements that overrule the model, one file a GPU: the user's own, and after them those shipped with the package.

`lorafuse tune` writes `tuned/<gpu>.json` in the folder of LORAFUSE_CACHE_DIR; `plan/tuned/<gpu>.json` ships. Both are

    {"version": 2, "entries": [{"N": 4096, "K": 4096, "R": [1, 16], "M": [1024, 16384], "dtype": "bfloat16",
      "dropout": false, "gradients": [], "kernel": "two_kernel", "seconds": 0.00037, "commit": "…", "date": "…",
      "points": [[1024, 1, 0.00005], [16384, 16, 0.00037]], "conditions": {"torch": "…", "triton": "…"}}]}

An entry speaks for passes of its N, K, dtype, dropout and gradients (none is a forward pass) whose M and R lie in its
ranges, ends included, whose rows are aligned and whose xa is not fp32 over fp16; adapter dtype and bias do not matter.
`kernel` was fastest there, or as fast as any within noise. `points` are what was measured, `[M, R, seconds]`, and
`seconds` those of the last; version 1 has neither points nor conditions.
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lorafuse import env
from lorafuse.plan.device import DeviceSpec
from lorafuse.plan.problem import Problem

__all__ = ["KERNELS", "Tuned", "load", "match", "name_of", "own_file", "read", "write"]

_TRITON = ("two_kernel", "single_kernel", "one_pass_backward")
# name: backend; the CUDA kernels do the same steps as Triton's, or da and db in dx's launch
KERNELS = {"aten_beta1": "eager", **dict.fromkeys(_TRITON, "triton")}
KERNELS |= {f"cuda {name}": "cuda" for name in (*_TRITON, "one_launch_backward")}
_FOLDER = Path(__file__).parent / "tuned"
_VERSION = 2
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "N": int, "K": int, "R": list, "M": list, "dtype": str, "dropout": bool, "gradients": list, "kernel": str,
    "seconds": (int, float), "commit": str, "date": str,
}  # fmt: skip
_FIELDS_OF = {1: _FIELDS, 2: _FIELDS | {"points": list, "conditions": dict}}
# M, R, seconds
_Point = tuple[int, int, float]


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
    own: bool = False

    def is_of(self, problem: Problem) -> bool:
        """Whether it is of the problem's layer and pass, whatever their M and R."""
        kind = self.N, self.K, self.dtype, self.dropout, self.gradients
        return kind == (problem.N, problem.K, problem.dtype, problem.dropout, problem.gradients)

    def covers(self, problem: Problem) -> bool:
        """Whether it speaks for the problem."""
        ranges = self.M[0] <= problem.M <= self.M[1] and self.R[0] <= problem.R <= self.R[1]
        return ranges and self.is_of(problem) and problem.aligned and not problem.wide

    def said(self, problem: Problem, device: str) -> str:
        """The reason that it gives for its kernel, with the time at the measured point that is nearest."""
        where, seconds = "", self.seconds
        if self.points:
            M, R, seconds = min(
                self.points, key=lambda p: abs(math.log(p[0] / problem.M)) + abs(math.log(p[1] / problem.R))
            )
            where = f" at M {M}, R {R}"
        whose = "by lorafuse tune" if self.own else "shipped"
        by = f"{self.date}, commit {self.commit}, {whose}"
        return f"fastest within noise when measured on {device}: {seconds * 1e6:.0f} us{where} ({by})"


def name_of(backend: str, kernel: str) -> str:
    """The name in `KERNELS` of a backend's kernel."""
    return f"cuda {kernel}" if backend == "cuda" else kernel


def _file_name(model: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", model.lower()) + ".json"


def own_file(model: str) -> Path:
    """Where the user's measurements of a GPU model are kept."""
    return env.cache_dir() / "tuned" / _file_name(model)


@cache
def load(model: str) -> tuple[Tuned, ...]:
    """The entries for a GPU model, the user's first, none when there is no file. Raises as `read` does."""
    return read(own_file(model), own=True) + read(_FOLDER / _file_name(model))


def read(path: Path, own: bool = False) -> tuple[Tuned, ...]:
    """The entries of a file, none when it is not there. Raises ValueError, with the file, for one that cannot be read
    or breaks the format; of the user's `own` it says how to get rid of it.
    """
    # Path.exists raises in the home of another user
    if not os.path.exists(path):
        return ()
    try:
        content = json.loads(path.read_text())
        version = content.get("version") if isinstance(content, dict) else None
        if version not in tuple(_FIELDS_OF) or not isinstance(content.get("entries"), list):
            raise ValueError(f'it must hold {{"version": {_VERSION}, "entries": […]}}')
        return tuple(_entry(entry, version, own, f"entry {i}") for i, entry in enumerate(content["entries"]))
    except (OSError, ValueError) as error:
        fix = "; delete it, and measure again with lorafuse tune" if own else ""
        raise ValueError(f"{path}: {error}{fix}") from error


def _entry(entry: Any, version: int, own: bool, where: str) -> Tuned:
    fields = _FIELDS_OF[version]
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: it is {entry!r}; it must be an object")
    if entry.keys() != fields.keys():
        raise ValueError(f"{where}: it has the fields {sorted(entry)}; they must be {sorted(fields)}")
    for name, kind in fields.items():
        if not isinstance(entry[name], kind):
            raise ValueError(f"{where}: {name} is {entry[name]!r}")
    for name in ("M", "R"):
        low_high = entry[name]
        if len(low_high) != 2 or not all(isinstance(v, int) for v in low_high) or low_high[0] > low_high[1]:
            raise ValueError(f"{where}: {name} is {low_high!r}; it must be [lowest, highest]")
    if entry["kernel"] not in KERNELS:
        raise ValueError(f"{where}: kernel {entry['kernel']!r} is not one of {', '.join(KERNELS)}")
    for point in entry.get("points", ()):
        numbers = isinstance(point, list) and len(point) == 3 and all(isinstance(v, int | float) for v in point)
        if not numbers or min(point) <= 0:
            raise ValueError(f"{where}: the point {point!r} must be [M, R, seconds], all above 0")
    values = entry | {name: tuple(entry[name]) for name in ("M", "R", "gradients")}
    return Tuned(**values | {"points": tuple(map(tuple, entry.get("points", ()))), "own": own})


def write(path: Path, entries: Iterable[Tuned]) -> None:
    """Replace a file by one of these entries, as a whole or not at all; its folder is made.

    Raises OSError where it cannot be written.
    """
    plain = [{name: value for name, value in asdict(entry).items() if name != "own"} for entry in entries]
    lines = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, suffix=".tmp", encoding="utf-8", delete=False
    ) as file:
        try:
            file.write(f'{{"version": {_VERSION}, "entries": [\n  {lines}\n]}}\n')
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def match(problem: Problem, device: DeviceSpec, kernels: Container[str] = KERNELS, own: bool = True) -> Tuned | None:
    """The first measurement that speaks for a problem on a device and names one of `kernels`, if there is one.

    Without `own` the user's are passed over.
    """
    known = (entry for entry in load(device.model) if own or not entry.own)
    return next((entry for entry in known if entry.covers(problem) and entry.kernel in kernels), None)
