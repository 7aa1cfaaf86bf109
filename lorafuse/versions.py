"""The oldest supported version of each package, and the comparison of versions."""

import re

__all__ = ["MINIMUM", "is_older"]

# a test holds these equal to pyproject.toml's
MINIMUM = {"torch": "2.11", "triton": "3.6", "peft": "0.21", "transformers": "5.7"}


def is_older(version: str, than: str) -> bool:
    """Whether the release of `version` comes before `than`; "2.13.0+cpu" and "2.13.0.dev0" are of release 2.13.0.

    Raises ValueError for a version that does not begin with a number. (packaging is no dependency of torch, so
    `import lorafuse` cannot rely on it.)
    """
    return _release(version) < _release(than)


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    if match is None:
        raise ValueError(f"version {version!r}: it must begin with a number, such as 2.13.0")
    return tuple(int(part) for part in match[0].split("."))
