"""Exceptions that lorafuse raises beyond `ValueError`, `TypeError` and `NotImplementedError`."""

__all__ = ["BackendUnavailable", "MissingDependency"]


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message holds the reason and the fix."""


class MissingDependency(ImportError):
    """An optional package is not installed, or too old; the message holds the command that installs it."""
