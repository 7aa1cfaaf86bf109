"""PEFT's mixed batches (`adapter_names`, an adapter for each sample) as one operator, in evaluation and in training;
aLoRA too, alone or in such a batch: the tokens before its invocation are rows without an adapter.

PEFT runs a layer's adapters one after the other, and refuses such batches in training, at the model and not at its
layers: the patched model's class lifts that.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from lorafuse.backends.multi import constant
from lorafuse.functional import lora_linear_multi
from lorafuse.integrations.hf_quantized import run_quantized
from lorafuse.integrations.hf_variants import Masked
from lorafuse.operands import Weight
from lorafuse.philox import draw_seed

__all__ = ["MIXED_APART", "FusedLoraModel", "lift", "lower", "run_mixed"]

MIXED_APART = (
    "batches with adapter_names run layer by layer: PEFT gives the names to each layer by a hook of its own, and calls "
    "no parent with them (lorafuse.adapters.AdapterPool groups them)"
)


class FusedLoraModel(LoraModel):
    """`peft.tuners.lora.LoraModel` that takes `adapter_names` in training; created by `lorafuse.patch`."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        training: bool = self.training  # type: ignore[has-type]
        with ExitStack() as stack:
            if training and kwargs.get("adapter_names") is not None:
                if any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
                    raise ValueError(
                        "adapter_names with gradient checkpointing: forward runs again in backward, where PEFT no "
                        "longer has the names. Disable checkpointing (model.gradient_checkpointing_disable()), or hold "
                        "the adapters in a lorafuse.adapters.AdapterPool, whose use_adapters covers backward"
                    )
                # PEFT asks this module alone
                self.training = False
            try:
                stack.enter_context(super()._enable_peft_forward_hooks(*args, **kwargs))
            finally:
                self.training = training
            yield


FusedLoraModel.__name__ = LoraModel.__name__


def lift(model: nn.Module) -> None:
    """Let every `LoraModel` in the model take `adapter_names` in training."""
    for module in model.modules():
        if type(module) is LoraModel:
            module.__class__ = FusedLoraModel


def lower(model: nn.Module) -> None:
    """Make them PEFT's again."""
    for module in model.modules():
        if type(module) is FusedLoraModel:
            module.__class__ = LoraModel


def run_mixed(
    layer: Any, x: Tensor, names: list[str], read: Callable[[Any, list[str]], Any], alora: list[int | None] | None
) -> Tensor | str | None:
    """y of a layer whose sample i has the adapter `names[i]`; `read` gives the operands of one adapter.

    `alora` is PEFT's `alora_offsets`: how many tokens at the end of each sample an aLoRA adapter has; None is none.

    None where PEFT is to check the call, or nothing is adapted; a str, the reason, for what cannot be fused.
    """
    adapted = layer._modules["lora_A"]._modules
    # those of other layers have rank 0 here: their rows keep their bits whatever the others are
    used = [name for name in dict.fromkeys(names) if name != "__base__"]
    if layer._disable_adapters or layer.merged_adapters or not used or x.dim() < 2 or len(names) != len(x):
        return None
    known = {name: read(layer, [name]) for name in used if name in adapted}
    for parts in (known := known or {"": read(layer, [next(iter(adapted))])}).values():
        if type(parts) not in (tuple, Masked):
            return (
                parts
                if isinstance(parts, str)
                else "a bias of lora_B, a scale in a tensor, or a variant of LoRA, in a mixed batch"
            )
    masked = {name for name, parts in known.items() if type(parts) is Masked}
    if masked and x.dim() > 3:
        return f"aLoRA, which counts the tokens of [B, T, K], over an x of {x.dim()} dimensions"
    if "_lorafuse_dropout_rng" in layer.__dict__ and any(parts[5] for parts in known.values()):
        return 'rows of several adapters, or of aLoRA, with dropout and dropout_rng="torch"; PEFT draws masks of these'
    weight, any_a, any_b, _, bias, _ = next(iter(known.values()))
    absent = weight, any_a[:0], any_b[:, :0], 1.0, bias, 0.0
    _, a, b, scales, _, p = zip(*(known.get(name, absent) for name in used), strict=True)
    where = {name: i for i, name in enumerate(used)}
    tokens = x[0].numel() // x.shape[-1]
    own = [tokens] * len(names)
    if masked:
        own = [
            min((alora[i] if alora else 0) or 0, tokens) if name in masked else tokens for i, name in enumerate(names)
        ]
    index = tuple(zip((where.get(name, len(used)) for name in names), own, strict=True))
    offsets, order, place = _sorted(index, len(used), tokens, x.device)
    ranks, seeds = [one.shape[0] for one in a], None
    if any(one.training and getattr(one, "p", 0.0) for one in layer._modules["lora_dropout"]._modules.values()):
        # one number is drawn, whoever is in the batch: an adapter's mask is that of a batch of its own
        own_seeds = constant(tuple(zlib.crc32(name.encode()) for name in used), torch.int64, x.device)
        seeds = draw_seed(x.device) + (own_seeds << 31)

    def run(
        x: Tensor, weight: Any, a: Tensor, b: Tensor, scales: Any, bias: Any, p: Any, _: None, backend: Any,
        wide: bool = False,
    ) -> Tensor:  # fmt: skip
        return lora_linear_multi(
            x, offsets, weight, a, b, ranks=ranks, scales=scales, bias=bias, dropout_p=p, seeds=seeds, backend=backend,
            wide=wide,
        )  # fmt: skip

    rows = x if order is None else x.flatten(0, -2).index_select(0, order)
    stacked = weight, torch.cat(a), torch.cat(b, dim=1), scales, bias, p
    if isinstance(weight, Weight):
        y = run_quantized(layer._modules["base_layer"], rows, stacked, layer._lorafuse_backend, run)
    else:
        y = run(rows, *stacked, None, layer._lorafuse_backend)
    return y if place is None else y.index_select(0, place).view(*x.shape[:-1], -1)


@lru_cache(maxsize=256)
# what a generation made is saved by a training step
@torch.inference_mode(False)
def _sorted(
    index: tuple[tuple[int, int], ...], count: int, tokens: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(offsets of rows, order, place)` of samples with `tokens` rows each, the last of which are their adapter's, as
    `lorafuse.nn.multi` has them; copied to the device once for all layers of a model, and not in each of them.

    `index` has the adapter, or `count` for none, and the number of its rows of each sample.
    """
    parts = [(count, i * tokens, (i + 1) * tokens - own) for i, (_, own) in enumerate(index)]
    parts += [(adapter, (i + 1) * tokens - own, (i + 1) * tokens) for i, (adapter, own) in enumerate(index)]
    parts = sorted((one for one in parts if one[1] < one[2]), key=lambda one: one[:2])
    ends = [sum(stop - start for adapter, start, stop in parts if adapter <= g) for g in range(count)]
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    if all(one[2] == after[1] for one, after in pairwise(parts)):
        return offsets, None, None
    order = torch.cat([torch.arange(start, stop) for _, start, stop in parts])
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return offsets, order.to(device), place.to(device)
