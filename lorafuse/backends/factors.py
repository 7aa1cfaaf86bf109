"""Stacks of LoRA factors on a CPU, one group at a time: read in x's dtype, their gradients collected.

PEFT packs lora_B `[N, R·E]` with neighbours from different groups. As a stack `[E, N, R]` it is a transposition of two
dimensions, for which ATen has a fast copy; element by element it would cost more than the products.
"""

import torch
from torch import Tensor

__all__ = ["Stack", "stack"]


class Stack:
    """`t [E, …]`, whose groups are read as contiguous matrices of `dtype`, times `scale` and rounded once; with `grad`,
    its gradient is collected.
    """

    def __init__(self, t: Tensor, dtype: torch.dtype, grad: bool = False, scale: float = 1.0) -> None:
        self._given, self._dtype, self._scale, self.shape = t, dtype, scale, t.shape
        self._packed = t.stride(0) == 1 and t.permute(1, 2, 0).is_contiguous()
        self._grad = None
        self._is_read = True
        if self._packed:
            self._read = self._rounded(t.permute(1, 2, 0)).view(-1, t.shape[0]).t().contiguous().view(t.shape)
        elif t.stride(0) == 0:
            # shared by all groups: converted once
            self._read = self._rounded(t[:1]).contiguous().expand_as(t)
        else:
            self._read, self._is_read = t if t.is_contiguous() else t.contiguous(), False
        if grad:
            self._grad = t.new_empty(t.shape, dtype=dtype if self._packed else t.dtype)

    def _rounded(self, t: Tensor) -> Tensor:
        if self._scale == 1.0:
            return t.to(self._dtype)
        return torch.mul(t, self._scale, out=torch.empty_like(t, dtype=self._dtype))

    def __getitem__(self, e: int) -> Tensor:
        return self._read[e] if self._is_read else self._rounded(self._read[e])

    def collect(self, e: int, grad: Tensor) -> None:
        """Keep the gradient of group `e`; every group that has rows must be given once."""
        if self._grad is not None:
            self._grad[e] = grad

    def gradient(self, ends: Tensor, scale: float) -> Tensor | None:
        """`scale` times what was collected, in the factors' dtype and packing; zero for groups without rows."""
        grad = self._grad
        if grad is None:
            return None
        grad[ends.diff(prepend=ends.new_zeros(1)) == 0] = 0
        if self._packed:
            E, N, R = grad.shape
            grad = grad.view(E, -1).t().contiguous().to(self._given.dtype).view(N, R, E).permute(2, 0, 1)
        return grad if scale == 1.0 else grad.mul_(scale)


def stack(t: Tensor | None, dtype: torch.dtype, grad: bool = False, scale: float = 1.0) -> Stack | None:
    """`Stack(t, dtype, grad, scale)`; None for none."""
    return None if t is None else Stack(t, dtype, grad, scale)
