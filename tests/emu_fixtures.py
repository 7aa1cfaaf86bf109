"""Fixtures of tests that run the CUDA kernels behind the operator in their emulator."""

import contextlib

import pytest
import torch
from native_build import emulator
from operators import Linear

from lorafuse.backends import base
from lorafuse.plan import override


@pytest.fixture(scope="module")
def operator():
    emulator()
    return Linear("emu")


@pytest.fixture
def emu():
    """The emulator, every test under a schedule of its own until it asks for another."""
    module = emulator()
    module.configure(seed=int(torch.randint(1, 2**31, ()).item()))
    yield module
    module.configure()


@pytest.fixture
def tiles():
    """Plans of these (block_n, stages, cluster) only."""
    with contextlib.ExitStack() as stack:
        yield lambda *configs: stack.enter_context(override(cuda_tiles=configs))


@pytest.fixture
def launched(monkeypatch):
    """Names and arguments of the kernels' functions that ran."""
    calls, module = [], emulator()

    class Recorder:
        def __getattr__(self, name):
            def record(**arguments):
                calls.append((name, arguments))
                return getattr(module, name)(**arguments)

            return record

    backend = base.load("emu")
    monkeypatch.setattr(backend, "native", Recorder())
    monkeypatch.setattr(backend, "flags", {})
    return calls
