"""What the commands that run models and layers share: dtypes by name, the device, the console, checks of numbers."""

import argparse
import sys
from typing import Any

import torch

__all__ = ["DTYPES", "check_at_least_one", "console", "device"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device(name: str) -> torch.device:
    """The device of that name; "" is cuda where there is one, else cpu. Raises ValueError for cuda without a device."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def console() -> Any:
    """rich's console, of one width also in a pipe or a log. Raises ImportError without rich."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def check_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError, with the option and its value, for a number below 1."""
    for name in names:
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: it must be at least 1")
