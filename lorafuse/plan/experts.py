"""A model of what the experts of a block cost on a GPU, run in several ways. It ranks; it does not measure.

Rows are spread evenly over the experts. A product computes whole tiles of every expert and reads every expert's weight;
everything else is passes over the rows at the bandwidth that copies sustain. Only gated experts are modelled.
"""

from dataclasses import dataclass, replace

from lorafuse.plan import cost
from lorafuse.plan.config import KernelConfig
from lorafuse.plan.cost import Part
from lorafuse.plan.device import DeviceSpec
from lorafuse.plan.problem import Problem
from lorafuse.plan.ragged import padded_rows, ragged_config

__all__ = ["WAYS", "ExpertsProblem", "configs"]

# rows of a tile of torch's grouped_mm (CUTLASS; assumed)
_GROUPED_TILE = 128


@dataclass(frozen=True)
class ExpertsProblem:
    """`T` tokens with `k` of `E` experts each, hidden size `H`, intermediate size `I`, rank `R` of both projections."""

    T: int
    E: int
    k: int
    H: int
    I: int  # noqa: E741
    R: int
    dtype: str
    adapter_dtype: str

    @property
    def S(self) -> int:
        """Rows over all experts."""
        return self.T * self.k

    def linear(self, up: bool) -> Problem:
        """gate_up `[2I, H]` or down `[H, I]` over the rows of all experts."""
        N, K = (2 * self.I, self.H) if up else (self.H, self.I)
        return Problem(self.S, N, K, self.R, self.dtype, self.adapter_dtype)


def configs(p: ExpertsProblem, device: DeviceSpec) -> dict[str, KernelConfig]:
    """The Triton configurations of a block, by what they compute."""
    return {
        "gate_up and activation": ragged_config("ragged_act", p.linear(True), p.E, device),
        "down": ragged_config("ragged", p.linear(False), p.E, device),
        "dh and activation's backward": ragged_config("ragged_act", p.linear(False), p.E, device),
        "dx": ragged_config("ragged", p.linear(True), p.E, device),
        "xa, ha, dyb": ragged_config("project", p.linear(True), p.E, device),
        "da, db": ragged_config("outer", p.linear(True), p.E, device),
    }


def _at_least_its_bytes(seconds: float, linear: Problem, p: ExpertsProblem, device: DeviceSpec) -> float:
    moved = linear.M * (linear.K + linear.N) + p.E * linear.N * linear.K
    return max(seconds, moved * linear.itemsize / device.sustained_bandwidth)


def _grouped_mm(name: str, up: bool, p: ExpertsProblem, device: DeviceSpec) -> Part:
    linear = p.linear(up)
    seconds = cost.frozen(replace(linear, M=padded_rows(p.S, p.E, _GROUPED_TILE)), device)[0].seconds
    return Part(name, _at_least_its_bytes(seconds, linear, p, device))


def _triton(name: str, config: KernelConfig, up: bool, p: ExpertsProblem, device: DeviceSpec) -> Part:
    linear = p.linear(up)
    padded = replace(linear, M=padded_rows(p.S, p.E, config.block_m))
    seconds = cost.kernel_seconds(replace(config, kernel="fwd"), padded, device)
    return Part(name, _at_least_its_bytes(seconds, linear, p, device))


def _rows(name: str, elements: int, p: ExpertsProblem, device: DeviceSpec) -> Part:
    return Part(name, elements * p.linear(True).itemsize / device.sustained_bandwidth)


def _base(p: ExpertsProblem, device: DeviceSpec, backward: bool) -> list[Part]:
    over_h, over_i, out = p.S * p.H, p.S * p.I, p.T * p.H
    if not backward:
        return [
            _rows("gather x", 2 * over_h, p, device),
            _grouped_mm("gate_up", True, p, device),
            _rows("activation", 3 * over_i, p, device),
            _grouped_mm("down", False, p, device),
            _rows("times router weight", 2 * over_h, p, device),
            _rows("sum over k", over_h + out, p, device),
        ]
    return [
        _rows("gather dout, times router weight", 2 * over_h, p, device),
        _rows("router gradient", 2 * over_h, p, device),
        _grouped_mm("dh", False, p, device),
        _rows("activation's backward", 5 * over_i, p, device),
        _grouped_mm("dx", True, p, device),
        _rows("sum over k of dx", over_h + out, p, device),
    ]


def _frozen(p: ExpertsProblem, device: DeviceSpec, backward: bool) -> tuple[Part, ...]:
    """The block without adapters, by torch's grouped_mm."""
    return cost.in_a_row(_base(p, device, backward), "aten")


def _full(p: ExpertsProblem, device: DeviceSpec, backward: bool) -> tuple[Part, ...]:
    parts = _base(p, device, backward)
    if backward:
        parts += [_grouped_mm("dw of gate_up", True, p, device), _grouped_mm("dw of down", False, p, device)]
    return cost.in_a_row(parts, "aten")


def _split(p: ExpertsProblem, device: DeviceSpec, backward: bool) -> tuple[Part, ...]:
    """Two more grouped products and a sum for each projection."""
    over_h, over_i = p.S * p.H, p.S * p.I
    low = []
    for name, inner, outer in (("gate_up", over_h, 2 * over_i), ("down", over_i, over_h)):
        if backward:
            low += [_rows(f"dyb, db of {name}", 2 * outer, p, device), _rows(f"da of {name}", inner, p, device)]
            low += [_rows(f"dyb a of {name}", inner, p, device), _rows(f"sum of {name}", 3 * inner, p, device)]
        else:
            low += [_rows(f"xa of {name}", inner, p, device), _rows(f"xa b of {name}", outer, p, device)]
            low.append(_rows(f"sum of {name}", 3 * outer, p, device))
    return cost.in_a_row(_base(p, device, backward) + low, "aten")


def _lorafuse(p: ExpertsProblem, device: DeviceSpec, backward: bool) -> tuple[Part, ...]:
    """The kernels of lorafuse.kernels.ragged and ragged_rank, in the order in which they run."""
    of, over_h, over_i, out = configs(p, device), p.S * p.H, p.S * p.I, p.T * p.H
    if not backward:
        parts = [
            _rows("xa, x gathered", over_h, p, device),
            _triton("gate_up, activation", of["gate_up and activation"], True, p, device),
            _rows("ha", over_i, p, device),
            _triton("down", of["down"], False, p, device),
            _rows("weighted sum over k", over_h + out, p, device),
        ]
    else:
        parts = [
            _rows("dyb of down, dout gathered", over_h, p, device),
            _triton("dh, activation's backward", of["dh and activation's backward"], False, p, device),
            _rows("da, db of down", over_i + over_h, p, device),
            _rows("dyb of gate_up", 2 * over_i, p, device),
            _rows("da, db of gate_up", over_h + 2 * over_i, p, device),
            _triton("dx", of["dx"], True, p, device),
            _rows("sum over k of dx", over_h + out, p, device),
        ]
    return cost.in_a_row(parts, "triton")


WAYS = {"frozen": _frozen, "full fine-tuning": _full, "split grouped_mm": _split, "lorafuse, Triton": _lorafuse}
