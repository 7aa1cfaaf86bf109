"""The activations between an expert's two projections, forward and backward, without autograd.

A gated activation takes `u [rows, 2I]`, gate and up as `GateLayout` says, and gives `act(gate) · up` or a function of
both; one without a gate takes `u [rows, I]`. On CPUs with AVX2 and FMA csrc/cpu/activation.cpp computes one of fp32 in
one pass, each way; for other dtypes and devices, tensors without an address and CPUs with AVX-512 torch does.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.nn import functional as F

from lorafuse.formats import cpu

__all__ = [
    "ACTIVATIONS",
    "CHUNK",
    "GATES",
    "GATE_ALPHA",
    "GATE_LIMIT",
    "Activation",
    "GateLayout",
    "Recomputed",
    "gate_backward",
    "gate_differentiable",
    "gate_forward",
    "lookup",
]

# name: (forward of x, gradient of x from that of the result)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    ),
    "relu": (F.relu, lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0)),
    "relu2": (lambda x: F.relu(x).square(), lambda dy, x: 2 * dy * F.relu(x)),
}
# of gpt-oss: the limit of gate and of up, and the slope of its sigmoid (its `swiglu_limit` and `swiglu_alpha`)
GATE_LIMIT, GATE_ALPHA = 7.0, 1.702


def _clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`(clamp(up) + 1) · g · sigmoid(1.702 g)` with g the clamped gate, as gpt-oss has it."""
    gate = gate.clamp(max=GATE_LIMIT)
    return (up.clamp(-GATE_LIMIT, GATE_LIMIT) + 1).mul_(gate * torch.sigmoid(GATE_ALPHA * gate))


def _clamped_swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> Iterator[Tensor]:
    """As torch differentiates a clamp: at the limit itself the gradient passes."""
    low, raised = gate.clamp(max=GATE_LIMIT), up.clamp(-GATE_LIMIT, GATE_LIMIT) + 1
    s = torch.sigmoid(GATE_ALPHA * low)
    yield dh * raised * s * (1 + GATE_ALPHA * low * (1 - s)) * (gate <= GATE_LIMIT)
    yield dh * low * s * (up.abs() <= GATE_LIMIT)


_Gate = tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Iterator[Tensor]]]
# name: (forward of gate and up, the gradient of gate and then that of up from that of the result); without a gate these
# do not exist
GATES: dict[str, _Gate] = {"clamped_swiglu": (_clamped_swiglu, _clamped_swiglu_backward)}


def _product(name: str) -> _Gate:
    """`act(gate) · up` and its backward."""
    act, backward = ACTIVATIONS[name]

    def gradients(dh: Tensor, gate: Tensor, up: Tensor) -> Iterator[Tensor]:
        yield backward(dh * up, gate)
        yield dh * act(gate)

    return lambda gate, up: act(gate).mul_(up), gradients


# those of csrc/cpu/activation.cpp, in its order
_NUMBERS = {
    name: number for number, name in enumerate(("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"))
}
# elements of a thread of csrc/cpu, 10 us of its time; and from which on its forward pays (4 rows of 1536: 13.2 us of
# torch and 15.9 of ours, 16 rows 34.6 and 31.0; one thread of an EPYC, 2026-11-30)
OF_THREAD, MANY = 1 << 14, 1 << 14


@cache
def function() -> Any:
    """`lorafuse_gated`; None where it does not run."""
    library = cpu.library()
    return library.lorafuse_gated if library is not None and library.lorafuse_rank_runs() else None


def _in_one_pass(
    name: str, gate: Tensor, up: Tensor, h: Tensor | None, dh: Tensor | None = None, dgate: Tensor | None = None,
    dup: Tensor | None = None,
) -> bool:  # fmt: skip
    """Whether csrc/cpu wrote h; with dh the gradients of gate and up too."""
    call = function() if name in _NUMBERS and gate.numel() and cpu.has_addresses() else None
    if call is None:
        return False
    of: list[int | None] = [_NUMBERS[name]]
    for t in (gate, up, h, dh, dgate, dup):
        if t is None:
            of += None, 0
            continue
        # rows that are written must not overlap
        if t.shape != gate.shape or not cpu.is_plain_fp32(t) or t.stride(1) != 1 or t.stride(0) < gate.shape[1]:
            return False
        of += t.data_ptr(), t.stride(0)
    call(ctypes.byref(cpu.Gated(*of, *gate.shape)), cpu.threads_for(gate.numel(), OF_THREAD))
    return True


# elements that a CPU activates at a time: temporaries stay in its caches, where full-size ones cost a page fault for
# every 4 KiB
CHUNK = 1 << 16


def _chunks(gate: Tensor) -> list[slice]:
    """Rows to activate at a time; all of them on other devices."""
    step = max(1, CHUNK // max(1, gate.shape[1])) if gate.is_cpu else max(1, gate.shape[0])
    return [slice(start, start + step) for start in range(0, gate.shape[0], step)]


def gate_forward(name: str, gate: Tensor, up: Tensor) -> Tensor:
    """h `[rows, I]` of gate and up, `[rows, I]` each: `act(gate) · up`, or a function of both."""
    if gate.is_cpu and gate.numel() >= MANY and _in_one_pass(name, gate, up, h := torch.empty_like(gate)):
        return h
    forward, _ = GATES.get(name) or _product(name)
    # the one temporary of a product is its result: in chunks it took 0.74 ms, so 0.36 (256 x 1536, fp32, EPYC,
    # 2026-11-30)
    chunks = _chunks(gate) if name in GATES else []
    if len(chunks) < 2:
        return forward(gate, up)
    h = torch.empty_like(gate)
    for rows in chunks:
        h[rows] = forward(gate[rows], up[rows])
    return h


def gate_differentiable(name: str, gate: Tensor, up: Tensor) -> Tensor:
    """`gate_forward` for autograd, which does not let every act's result be changed in place."""
    return GATES[name][0](gate, up) if name in GATES else ACTIVATIONS[name][0](gate) * up


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """`(silu(x), its slope)` of one exponential, which a CPU computes slowly; the slope in fp32 at least."""
    wide = x if x.dtype.itemsize >= 4 else x.float()
    s = torch.sigmoid(wide)
    act = wide * s
    return act if wide is x else act.to(x.dtype), s.addcmul_(act, 1 - s)


def gate_backward(name: str, dh: Tensor, gate: Tensor, up: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up from that of h `[rows, I]`, which is written into; h too, where one is given."""
    dup = torch.empty_like(dh)
    if dh.is_cpu and dh.numel() >= MANY and _in_one_pass(name, gate, up, h, dh, dh, dup):
        return dh, dup
    chunks = _chunks(gate)
    if len(chunks) < 2:
        dgate = _backward_of_rows(name, dh, gate, up, dup, h)
        return dgate if dgate.dtype is dh.dtype else dgate.to(dh.dtype), dup
    for rows in chunks:
        mine = None if h is None else h[rows]
        dh[rows] = _backward_of_rows(name, dh[rows], gate[rows], up[rows], dup[rows], mine)
    return dh, dup


def _backward_of_rows(name: str, d: Tensor, g: Tensor, u: Tensor, dup: Tensor, h: Tensor | None) -> Tensor:
    """The gradient of gate; that of up is written into dup, and h where one is given. d is used up."""
    if name in GATES:
        forward, backward = GATES[name]
        if h is not None:
            h.copy_(forward(g, u))
        dgate, of_up = backward(d, g, u)
        dup.copy_(of_up)
        return dgate
    forward_of_one, backward_of_one = ACTIVATIONS[name]
    slope = None
    if name == "silu" and g.is_cpu:
        act, slope = _silu(g)
    else:
        act = forward_of_one(g)
    if h is not None:
        torch.mul(act, u, out=h)
    torch.mul(act, d, out=dup)
    d.mul_(u)
    return backward_of_one(d, g) if slope is None else slope.mul_(d)


class GateLayout(str, Enum):
    """How the columns of `u`, and the rows of its weight, hold gate and up."""

    NONE = ""
    CONCATENATED = "concatenated"
    INTERLEAVED = "interleaved"

    @classmethod
    def of(cls, has_gate: bool, is_concatenated: bool) -> "GateLayout":
        """The layout by the flags of transformers' experts."""
        if not has_gate:
            return cls.NONE
        return cls.CONCATENATED if is_concatenated else cls.INTERLEAVED


@dataclass(frozen=True)
class Activation:
    """A known activation: its name, and how `u` holds gate and up."""

    name: str
    layout: GateLayout

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return self.layout is not GateLayout.NONE

    def _parts(self, u: Tensor) -> tuple[Tensor, Tensor]:
        if self.layout is GateLayout.INTERLEAVED:
            return u[:, ::2], u[:, 1::2]
        half = u.shape[1] // 2
        return u[:, :half], u[:, half:]

    def forward(self, u: Tensor) -> Tensor:
        """`h [rows, I]` of `u`."""
        return gate_forward(self.name, *self._parts(u)) if self.gated else ACTIVATIONS[self.name][0](u)

    def differentiable(self, u: Tensor) -> Tensor:
        """`forward` for autograd, which does not let every act's result be changed in place."""
        return gate_differentiable(self.name, *self._parts(u)) if self.gated else self.forward(u)

    def backward(self, u: Tensor, dh: Tensor) -> Tensor:
        """The gradient of `u` from that of `h`."""
        if not self.gated:
            return ACTIVATIONS[self.name][1](dh, u)
        du, (gate, up) = torch.empty_like(u), self._parts(u)
        if u.is_cpu and _in_one_pass(self.name, gate, up, None, dh, *self._parts(du)):
            return du
        _, backward = GATES.get(self.name) or _product(self.name)
        for part, gradient in zip(self._parts(du), backward(dh, gate, up), strict=True):
            part.copy_(gradient)
        return du


def _autograd() -> AbstractContextManager[object]:
    """Lets autograd record inside an operator that a dispatch mode (FLOP counter, checkpoint) called below autograd."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (DispatchKey.AutogradFunctionality, DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


@dataclass(frozen=True)
class Recomputed:
    """Any differentiable `u → h`; its backward runs it again under autograd.

    The function gets a copy of u, which is saved for backward: it may change its input in place and may return it.
    """

    function: Callable[[Tensor], Tensor]

    def forward(self, u: Tensor) -> Tensor:
        return self.function(u.clone())

    differentiable = forward

    def backward(self, u: Tensor, dh: Tensor) -> Tensor:
        with torch.enable_grad(), _autograd():
            leaf = u.detach().requires_grad_()
            (du,) = torch.autograd.grad(self.function(leaf.clone()), leaf, dh)
        return du


def lookup(name: str, layout: GateLayout) -> Activation:
    """A known activation. Raises ValueError that lists the known ones, or for one that needs a gate without it."""
    if not isinstance(name, str):
        raise TypeError(f"activation is a {type(name).__name__}; it must be a name or a function of u")
    if name not in ACTIVATIONS and name not in GATES:
        known = ", ".join((*ACTIVATIONS, *GATES))
        raise ValueError(f"activation {name!r} is not one of {known}; or pass a function of u")
    if name in GATES and layout is GateLayout.NONE:
        raise ValueError(
            f"activation {name!r} is a function of gate and up, and has_gate=False: without a gate use one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    return Activation(name, layout)
