"""Which backends exist, which can run here, and which one a call uses.

A backend is a module of this folder whose `backend()` gives the one instance of a class of the protocol. "emu", which
runs the CUDA kernels on a CPU, is one for tests: it exists where `lorafuse._emu` was built.
"""

import contextvars
import functools
import importlib
import importlib.util
import threading
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

import torch

from lorafuse import env, plan
from lorafuse.backends import native
from lorafuse.errors import BackendUnavailable
from lorafuse.versions import MINIMUM, is_older

if TYPE_CHECKING:
    from lorafuse.backends.protocol import Backend

__all__ = [
    "BACKENDS",
    "EMULATOR",
    "Availability",
    "availability",
    "candidates",
    "check_name",
    "clear_cache",
    "current",
    "load",
    "probe",
    "require",
    "resolve",
    "use_backend",
]

BACKENDS = ("eager", "triton", "cuda")
# the CUDA kernels on CPU tensors, for tests: known where it was built, chosen by nobody but by name
EMULATOR = "emu"
_MODULES = {"eager": "aten", "triton": "triton", "cuda": "cuda", EMULATOR: "emulator"}


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here; if not, `reason` says why and `fix` what to do about it."""

    ok: bool
    reason: str = ""
    fix: str = ""


_EAGER_INSTEAD = "use backend='eager' or 'auto'"
# what `probe` returned, by backend
_AVAILABILITY: dict[str, Availability] = {}


def _triton() -> Availability:
    if importlib.util.find_spec("triton") is None:
        return Availability(False, "Triton is not installed", f"pip install 'triton>=3.6', or {_EAGER_INSTEAD}")
    version = metadata.version("triton")
    if is_older(version, MINIMUM["triton"]):
        return Availability(
            False, f"Triton {version} is older than 3.6", f"pip install 'triton>=3.6', or {_EAGER_INSTEAD}"
        )
    from triton import knobs

    if knobs.runtime.interpret:
        # the interpreter of Triton 3.6 fails in numpy 2.4; those of 3.7, 3.8 and 3.9 do not (all run, 2026-11)
        if is_older(version, "3.7") and not is_older(metadata.version("numpy"), "2.4"):
            reason = f"the interpreter of Triton {version} fails with numpy {metadata.version('numpy')}"
            return Availability(False, reason, "pip install 'numpy<2.4', or unset TRITON_INTERPRET")
    elif not torch.cuda.is_available():
        fix = f"run on a GPU, or set TRITON_INTERPRET=1 for Triton's slow interpreter, or {_EAGER_INSTEAD}"
        return Availability(False, "torch sees no CUDA device", fix)
    return Availability(True)


def _cuda() -> Availability:
    state = _module("_cuda", f"or {_EAGER_INSTEAD}")
    if not state.ok:
        return state
    if not torch.cuda.is_available():
        return Availability(False, "torch sees no CUDA device", f"run on a Hopper GPU, or {_EAGER_INSTEAD}")
    # which device a call is on, the plan looks at
    here = {"sm_{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())}
    architectures = [name for name in native.info("_cuda")["architectures"] if name.endswith("a")]
    if not here & {name.removesuffix("a") for name in architectures}:
        built = ", ".join(architectures)
        reason = f"its kernels were built for {built}, the devices here are {', '.join(sorted(here))}"
        return Availability(False, reason, "use backend='triton' or 'auto'")
    return Availability(True)


def _module(name: str, otherwise: str) -> Availability:
    """Whether a module that csrc is compiled to is there, loads, and is of the sources that are here."""
    if not native.built(name):
        return Availability(False, f"lorafuse.{name} is not built", f"{native.how_to_build(name)}, {otherwise}")
    reason = native.stale(name)
    if not reason:
        try:
            native.load(name)
        except ImportError as error:
            reason = f"lorafuse.{name} does not load: {error}"
    return Availability(not reason, reason, f"{native.how_to_build(name)}, {otherwise}" if reason else "")


def probe(name: str) -> Availability:
    """Whether a backend can run on this machine now."""
    if name == "eager":
        return Availability(True)
    if name == EMULATOR:
        return _module("_emu", "or use backend='eager'")
    return _triton() if name == "triton" else _cuda()


def clear_cache() -> None:
    """Look into every backend again: for whoever built one meanwhile."""
    plan.clear_cache()
    native.info.cache_clear()
    native.stale.cache_clear()
    _AVAILABILITY.clear()


def check_name(name: str) -> str:
    """`name` if it is "auto" or a backend. Raises ValueError that lists the known ones."""
    if name == EMULATOR and native.built("_emu"):
        return name
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not known; use one of {', '.join(map(repr, ('auto', *BACKENDS)))}")
    return name


def availability(name: str) -> Availability:
    """Whether the backend `name` can run on this machine. Raises ValueError for an unknown name."""
    if check_name(name) == "auto":
        raise ValueError("backend='auto' is a choice among backends; ask for one of them by name")
    if name not in _AVAILABILITY:
        _AVAILABILITY[name] = probe(name)
    return _AVAILABILITY[name]


def require(name: str) -> str:
    """`name` if it is "auto" or a backend that can run here. Raises ValueError or BackendUnavailable otherwise."""
    if check_name(name) != "auto":
        state = availability(name)
        if not state.ok:
            raise BackendUnavailable(f"backend={name!r} is not available: {state.reason}; fix: {state.fix}")
    return name


def candidates(device_type: str) -> tuple[str, ...]:
    """Backends that can run tensors of a device type ("cpu", "cuda", …) here; eager always can and comes last."""
    return tuple(n for n in reversed(BACKENDS) if (n == "eager" or device_type == "cuda") and availability(n).ok)


def load(name: str) -> "Backend":
    """The instance of an available backend. Raises ValueError or BackendUnavailable otherwise."""
    return importlib.import_module(f"lorafuse.backends.{_MODULES[require(name)]}").backend()


# the call of `use_backend` that set the backend of the process last, and that of the running thread or task
process_choice: "use_backend | None" = None
_local: contextvars.ContextVar[str | None] = contextvars.ContextVar("lorafuse_backend", default=None)
_LOCK = threading.Lock()


@functools.cache
def _from_environment() -> str:
    return require(env.get("LORAFUSE_BACKEND"))


def current() -> str:
    """The backend of calls that name none: that of `use_backend`, else `LORAFUSE_BACKEND`, else "auto"."""
    name = _local.get()
    if name is not None:
        return name
    return _from_environment() if process_choice is None else process_choice.name


def resolve(name: str) -> str:
    """`name`, or `current()` for "current", which calls that a compiler traced hold: they look when they run."""
    return current() if name == "current" else name


class use_backend:
    """Set the backend of every call that names none: `lorafuse.use_backend("eager")` sets it for the whole process.

    As a context manager, `with lorafuse.use_backend("eager"): …`, it holds for the block, in the thread or asyncio task
    that runs the block; threads that the block starts follow the process. Raises ValueError for an unknown name,
    `BackendUnavailable` for one that cannot run here.
    """

    def __init__(self, name: str) -> None:
        global process_choice
        self.name = require(name)
        self._tokens: list[contextvars.Token[str | None]] = []
        self._thread, self._is_block = threading.get_ident(), False
        with _LOCK:
            former, process_choice = process_choice, self
            self._former = former
            if former is not None and former._thread == self._thread:
                # nobody goes back further: a setter in a loop keeps one former, not all
                former._former = None

    def __enter__(self) -> "use_backend":
        global process_choice
        self._tokens.append(_local.set(self.name))
        with _LOCK:
            # a block is no setting of the process; those that other threads entered meanwhile are none either
            self._is_block = True
            while process_choice is not None and process_choice._is_block:
                process_choice = process_choice._former
        return self

    def __exit__(self, *exc: object) -> None:
        _local.reset(self._tokens.pop())
