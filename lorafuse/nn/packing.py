"""PEFT's packing of experts' factors: the expert is slowest in `lora_A.weight [E·R, in]` and fastest in
`lora_B.weight [out, R·E]`.
"""

from torch import Tensor

__all__ = ["packed", "unpacked"]


def packed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """PEFT's pair of a `[E, R, in]` and b `[E, out, R]`."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def unpacked(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """a `[E, R, in]` and b `[E, out, R]` of PEFT's pair, views of it where it is contiguous.

    Raises RuntimeError for sizes that `experts` does not divide.
    """
    return a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
