"""Fixtures of tests of the choice of a backend."""

import sys
from types import ModuleType

import pytest

from lorafuse.backends import base, eager


@pytest.fixture
def no_choice_yet(monkeypatch):
    monkeypatch.setattr(base, "_current", None)
    monkeypatch.delenv("LORAFUSE_BACKEND", raising=False)


@pytest.fixture
def spy(monkeypatch):
    """A backend "triton" that exists, computes as eager does, and records which of its functions ran."""
    module = ModuleType("lorafuse.backends.triton")
    module.calls = []
    for name in ("linear_forward", "linear_backward"):

        def run(*args, name=name):
            module.calls.append(name)
            return getattr(eager, name)(*args)

        setattr(module, name, run)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(base._AVAILABILITY, "triton", base.Availability(True))
    return module
