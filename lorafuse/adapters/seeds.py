"""Seeds of dropout masks: numbers made of an adapter's own seed and of how many batches it was in."""

from torch import Tensor

__all__ = ["mixed", "signed"]


def signed(number: int) -> int:
    """64 bits of a number, as int64 holds them."""
    return (number + 2**63) % 2**64 - 2**63


def mixed(seeds: Tensor, calls: Tensor) -> Tensor:
    """63 bits for each pair of numbers, int64 that wrap around."""
    z = seeds * -0x61C8864680B583EB + calls * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 30) & (2**34 - 1))) * -0x6B2FB644ECCEEE15
    return ((z ^ ((z >> 31) & (2**33 - 1))) >> 1) & (2**63 - 1)
