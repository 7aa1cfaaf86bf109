"""Tensor-parallel adapted layers: each rank of a group holds some columns or rows of wᵀ, and runs one fused operator.

With P ranks, `M` tokens of the whole batch in x:

| | column parallel (q, k, v, gate, up) | row parallel (o, down) |
| --- | --- | --- |
| weight | `[N/P, K]` | `[N, K/P]` |
| bias | `[N/P]` | `[N]`, equal on every rank, added once after the sum |
| a | `[R, K]`, equal on every rank | `[R, K/P]` |
| b | `[N/P, R]` | `[N, R]`, equal on every rank |
| x | `[…, K]`, equal on every rank | `[…, K/P]` |
| y | `[…, N/P]` | `[…, N]`, equal on every rank |
| forward sends | nothing | one sum of y |
| backward sends | one sum of dx, one of da `[R, K]` | one sum of db `[N, R]` |

Row parallel never sums xa by itself: base and low-rank path are both linear in the rank's part of x, so that their sum
is reduced once, and `scale · xa · bᵀ` is part of it once. With `sequence_dim` the tensors that are equal on every rank
are a part of the sequence on each instead: x is gathered for a column-parallel layer, y reduced and scattered after a
row-parallel one.

Gradients of what is equal on every rank are summed here, so they are equal on every rank: no data-parallel wrapper may
sum them again over this group.
"""

import torch.distributed as dist
from torch import Tensor

from lorafuse.functional import lora_linear
from lorafuse.operands import Weight
from lorafuse.ops.checks import seed_tensor
from lorafuse.parallel.collectives import gathered, replicated, scattered, summed

__all__ = ["column_parallel_linear", "row_parallel_linear"]


def column_parallel_linear(
    x: Tensor,
    weight: Tensor | Weight,
    a: Tensor,
    b: Tensor,
    group: dist.ProcessGroup,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    sequence_dim: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """This rank's columns of y, `[..., N/P]`.

    Args:
        x: `[..., K]`, equal on every rank; with `sequence_dim` this rank's part of the sequence.
        weight, a, b, bias: `[N/P, K]`, `[R, K]`, `[N/P, R]`, `[N/P]`; a is equal on every rank.
        group: the ranks that hold the layer.
        dropout_p, seed: as in `lora_linear`. All ranks draw one mask: a seed of None is that of the group's first rank.
        sequence_dim: the dimension along which each rank has a part of x, or None.
        scale, backend: as in `lora_linear`.

    Raises what `lora_linear` raises.
    """
    if dropout_p and seed is None:
        seed = seed_tensor(None, x.device)
        dist.broadcast(seed, group_src=0, group=group)
    x = replicated(x, group) if sequence_dim is None else gathered(x, group, sequence_dim)
    a = replicated(a, group)
    return lora_linear(x, weight, a, b, scale=scale, bias=bias, dropout_p=dropout_p, seed=seed, backend=backend)


def row_parallel_linear(
    x: Tensor,
    weight: Tensor | Weight,
    a: Tensor,
    b: Tensor,
    group: dist.ProcessGroup,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    sequence_dim: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """y `[..., N]`, equal on every rank; with `sequence_dim` this rank's part of the sequence.

    Args:
        x: `[..., K/P]`, this rank's columns.
        weight, a, b, bias: `[N, K/P]`, `[R, K/P]`, `[N, R]`, `[N]`; b and bias are equal on every rank.
        group: the ranks that hold the layer.
        sequence_dim: the dimension along which each rank keeps a part of y, or None.
        scale, dropout_p, seed, backend: as in `lora_linear`; each rank masks its own columns of x.

    Raises what `lora_linear` raises, and ValueError for a sequence that does not divide among the ranks.
    """
    b = replicated(b, group)
    partial = lora_linear(x, weight, a, b, scale=scale, dropout_p=dropout_p, seed=seed, backend=backend)
    y = summed(partial, group) if sequence_dim is None else scattered(partial, group, sequence_dim)
    if bias is None:
        return y
    # each rank has a part of the sequence's gradient of the bias
    return y + (bias if sequence_dim is None else replicated(bias, group)).to(y.dtype)
