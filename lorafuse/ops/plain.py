"""The grouped layer and the experts as plain torch, which every transform of autograd can go through: short and slow.

Second derivatives, `torch.func`, forward-mode AD and `torch.jit.trace` run these; everything else runs a backend.
Which rows a group has is an index here and never a slice, so that a traced file serves other routings too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.nn import functional as F

from lorafuse.activation import Activation, Recomputed
from lorafuse.ops.autocast import outside_autocast
from lorafuse.philox import keep_mask, rescaled

__all__ = ["experts", "experts_multi", "gradients", "grouped", "multi"]


def _layers(
    x: Tensor,
    group: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    transposed: bool,
) -> Tensor:
    """The linear layer of its `group [S]` for every row of x; zero for the rows of no group."""
    # the empty part is there for a stack of no groups
    rows, parts = [group.new_empty(0)], [x.new_empty((0, w.shape[2 if transposed else 1]))]
    for e, w_e in enumerate(w.unbind()):
        mine = (group == e).nonzero().squeeze(1)
        y = F.linear(x[mine], w_e.t() if transposed else w_e, None if bias is None else bias[e])
        if a is not None and b is not None:
            # the scale is applied before b is rounded to x's dtype
            y = y + F.linear(F.linear(x[mine], a[e].to(x.dtype)), (b[e] * scale).to(x.dtype))
        rows.append(mine)
        parts.append(y)
    return x.new_zeros((x.shape[0], parts[0].shape[1])).index_copy(0, torch.cat(rows), torch.cat(parts))


def grouped(x: Tensor, ends: Tensor, *layer) -> Tensor:
    """y of `lora_grouped_linear`; `layer` is that of the operator, from w to transposed."""
    _refuse_batched("lora_grouped_linear", "offsets", ends)
    return _layers(x, torch.searchsorted(ends, torch.arange(x.shape[0], device=ends.device), right=True), *layer)


def multi(
    x: Tensor,
    ends: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    seeds: Tensor | None,
    ranks: Sequence[int],
    scales: Sequence[float],
    dropout_p: Sequence[float] | None,
) -> Tensor:
    """y of `lora_linear_multi`."""
    _refuse_batched("lora_linear_multi", "offsets", ends)
    flat = x.reshape(-1, x.shape[-1])
    group = torch.searchsorted(ends, torch.arange(flat.shape[0], device=ends.device, dtype=ends.dtype), right=True)
    y, first = F.linear(flat, w, bias), 0
    for g, (R, scale) in enumerate(zip(ranks, scales, strict=True)):
        mine = (group == g).nonzero().squeeze(1)
        part = flat[mine]
        if seeds is not None and dropout_p is not None and dropout_p[g]:
            part = part * keep_mask(seeds[g : g + 1], dropout_p[g], slice(0, mine.shape[0]), part.shape[1])
            scale = rescaled(scale, dropout_p[g])
        ranks_of = slice(first, first := first + R)
        low = F.linear(F.linear(part, a[ranks_of].to(x.dtype)), (b[:, ranks_of] * scale).to(x.dtype))
        y = y.index_add(0, mine, low)
    return y.view(*x.shape[:-1], -1)


def experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    up_scale: float,
    down_scale: float,
    transposed: bool,
    act: Activation | Recomputed,
) -> Tensor:
    """out of `lora_experts`; rows of sentinels are never computed."""
    _refuse_batched("lora_experts", "topk_index", index)
    (T, k), flat = index.shape, index.reshape(-1)
    choice = (flat < up.shape[0]).nonzero().squeeze(1)
    group = flat[choice]
    u = _layers(x[choice // k], group, up, up_bias, up_a, up_b, up_scale, transposed)
    y = _layers(act.differentiable(u), group, down, down_bias, down_a, down_b, down_scale, transposed)
    y = y * weight.reshape(-1, 1)[choice].to(y.dtype)
    return x.new_zeros((T * k, y.shape[1])).index_copy(0, choice, y).view(T, k, y.shape[1]).sum(1)


def experts_multi(
    x: Tensor,
    ends: Tensor,
    index: Tensor,
    weight: Tensor,
    projections: Sequence[Sequence[Any]],
    act: Activation,
) -> Tensor:
    """out of `lora_experts_multi`; of gate_up and down `(w [E, N, K], bias, a, b, ranks, scales)`, a or b 2-D where
    shared.
    """
    _refuse_batched("lora_experts_multi", "offsets", ends)
    _refuse_batched("lora_experts_multi", "topk_index", index)
    (T, k), flat = index.shape, index.reshape(-1)
    up, down = projections
    choice = (flat < up[0].shape[0]).nonzero().squeeze(1)
    token = choice // k
    adapter = torch.searchsorted(ends, token.to(ends.dtype), right=True)
    u = _layers_multi(x[token], flat[choice], adapter, *up)
    y = _layers_multi(act.differentiable(u), flat[choice], adapter, *down)
    y = y * weight.reshape(-1, 1)[choice].to(y.dtype)
    return x.new_zeros((T * k, y.shape[1])).index_copy(0, choice, y).view(T, k, y.shape[1]).sum(1)


def _layers_multi(
    x: Tensor, group: Tensor, adapter: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
    ranks: Sequence[int], scales: Sequence[float],
) -> Tensor:  # fmt: skip
    y = _layers(x, group, w, bias, None, None, 1.0, False)
    for e in range(w.shape[0]):
        of_a, of_b, first = a if a.dim() == 2 else a[e], b if b.dim() == 2 else b[e], 0
        for g, (R, scale) in enumerate(zip(ranks, scales, strict=True)):
            mine, some = ((group == e) & (adapter == g)).nonzero().squeeze(1), slice(first, first := first + R)
            xa = F.linear(x[mine], of_a[some].to(x.dtype))
            y = y.index_add(0, mine, F.linear(xa, (of_b[:, some] * scale).to(x.dtype)))
    return y


def gradients(
    formula: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Any], needed: Sequence[int], *douts: Tensor
) -> list[Tensor]:
    """Gradients of `formula(*inputs)` for the inputs at the places `needed`, which autograd can differentiate again.

    `douts` are the gradients of its results.
    """
    create_graph, given = torch.is_grad_enabled(), list(inputs)
    with torch.enable_grad(), outside_autocast(douts[0]):
        for i in needed:
            # an alias, so that the hooks of an input do not run here
            given[i] = given[i].view_as(given[i])
        out = formula(*given)
        leaves = [given[i] for i in needed]
        return list(torch.autograd.grad(out, leaves, douts, create_graph=create_graph, materialize_grads=True))


def _refuse_batched(operator: str, name: str, t: Tensor) -> None:
    """Raises NotImplementedError where vmap maps over what decides which rows a group has."""
    while _functorch.is_functorch_wrapped_tensor(t):
        if _functorch.is_batchedtensor(t):
            raise NotImplementedError(
                f"lorafuse's {operator} got a {name} that vmap maps over; the rows of each group must be the same for "
                f"all samples: call it in a loop over the samples, or give vmap in_dims=None for {name}"
            )
        t = _functorch.get_unwrapped(t)
