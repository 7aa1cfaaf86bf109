"""Linear layers with LoRA over groups of ragged rows: the problem, and a model of what each way to run one costs.

Rows are spread evenly over the groups that can have any: no more than there are rows. A product computes whole tiles of
every such group and reads its weight; everything else is passes over the rows at the bandwidth that copies sustain.
"""

from dataclasses import dataclass, replace

from lorafuse.plan import cost
from lorafuse.plan.config import KernelConfig
from lorafuse.plan.cost import Part
from lorafuse.plan.device import DeviceSpec
from lorafuse.plan.problem import Problem
from lorafuse.plan.ragged import padded_rows, ragged_config

__all__ = [
    "GroupedProblem",
    "cast_step",
    "dw_steps",
    "eager_grouped",
    "eager_loop",
    "grouped_steps",
    "has_grouped_mm",
    "loop_steps",
    "no_grouped_mm",
    "read_on_host",
    "rows_step",
    "skinny_step",
    "torch_steps",
    "triton",
    "triton_step",
]

# rows of a tile of torch's grouped_mm (CUTLASS; assumed)
_GROUPED_TILE = 128
# seconds until the host has read where groups end and the GPU has work again (assumed)
_READ_ON_HOST = 20e-6
# what Triton's main loop reaches over gathered rows and many weights, of what it reaches over one matrix (an H200 at
# 128 experts, 2026-11-26)
_GATHERED = 0.78
# torch starts a thread for each group, in one block
_MOST_GROUPS = 1023


@dataclass(frozen=True)
class GroupedProblem:
    """`S` rows in `E` groups, each with its `N` out and `K` in features and rank `R`; dtypes by name.

    `aligned` says that every row of the weights, either way round, starts on a 16-byte boundary. `backward`: the
    gradients of x and of all factors.
    """

    S: int
    E: int
    N: int
    K: int
    R: int
    dtype: str
    adapter_dtype: str
    aligned: bool = True
    backward: bool = False

    @property
    def active(self) -> int:
        """How many groups can have rows."""
        return min(self.E, self.S)

    @property
    def problem(self) -> Problem:
        """The same product over all rows with one weight; M is S."""
        return Problem(self.S, self.N, self.K, self.R, self.dtype, self.adapter_dtype, aligned=self.aligned)

    @property
    def read(self) -> int:
        """Features that the products read: of x, or in backward of dy."""
        return self.N if self.backward else self.K

    @property
    def written(self) -> int:
        """Features that they write: of y, or in backward of dx."""
        return self.K if self.backward else self.N


def no_grouped_mm(dtype: str, groups: int, aligned: bool, arch: int) -> str:
    """Why torch's grouped_mm has no fast kernel for weights of `dtype` on sm_`arch`; "" where it has.

    Elsewhere it reads on the host where groups end and multiplies one group after the other (torch 2.11 to 2.13).
    """
    if arch // 10 not in (9, 10):
        return f"torch's grouped_mm has a fast kernel for sm_90 and sm_100, this is sm_{arch}"
    if dtype != "bfloat16":
        return f"torch's grouped_mm has a fast kernel for bfloat16, not {dtype}"
    if groups > _MOST_GROUPS:
        return f"torch's grouped_mm takes up to {_MOST_GROUPS} groups, there are {groups}"
    return "" if aligned else "torch's grouped_mm takes weights whose rows start on 16-byte boundaries"


def has_grouped_mm(g: GroupedProblem, device: DeviceSpec) -> bool:
    """Whether torch's grouped_mm has a fast kernel for this layer."""
    return not no_grouped_mm(g.dtype, g.E, g.aligned, device.arch)


def rows_step(name: str, elements: int, g: GroupedProblem, device: DeviceSpec, launches: int = 1) -> Part:
    """Elements of x's dtype read or written."""
    return Part(name, elements * g.problem.itemsize / device.sustained_bandwidth, launches)


def skinny_step(name: str, elements: int, g: GroupedProblem, device: DeviceSpec, launches: int = 1) -> Part:
    """A product with the rank that reads or writes so many elements."""
    part = rows_step(name, elements, g, device, launches)
    return replace(part, seconds=part.seconds / cost.SKINNY)


def read_on_host() -> Part:
    """The host asks the device where groups end."""
    return Part("waiting for where groups end", _READ_ON_HOST)


def cast_step(g: GroupedProblem, device: DeviceSpec, of: str) -> Part:
    """The factors of all groups read, and written in x's dtype."""
    per = replace(g.problem, dtype=g.adapter_dtype).itemsize + g.problem.itemsize
    return Part(f"factors of {of} in x's dtype", g.E * g.R * (g.K + g.N) * per / device.sustained_bandwidth, 2)


def _at_least_its_bytes(seconds: float, weights: int, g: GroupedProblem, device: DeviceSpec) -> float:
    moved = g.S * (g.K + g.N) + weights * g.N * g.K
    return max(seconds, moved * g.problem.itemsize / device.sustained_bandwidth)


def _base(rows: int, g: GroupedProblem, device: DeviceSpec) -> float:
    """Seconds of the base product of so many rows with one weight."""
    return cost.frozen(replace(g.problem, M=rows, gradients=("dx",) if g.backward else ()), device)[0].seconds


def _loop_step(name: str, g: GroupedProblem, device: DeviceSpec) -> Part:
    """The base product, of one group that has rows after the other."""
    seconds = g.active * _base(-(-g.S // g.active), g, device)
    return Part(name, _at_least_its_bytes(seconds, g.active, g, device), g.active)


def torch_steps(name: str, g: GroupedProblem, device: DeviceSpec) -> list[Part]:
    """The base product by torch's grouped_mm."""
    if not has_grouped_mm(g, device):
        return [read_on_host(), _loop_step(name, g, device)]
    seconds = _base(padded_rows(g.S, g.active, _GROUPED_TILE), g, device)
    return [Part(name, _at_least_its_bytes(seconds, g.active, g, device))]


def dw_steps(g: GroupedProblem, device: DeviceSpec, of: str) -> list[Part]:
    """The gradient of all weights by torch's grouped_mm; that of a group without rows is written too."""
    *before, product = torch_steps(f"dw of {of}", g, device)
    return [*before, replace(product, seconds=_at_least_its_bytes(product.seconds, g.E, g, device))]


def triton_step(name: str, config: KernelConfig, g: GroupedProblem, device: DeviceSpec) -> Part:
    """A base product and its low-rank one by the kernels of lorafuse.kernels.ragged."""
    padded = replace(g.problem, M=padded_rows(g.S, g.active, config.block_m))
    seconds = cost.kernel_seconds(replace(config, kernel="dx" if g.backward else "fwd"), padded, device) / _GATHERED
    return Part(name, _at_least_its_bytes(seconds, g.active, g, device))


def grouped_steps(g: GroupedProblem, device: DeviceSpec, of: str) -> list[Part]:
    """One projection in lorafuse.backends.grouped_experts: three grouped products and a sum."""
    first, second = ("dyb", "dyb a") if g.backward else ("xa", "xa b")
    return [
        cast_step(g, device, of),
        rows_step(f"{first} of {of}", g.S * g.read, g, device),
        *torch_steps(f"dx of {of}" if g.backward else of, g, device),
        rows_step(f"{second} of {of}", g.S * g.written, g, device),
        rows_step(f"sum of {of}", 3 * g.S * g.written, g, device),
        *_gradients(g, device, of, 1),
    ]


def loop_steps(g: GroupedProblem, device: DeviceSpec, of: str) -> list[Part]:
    """One projection in lorafuse.backends.loop_experts: the base product of a group onto its low-rank one."""
    first, second = ("dyb", "dyb a") if g.backward else ("xa", "xa b")
    return [
        cast_step(g, device, of),
        rows_step(f"{first} of {of}", g.S * g.read, g, device, g.active),
        rows_step(f"{second} of {of}", g.S * g.written, g, device, g.active),
        _loop_step(f"dx of {of}" if g.backward else of, g, device),
        *_gradients(g, device, of, g.active),
    ]


def _gradients(g: GroupedProblem, device: DeviceSpec, of: str, launches: int) -> list[Part]:
    return [rows_step(f"da, db of {of}", g.S * (g.K + g.N), g, device, 2 * launches)] if g.backward else []


def eager_grouped(g: GroupedProblem, device: DeviceSpec) -> tuple[Part, ...]:
    """lorafuse.backends.grouped_experts."""
    zeroed = rows_step("rows of no group zeroed", 2 * g.S * g.written, g, device)
    return cost.in_a_row([*grouped_steps(g, device, "the layer"), zeroed], "aten")


def eager_loop(g: GroupedProblem, device: DeviceSpec) -> tuple[Part, ...]:
    """lorafuse.backends.loop_experts."""
    return cost.in_a_row([read_on_host(), *loop_steps(g, device, "the layer")], "aten")


def triton(g: GroupedProblem, device: DeviceSpec) -> tuple[Part, ...]:
    """lorafuse.backends.triton_experts."""
    config = ragged_config("ragged", g.problem, g.E, device)
    parts = [
        rows_step("dyb" if g.backward else "xa", g.S * g.read, g, device),
        triton_step("dx" if g.backward else "y", config, g, device),
        rows_step("rows of no group zeroed", 2 * g.S * g.written, g, device),
        *_gradients(g, device, "the layer", 1),
    ]
    return cost.in_a_row(parts, "triton")
