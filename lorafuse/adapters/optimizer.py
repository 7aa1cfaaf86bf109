"""`MultiAdamW`: one step for some of a pool's adapters, each with its own settings, counter and clipping."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafuse.adapters.pool import AdapterPool

__all__ = ["AdamParams", "MultiAdamW", "Step"]


@dataclass(frozen=True)
class AdamParams:
    """Settings of one step of one adapter: those of `torch.optim.AdamW`, with the defaults of Tinker's optim_step.

    `grad_scale` multiplies the gradients first, such as 1 / tokens: they are sums. `max_grad_norm` clips their norm
    then; 0 does not. Raises ValueError for numbers outside of their ranges.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_scale: float = 1.0
    max_grad_norm: float = 0.0

    def __post_init__(self) -> None:
        numbers = self.lr, self.eps, self.weight_decay, self.max_grad_norm
        if not (
            all(0.0 <= one < math.inf for one in numbers)
            and all(0.0 <= one < 1.0 for one in self.betas)
            and math.isfinite(self.grad_scale)
        ):
            raise ValueError(
                f"{self}: lr, eps, weight_decay and max_grad_norm must be finite and at least 0, betas at least 0 and "
                "below 1, grad_scale finite"
            )


@dataclass(frozen=True)
class Step:
    """What a step did: the norm of the gradients after `grad_scale`, before clipping, and the number of the step.

    A norm that is not finite left the adapter and its state as they were.
    """

    grad_norm: float
    number: int

    @property
    def is_skipped(self) -> bool:
        return not math.isfinite(self.grad_norm)


@dataclass(eq=False)
class _State:
    number: int
    m: list[Tensor]
    v: list[Tensor]
    owner: object


class MultiAdamW:
    """AdamW (decoupled weight decay) over the adapters of a pool; state is created at an adapter's first step.

    What a step does to an adapter does not depend on the others that step with it.
    """

    def __init__(self, pool: AdapterPool) -> None:
        self.pool = pool
        self._states: dict[int, _State] = {}

    @torch.no_grad()
    def step(self, params: Mapping[int, AdamParams]) -> dict[int, Step]:
        """Step these slots and zero their gradients; the others keep theirs, and sum on.

        All tensors of all slots are computed together by torch's multi-tensor functions; the host waits once, for the
        norms. Raises KeyError for a slot that is not allocated.
        """
        if not params:
            return {}
        held = self.pool._slots
        self._states = {slot: state for slot, state in self._states.items() if held.get(slot) is state.owner}
        given = {slot: self._tensors(slot) for slot in params}
        norms = self._norms({slot: grads for slot, (_, grads, _) in given.items()})
        p: list[Tensor] = []
        g: list[Tensor] = []
        m: list[Tensor] = []
        v: list[Tensor] = []
        results: dict[int, Step] = {}
        factors: list[float] = []
        settings: list[AdamParams] = []
        numbers: list[int] = []
        for slot, (weights, grads, state) in given.items():
            setting = params[slot]
            norm = norms[slot] * abs(setting.grad_scale)
            if math.isfinite(norm):
                state.number += 1
                clip = setting.max_grad_norm / (norm + 1e-6) if setting.max_grad_norm else 1.0
                for every, some in ((p, weights), (g, grads), (m, state.m), (v, state.v)):
                    every += some
                factors += [setting.grad_scale * min(1.0, clip)] * len(weights)
                settings += [setting] * len(weights)
                numbers += [state.number] * len(weights)
            results[slot] = Step(norm, state.number)
        if p:
            _adamw(p, torch._foreach_mul(g, factors), m, v, settings, numbers)
        torch._foreach_zero_([grad for _, grads, _ in given.values() for grad in grads])
        return results

    def state_dict(self, slot: int) -> dict[str, Any]:
        """Copies of what a slot's next steps need besides its parameters (`AdapterPool.export`): the moments by the
        parameters' names, the number of steps, and of batches and the seed, by which its masks of dropout are drawn.

        Gradients that were not stepped are not in it.
        """
        _, _, state = self._tensors(slot)
        names = self.pool.parameters(slot)
        moments = {key: dict(zip(names, (t.clone() for t in getattr(state, key)), strict=True)) for key in "mv"}
        return {"number": state.number, **self.pool._drawing(slot), **moments}

    @torch.no_grad()
    def load_state_dict(self, slot: int, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned of an adapter of the same layers and rank, of whichever pool and slot.

        Changes nothing where it raises: ValueError for one of other layers or another rank, KeyError for parts missing.
        """
        named = self.pool.parameters(slot)
        number, batches, seed = (state[key] for key in ("number", "batches", "seed"))
        for key in "mv":
            if {n: t.shape for n, t in state[key].items()} != {n: t.shape for n, t in named.items()}:
                raise ValueError(f"the state is not of an adapter with the layers and the rank of slot {slot}")
        self.reset(slot)
        _, _, own = self._tensors(slot)
        own.number = number
        for key in "mv":
            for t, name in zip(getattr(own, key), named, strict=True):
                t.copy_(state[key][name])
        self.pool._draw_from(slot, batches, seed)

    def reset(self, slot: int) -> None:
        """Forget the state of a slot: the next step is its first."""
        self._states.pop(slot, None)

    def _tensors(self, slot: int) -> tuple[list[Tensor], list[Tensor], _State]:
        weights = list(self.pool.parameters(slot).values())
        owner = self.pool._slots[slot]
        state = self._states.get(slot)
        if state is None or state.owner is not owner:
            # contiguous or not as the parameter is, so that one kernel reads all
            state = _State(0, [torch.zeros_like(t) for t in weights], [torch.zeros_like(t) for t in weights], owner)
            self._states[slot] = state
        elif state.m[0].device != weights[0].device:
            # the model was moved
            state.m, state.v = ([t.to(weights[0].device) for t in some] for some in (state.m, state.v))
        return weights, list(self.pool.gradients(slot).values()), state

    @staticmethod
    def _norms(grads: dict[int, list[Tensor]]) -> dict[int, float]:
        """The norm of each slot's gradients; nothing of one reaches another's."""
        every = [grad for some in grads.values() for grad in some]
        # neither the sum of squares nor its root overflows there
        norms, out, first = torch.stack(torch._foreach_norm(every, 2, dtype=torch.float64)).tolist(), {}, 0
        for slot, some in grads.items():
            out[slot] = math.sqrt(sum(norm * norm for norm in norms[first : first + len(some)]))
            first += len(some)
        return out


def _adamw(
    p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], settings: list[AdamParams], numbers: list[int]
) -> None:
    """The update of `torch.optim.AdamW`, each tensor with its own settings and number of its step."""
    betas = [one.betas for one in settings]
    corrections = [(1 - b1**n, math.sqrt(1 - b2**n)) for (b1, b2), n in zip(betas, numbers, strict=True)]
    torch._foreach_mul_(p, [1 - one.lr * one.weight_decay for one in settings])
    torch._foreach_mul_(m, [b1 for b1, _ in betas])
    torch._foreach_add_(m, torch._foreach_mul(g, [1 - b1 for b1, _ in betas]))
    torch._foreach_mul_(v, [b2 for _, b2 in betas])
    torch._foreach_addcmul_(v, g, g, [1 - b2 for _, b2 in betas])
    denominators = torch._foreach_sqrt(v)
    torch._foreach_div_(denominators, [root for _, root in corrections])
    torch._foreach_add_(denominators, [one.eps for one in settings])
    torch._foreach_addcdiv_(
        p, m, denominators, [-one.lr / first for one, (first, _) in zip(settings, corrections, strict=True)]
    )
