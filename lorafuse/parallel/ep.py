"""Expert-parallel adapted experts: each rank of a group holds E/P experts with their adapters, and runs one operator.

Tokens reach the experts in one of two forms:

| | `shares_tokens` (every rank has the same tokens) | each rank has tokens of its own |
| --- | --- | --- |
| forward sends | one sum of out `[T, H]` | each chosen row to its expert and its result back: `2·T·k·H` |
| backward sends | one sum of dx and of the router gradient | the same rows again |
| a token of another rank's expert | a sentinel, which adds nothing | a row of the exchange |
| waits for the device | never | once a call, for the number of rows |

An adapter belongs to the rank of its expert and is held nowhere else. Its gradient comes from the tokens of all ranks:
with tokens of its own on each rank it is divided by P, as data parallelism averages the gradients of the other
parameters, so that a step does not depend on P. No data-parallel wrapper may average it again over this group.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from lorafuse.functional import lora_experts
from lorafuse.operands import Weight
from lorafuse.parallel.collectives import averaged, exchanged, replicated, summed

__all__ = ["expert_parallel_experts"]

_ADAPTERS = ("gate_up_a", "gate_up_b", "down_a", "down_b")


def expert_parallel_experts(
    x: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    gate_up: Tensor | Weight,
    down: Tensor | Weight,
    group: dist.ProcessGroup,
    *,
    shares_tokens: bool = False,
    **operands: object,
) -> Tensor:
    """`lora_experts` over the experts of all ranks; `out[t] = Σ_j topk_weight[t, j] · expert(x[t])`.

    Args:
        x: `[T, H]`, this rank's tokens, as many as it has; none is allowed.
        topk_index: `[T, k]`, experts by their number among the E of all ranks; rank p holds those from `p · E/P` on. A
            number of E or more is a sentinel.
        topk_weight: `[T, k]`.
        gate_up, down: this rank's stacks, `[E/P, …]`; E/P is equal on every rank.
        group: the ranks that hold the experts, in the order of the experts.
        shares_tokens: x, topk_index and topk_weight are equal on every rank of the group (it is the tensor-parallel
            group too); the result and all gradients are then equal as well.
        operands: the other keyword arguments of `lora_experts`; factors and biases are this rank's. A factor that all
            experts share is no part of this layout: pass `[E/P, …]`.

    Returns out `[T, H]`, this rank's tokens, in x's dtype.

    Raises what `lora_experts` raises, and ValueError for a factor without a dimension of experts.
    """
    for name in _ADAPTERS:
        factor = operands.get(name)
        if isinstance(factor, Tensor) and factor.dim() == 2:
            raise ValueError(
                f"expert_parallel_experts got {name} {list(factor.shape)}, shared by all experts; it would be another "
                "one on each rank: pass one for each expert, [E/P, …]"
            )
    experts = (gate_up if isinstance(gate_up, Weight) else Weight(gate_up)).stored[0]
    if shares_tokens:
        first = dist.get_rank(group) * experts
        is_here = (topk_index >= first) & (topk_index < first + experts)
        here = torch.where(is_here, topk_index - first, experts)
        x, topk_weight = replicated(x, group), replicated(topk_weight, group)
        return summed(lora_experts(x, here, topk_weight, gate_up, down, **operands), group)  # type: ignore[arg-type]
    for name in _ADAPTERS:
        if isinstance(factor := operands.get(name), Tensor):
            operands[name] = averaged(factor, group)
    return _exchanged_experts(x, topk_index, topk_weight, gate_up, down, experts, group, operands)


def _exchanged_experts(
    x: Tensor, topk_index: Tensor, topk_weight: Tensor, gate_up: Tensor | Weight, down: Tensor | Weight, experts: int,
    group: dist.ProcessGroup, operands: dict[str, object],
) -> Tensor:  # fmt: skip
    """Rows sorted by expert go to their rank, run there as tokens of one expert each, and come back."""
    P, (T, k) = group.size(), topk_index.shape
    chosen = topk_index.reshape(-1)
    order = chosen.argsort(stable=True)
    # sentinels are last and stay here
    counts = torch.bincount(chosen.clamp(max=P * experts), minlength=P * experts + 1)[:-1].view(P, experts)
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts, group=group)
    sent, received = torch.stack([counts.sum(1), theirs.sum(1)]).tolist()
    order = order[: sum(sent)]
    rows = exchanged(x[order // k], received, sent, group)
    number = torch.arange(experts, device=x.device).repeat(P)
    index = number.repeat_interleave(theirs.view(-1), output_size=sum(received)).unsqueeze(1)
    ones = topk_weight.new_ones(index.shape)
    ys = exchanged(lora_experts(rows, index, ones, gate_up, down, **operands), sent, received, group)  # type: ignore[arg-type]
    weighted = ys * topk_weight.reshape(-1)[order].unsqueeze(1).to(ys.dtype)
    # in the order of choices, so that the sum over a token's is the same however rows were sorted; index_copy would
    # save rows that its gradient does not need
    every = ys.new_zeros((T * k, ys.shape[1])).index_put((order,), weighted)
    return every.view(T, k, ys.shape[1]).sum(1)
