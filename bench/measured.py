"""The measured tables that ship: lorafuse/plan/measured/<gpu>.json, from the layers in bench/results/.

A plan follows them before its model. Of each layer and pass the fastest of lorafuse's own candidates is kept, over the
ranges of M and R that `lorafuse.tune.ranges` derives from the measured points. Candidates whose spreads overlap count
as equal, and the one that the model would choose stays. `make numbers` writes the files, a test holds them in step.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorafuse.plan import DEVICES, DeviceSpec, Problem, modelled, select, tuned
from lorafuse.tune.measure import PASSES, Outcome
from lorafuse.tune.record import record

__all__ = ["FOLDER", "device_of", "tables"]

FOLDER = Path("lorafuse") / "plan" / "measured"
_AVAILABLE = (("eager", ""), ("triton", ""), ("cuda", ""))
_CONDITIONS = ("commit", "torch", "triton", "cuda", "driver", "power limit")
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
    """The entries by GPU model, of result files that were measured on GPUs that the planner knows; of two points at one
    size the later file's is kept."""
    entries: dict[str, tuple[tuned.Tuned, ...]] = {}
    for content in contents:
        conditions = content["conditions"]
        device = device_of(conditions["device"])
        if content["kind"] == "linear" and device is not None:
            kept = {name: conditions[name] for name in _CONDITIONS if name in conditions}
            kept["date"] = conditions["date"].split()[0]
            entries[device.model] = record(entries.get(device.model, ()), list(_outcomes(content, device)), kept)
    return dict(sorted(entries.items()))


def device_of(name: str) -> DeviceSpec | None:
    """The GPU that torch calls by this name, where the planner knows it."""
    return next((spec for spec in DEVICES.values() if re.search(rf"\b{re.escape(spec.model)}\b", name)), None)


def _outcomes(content: dict[str, Any], device: DeviceSpec) -> Iterator[Outcome]:
    """The candidates of each layer and pass that has several."""
    for result in content["results"]:
        for i, (name, gradients) in enumerate(PASSES.items()):
            times = _times(result["variants"], i, name, content["conditions"]["commit"])
            if len(times) < 2:
                continue
            sizes = (result[size] for size in "MNKR")
            problem = Problem(*sizes, result["dtype"], "float32", gradients=gradients)
            # five values with the percentiles and the median of the file, which has no others
            seconds = {k: [t["p20"], t["p20"], t["median"], t["p80"], t["p80"]] for k, t in times.items()}
            yield Outcome(problem, modelled(select(problem, device, _AVAILABLE).candidates).name, seconds)


def _times(variants: Mapping[str, Any], i: int, name: str, commit: str) -> dict[str, dict[str, float]]:
    """The spread of each candidate's time, by kernel."""
    times = {kernels[i]: variants[variant][name] for variant, kernels in _KERNELS.items() if variant in variants}
    if commit in _AUTO_WAS_CUDA and "lorafuse" in variants:
        times[_KERNELS["lorafuse-cuda"][i]] = variants["lorafuse"][name]
    return times
