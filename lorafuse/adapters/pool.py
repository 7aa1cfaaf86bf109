"""`AdapterPool`: the adapters of many users on one model."""

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.adapters import files
from lorafuse.adapters.experts import PooledExperts, stack_names
from lorafuse.adapters.seeds import mixed, signed
from lorafuse.nn.multi import AdapterRows, AdapterStack, LoRALinearMulti
from lorafuse.nn.multi_groups import MultiGatedMLP, form_groups

__all__ = ["AdapterPool"]


@dataclass(eq=False)
class _Slot:
    """One adapter. `stacks` are the names of those that hold its factors."""

    rank: int
    scale: float
    seed: int
    dropout: float
    stacks: tuple[str, ...]


class AdapterPool:
    """Adapters of any rank and targets on the layers of one frozen model; slots are small ints.

    What `targets` names (the last parts of names, as PEFT matches them; None for all) is replaced in the model, and
    everything is frozen: `layers`, every `nn.Linear` and quantized linear layer, and `experts`, transformers' experts
    modules, by their names ("experts") or those of their stacks ("experts.down_proj", as PEFT's target_parameters).
    `skipped` are experts that no operator runs, with the reason. `close` puts all back. Within `use_adapters` a call of
    the model runs every row with its adapter, outside of it the base alone. What an adapter computes, and its
    gradients, do not depend on the others, not in one bit (`lorafuse.functional.lora_linear_multi`).

    With `groups` siblings among the layers (q, k and v of one parent, by the names of known families) run as one
    operator in calls with gradients, and so does every gated MLP with one of the layers, which is known by a run of its
    forward with small layers (`lorafuse.nn.multi_groups`).

    Gradients add up in the pool, in sums over tokens, until `MultiAdamW.step` or `zero_grad` of that slot.

    Raises ValueError where nothing matches, for experts among `targets` that no operator runs, and for a model with
    PEFT's layers or layers on several devices; TypeError for targets in one str.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[str] | None = None, *, dtype: torch.dtype = torch.float32,
        groups: bool = True,
    ) -> None:  # fmt: skip
        _refuse_text(targets)
        self.model, self.dtype, self.targets = model.requires_grad_(False), dtype, targets
        self.layers: dict[str, LoRALinearMulti] = {}
        self.experts: dict[str, PooledExperts] = {}
        self.skipped: dict[str, str] = {}
        # what holds factors: layers by their names, the projections of experts by those of their parameters
        self._stacks: dict[str, AdapterStack] = {}
        # every name of a layer, of which a module that stands in several places has several
        self._names: dict[LoRALinearMulti | PooledExperts, list[str]] = {}
        self._slots: dict[int, _Slot] = {}
        self._in_use = 0
        made: dict[nn.Module, LoRALinearMulti | PooledExperts] = {}
        for name, module in list(model.named_modules(remove_duplicate=False)):
            # what quantizes experts lies within them
            if module in made or not any(name.startswith(f"{one}.") for one in (*self.experts, *self.skipped)):
                layer = made.get(module) or self._adapted(name, module)
                if layer is not None:
                    made[module] = layer
                    self._names.setdefault(layer, []).append(name)
        if not self._names:
            raise ValueError(
                f"no linear layer or experts of the model match {targets}; name the last parts of their names"
            )
        devices = sorted({str(stack.a.device) for stack in self._stacks.values()})
        if len(devices) > 1:
            raise ValueError(f"the layers lie on {' and '.join(devices)}; a pool needs them on one device")
        for layer, names in self._names.items():
            for name in names:
                self._replace(name, layer)
        self._siblings, self._gated = form_groups(model) if groups else ([], [])
        # how many batches each slot was in, and its seed, where the rows' adapters are, which nobody waits for
        self._calls = torch.zeros(0, dtype=torch.int64, device=self._device)
        self._seeds = torch.zeros(0, dtype=torch.int64, device=self._device)

    @property
    def slots(self) -> tuple[int, ...]:
        """Those allocated, ascending: the order of the adapters in the stacks."""
        return tuple(sorted(self._slots))

    def allocate(
        self, rank: int, *, alpha: float | None = None, seed: int = 0, targets: Sequence[str] | None = None,
        dropout: float = 0.0,
    ) -> int:  # fmt: skip
        """A slot with a fresh adapter: a as PEFT initializes it, from `seed` and the layer's name alone, and b zero.

        `alpha` is the rank by default; `targets` as of the pool, None for all that it holds. Raises ValueError for a
        rank below 1, an alpha that is not finite, a dropout outside [0, 1] or of experts, which have none in PEFT, or
        targets that match nothing; TypeError for a rank that is no int.

        Graphs of calls before cannot run backward after it, nor after `load` and `release`: RuntimeError.
        """
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise TypeError(f"got rank={rank!r}; it must be an int")
        if rank < 1 or not 0.0 <= dropout <= 1.0:
            raise ValueError(f"got rank={rank} and dropout={dropout}; they must be at least 1, and in [0, 1]")
        names = self._targeted(targets)
        if not names:
            raise ValueError(f"no layer of the pool matches {targets}; it has {sorted(self._stacks)[:5]}, …")
        if dropout and (experts := [name for name in names if name not in self.layers]):
            raise ValueError(f"{experts[0]} is of experts, which have no dropout, as in PEFT: name other targets")
        factors = {}
        for name in names:
            of_a, of_b = self._sizes(name)
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
            bound = 1 / math.sqrt(of_a[-1])
            a = torch.empty(rank, *of_a).uniform_(-bound, bound, generator=generator)
            factors[name] = a, torch.zeros(rank, *of_b)
        return self._add(_Slot(rank, (rank if alpha is None else alpha) / rank, seed, dropout, tuple(names)), factors)

    def release(self, slot: int) -> None:
        """Give the slot back. Raises KeyError for one that is not allocated, as all methods do; RuntimeError within
        `use_adapters`, as `allocate`, `load` and `close` do too.
        """
        self._refuse_in_use("release")
        _, at = self._slots[slot], self.slots.index(slot)
        del self._slots[slot]
        for stack in self._stacks.values():
            stack.remove(at)
        self._describe()

    def load(self, folder: str | Path, *, seed: int = 0) -> int:
        """A slot with the adapter of PEFT's files. Raises ValueError for one that is no plain LoRA of one rank, or that
        adapts what the pool does not hold.
        """
        factors, scale, dropout = files.read(Path(folder), self.experts, self._others())
        # in the order of the pool, in which an optimizer adds up norms
        names = [name for name in self._targeted(None) if name in factors]
        if unknown := sorted(set(factors) - set(names)):
            raise ValueError(f"{folder} adapts {unknown[:3]}, which the pool does not hold")
        for name in names:
            sizes, given = self._sizes(name), tuple(t.shape[1:] for t in factors[name])
            if given != sizes:
                raise ValueError(
                    f"{folder} has factors of {given[0][-1]} and {given[1][-1]} features for {name}, which maps "
                    f"{sizes[0][-1]} features to {sizes[1][-1]}"
                )
        return self._add(_Slot(len(factors[names[0]][0]), scale, seed, dropout, tuple(names)), factors)

    def export(self, slot: int, folder: str | Path) -> None:
        """Write PEFT's files of the adapter, which `peft.PeftModel.from_pretrained` reads.

        Raises ValueError for a layer that several modules hold, of which PEFT would adapt the first place alone.
        """
        held, at = self._slots[slot], self.slots.index(slot)
        for names in (self._names[self._owner(name)] for name in held.stacks):
            parents = {(id(self.model.get_submodule(n.rpartition(".")[0])), n.rpartition(".")[2]) for n in names}
            if len(parents) > 1:
                raise ValueError(
                    f"{' and '.join(names)} are one module, which PEFT would adapt in the first place alone: give the "
                    "model a copy of it in the others"
                )
        stacks = {name: self._stacks[name] for name in held.stacks}
        factors = {n: (one.a.detach()[one.of(at)], one.b.detach()[one.of(at)]) for n, one in stacks.items()}
        files.write(
            Path(folder), factors, self.experts, held.rank, held.scale * held.rank, held.dropout, self.model,
            self._others(),
        )  # fmt: skip

    def parameters(self, slot: int) -> dict[str, Tensor]:
        """The adapter's a `[R, K]` and b `[N, R]` by their names in PEFT's models, until the next allocate, load or
        release: views, without autograd's record. Of experts a `[E, R, K]` and b `[E, N, R]`, by the names of their
        parameters.
        """
        return self._views(slot, lambda a, b, _: (a.detach(), b.detach()))

    def gradients(self, slot: int) -> dict[str, Tensor]:
        """The sums of the gradients of `parameters` since they were last zeroed, likewise."""
        return self._views(slot, lambda a, b, buffers: buffers)

    def places(self, name: str) -> list[str]:
        """Every name of what `parameters` gives by this one (without .lora_A.weight): a module may have several."""
        names = self._names[self._owner(name)]
        return [other + name.removeprefix(names[0]) for other in names]

    def scale(self, slot: int) -> float:
        """alpha / R of the adapter."""
        return self._slots[slot].scale

    def zero_grad(self, slot: int) -> None:
        """Forget the gradients of a slot."""
        for t in self.gradients(slot).values():
            t.zero_()

    @contextlib.contextmanager
    def use_adapters(self, slots: Sequence[int] | Tensor) -> Iterator[None]:
        """Within it, forward and backward (activation checkpointing runs forward again) have these adapters.

        `slots` has one for each sample, or is a tensor of integers `[B]` or `[B, T, …]` on the model's device, for each
        sample or token; -1 is none. Ascending ints, -1 last, need no row to be moved. Nothing waits for the device.
        Raises KeyError for an int that is not allocated; in a tensor, which is not looked at, it is none. TypeError for
        a tensor of other numbers and a list of lists. A layer that a checkpoint calls again later raises RuntimeError.
        """
        every, count = self.slots, len(self._slots)
        if isinstance(slots, Tensor):
            if slots.is_floating_point() or slots.is_complex() or slots.dtype is torch.bool:
                raise TypeError(f"slots is {slots.dtype}; it must hold integers, as allocate returns them")
            # of every number, of which those that are no slot are the last
            place = [count] * (max(every, default=0) + 2)
            for i, slot in enumerate(every):
                place[slot] = i
            index = self._on_device(place)[slots.long().clamp(-1, len(place) - 1)]
            is_sorted = False
        else:
            known = {slot: i for i, slot in enumerate(every)} | {-1: count}
            given = list(slots)
            if any(isinstance(slot, list | tuple) for slot in given):
                raise TypeError("slots has lists in it; those of tokens must be a tensor, which must hold integers")
            values = [known[slot] for slot in given]
            index, is_sorted = self._on_device(values), values == sorted(values)
        # without any adapter there is the base alone
        rows = AdapterRows(index, count, is_sorted, self._drawn(index)) if count else None
        former = {layer: layer.rows for layer in self._names}
        for layer in self._names:
            layer.rows, layer.had_rows = rows, rows is not None
        self._in_use += 1
        try:
            yield
            for group in self._siblings:
                group.drop()
        finally:
            self._in_use -= 1
            for group in self._siblings:
                group.forget()
            for layer, before in former.items():
                layer.rows = before

    def close(self) -> None:
        """Put the model's own layers back."""
        self._refuse_in_use("close")
        for layer, names in self._names.items():
            for name in names:
                self._replace(name, layer.base)
        for parent in self._gated:
            MultiGatedMLP.dissolve(parent)
        self.layers.clear()
        self.experts.clear()
        self._stacks.clear()
        self._names.clear()
        self._siblings.clear()
        self._gated.clear()
        self._slots.clear()

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, last = name.rpartition(".")
        setattr(self.model.get_submodule(parent), last, module)

    def _adapted(self, name: str, module: nn.Module) -> LoRALinearMulti | PooledExperts | None:
        """What stands in the place of a module of the model, if it is a target."""
        targets, parameters = self.targets, stack_names(module)
        names = [f"{name}.{one}" for one in parameters] or [name]
        is_target = targets is None or any(_matches(one, targets, bool(parameters)) for one in names)
        if not is_target or not (parameters or _is_linear(module)):
            return None
        if name.endswith(".base_layer"):
            raise ValueError(
                f"{name} has an adapter of PEFT around it; make the pool of the model without its layers "
                "(model.unload(), or merge_and_unload()), and load adapters by their files"
            )
        if not parameters:
            layer = LoRALinearMulti(module, self.dtype).train(module.training)
            layer.number = zlib.crc32(name.encode())
            self.layers[name] = self._stacks[name] = layer
            return layer
        try:
            experts = PooledExperts(module, self.dtype).train(module.training)
        except ValueError as error:
            if targets is not None:
                raise ValueError(f"{name}: {error}") from error
            self.skipped[name] = str(error)
            return None
        self.experts[name] = experts
        self._stacks |= {f"{name}.{one}": stack for one, stack in experts.stacks.items()}
        return experts

    def _owner(self, name: str) -> LoRALinearMulti | PooledExperts:
        """Whose a stack is."""
        return self.layers.get(name) or self.experts[name.rpartition(".")[0]]

    def _others(self) -> dict[str, str]:
        """The first name of a module by each of its other names."""
        return {other: first for first, *others in self._names.values() for other in others}

    def _targeted(self, targets: Sequence[str] | None) -> list[str]:
        """The names of the stacks among `targets` and those of the pool, in its order."""
        _refuse_text(targets)
        every = [some for some in (self.targets, targets) if some is not None]
        return [name for name in self._stacks if all(_matches(name, t, name not in self.layers) for t in every)]

    def _sizes(self, name: str) -> tuple[torch.Size, torch.Size]:
        """Those of one rank of a and b in a stack."""
        return self._stacks[name].a.shape[1:], self._stacks[name].b.shape[1:]

    @property
    def _device(self) -> torch.device:
        return next(iter(self._stacks.values())).a.device

    def _on_device(self, values: Sequence[int]) -> Tensor:
        """int64 on the model's device; nothing waits for it."""
        is_cuda = self._device.type == "cuda"
        return torch.tensor(values, dtype=torch.int64, pin_memory=is_cuda).to(self._device, non_blocking=True)

    def _drawn(self, index: Tensor) -> Tensor | None:
        """Seeds of dropout for one batch, by the place of each adapter, None without; counts the batch for those in it.

        They depend on the adapter's own seed and on how many batches it was in.
        """
        every, count = self.slots, len(self._slots)
        if not any(held.dropout for held in self._slots.values()):
            return None
        # a model may have been moved
        self._calls, self._seeds = self._calls.to(self._device), self._seeds.to(self._device)
        slots = self._on_device(every)
        present = torch.zeros(count + 1, dtype=torch.int64, device=index.device)
        present.scatter_(0, index.reshape(-1), 1)
        self._calls[slots] += present[:count]
        return mixed(self._seeds[slots], self._calls[slots])

    def _drawing(self, slot: int) -> dict[str, int]:
        """What decides the next mask of dropout of a slot."""
        return {"batches": int(self._calls[slot]), "seed": int(self._seeds[slot])}

    def _draw_from(self, slot: int, batches: int, seed: int) -> None:
        self._calls[slot], self._seeds[slot] = batches, seed

    def _refuse_in_use(self, what: str) -> None:
        if self._in_use:
            raise RuntimeError(
                f"{what} within use_adapters, whose calls have the adapters of its beginning: end it first"
            )

    def _add(self, held: _Slot, factors: dict[str, tuple[Tensor, Tensor]]) -> int:
        self._refuse_in_use("allocate or load")
        # the operator refuses it, with every other adapter of the batch
        if not math.isfinite(held.scale):
            raise ValueError(f"got alpha / rank = {held.scale}; it must be finite")
        slot = next(i for i in range(len(self._slots) + 1) if i not in self._slots)
        self._slots[slot] = held
        if slot == len(self._calls):
            self._calls, self._seeds = (torch.cat((t, t.new_zeros(1))) for t in (self._calls, self._seeds))
        self._calls[slot], self._seeds[slot] = 0, signed(held.seed)
        at = self.slots.index(slot)
        for name, stack in self._stacks.items():
            a, b = factors.get(name) or (torch.empty(0, *size) for size in self._sizes(name))
            stack.insert(at, a, b)
        self._describe()
        return slot

    def _describe(self) -> None:
        held = [self._slots[slot] for slot in self.slots]
        for stack in self._stacks.values():
            stack.scales = tuple(one.scale for one in held)
            stack.dropout_p = tuple(one.dropout for one in held)

    def _views(self, slot: int, of: Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]) -> Any:
        held, at, views = self._slots[slot], self.slots.index(slot), {}
        for name in held.stacks:
            stack = self._stacks[name]
            a, b = of(*stack.operands())
            views[f"{name}.lora_A.weight"] = a[..., stack.of(at), :]
            views[f"{name}.lora_B.weight"] = b[..., stack.of(at)]
        return views


def _is_linear(module: nn.Module) -> bool:
    try:
        return LoRALinearMulti(module).weight is not None
    except TypeError:
        return False


def _refuse_text(targets: object) -> None:
    if isinstance(targets, str):
        raise TypeError(f"targets is the str {targets!r}; it must be a list of names")


def _matches(name: str, targets: Sequence[str], is_stack: bool = False) -> bool:
    """Whether a target is a name or the last parts of one; `is_stack` of a parameter of experts, which they name by its
    module, or by itself with at least one part more ("down_proj" is a linear layer).
    """
    if is_stack and _matches(name.rpartition(".")[0], targets):
        return True
    return any(name == one or (name.endswith(f".{one}") and "." * is_stack in one) for one in targets)
