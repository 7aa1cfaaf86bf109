"""Which backends exist, which can run here, and which one a call uses.

A backend is a module of this folder with `linear_forward` and `linear_backward` (signatures in `eager`).
"""

import importlib
from dataclasses import dataclass
from types import ModuleType

from lorafuse import env
from lorafuse.errors import BackendUnavailable

__all__ = [
    "BACKENDS",
    "Availability",
    "availability",
    "candidates",
    "check_name",
    "current",
    "load",
    "require",
    "use_backend",
]

BACKENDS = ("eager", "triton", "cuda")


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here; if not, `reason` says why and `fix` what to do about it."""

    ok: bool
    reason: str = ""
    fix: str = ""


_AVAILABILITY = {
    "eager": Availability(True),
    "triton": Availability(False, "this version of lorafuse holds no Triton kernels", "use backend='eager' or 'auto'"),
    "cuda": Availability(False, "this version of lorafuse holds no CUDA kernels", "use backend='eager' or 'auto'"),
}


def check_name(name: str) -> str:
    """`name` if it is "auto" or a backend. Raises ValueError that lists the known ones."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not known; use one of {', '.join(map(repr, ('auto', *BACKENDS)))}")
    return name


def availability(name: str) -> Availability:
    """Whether the backend `name` can run on this machine. Raises ValueError for an unknown name."""
    if name not in BACKENDS:
        check_name(name)
        raise ValueError("backend='auto' is a choice among backends; ask for one of them by name")
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
    return tuple(n for n in reversed(BACKENDS) if _AVAILABILITY[n].ok and (n == "eager" or device_type == "cuda"))


def load(name: str) -> ModuleType:
    """The module that implements an available backend."""
    return importlib.import_module(f"lorafuse.backends.{require(name)}")


_current: str | None = None


def current() -> str:
    """The backend of calls that name none: that of `use_backend`, else `LORAFUSE_BACKEND`, else "auto"."""
    global _current
    if _current is None:
        _current = require(env.get("LORAFUSE_BACKEND"))
    return _current


class use_backend:
    """Set the backend of every call that names none; as a context manager, for the block only.

    `lorafuse.use_backend("eager")` sets it, `with lorafuse.use_backend("eager"): …` restores the former one afterwards.
    It is one setting for the whole process. Raises ValueError for an unknown name, `BackendUnavailable` for one that
    cannot run here.
    """

    def __init__(self, name: str) -> None:
        global _current
        self._former = _current
        _current = require(name)

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exc: object) -> None:
        global _current
        _current = self._former
