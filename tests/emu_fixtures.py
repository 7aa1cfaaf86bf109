"""Fixtures of tests that run the CUDA kernels behind the operator in their emulator."""

import contextlib
from dataclasses import replace

import pytest
import torch
from native_build import emulator

from lorafuse.backends import base
from lorafuse.plan import override


@pytest.fixture(scope="module")
def backend():
    emulator()
    return base.load("emu")


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
def launched(backend, monkeypatch):
    """Names and arguments of the kernels' functions that ran."""
    calls = []

    class Recorder:
        def __getattr__(self, name):
            def record(**arguments):
                calls.append((name, arguments))
                return getattr(emulator(), name)(**arguments)

            return record

    monkeypatch.setattr(backend, "_RUN", replace(backend._RUN, native=Recorder(), flags={}))
    return calls
