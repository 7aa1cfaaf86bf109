"""Exceptions of lorafuse beyond `ValueError`, `TypeError` and `NotImplementedError`, and a text in one line."""

__all__ = ["BackendUnavailable", "MissingDependency", "one_line"]


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message holds the reason and the fix."""


class MissingDependency(ImportError):
    """An optional package is not installed, or too old; the message holds the command that installs it."""


def one_line(text: str) -> str:
    """`text` in one line, with what a terminal would obey instead of show written as escapes."""
    line = " ".join(part.strip() for part in text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
