"""The measured tables that ship: lorafuse/plan/measured/<gpu>.json, from the layers in bench/results/.

A plan follows them before its model. Of each layer and pass the fastest of lorafuse's own candidates is kept, over the
ranges of M and R that `lorafuse.tune.ranges` derives from the measured points. Candidates whose spreads overlap count
as equal, and the one that the model would choose stays. `make numbers` writes the files, a test holds them in step.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorafuse.plan import DEVICES, DeviceSpec, Problem, modelled, select, tuned
from lorafuse.tune.ranges import rectangles

__all__ = ["FOLDER", "tables"]

FOLDER = Path("lorafuse") / "plan" / "measured"
_AVAILABLE = (("eager", ""), ("triton", ""), ("cuda", ""))
_PASSES: dict[str, tuple[str, ...]] = {"forward": (), "backward": ("dx", "da", "db")}
# what the variants of `bench/baselines/lorafuse.py` run, by pass. The baseline "addmm" is other work than "aten_addmm":
# its adapters need no cast, and its backward computes xa again
_KERNELS = {
    "lorafuse-eager": ("aten_beta1", "aten_beta1"),
    "lorafuse-addmm": ("aten_addmm", "aten_addmm"),
    "lorafuse-triton": ("two_kernel", "one_pass_backward"),
    "lorafuse-cuda": ("cuda two_kernel", "cuda one_pass_backward"),
}
# commits whose "lorafuse" (backend "auto") ran the CUDA kernels in every pass of their files: the plan of that commit
# says so for each of these problems
_AUTO_WAS_CUDA = {"42a016e4784e"}


def tables(contents: list[dict[str, Any]]) -> dict[str, tuple[tuned.Tuned, ...]]:
    """The entries by GPU model, of result files that were measured on GPUs that the planner knows."""
    points: dict[str, list[tuned.Tuned]] = {}
    for content in contents:
        device = _device(content["conditions"]["device"])
        if content["kind"] == "linear" and device is not None:
            points.setdefault(device.model, []).extend(_points(content, device))
    return {model: tuple(_merged(entries)) for model, entries in sorted(points.items())}


def _device(name: str) -> DeviceSpec | None:
    """The GPU that torch calls by this name, where the planner knows it."""
    return next((spec for spec in DEVICES.values() if re.search(rf"\b{re.escape(spec.model)}\b", name)), None)


def _points(content: dict[str, Any], device: DeviceSpec) -> Iterator[tuned.Tuned]:
    """An entry of one point for each layer and pass."""
    conditions = content["conditions"]
    for result in content["results"]:
        M, N, K, R = (result[name] for name in "MNKR")
        for i, (name, gradients) in enumerate(_PASSES.items()):
            times = _times(result["variants"], i, name, conditions["commit"])
            if len(times) < 2:
                continue
            problem = Problem(M, N, K, R, result["dtype"], "float32", gradients=gradients)
            kernel = _winner(times, problem, device)
            seconds = round(times[kernel]["median"], 9)
            kept = {key: conditions[key] for key in ("torch", "triton", "cuda", "driver", "power limit")}
            yield tuned.Tuned(
                N, K, (R, R), (M, M), result["dtype"], False, gradients, kernel, seconds, conditions["commit"],
                conditions["date"].split()[0], ((M, R, seconds),), kept,
            )  # fmt: skip


def _times(variants: Mapping[str, Any], i: int, name: str, commit: str) -> dict[str, dict[str, float]]:
    """The spread of each candidate's time, by kernel."""
    times = {kernels[i]: variants[variant][name] for variant, kernels in _KERNELS.items() if variant in variants}
    if commit in _AUTO_WAS_CUDA and "lorafuse" in variants:
        times[_KERNELS["lorafuse-cuda"][i]] = variants["lorafuse"][name]
    return times


def _winner(times: dict[str, dict[str, float]], problem: Problem, device: DeviceSpec) -> str:
    fastest = min(times, key=lambda kernel: times[kernel]["median"])
    usual = modelled(select(problem, device, _AVAILABLE).candidates).name
    if usual in times and times[usual]["p20"] <= times[fastest]["p80"]:
        return usual
    return fastest


def _merged(points: list[tuned.Tuned]) -> Iterator[tuned.Tuned]:
    """Entries of several points where one kernel won in neighbouring ones; of two at one size the later file's."""
    kinds: dict[tuple[Any, ...], dict[tuple[int, int], tuned.Tuned]] = {}
    for entry in points:
        kind = kinds.setdefault((entry.N, entry.K, entry.dtype, entry.gradients), {})
        kind[entry.M[0], entry.R[0]] = entry
    for kind in kinds.values():
        for of_m, of_r, _ in rectangles({size: entry.kernel for size, entry in kind.items()}):
            inside = [kind[M, R] for M, R in sorted(kind) if of_m[0] <= M <= of_m[1] and of_r[0] <= R <= of_r[1]]
            measured = tuple(point for entry in inside for point in entry.points)
            yield replace(inside[-1], M=of_m, R=of_r, points=measured)
