"""A gradient probe: which layers would use more rank, from a few batches, as PEFT's `rank_pattern` and `alpha_pattern`.

Finding F6 names adaptive rank as an outlook and gives no formula; this one is an assumption, a rule of thumb. The
gradient G = dyᵀ x of a weight is sketched as G Ωᵀ with a random Ω `[width, K]`, which is the gradient of B when A is
Ω, so no gradient of full size is built. Its singular values stand for those of G (randomized range finder, Halko et
al. 2011). Ranks are then given one by one to the layer whose next singular value, squared, is the largest for each
parameter that it costs, until the parameters of the uniform rank are spent: the most gradient energy for the same
adapter size.
"""

import heapq
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.advise.shapes import shapes_of

__all__ = ["Probe", "allocate", "probe_ranks", "sketch"]


@dataclass(frozen=True)
class Probe:
    """`rank_pattern` and `alpha_pattern` as `LoraConfig` takes them; `energy` is the squared norm of each layer's
    gradient, as sketched; `skipped` are layers that the probe cannot see, with the reason."""

    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, int]
    energy: dict[str, float]
    skipped: dict[str, str]


def sketch(
    model: nn.Module, layers: dict[str, nn.Linear], run: Callable[[], Any], *, width: int, seed: int = 0
) -> dict[str, Tensor]:
    """`G Ωᵀ [N, width]` of each layer in fp32, G summed over what `run` backpropagates.

    No parameter keeps or gets a gradient. Raises RuntimeError, of torch, where `run` does not backpropagate.
    """
    generator = torch.Generator().manual_seed(seed)
    sketches: dict[str, Tensor] = {}
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    handles = []
    for name, layer in layers.items():
        device = layer.weight.device
        omega = (torch.randn(width, layer.in_features, generator=generator) / width**0.5).to(device)
        sketches[name] = torch.zeros(layer.out_features, width, device=device)
        handles.append(layer.register_forward_hook(_hook(sketches[name], omega)))
    try:
        for parameter, _ in required:
            parameter.requires_grad_(False)
        run()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, was in required:
            parameter.requires_grad_(was)
    return sketches


def _hook(into: Tensor, omega: Tensor) -> Callable[..., None]:
    def after(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        low = inputs[0].detach().flatten(0, -2).float() @ omega.T
        # everything is frozen, so the first layers' outputs are leaves that must ask for their gradient
        if not y.requires_grad:
            y.requires_grad_()

        def add(dy: Tensor) -> None:
            into.addmm_(dy.detach().flatten(0, -2).float().T, low)

        y.register_hook(add)

    return after


def allocate(spectra: dict[str, list[float]], costs: dict[str, int], budget: int) -> dict[str, int]:
    """Ranks from singular values, in falling order: each layer gets 1, then whichever gains most for each parameter of
    `costs` (N + K) next, while the budget of parameters lasts. No layer gets more ranks than it has values."""
    ranks = dict.fromkeys(spectra, 1)
    left = budget - sum(costs.values())
    queue = [(-(values[1] ** 2) / costs[name], name) for name, values in spectra.items() if len(values) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if costs[name] > left:
            continue
        ranks[name] += 1
        left -= costs[name]
        values = spectra[name]
        if ranks[name] < len(values):
            heapq.heappush(queue, (-(values[ranks[name]] ** 2) / costs[name], name))
    return ranks


def probe_ranks(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    rank: int,
    *,
    alpha: int = 32,
    keep_scale: bool = False,
    seed: int = 0,
) -> Probe:
    """Ranks of a base model's `nn.Linear` layers, routers and the unembedding left out as in the advised adapter:
    together they cost what a uniform `rank` costs, after the batches' gradients.

    `batches` are keyword arguments of the model, labels included. No layer gets more than twice the uniform rank, the
    width of the sketch. alpha stays the same for all layers, with which the start of training does not depend on the
    rank (finding FORM), so that `alpha_pattern` is empty; `keep_scale` keeps alpha / r instead. Raises ValueError for a
    rank below 1, a model with adapters, no batch, and a loss without any gradient.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: it must be at least 1")
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the model has adapters; probe the base model, before get_peft_model")
    # how many experts are active does not matter here
    adapted = {linear.name for linear in shapes_of(model, active_experts=1).adapted}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n in adapted}
    skipped = {
        f"{at}.{name}": "a stack of experts is no nn.Linear; it keeps its rank"
        for at, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }
    count = 0

    def run() -> None:
        nonlocal count
        for count, batch in enumerate(batches, 1):  # noqa: B007
            model(**batch).loss.backward()

    sketches = sketch(model, layers, run, width=2 * rank, seed=seed)
    if not count:
        raise ValueError("there is no batch to probe with; give at least one")
    spectra = {name: torch.linalg.svdvals(value).tolist() for name, value in sketches.items()}
    energy = {name: sum(value**2 for value in values) for name, values in spectra.items()}
    if not any(energy.values()):
        raise ValueError("no gradient reached any layer; the batches must hold labels that are not all -100")
    spectra = {name: values[: min(layers[name].in_features, len(values))] for name, values in spectra.items()}
    costs = {name: layers[name].in_features + layers[name].out_features for name in layers}
    ranks = allocate(spectra, costs, rank * sum(costs.values()))
    # PEFT reads a key as a regular expression that ends a module's name
    pattern = {re.escape(name): own for name, own in ranks.items() if own != rank}
    alphas = {name: max(1, round(alpha * own / rank)) for name, own in pattern.items()} if keep_scale else {}
    return Probe(pattern, alphas, energy, skipped)
