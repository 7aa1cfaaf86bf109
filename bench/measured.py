"""The measured tables that ship: lorafuse/plan/measured/<gpu>.json, from the layers, groups and experts in
bench/results/.

A plan follows them before its model. Of each layer and pass the fastest of lorafuse's own candidates is kept, over the
ranges of M and R that `lorafuse.tune.ranges` derives from the measured points. Candidates whose spreads overlap count
as equal, and the one that the model would choose stays. `make numbers` writes the files, a test holds them in step.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lorafuse.plan import DEVICES, Candidate, DeviceSpec, Problem, modelled, select, tuned
from lorafuse.tune.measure import PASSES, Outcome
from lorafuse.tune.record import record

__all__ = ["FOLDER", "device_of", "tables"]

FOLDER = Path("lorafuse") / "plan" / "measured"
_AVAILABLE = (("eager", ""), ("triton", ""), ("cuda", ""))
_CONDITIONS = ("commit", "torch", "triton", "cuda", "driver", "power limit")
# backend and forced kernel of the variants of `bench/baselines/lorafuse.py` and `lorafuse_group.py` that are candidates
# by name. The baseline "addmm" is other work than "aten_addmm": its adapters need no cast, and its backward computes xa
# again
_FORMS = {
    "eager": ("eager", "aten_beta1"),
    "addmm": ("eager", "aten_addmm"),
    "triton": ("triton", ""),
    "cuda": ("cuda", ""),
    "cuda-tiles": ("cuda", "cuda xa_in_tiles"),
    "cuda-split": ("cuda", "cuda split_k"),
    "cuda-forward": ("cuda", "cuda fused_forward"),
    "cuda-concurrent": ("cuda", "cuda concurrent_backward"),
    "cuda-backward": ("cuda", "cuda fused_backward"),
}
_GROUP_FORMS = {
    "eager": ("eager", ""),
    "triton": ("triton", ""),
    "siblings": ("triton", "siblings"),
    "cuda": ("cuda", ""),
    "cuda-siblings": ("cuda", "cuda siblings"),
}
_MLP_FORMS = {"cuda-siblings-ha": ("cuda", "cuda siblings_ha")}
_EXPERTS_FORMS = {
    "eager": ("eager", ""),
    "triton": ("triton", ""),
    "cuda": ("cuda", ""),
    "cuda-gathered": ("cuda", "cuda gathered"),
}
_VARIANTS = {
    "moe": {f"lorafuse-{form}": what for form, what in _EXPERTS_FORMS.items()},
    "linear": {f"lorafuse-{form}": what for form, what in _FORMS.items()},
    "group": {f"lorafuse-group-{form}": what for form, what in _GROUP_FORMS.items()},
    "mlp": {f"lorafuse-group-{form}": what for form, what in (_GROUP_FORMS | _MLP_FORMS).items()},
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
        if content["kind"] in _VARIANTS and device is not None:
            kept = {name: conditions[name] for name in _CONDITIONS if name in conditions}
            kept["date"] = conditions["date"].split()[0]
            entries[device.model] = record(entries.get(device.model, ()), list(_outcomes(content, device)), kept)
    return dict(sorted(entries.items()))


def device_of(name: str) -> DeviceSpec | None:
    """The GPU that torch calls by this name, where the planner knows it."""
    return next((spec for spec in DEVICES.values() if re.search(rf"\b{re.escape(spec.model)}\b", name)), None)


def _operators(result: Mapping[str, Any], kind: str, name: str) -> list[tuple[Problem, ...]]:
    """The problems of each plan that a pass of a result follows; of a gated MLP those of gate and up, and in backward
    of down."""
    M, R, dtype, gradients = result["M"], result["R"], result["dtype"], PASSES[name]
    of = partial(Problem, dtype=dtype, adapter_dtype="float32", gradients=gradients)
    if kind == "linear":
        return [(of(M, result["N"], result["K"], R),)]
    if kind == "group":
        many = len(result["N"])
        return [(of(M, sum(result["N"]), result["K"], many * R, siblings=many),)]
    H, inner = result["H"], result["I"]
    first, last = ("", "gated") if gradients else ("gated", "")
    if kind == "moe":
        block = partial(of, M * result["k"], groups=result["E"], is_ragged=True, choices=result["k"], R=R)
        return [(block(N=2 * inner, K=H, epilogue=first), block(N=H, K=inner, epilogue=last))]
    both = (of(M, 2 * inner, H, 2 * R, siblings=2, epilogue=first),)
    return [both, (of(M, H, inner, R, epilogue=last),)] if gradients else [both]


def _outcomes(content: dict[str, Any], device: DeviceSpec) -> Iterator[Outcome]:
    """The candidates of each result and pass that has several."""
    # experts' routings share their sizes: the usual one
    results = [one for one in content["results"] if one.get("routing", "balanced") == "balanced"]
    for result, name in itertools.product(results, PASSES):
        kind = result.get("kind") or content["kind"]
        for operator in _operators(result, kind, name):
            problems = operator if len(operator) > 1 else operator[0]
            candidates = select(problems, device, _AVAILABLE).candidates
            times = _times(result["variants"], candidates, kind, name, content["conditions"]["commit"])
            if len(times) < 2:
                continue
            # five values with the percentiles and the median of the file, which has no others
            seconds = {k: [t["p20"], t["p20"], t["median"], t["p80"], t["p80"]] for k, t in times.items()}
            yield from (Outcome(problem, modelled(candidates).name, seconds) for problem in operator)


def _times(
    variants: Mapping[str, Any], candidates: Sequence[Candidate], kind: str, name: str, commit: str
) -> dict[str, dict[str, float]]:
    """The spread of each candidate's time, by kernel: of a variant whose kernel is no candidate there is none."""
    times = {}
    for variant, (backend, kernel) in _VARIANTS[kind].items():
        able = [one for one in candidates if one.backend == backend and kernel in ("", one.name)]
        if variant in variants and able:
            times[modelled(able).name] = variants[variant][name]
    if kind == "linear" and commit in _AUTO_WAS_CUDA and "lorafuse" in variants:
        times["cuda one_pass_backward" if PASSES[name] else "cuda two_kernel"] = variants["lorafuse"][name]
    return times
