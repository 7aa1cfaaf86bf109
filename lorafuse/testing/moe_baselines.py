"""The ways to run a mixture-of-experts block with LoRA that benchmarks compare, with the same numbers in each.

`frozen` is transformers' own block without adapters, from which the LoRA tax is measured, `full` what full fine-tuning
pays, `split` the grouped GEMM with the low-rank path as grouped GEMMs of its own, written here from the formula.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafuse.integrations import patch
from lorafuse.testing.baselines import Variant
from lorafuse.testing.cases import MoECase
from lorafuse.testing.numerics import relative_l2, tolerance

__all__ = ["ROUTINGS", "VARIANTS", "MoEInputs", "build", "check", "inputs", "reference"]

SCALE = 2.0


@dataclass(frozen=True)
class MoEInputs:
    """`x` and `dout` `[T, H]`, `index` and `weight` `[T, k]`, `gate_up [E, 2I, H]`, `down [E, H, I]`, fp32 factors."""

    x: Tensor
    index: Tensor
    weight: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_a: Tensor
    gate_up_b: Tensor
    down_a: Tensor
    down_b: Tensor
    dout: Tensor


def _balanced(tokens: int, experts: int, k: int) -> Tensor:
    return (torch.arange(tokens * k) % experts).view(tokens, k)


def _zipf(tokens: int, experts: int, k: int) -> Tensor:
    """Experts drawn without repetition, the n-th most wanted with weight 1/n."""
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial((1 / torch.arange(1, experts + 1)).expand(tokens, -1), k, generator=generator)


def _one_hot(tokens: int, experts: int, k: int) -> Tensor:
    """Every token to the same k experts."""
    return torch.arange(k).expand(tokens, -1).contiguous()


ROUTINGS = {"balanced": _balanced, "zipf": _zipf, "one-hot": _one_hot}


def inputs(case: MoECase, tokens: int, rank: int, routing: str, dtype: torch.dtype, device: torch.device) -> MoEInputs:
    """Normal numbers of unit size, no factor zero."""
    generator = torch.Generator(device).manual_seed(0)
    E, k, H, I = case.E, case.k, case.H, case.I

    def normal(*size: int, fan: int = 1, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * fan**-0.5).to(of)

    fp32 = torch.float32
    return MoEInputs(
        x=normal(tokens, H),
        index=ROUTINGS[routing](tokens, E, k).to(device),
        weight=torch.rand(tokens, k, generator=generator, device=device).to(dtype),
        gate_up=normal(E, 2 * I, H, fan=H),
        down=normal(E, H, I, fan=I),
        gate_up_a=normal(E, rank, H, fan=H, of=fp32),
        gate_up_b=normal(E, 2 * I, rank, fan=rank, of=fp32) / SCALE,
        down_a=normal(E, rank, I, fan=I, of=fp32),
        down_b=normal(E, H, rank, fan=rank, of=fp32) / SCALE,
        dout=normal(tokens, H),
    )


def _experts(given: MoEInputs, trainable: bool) -> nn.Module:
    """transformers' Qwen3-MoE experts holding the inputs' stacks, run by its "grouped_mm"."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    E, twice, H = given.gate_up.shape
    config = Qwen3MoeConfig(num_experts=E, hidden_size=H, moe_intermediate_size=twice // 2)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = nn.Parameter(given.gate_up.clone(), requires_grad=trainable)
    experts.down_proj = nn.Parameter(given.down.clone(), requires_grad=trainable)
    return experts


_Built = tuple[Callable[[Tensor, Tensor, Tensor], Tensor], dict[str, Tensor]]


def _plain(given: MoEInputs, trainable: bool) -> _Built:
    experts = _experts(given, trainable)
    stacks = {"d_gate_up": experts.gate_up_proj, "d_down": experts.down_proj}
    return experts, stacks if trainable else {}  # type: ignore[return-value]


def _peft(given: MoEInputs, patched: bool) -> _Built:
    from peft import LoraConfig, get_peft_model

    rank = given.gate_up_a.shape[1]
    config = LoraConfig(
        r=rank,
        lora_alpha=int(SCALE * rank),
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    model = get_peft_model(nn.ModuleDict({"experts": _experts(given, False)}), config)
    outer = model.base_model.model["experts"]
    wanted: dict[str, Tensor] = {}
    with torch.no_grad():
        for wrapper, name in ((outer, "down"), (outer.base_layer, "gate_up")):
            a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
            # PEFT packs lora_A expert-slowest and lora_B expert-fastest
            a.copy_(getattr(given, f"{name}_a").flatten(0, 1))
            b.copy_(getattr(given, f"{name}_b").permute(1, 2, 0).flatten(1))
            wanted |= {f"d_{name}_a": a, f"d_{name}_b": b}
    if patched:
        patch(outer, strict=True)
    return outer, wanted


def _split(given: MoEInputs) -> _Built:
    names = ("gate_up_a", "gate_up_b", "down_a", "down_b")
    factors = {name: getattr(given, name).to(given.x.dtype).requires_grad_() for name in names}

    def project(rows: Tensor, ends: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low = F.grouped_mm(F.grouped_mm(rows, a.mT, offs=ends), b.mT, offs=ends)
        return F.grouped_mm(rows, w.mT, offs=ends) + SCALE * low

    def call(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        (tokens, k), E = index.shape, given.gate_up.shape[0]
        order = index.flatten().argsort(stable=True)
        ends = torch.bincount(index.flatten(), minlength=E).cumsum(0).int()
        u = project(x[order // k], ends, given.gate_up, factors["gate_up_a"], factors["gate_up_b"])
        gate, up = u.chunk(2, -1)
        y = project(F.silu(gate) * up, ends, given.down, factors["down_a"], factors["down_b"])
        y = y * weight.flatten()[order].unsqueeze(1)
        return torch.empty_like(y).index_copy(0, order, y).view(tokens, k, -1).sum(1)

    return call, {f"d_{name}": t for name, t in factors.items()}


VARIANTS: dict[str, Callable[[MoEInputs], _Built]] = {
    "frozen": partial(_plain, trainable=False),
    "full": partial(_plain, trainable=True),
    "peft": partial(_peft, patched=False),
    "split": _split,
    "lorafuse": partial(_peft, patched=True),
}


def build(name: str, given: MoEInputs) -> Variant:
    """A variant by name; its backward asks for the gradients of x, of the router weights and of what it trains."""
    run, parameters = VARIANTS[name](given)
    x, weight = given.x.clone().requires_grad_(), given.weight.clone().requires_grad_()
    wanted = {"dx": x, "dweight": weight, **parameters}
    return Variant(name, lambda x: run(x, given.index, weight), x, given.dout, wanted)


def reference(given: MoEInputs, adapted: bool = True) -> dict[str, Tensor]:
    """out and every gradient by the formula in fp64, expert by expert."""
    leaves = {n: t.detach().double() for n, t in vars(given).items() if t.is_floating_point()}
    wanted = {"dx": "x", "dweight": "weight"} | {
        f"d_{n}": n for n in ("gate_up_a", "gate_up_b", "down_a", "down_b") if adapted
    }
    for name in wanted.values():
        leaves[name].requires_grad_()
    out = torch.zeros_like(leaves["x"])
    for e in range(given.gate_up.shape[0]):
        token, slot = torch.where(given.index == e)
        if token.numel() == 0:
            continue

        def project(v: Tensor, name: str, e: int = e) -> Tensor:
            y = v @ leaves[name][e].t()
            low = (v @ leaves[f"{name}_a"][e].t()) @ leaves[f"{name}_b"][e].t()
            return y + SCALE * low if adapted else y

        gate, up = project(leaves["x"][token], "gate_up").chunk(2, 1)
        y = project(F.silu(gate) * up, "down") * leaves["weight"][token, slot].unsqueeze(1)
        out = out.index_add(0, token, y)
    grads = torch.autograd.grad(out, [leaves[n] for n in wanted.values()], leaves["dout"])
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def check(variant: Variant, adapted: dict[str, Tensor], frozen: dict[str, Tensor]) -> str:
    """ "" when out and every gradient that the references have are right, else which is wrong and by how much."""
    y = variant.forward()
    found: dict[str, Any] = {"out": y.detach(), **dict(zip(variant.wanted, variant.backward(y), strict=True))}
    expected = frozen if variant.name in ("frozen", "full") else adapted
    for name, tensor in found.items():
        if name not in expected:
            continue
        given = expected[name]
        if tensor.shape != given.shape:
            # PEFT's packing
            E, first, second = given.shape
            given = given.flatten(0, 1) if name.endswith("_a") else given.permute(1, 2, 0).reshape(first, second * E)
        error = relative_l2(tensor, given)
        if not error <= tolerance(y.dtype) or not tensor.any():
            return f"{variant.name}: {name} is wrong by {error:.2e} relative, the bound is {tolerance(y.dtype):.0e}"
    return ""
