"""PEFT's mixed batches (`adapter_names`, an adapter for each sample) as one operator, in evaluation and in training;
aLoRA too, alone or in such a batch: the tokens before its invocation are rows without an adapter.

PEFT runs a layer's adapters one after the other, and refuses such batches in training, at the model and not at its
layers: the patched model's class lifts that. It gives each layer the names by a hook, where `batch_of` reads them for a
gated MLP; siblings run as those of a pool do. Which layers run as one depends neither on sizes nor on who is in the
batch: an adapter has the bits of a batch of its own.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraModel, model
from torch import Tensor, nn

from lorafuse.backends.multi import constant
from lorafuse.functional import MultiProjection, lora_linears_multi
from lorafuse.integrations.groups import fits, is_same_weight
from lorafuse.integrations.hf_quantized import Dtypes, dtypes_of
from lorafuse.integrations.hf_variants import Masked
from lorafuse.nn.multi_groups import SiblingCalls, cast_dtype
from lorafuse.operands import Weight
from lorafuse.philox import draw_seed

__all__ = ["FusedLoraModel", "Mixed", "batch_of", "end_mixed", "lift", "lower", "mixed_parts", "run_batch", "run_mixed"]

# PEFT's hooks that give a layer the names, and the tokens of aLoRA, which not every PEFT has
_NAMES = "_adapter_names_pre_forward_hook", "_alora_offsets_pre_forward_hook"
_HOOKS = [getattr(model, name) for name in _NAMES if hasattr(model, name)]
_LATE = (
    "runs again in backward, where PEFT no longer has the names. Disable checkpointing "
    "(model.gradient_checkpointing_disable()), or hold the adapters in a lorafuse.adapters.AdapterPool, whose "
    "use_adapters covers backward"
)


class FusedLoraModel(LoraModel):
    """`peft.tuners.lora.LoraModel` that takes `adapter_names` in training; created by `lorafuse.patch`."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        training: bool = self.training  # type: ignore[has-type]
        with ExitStack() as stack:
            if kwargs.get("adapter_names") is not None:
                states = [module.__dict__ for module in self.modules() if "_lorafuse_calls" in module.__dict__]
                for group in {state["_lorafuse_siblings"][0] for state in states if "_lorafuse_siblings" in state}:
                    stack.enter_context(group.mixed_batch(_MixedSiblings))
                for state in states:
                    state["_lorafuse_mixed"] = True
            if training and kwargs.get("adapter_names") is not None:
                if any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
                    raise ValueError(f"adapter_names with gradient checkpointing: forward {_LATE}")
                # PEFT asks this module alone
                self.training = False
            # PEFT leaves its hooks after a call that raises, and they would give later calls this one's names
            stack.push(partial(_unhook, self))
            try:
                stack.enter_context(super()._enable_peft_forward_hooks(*args, **kwargs))
            finally:
                self.training = training
            yield


FusedLoraModel.__name__ = LoraModel.__name__


def _unhook(lora_model: nn.Module, kind: Any, *_: Any) -> None:
    if kind is not None:
        for module in lora_model.modules():
            for key in [
                key for key, hook in module._forward_pre_hooks.items() if getattr(hook, "func", None) in _HOOKS
            ]:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


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


class Mixed(NamedTuple):
    """The operands of a layer in a mixed batch: those of the adapters in it, in the order of their rows.

    `rows` are `_sorted`'s, `seeds` the adapters' own; `is_drawn` says whether the layer draws a number for its masks.
    """

    weight: Tensor | Weight
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    scales: tuple[float, ...]
    bias: Tensor | None
    dropout_p: tuple[float, ...]
    rows: tuple[Tensor, Tensor | None, Tensor | None]
    seeds: tuple[int, ...]
    is_drawn: bool

    def stacked(self) -> tuple[Any, ...]:
        """The operands of one layer with all of these."""
        return self.weight, torch.cat(self.a), torch.cat(self.b, dim=1), self.scales, self.bias, self.dropout_p

    def is_same(self, other: "Mixed") -> bool:
        """Whether the same operands are in both."""
        return self._key() == other._key() and is_same_weight(self.weight, other.weight)

    def _key(self) -> tuple[Any, ...]:
        # of an adapter of other layers the factors are made in each call
        objects = *(t for t in (*self.a, *self.b) if t.numel()), self.bias, self.rows
        return self.scales, self.dropout_p, self.seeds, *map(id, objects)


def mixed_parts(
    layer: Any, read: Callable[[Any, list[str]], Any], x: Tensor, names: Sequence[str],
    alora: Sequence[int | None] | None,
) -> Mixed | str | None:  # fmt: skip
    """What a layer whose sample i has the adapter `names[i]` computes of x, or of a tensor with all but its last size;
    `read` gives the operands of one adapter.

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
    absent = weight, any_a.detach()[:0], any_b.detach()[:, :0], 1.0, bias, 0.0
    _, a, b, scales, _, p = zip(*(known.get(name, absent) for name in used), strict=True)
    where = {name: i for i, name in enumerate(used)}
    tokens = x[0].numel() // x.shape[-1]
    own = [tokens] * len(names)
    if masked:
        own = [
            min((alora[i] if alora else 0) or 0, tokens) if name in masked else tokens for i, name in enumerate(names)
        ]
    index = tuple(zip((where.get(name, len(used)) for name in names), own, strict=True))
    rows = _sorted(index, len(used), tokens, x.device)
    # one number is drawn, whoever is in the batch: an adapter's mask is that of a batch of its own
    drops = layer._modules["lora_dropout"]._modules.values()
    is_drawn = any(one.training and getattr(one, "p", 0.0) for one in drops)
    return Mixed(weight, a, b, scales, bias, p, rows, tuple(zlib.crc32(name.encode()) for name in used), is_drawn)


def run_batch(
    several: Callable[..., Sequence[Tensor]], x: Tensor, every: Sequence[Mixed | tuple[Any, ...]], stacks: Any,
    dtypes: Dtypes | None, backend: str | None,
) -> list[Tensor]:  # fmt: skip
    """The ys of layers of one batch: `several` is `lora_linears_multi` or runs as it does, `stacks` are the operands of
    each layer as `Mixed.stacked` gives them (a and b None of a layer without adapters), `dtypes` those of a quantized
    base.
    """
    offsets, order, place = next(one.rows for one in every if isinstance(one, Mixed))
    layers = []
    for one, (w, a, b, scales, bias, p) in zip(every, stacks, strict=True):
        if not isinstance(one, Mixed):
            layers.append(MultiProjection(w, bias=bias))
            continue
        ranks, seeds = [t.shape[0] for t in one.a], None
        if one.is_drawn:
            seeds = draw_seed(x.device) + (constant(one.seeds, torch.int64, x.device) << 31)
        layers.append(MultiProjection(w, a, b, ranks, scales, bias, p, seeds))
    rows = x if order is None else x.flatten(0, -2).index_select(0, order)

    def run(x: Tensor, layers: list[MultiProjection], wide: bool = False) -> Sequence[Tensor]:
        return several(x, offsets, layers, backend=backend, wide=wide)

    ys = run(rows, layers) if dtypes is None else dtypes.run(run, rows, layers)
    ys = ys if dtypes is None else [y.to(dtypes.returned) for y in ys]
    return [y if place is None else y.index_select(0, place).view(*x.shape[:-1], -1) for y in ys]


def run_mixed(
    layer: Any, x: Tensor, names: list[str], read: Callable[[Any, list[str]], Any], alora: list[int | None] | None
) -> Tensor | str | None:
    """y of a layer in a mixed batch; see `mixed_parts`, what else it returns too."""
    parts = mixed_parts(layer, read, x, names, alora)
    if not isinstance(parts, Mixed):
        return parts
    group, _ = layer.__dict__.get("_lorafuse_siblings", (None, 0))
    calls = None if group is None or group.mixed is None else group.mixed.get(layer)
    read_other = partial(mixed_parts, read=read, x=x, names=names, alora=alora)
    y = None if calls is None else calls.output(layer, x, (parts, read_other))
    if y is not None:
        layer._lorafuse_calls.grouped += 1
        return y
    stacked = parts.stacked()
    dtypes = dtypes_of(layer._modules["base_layer"], x, stacked) if isinstance(parts.weight, Weight) else None
    return run_batch(lora_linears_multi, x, [parts], [stacked], dtypes, layer._lorafuse_backend)[0]


def end_mixed(layer: Any) -> None:
    """Note a call without names after a mixed batch; RuntimeError in that batch's backward, where it is a checkpoint's,
    whose rows would all have the active adapter.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(f"a layer of a batch with adapter_names {_LATE}")
    del layer.__dict__["_lorafuse_mixed"]


@dataclass(eq=False)
class _State:
    """What y depends on: the operands, and the versions of what may change in place."""

    parts: Mixed
    versions: tuple[Any, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _State) and self.versions == other.versions and self.parts.is_same(other.parts)


class _MixedSiblings(SiblingCalls):
    """Siblings of a patched model in a mixed batch; `given` are the operands of a layer, and how those of another are
    read.
    """

    def compute(self, layers: Sequence[Any], x: Tensor, given: Any) -> dict[Any, tuple[Any, Tensor]]:
        first, read = given
        member, dtypes, operands = layers[0], None, first.stacked()
        every, stacks = {member: first}, {member: operands}
        if isinstance(first.weight, Weight):
            dtypes = dtypes_of(member._modules["base_layer"], x, operands)
        for other in layers[1:]:
            parts = read(other)
            if not isinstance(parts, Mixed) or parts.rows is not first.rows:
                continue
            stacked = parts.stacked()
            if other._lorafuse_backend != member._lorafuse_backend or not fits(stacked, operands, x, x.shape[-1:]):
                continue
            if dtypes is None or dtypes_of(other._modules["base_layer"], x, stacked) == dtypes:
                every[other], stacks[other] = parts, stacked
        backend = member._lorafuse_backend
        ys = run_batch(lora_linears_multi, x, list(every.values()), stacks.values(), dtypes, backend)
        return {one: (self.state(one, x, (parts, None)), y) for (one, parts), y in zip(every.items(), ys, strict=True)}

    def state(self, layer: Any, x: Tensor, given: Any) -> Any:
        parts, _ = given
        return _State(parts, (x._version, cast_dtype(x), *(t._version for t in (*parts.a, *parts.b))))


def batch_of(members: Sequence[Any]) -> tuple[Any, Any] | None:
    """`(adapter_names, alora_offsets)` that PEFT's hooks would give layers, the same to all; None without, or where
    there are other hooks.
    """
    every = []
    for member in members:
        hooks = list(member._forward_pre_hooks.values())
        if any(getattr(hook, "func", None) not in _HOOKS for hook in hooks):
            return None
        given: dict[str, Any] = {}
        for hook in hooks:
            given |= hook.keywords
        every.append((given.get("adapter_names"), given.get("alora_offsets")))
    return every[0] if every and every[0][0] is not None and all(one == every[0] for one in every) else None


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
