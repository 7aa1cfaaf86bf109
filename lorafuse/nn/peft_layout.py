"""What PEFT's files hold: experts' factors, whose expert is slowest in `lora_A.weight [E·R, in]` and fastest in
`lora_B.weight [out, R·E]`, and which layers of a model are adapted.
"""

import re
from collections.abc import Collection, Iterable

from torch import Tensor

__all__ = ["packed", "target_modules", "unpacked"]


def packed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """PEFT's pair of a `[E, R, in]` and b `[E, out, R]`."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def unpacked(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """a `[E, R, in]` and b `[E, out, R]` of PEFT's pair, views of it where it is contiguous.

    Raises RuntimeError for sizes that `experts` does not divide.
    """
    return a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)


def target_modules(names: Collection[str], every: Iterable[str]) -> list[str] | str:
    """PEFT's target_modules of the layers with these names among `every` module of a model: the ends of their names
    where no other module ends so, whole names where no other module ends in one, or else a pattern.
    """
    others = set(every).difference(names)
    ends = {name.rpartition(".")[2] for name in names}
    if not any(other.rpartition(".")[2] in ends for other in others):
        return sorted(ends)
    if not any(other.endswith(f".{name}") for other in others for name in names):
        return sorted(names)
    return "|".join(re.escape(name) for name in sorted(names))
