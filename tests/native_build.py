"""Builds csrc for the tests that run it or look at it: once a session, and only what changed since the last build."""

import importlib
import json
import subprocess
import sys
from functools import cache

import pytest
from native_commands import REPORTS, ROOT, command

from lorafuse.backends import base, native

# objects of the emulator that tests run
PLANTED = REPORTS / "emu-copied"


@cache
def build(target, *options):
    """`""`, or why this machine cannot build it. Fails the test for sources that do not compile."""
    done = subprocess.run(command(target, *options), capture_output=True, text=True, timeout=3600)
    if done.returncode and "was not found" in done.stderr:
        return done.stderr.strip()
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    importlib.invalidate_caches()
    base.clear_cache()
    return ""


def emulator():
    """The module `lorafuse._emu`, built from the sources that are here. Skips where there is no g++."""
    reason = build("emu")
    if reason:
        pytest.skip(f"the emulator cannot be built: {reason}")
    module = native.load("_emu")
    assert module.build_info() == native.info("_emu"), "an older lorafuse._emu was loaded before: run pytest again"
    return module


class _Emulator:
    """`lorafuse._emu`, built when a test first asks it for something."""

    def __getattr__(self, name):
        # pytest's collection looks for private names of mocks
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(emulator(), name)


EMULATOR = _Emulator()


def loads_alone(name, folder=ROOT / "lorafuse"):
    """What a Python that imports nothing else prints of a module's build information."""
    # a module that lacks units loads until it needs one
    code = f"import os, sys; sys.setdlopenflags(os.RTLD_LAZY); sys.path.insert(0, {str(folder)!r}); "
    code += f"import json, {name}; print(json.dumps({name}.build_info()))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout)
