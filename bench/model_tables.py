"""Tables in Markdown of what the planner's model says, beside what was measured of it."""

from dataclasses import replace
from typing import Any

from result_tables import Content, table

from lorafuse.plan import Problem, cost, find, select

__all__ = ["experts_model", "layers_model"]

_GRADIENTS = ("dx", "da", "db")
# the model's GPU; its rows, by the variants that measure them
_GPU = "H200"
_MEASURED_AS = {
    "frozen": "frozen",
    "lorafuse, eager": "lorafuse-eager",
    "lorafuse, Triton": "lorafuse-triton",
    "lorafuse, CUDA": "lorafuse",
}
_KERNELS = {
    "lorafuse, eager": ("aten_beta1", "aten_beta1"),
    "lorafuse, Triton": ("two_kernel", "one_pass_backward"),
    "lorafuse, CUDA": ("cuda two_kernel", "cuda one_pass_backward"),
}
_EXPERTS_KERNELS = {"lorafuse, eager": ("grouped_mm", "grouped_mm"), "lorafuse, Triton": ("ragged", "ragged")}
_EXPERTS_AS = {"frozen": "frozen", "lorafuse, Triton": "lorafuse"}


def layers_model(contents: list[Content], absent: str) -> str:
    """What the model says of one layer on an H200, and what was measured of it on one, or `absent`."""
    forward = Problem(8192, 4096, 4096, 16, "bfloat16", "float32")
    rows = _modelled([(forward,), (replace(forward, gradients=_GRADIENTS),)], _KERNELS)
    sizes = {"M": forward.M, "N": forward.N, "K": forward.K, "R": forward.R, "dtype": forward.dtype}
    return _beside(rows, _measured(contents, "linear", sizes, _MEASURED_AS), absent)


def experts_model(contents: list[Content], absent: str) -> str:
    """What the model says of one block's experts on an H200, and what was measured of it on one, or `absent`."""
    T, E, k, H, I, R = 8192, 128, 8, 2048, 768, 16  # noqa: E741
    up = Problem(T * k, 2 * I, H, R, "bfloat16", "float32", groups=E, is_ragged=True, choices=k)
    down = replace(up, N=H, K=I)
    forward = replace(up, epilogue="gated"), down
    backward = replace(up, gradients=_GRADIENTS), replace(down, gradients=_GRADIENTS, epilogue="gated")
    rows = _modelled([forward, backward], _EXPERTS_KERNELS)
    sizes = {"M": T, "E": E, "k": k, "H": H, "I": I, "R": R, "routing": "balanced"}
    return _beside(rows, _measured(contents, "moe", sizes, _EXPERTS_AS), absent)


def _modelled(operators: list[tuple[Problem, ...]], named: dict[str, tuple[str, str]]) -> dict[str, list[float]]:
    """Modelled seconds of forward and backward: of the frozen operator, and of candidates by their kernels' names."""
    device = find(_GPU)
    plans = [select(problems, device, (("eager", ""), ("triton", ""), ("cuda", ""))) for problems in operators]
    seconds = [{one.name: one.seconds for one in plan.candidates} for plan in plans]
    rows = {"frozen": [cost.frozen(problems, device).seconds for problems in operators]}
    return rows | {name: [of[k] for of, k in zip(seconds, kernels, strict=True)] for name, kernels in named.items()}


def _measured(
    contents: list[Content], kind: str, sizes: dict[str, Any], named: dict[str, str]
) -> dict[str, tuple[float, float]]:
    """Seconds of forward and backward by the model's names, the first that was measured on the model's GPU."""
    spans: dict[str, tuple[float, float]] = {}
    for content in contents:
        if _GPU in content["conditions"]["device"] and content["kind"] == kind:
            for result in content["results"]:
                if all(result[key] == value for key, value in sizes.items()):
                    for name, variant in named.items():
                        if (one := result["variants"].get(variant)) is not None:
                            spans.setdefault(name, (one["forward"]["median"], one["backward"]["median"]))
    return spans


def _beside(rows: dict[str, list[float]], measured: dict[str, tuple[float, float]], absent: str) -> str:
    """The model's seconds and LoRA tax, and the measured ones beside them."""

    def tax(own: float, base: float) -> str:
        return f"{own / base - 1:.1%}".replace("%", " %")

    base, measured_base = sum(rows["frozen"]), sum(measured.get("frozen", (0.0,)))
    head = ["candidate", "forward", "backward", "tax", "forward, measured", "backward, measured", "tax, measured"]
    lines = []
    for name, times in rows.items():
        cells = [*(f"{1e6 * t:.0f}" for t in times), tax(sum(times), base)]
        if name in measured and measured_base:
            cells += [*(f"{1e6 * t:.0f}" for t in measured[name]), tax(sum(measured[name]), measured_base)]
        else:
            cells += [absent] * 3
        lines.append([name, *cells])
    return table(head, lines)
