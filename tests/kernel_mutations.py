"""Wrong kernels: one place of a kernel module is changed, and the backend runs it with all that imports it."""

import importlib.util
import sys
from pathlib import Path

from lorafuse.backends import triton, triton_multi
from lorafuse.kernels import (
    combine,
    common,
    decode,
    epilogues,
    gated,
    gates,
    lowrank,
    matmul,
    multi,
    packed,
    philox,
    product,
    routing,
    rows,
    siblings,
    tickets,
)

# every module after those that it imports
MODULES = (
    common, philox, rows, routing, epilogues, product, decode, combine, lowrank, matmul, packed, tickets, siblings,
    gated, gates, multi,
)  # fmt: skip


def _copy(module, source, folder):
    path = folder / f"{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(module.__name__, path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def install(module, old, new, monkeypatch, folder):
    """Make the backend run `module` with `old`, which occurs once in its source, replaced by `new`."""
    changed = set()
    for each in MODULES:
        source = Path(each.__file__).read_text()
        if each is module:
            assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
            source = source.replace(old, new)
        elif not any(f"from {name} import" in source for name in changed):
            continue
        copy = _copy(each, source, folder)
        changed.add(each.__name__)
        monkeypatch.setitem(sys.modules, each.__name__, copy)
        for backend in (triton, triton_multi):
            monkeypatch.setattr(backend, each.__name__.rpartition(".")[2], copy, raising=False)
            if each is rows:
                monkeypatch.setattr(backend, "Tiles", copy.Tiles)
