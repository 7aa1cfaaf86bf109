"""Fixtures of tests of the choice of a backend."""

import sys
from types import ModuleType

import pytest

from lorafuse.backends import aten, base, workspace
from lorafuse.ops import linear
from lorafuse.plan import Plan

GROUPED_MM = Plan("eager", "grouped_mm")


class Spy(aten.Aten):
    """A backend that computes as eager does, and records which of its functions for linear layers ran."""

    name = "triton"

    def __init__(self):
        self.calls = []

    def linear_forward(self, x, w, bias, a, b, plan, scale, dropout):
        self.calls.append("linear_forward")
        return linear.forward(aten.BACKEND, plan, x, w, bias, a, b, scale, dropout, False)

    def linear_backward(self, dy, x, xa, w, a, b, plan, scale, dropout, needs):
        self.calls.append("linear_backward")
        return linear.backward(aten.BACKEND, plan, dy, x, xa, w, a, b, scale, dropout, needs, False)


class ByGroupedMM(aten.Aten):
    """Eager as on GPUs with a fast kernel of grouped_mm, which refuses sizes of 0: there eager runs the loop."""

    def project(self, x, a, rows, plan, **more):
        return super().project(x, a, rows, _planned(rows, plan, x, a), **more)

    def matmul(self, x, w, rows, plan, **more):
        return super().matmul(x, w, rows, _planned(rows, plan, x, w.data), **more)

    def outer(self, narrow, wide, rows, plan, **more):
        return super().outer(narrow, wide, rows, _planned(rows, plan, narrow, wide, more["like"]), **more)


def _planned(rows, plan, *tensors):
    return GROUPED_MM if rows is not None and all(t.numel() for t in tensors) else plan


@pytest.fixture
def assume(monkeypatch):
    """`assume(name, state)`: in this test a backend is as available as `state` says."""

    def one(name, state):
        availability = base.availability
        monkeypatch.setattr(base, "availability", lambda other: state if other == name else availability(other))

    return one


@pytest.fixture
def no_choice_yet(monkeypatch):
    monkeypatch.setattr(base, "process_choice", None)
    monkeypatch.delenv("LORAFUSE_BACKEND", raising=False)


@pytest.fixture
def spy(monkeypatch, assume):
    """A backend "triton" that exists, computes as eager does, and records which of its functions ran."""
    actual = Spy()
    module = ModuleType("lorafuse.backends.triton")
    module.backend = lambda: actual
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assume("triton", base.Availability(True))
    return actual


@pytest.fixture
def by_grouped_mm(monkeypatch):
    """Eager multiplies ragged rows by grouped_mm."""
    actual = ByGroupedMM()
    monkeypatch.setattr("lorafuse.ops.choose.ATEN", actual)
    return actual


@pytest.fixture
def empty_workspace():
    """Nothing was decoded yet."""
    workspace.clear_workspace()


@pytest.fixture
def decoded(monkeypatch):
    """The sizes of every weight that is decoded, in order."""
    # not at the top: tests without Triton use the others
    from lorafuse.backends import triton

    sizes = []
    for backend in (aten.BACKEND, triton.BACKEND):

        def recorded(w, dtype, out, decode=backend.decode):
            sizes.append(w.stored)
            return decode(w, dtype, out)

        monkeypatch.setattr(backend, "decode", recorded)
    return sizes
