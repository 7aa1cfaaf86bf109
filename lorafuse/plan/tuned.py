"""Measurements that overrule the model: `plan/tuned/<gpu>.json`, one file a GPU.

    {"version": 1, "entries": [{"N": 4096, "K": 4096, "R": [1, 16], "M": [1024, 16384], "dtype": "bfloat16",
      "dropout": false, "gradients": [], "kernel": "two_kernel", "seconds": 0.00037, "commit": "…", "date": "…"}]}

An entry speaks for passes of its N, K, dtype, dropout and gradients (none is a forward pass) whose M and R lie in its
ranges, ends included, and whose rows are aligned; adapter dtype and bias do not matter. `kernel` was fastest there.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lorafuse.plan.device import DeviceSpec
from lorafuse.plan.problem import Problem

__all__ = ["KERNELS", "Tuned", "load", "match", "name_of"]

_TRITON = ("two_kernel", "single_kernel", "one_pass_backward")
# name: backend; the CUDA kernels do the same steps as Triton's
KERNELS = {"aten_beta1": "eager", **dict.fromkeys(_TRITON, "triton")} | {f"cuda {name}": "cuda" for name in _TRITON}
_FOLDER = Path(__file__).parent / "tuned"
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "N": int, "K": int, "R": list, "M": list, "dtype": str, "dropout": bool, "gradients": list, "kernel": str,
    "seconds": (int, float), "commit": str, "date": str,
}  # fmt: skip


@dataclass(frozen=True)
class Tuned:
    """One measured choice."""

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


def name_of(backend: str, kernel: str) -> str:
    """The name in `KERNELS` of a backend's kernel."""
    return f"cuda {kernel}" if backend == "cuda" else kernel


@cache
def load(model: str) -> tuple[Tuned, ...]:
    """The entries for a GPU model, none when it has no file. Raises ValueError for a file that breaks the format."""
    path = _FOLDER / (re.sub(r"[^a-z0-9]+", "-", model.lower()) + ".json")
    if not path.exists():
        return ()
    content = json.loads(path.read_text())
    if content.get("version") != 1 or not isinstance(content.get("entries"), list):
        raise ValueError(f'{path}: it must hold {{"version": 1, "entries": […]}}')
    return tuple(_entry(entry, f"{path}, entry {i}") for i, entry in enumerate(content["entries"]))


def _entry(entry: dict[str, Any], where: str) -> Tuned:
    if entry.keys() != _FIELDS.keys():
        raise ValueError(f"{where}: it has the fields {sorted(entry)}; they must be {sorted(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if not isinstance(entry[name], kind):
            raise ValueError(f"{where}: {name} is {entry[name]!r}")
    for name in ("M", "R"):
        low_high = entry[name]
        if len(low_high) != 2 or not all(isinstance(v, int) for v in low_high) or low_high[0] > low_high[1]:
            raise ValueError(f"{where}: {name} is {low_high!r}; it must be [lowest, highest]")
    if entry["kernel"] not in KERNELS:
        raise ValueError(f"{where}: kernel {entry['kernel']!r} is not one of {', '.join(KERNELS)}")
    return Tuned(**entry | {name: tuple(entry[name]) for name in ("M", "R", "gradients")})


def match(problem: Problem, device: DeviceSpec) -> Tuned | None:
    """The measurement that speaks for a problem on a device, if there is one."""
    for entry in load(device.model):
        sizes = entry.N == problem.N and entry.K == problem.K
        ranges = entry.M[0] <= problem.M <= entry.M[1] and entry.R[0] <= problem.R <= entry.R[1]
        kind = entry.dtype, entry.dropout, entry.gradients
        if sizes and ranges and kind == (problem.dtype, problem.dropout, problem.gradients) and problem.aligned:
            return entry
    return None
