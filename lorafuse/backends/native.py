"""The modules that csrc is compiled to, `lorafuse._cuda` and its emulation `lorafuse._emu`: what is built, and of what.

Importing either needs no GPU, no driver and no torch.
"""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from lorafuse.backends.native_sources import source_hash

__all__ = ["built", "describe", "how_to_build", "info", "load", "stale", "why_not_built"]

_PACKAGE = Path(__file__).parents[1]
CSRC = _PACKAGE.parent / "csrc"


def built(name: str) -> bool:
    """Whether the module `lorafuse.<name>` ("_cuda" or "_emu") exists; it is not imported."""
    return importlib.util.find_spec(f"lorafuse.{name}") is not None


def load(name: str) -> ModuleType:
    """The module `lorafuse.<name>`. Raises ImportError where it was not built, or for another Python."""
    return importlib.import_module(f"lorafuse.{name}")


@cache
def info(name: str) -> dict[str, Any]:
    """What a built module says of itself, {compiler, architectures, sources}, read from its file: it is not loaded."""
    spec = importlib.util.find_spec(f"lorafuse.{name}")
    assert spec is not None
    assert spec.origin is not None
    match = re.search(rb'\{"compiler": [^}]*\}', Path(spec.origin).read_bytes())
    return json.loads(match[0]) if match else {"compiler": "?", "architectures": [], "sources": "?"}


def how_to_build(name: str) -> str:
    """What builds a module: make in a checkout; an installed package has neither Makefile nor csrc."""
    if _in_checkout():
        if name == "_cpu":
            return "python csrc/build.py cpu (needs g++)"
        return "make cuda (needs nvcc 12.8 or newer; g++ alone for the emulator)"
    needed = {"_emu": "with LORAFUSE_BUILD_EMULATOR=1, where g++ is", "_cpu": "where g++ is"}.get(
        name, "where nvcc 12.8 or newer is"
    )
    return f"install lorafuse from its sources {needed}"


def _in_checkout() -> bool:
    return (CSRC / "build.py").exists()


@cache
def stale(name: str) -> str:
    """Why a built module must be built anew: "" when it is of this checkout's sources, or no sources are here."""
    if not _in_checkout():
        return ""
    here, of = source_hash(CSRC, emulated=name == "_emu"), info(name)["sources"]
    return "" if here == of else f"lorafuse.{name} was built from other sources ({of}) than those of csrc here ({here})"


def describe(name: str) -> str:
    """A built module in one line."""
    build = info(name)
    architectures = f" for {', '.join(build['architectures'])}" if build["architectures"] else ""
    return f"built by {build['compiler']}{architectures} from sources {build['sources']}"


def why_not_built() -> str:
    """What keeps this checkout from building the CUDA kernels; "" where nothing does, or this is no checkout."""
    if not _in_checkout():
        return ""
    done = subprocess.run([sys.executable, str(CSRC / "build.py"), "check"], capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else ""
