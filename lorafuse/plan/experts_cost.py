"""A model of what the experts of a block cost on a GPU, run in several ways. It ranks; it does not measure.

Products, and how rows are spread, as in `lorafuse.plan.grouped`. Outside Triton's epilogues an activation is counted as
the kernels of torch that run it, each reading and writing; gathers and sums over k as the least they can be.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from lorafuse.plan import cost
from lorafuse.plan.config import KernelConfig
from lorafuse.plan.cost import Part
from lorafuse.plan.device import DeviceSpec
from lorafuse.plan.grouped import (
    GroupedProblem,
    cast_step,
    dw_steps,
    grouped_steps,
    has_grouped_mm,
    loop_steps,
    read_on_host,
    rows_step,
    skinny_step,
    torch_steps,
    triton_step,
)
from lorafuse.plan.ragged import ragged_config

__all__ = ["BASELINES", "WAYS", "ExpertsProblem", "configs", "eager_grouped", "eager_loop", "triton"]


@dataclass(frozen=True)
class ExpertsProblem:
    """`T` tokens with `k` of `E` experts each, hidden size `H`, intermediate size `I`, rank `R` of both projections.

    The first projection has 2I out features when `gated`, else I. `aligned` says that every row of the weights, either
    way round, starts on a 16-byte boundary. `backward`: the gradients of x, of the router weights and of all factors.
    """

    T: int
    E: int
    k: int
    H: int
    I: int  # noqa: E741
    R: int
    dtype: str
    adapter_dtype: str
    gated: bool = True
    aligned: bool = True
    backward: bool = False

    @property
    def S(self) -> int:
        """Rows over all experts."""
        return self.T * self.k

    @property
    def U(self) -> int:
        """Out features of the first projection."""
        return 2 * self.I if self.gated else self.I

    def linear(self, up: bool, backward: bool = False) -> GroupedProblem:
        """gate_up `[U, H]` or down `[H, I]` of every expert."""
        N, K = (self.U, self.H) if up else (self.H, self.I)
        return GroupedProblem(self.S, self.E, N, K, self.R, self.dtype, self.adapter_dtype, self.aligned, backward)


def configs(p: ExpertsProblem, device: DeviceSpec) -> dict[str, KernelConfig]:
    """The Triton configurations of a block in the problem's direction, by what they compute."""
    up, down = p.linear(True).problem, p.linear(False).problem
    if not p.backward:
        return {
            "xa, ha": ragged_config("project", up, p.E, device),
            "gate_up and activation": ragged_config("ragged_act", up, p.E, device),
            "down": ragged_config("ragged", down, p.E, device),
        }
    return {
        "dyb": ragged_config("project", up, p.E, device),
        "dh and activation's backward": ragged_config("ragged_act_backward", down, p.E, device),
        "da, db": ragged_config("outer", up, p.E, device),
        "dx": ragged_config("ragged", up, p.E, device),
    }


def _activation(p: ExpertsProblem, device: DeviceSpec, name: str) -> Part:
    # act(gate), times up
    elements, launches = (5 * p.S * p.I, 2) if p.gated else (2 * p.S * p.I, 1)
    return rows_step(name, elements, p.linear(True), device, launches)


def _activation_backward(p: ExpertsProblem, device: DeviceSpec) -> Part:
    # dh up, the backward of act, dh act(gate), and both halves of du brought together; lorafuse computes act(gate)
    # again but writes one half in place, which reads and writes as much
    elements, launches = (13 * p.S * p.I, 5) if p.gated else (3 * p.S * p.I, 1)
    return rows_step("activation's backward", elements, p.linear(True), device, launches)


def _base(p: ExpertsProblem, device: DeviceSpec, backward: bool) -> list[Part]:
    over_h, out = p.S * p.H, p.T * p.H
    up, down = (p.linear(which, backward) for which in (True, False))
    if not backward:
        return [
            rows_step("gather x", 2 * over_h, up, device),
            *torch_steps("gate_up", up, device),
            _activation(p, device, "activation"),
            *torch_steps("down", down, device),
            rows_step("times router weight", 2 * over_h, up, device),
            rows_step("sum over k", over_h + out, up, device),
        ]
    return [
        rows_step("gather dout, times router weight", 2 * over_h, up, device),
        rows_step("router gradient", 2 * over_h, up, device),
        *torch_steps("dh", down, device),
        _activation_backward(p, device),
        *torch_steps("dx", up, device),
        rows_step("sum over k of dx", over_h + out, up, device),
    ]


def _frozen(p: ExpertsProblem, device: DeviceSpec, backward: bool) -> tuple[Part, ...]:
    """The block without adapters, by torch's grouped_mm."""
    return cost.in_a_row(_base(p, device, backward), "aten")


def _full(p: ExpertsProblem, device: DeviceSpec, backward: bool) -> tuple[Part, ...]:
    parts = _base(p, device, backward)
    if backward:
        parts += [*dw_steps(p.linear(True), device, "gate_up"), *dw_steps(p.linear(False), device, "down")]
    return cost.in_a_row(parts, "aten")


def _peft(p: ExpertsProblem, device: DeviceSpec, backward: bool) -> tuple[Part, ...]:
    """PEFT 0.21's `target_parameters` as its source runs, from arithmetic and bytes; nothing was measured.

    Forward makes W + ΔW of all experts twice for each projection, once to check the parametrization and once to use it:
    a baddbmm that reads and writes the stack. Backward makes the gradient of the whole W + ΔW, and reads it in two bmm
    for those of the factors, each of which is scaled in a pass of its own.
    """
    parts = []
    for up, name in ((True, "gate_up"), (False, "down")):
        g = p.linear(up)
        stack = g.E * g.N * g.K
        # the low-rank product of the whole stack
        product = 2 * stack * g.R / device.sustained_flops
        one_pass = rows_step("", stack, g, device).seconds
        if backward:
            parts += [*dw_steps(g, device, name), Part(f"dw a and dw b of {name}", 2 * max(one_pass, product), 2)]
            factors = g.E * g.R * (g.N + g.K)
            parts.append(rows_step(f"da, db of {name} times scale", 2 * factors, g, device, 2))
        else:
            twice = Part(f"W + ΔW of {name}, twice", 2 * max(2 * one_pass, product), 2)
            parts += [cast_step(g, device, name), twice]
    return cost.in_a_row(_base(p, device, backward) + parts, "aten")


def _split(p: ExpertsProblem, device: DeviceSpec, backward: bool) -> tuple[Part, ...]:
    """Two more grouped products and a sum for each projection."""
    low = []
    for up, name in ((True, "gate_up"), (False, "down")):
        g = p.linear(up)
        inner, outer = g.S * g.K, g.S * g.N
        if backward:
            low += [
                rows_step(f"dyb, db of {name}", 2 * outer, g, device, 2),
                rows_step(f"da of {name}", inner, g, device),
            ]
            low += [rows_step(f"dyb a of {name}", inner, g, device), rows_step(f"sum of {name}", 3 * inner, g, device)]
        else:
            low += [rows_step(f"xa of {name}", inner, g, device), rows_step(f"xa b of {name}", outer, g, device)]
            low.append(rows_step(f"sum of {name}", 3 * outer, g, device))
    return cost.in_a_row(_base(p, device, backward) + low, "aten")


def _around(p: ExpertsProblem, device: DeviceSpec, backward: bool) -> list[Part]:
    """What the eager backend does in both its ways beside the projections."""
    g, over_h, over_i, out = p.linear(True), p.S * p.H, p.S * p.I, p.T * p.H
    if not backward:
        return [
            rows_step("gather x", 2 * over_h, g, device),
            _activation(p, device, "activation"),
            rows_step("weighted sum over k", over_h + out, g, device),
        ]
    return [
        rows_step("gather dout", 2 * over_h, g, device),
        _activation(p, device, "h again"),
        rows_step("router gradient", 4 * over_i, g, device, 2),
        rows_step("dh times router weight", 2 * over_i, g, device),
        _activation_backward(p, device),
        rows_step("gather x again", 2 * over_h, g, device),
        rows_step("sum over k of dx", over_h + out, g, device),
    ]


def eager_grouped(p: ExpertsProblem, device: DeviceSpec, backward: bool) -> tuple[Part, ...]:
    """lorafuse.backends.grouped_experts."""
    up, down = (p.linear(which, backward) for which in (True, False))
    steps = [*grouped_steps(up, device, "gate_up"), *grouped_steps(down, device, "down")]
    return cost.in_a_row([*_around(p, device, backward), *steps], "aten")


def eager_loop(p: ExpertsProblem, device: DeviceSpec, backward: bool) -> tuple[Part, ...]:
    """lorafuse.backends.loop_experts."""
    up, down = (p.linear(which, backward) for which in (True, False))
    steps = [*loop_steps(up, device, "gate_up"), *loop_steps(down, device, "down")]
    return cost.in_a_row([read_on_host(), *_around(p, device, backward), *steps], "aten")


def _eager(p: ExpertsProblem, device: DeviceSpec, backward: bool) -> tuple[Part, ...]:
    """The eager backend in the way that it takes on a device."""
    return (eager_grouped if has_grouped_mm(p.linear(True), device) else eager_loop)(p, device, backward)


def triton(p: ExpertsProblem, device: DeviceSpec, backward: bool) -> tuple[Part, ...]:
    """The kernels of lorafuse.kernels.ragged and ragged_rank, in the order in which they run."""
    of = configs(replace(p, backward=backward), device)
    over_h, over_i, over_u, out = p.S * p.H, p.S * p.I, p.S * p.U, p.T * p.H
    up, down = (p.linear(which, backward) for which in (True, False))
    if not backward:
        parts = [
            skinny_step("xa, x gathered", over_h, up, device),
            triton_step("gate_up, activation", of["gate_up and activation"], up, device),
            skinny_step("ha", over_i, up, device),
            triton_step("down", of["down"], down, device),
            rows_step("weighted sum over k", over_h + out, up, device),
        ]
    else:
        parts = [
            skinny_step("dyb of down, dout gathered", over_h, up, device),
            triton_step("dh, activation's backward", of["dh and activation's backward"], down, device),
            skinny_step("da, db of down", over_i + over_h, up, device, 2),
            skinny_step("dyb of gate_up", over_u, up, device),
            skinny_step("da, db of gate_up", over_h + over_u, up, device, 2),
            triton_step("dx", of["dx"], up, device),
            rows_step("sum over k of dx", over_h + out, up, device),
        ]
    return cost.in_a_row(parts, "triton")


_Way = Callable[[ExpertsProblem, DeviceSpec, bool], tuple[Part, ...]]
# what others run
BASELINES: dict[str, _Way] = {
    "frozen": _frozen,
    "full fine-tuning": _full,
    "PEFT as shipped": _peft,
    "split grouped_mm": _split,
}
WAYS: dict[str, _Way] = BASELINES | {"lorafuse, eager": _eager, "lorafuse, Triton": triton}
