"""The `lorafuse` operator namespace, and what a formula registered with torch must return."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import Library

__all__ = ["LIBRARY", "implement", "no_gradients"]

LIBRARY = Library("lorafuse", "DEF")


def implement(name: str, real: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Give the operator `name` its implementation on every device, and the one that knows shapes alone."""
    LIBRARY.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorafuse::{name}", fake, lib=LIBRARY)


def no_gradients(inputs: Sequence[Any], defaults: Sequence[Any]) -> list[Any]:
    """None for each argument of a call: what `register_autograd` wants back, before gradients are put in.

    `defaults` are those of the last arguments. The dispatcher drops arguments that are equal to theirs from the end,
    and a list of tensors has a list of gradients (torch 2.11 to 2.13).
    """
    given = len(inputs)
    while given > len(inputs) - len(defaults) and inputs[given - 1] == defaults[given - 1 - len(inputs)]:
        given -= 1
    return [[None] * len(value) if isinstance(value, list | tuple) else None for value in inputs[:given]]
