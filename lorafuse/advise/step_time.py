"""Step time of a model's linear layers on a GPU, by the cost model of `lorafuse.plan`. A model, not a measurement."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lorafuse.advise.capacity import rank_of
from lorafuse.advise.shapes import Linear, ModelShapes
from lorafuse.plan import DeviceSpec, Problem, cost, select

__all__ = ["WAYS", "step_seconds"]

WAYS = ("frozen", "full fine-tuning", "lorafuse")
_GRADIENTS = ("dx", "da", "db")
# where nvcc is: without it, lorafuse has Triton and eager
_AVAILABLE = (("eager", ""), ("triton", ""), ("cuda", ""))


def step_seconds(shapes: ModelShapes, rank: int, tokens: int, device: DeviceSpec) -> dict[str, float]:
    """Modelled seconds, forward and backward, of `tokens` through all linear layers and experts, for each of `WAYS`.

    bf16 base; attention, norms, loss and optimizer are left out of all alike. Raises ValueError for tokens below 1.
    """
    if tokens < 1:
        raise ValueError(f"tokens {tokens}: it must be at least 1")
    found = dict.fromkeys(WAYS, 0.0)
    blocks, rest = _blocks(shapes.linears)
    sizes = Counter(
        (x.N, x.K, x.adapted, rank_of(x, rank, shapes.active_experts), x.active / x.experts, x.experts) for x in rest
    )
    for (N, K, adapted, R, share, copies), count in sizes.items():
        problem = Problem(math.ceil(tokens * share), N, K, R, "bfloat16", "float32")
        for way, seconds in _linear(problem, device, adapted).items():
            found[way] += seconds * count * copies
    for (up, down), count in Counter((_sizes(up), _sizes(down)) for up, down in blocks).items():
        R = rank_of(blocks[0][0], rank, shapes.active_experts)
        for way, seconds in _experts(up, down, shapes.active_experts, R, tokens, device).items():
            found[way] += seconds * count
    return found


def _sizes(linear: Linear) -> tuple[int, int, int]:
    return linear.experts, linear.N, linear.K


def _blocks(linears: Sequence[Linear]) -> tuple[list[tuple[Linear, Linear]], list[Linear]]:
    """Pairs of stacks that make the experts of a block, gate_up and down, and all that is no such pair."""
    modules: dict[str, list[Linear]] = {}
    rest = [linear for linear in linears if not linear.parameter]
    for linear in linears:
        if linear.parameter:
            modules.setdefault(linear.name.rpartition(".")[0], []).append(linear)
    pairs = []
    for stacks in modules.values():
        by_order = [(up, down) for up in stacks for down in stacks if up is not down and _pair(up, down)]
        if len(stacks) == 2 and by_order:
            # where H is I without gate both orders fit; the first parameter is then the first projection
            pairs.append(by_order[0])
        else:
            rest += stacks
    return pairs, rest


def _pair(up: Linear, down: Linear) -> bool:
    return up.K == down.N and up.N in (down.K, 2 * down.K) and up.experts == down.experts


def _linear(problem: Problem, device: DeviceSpec, adapted: bool) -> dict[str, float]:
    found = _both((problem,), (replace(problem, gradients=_GRADIENTS),), device)
    return found if adapted else found | {"lorafuse": found["frozen"]}


def _both(forward: tuple[Problem, ...], backward: tuple[Problem, ...], device: DeviceSpec) -> dict[str, float]:
    """Seconds of forward and backward, a problem for each projection."""
    frozen = ours = 0.0
    for problems in (forward, backward):
        frozen += cost.frozen(problems, device).seconds
        ours += select(problems, device, _AVAILABLE).chosen.seconds
    # dw = dyᵀ x has as many products as y
    dw = sum(cost.frozen((p,), device).seconds for p in forward)
    return {"frozen": frozen, "full fine-tuning": frozen + dw, "lorafuse": ours}


def _experts(
    up: tuple[int, int, int], down: tuple[int, int, int], active: int, R: int, tokens: int, device: DeviceSpec
) -> dict[str, float]:
    (E, U, H), I = up, down[2]  # noqa: E741
    epilogue = "gated" if U == 2 * I else "activation"
    base = Problem(tokens * active, U, H, R, "bfloat16", "float32", groups=E, is_ragged=True, choices=active)
    forward = replace(base, epilogue=epilogue), replace(base, N=H, K=I)
    backward = replace(base, gradients=_GRADIENTS), replace(base, N=H, K=I, gradients=_GRADIENTS, epilogue=epilogue)
    return _both(forward, backward, device)
