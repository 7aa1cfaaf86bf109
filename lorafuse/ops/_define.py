"""The `lorafuse` operator namespace."""

from torch.library import Library

__all__ = ["LIBRARY"]

LIBRARY = Library("lorafuse", "DEF")
