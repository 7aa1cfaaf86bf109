"""What patched layers of every kind need: whether calling a module does more than its class says, and one warning."""

import functools
import warnings

from torch import nn

__all__ = ["altered", "warn_once"]


@functools.cache
def warn_once(reason: str) -> None:
    """Say once for each reason that a patched layer runs as PEFT ships it."""
    warnings.warn(f"a patched layer runs as PEFT ships it: {reason}", stacklevel=4)


def altered(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward (hooks, a replaced forward)."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )
