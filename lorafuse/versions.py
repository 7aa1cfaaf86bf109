"""The oldest supported version of each package, what needs a newer one, and the comparison of versions."""

import re

__all__ = ["EXPERTS", "MINIMUM", "is_older"]

# A test holds these equal to pyproject.toml's. PEFT and transformers: the oldest that a trainer still allows for dense
# models (LLaMA-Factory 0.9.5; axolotl 0.19.0 has 0.20.0 and 5.16.1, ms-swift 4.6.0 below 0.21 and 5.20; 2026-11-29).
MINIMUM = {"torch": "2.11", "triton": "3.6", "peft": "0.18", "transformers": "4.55"}
# Of experts: PEFT 0.18 lays their factors out the other way, with in and out features exchanged; transformers 5.7 is
# the first whose experts implementations can be registered.
EXPERTS = {"peft": "0.19", "transformers": "5.7"}


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
