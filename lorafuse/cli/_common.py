"""What the commands share: dtypes by name, the device, the console, checks of numbers and of paths to write."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["DTYPES", "MOST", "check_numbers", "check_path", "console", "device"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# of every size and count: a matrix of it and any other is beyond all memory
MOST = 2**48


def device(name: str) -> torch.device:
    """The device of that name; "" is cuda where there is one, else cpu. Raises ValueError where torch cannot use it."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            count = max(1, torch.cuda.device_count())
            if (device.index or 0) >= count:
                raise RuntimeError(f"the CUDA devices here are 0 to {count - 1}")
        else:
            # a name that torch knows may be of a device that it was built without, is not here, or holds no numbers
            torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name}: torch cannot use it here ({reason}); use --device cpu") from error
    return device


def console() -> Any:
    """rich's console, of one width also in a pipe or a log. Raises ImportError without rich."""
    from rich.console import Console

    class _Console(Console):
        def on_broken_pipe(self) -> None:
            # rich would exit with status 1, which here says that a result is wrong
            raise BrokenPipeError

    return _Console(width=None if sys.stdout.isatty() else 120)


def check_numbers(args: argparse.Namespace, *names: str, least: float = 1, most: float = MOST) -> None:
    """Raises ValueError, with the option and its value, for a number that is not from `least` to `most`, or is NaN.

    Options that were not given, None, are passed over.
    """
    for name in names:
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is None or least <= value <= most:
                continue
            rule = f"at most {most}" if value > most else f"at least {least}"
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be {rule}")


def check_path(option: str, path: Path, why_not: Callable[[Path], str]) -> None:
    """Raises ValueError where `why_not` (`files.why_no_file` or `why_no_folder`) has a reason."""
    if reason := why_not(path):
        raise ValueError(f"{option} {path}: {reason}")
