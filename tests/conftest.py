"""What every test gets: a fixed seed, NaN in memory nobody wrote, no network; skips are listed at the end."""

import os

# Before torch is imported: processes of pytest-xdist share the cores, and one thread for each is the fastest.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    # Inductor otherwise starts processes of its own, which import torch and compile nothing for a CPU
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

# Before transformers is imported: tests build their models from configurations and never download.
os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import importlib.util
import random
import tempfile
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors

# what modules of tests import stays: collections that visit it while it grows are a tenth of the time of the imports
gc.disable()

# what `lorafuse tune` measured on this machine would change the plans that tests look at
_cache = tempfile.TemporaryDirectory()
os.environ["LORAFUSE_CACHE_DIR"] = _cache.name
# Inductor's cache knows an operator by its name: another checkout's graph would call it with other arguments. The
# processes of pytest-xdist inherit theirs: headers are precompiled and graphs compiled once for all
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{_cache.name}/inductor"
# a compiler knows what its CPU has: Inductor otherwise compiles a program to see that, for 5 s
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"

# Before any kernel is defined: without a GPU, kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        import fast_interpreter

        fast_interpreter.install()

# Remembered at its first call: under a patched torch.empty it would remember that one, and `with torch.device("meta")`
# would then allocate whole models.
_device_constructors()

_POISONED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """A full collection, which some tests ask for, visits nothing that earlier files imported or left in caches."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def small_groups(monkeypatch):
    """Layers run as groups however small x is: models of tests have no other."""
    from lorafuse.integrations import groups

    monkeypatch.setattr(groups, "SMALL", 0)


def _method(new, function):
    def allocate(self, *args, dtype=None, device=None, **kwargs):
        # Dynamo cannot trace a method descriptor of torch.Tensor that it meets outside the class
        if torch.compiler.is_compiling():
            return function(*args, dtype=dtype or self.dtype, device=device or self.device, **kwargs)
        return new(self, *args, dtype=dtype, device=device, **kwargs)

    return allocate


def _poisoned(allocate):
    def allocate_nan(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if out.dtype in _POISONED_DTYPES:
            with torch.no_grad():
                out.fill_(float("nan"))
        return out

    return allocate_nan


@pytest.fixture(autouse=True)
def _poison(request, monkeypatch):
    """Uninitialized float memory reads as NaN, so that an output element nobody writes fails its test."""
    if request.node.get_closest_marker("no_poison"):
        return
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("empty", "empty_strided"):
        method = _poisoned(_method(getattr(torch.Tensor, f"new_{name}"), getattr(torch, name)))
        monkeypatch.setattr(torch.Tensor, f"new_{name}", method)


def pytest_addoption(parser):
    parser.addoption("--every-dtype", action="store_true", help="compile-only tests: all of it (make test-compile)")
    parser.addoption("--update-budget", action="store_true", help="write tests/*/*_budget.json (make budget)")
    parser.addoption("--seeds", type=int, default=50, help="schedules of each emulated kernel (make test-emu: 1000)")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, this machine has none"))


def pytest_collection_finish():
    # a full collection otherwise visits everything that was imported: half a second, dozens of times a file
    gc.collect()
    gc.freeze()
    # every 700 objects, and a full one as often as little is left beside what is frozen, take a tenth of a trace
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


def skipped_by_reason(reports):
    """`{reason: [test id or file, …]}` of skipped reports, in the order in which they came."""
    groups = defaultdict(list)
    for report in reports:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        groups[reason.removeprefix("Skipped: ")].append(report.nodeid)
    return dict(groups)


def pytest_terminal_summary(terminalreporter):
    groups = skipped_by_reason(terminalreporter.stats.get("skipped", []))
    terminalreporter.section("what was skipped and why")
    if not groups:
        terminalreporter.line("nothing was skipped")
    for reason, tests in groups.items():
        shown = ", ".join(tests[:3]) + (f" and {len(tests) - 3} more" if len(tests) > 3 else "")
        terminalreporter.line(f"{len(tests)} x {reason}: {shown}")
