"""The ways to run one LoRA linear that benchmarks compare, each as its users run it, with the same numbers in it.

`frozen` is the floor that the LoRA tax is measured from, `full` what full fine-tuning pays.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.backends import base
from lorafuse.integrations import patch
from lorafuse.plan import only
from lorafuse.testing.cases import Case
from lorafuse.testing.numerics import lora_formula, relative_l2, tolerance

__all__ = ["VARIANTS", "Inputs", "Variant", "build", "check", "inputs", "reference", "variants"]

SCALE = 2.0


@dataclass(frozen=True)
class Inputs:
    """`x [M, K]`, `w [N, K]`, `a [R, K]`, `b [N, R]`, `dy [M, N]` of one case; b is not zero."""

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    dy: Tensor


@dataclass
class Variant:
    """One way to run the layer: `forward()` gives y, whose gradient is asked for the tensors in `wanted`, by name."""

    name: str
    call: Callable[[Tensor], Tensor]
    x: Tensor
    dy: Tensor
    wanted: dict[str, Tensor]

    def forward(self) -> Tensor:
        return self.call(self.x)

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, tuple(self.wanted.values()), self.dy)


def inputs(case: Case, m: int, rank: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Normal numbers; base and low-rank part of y are of one size, the adapters in fp32 as PEFT's are."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * std).to(dtype)

    return Inputs(
        x=normal(m, case.K),
        w=normal(case.N, case.K, std=case.K**-0.5),
        a=normal(rank, case.K, std=case.K**-0.5, dtype=torch.float32),
        b=normal(case.N, rank, std=rank**-0.5 / SCALE, dtype=torch.float32),
        dy=normal(m, case.N),
    )


def _linear(given: Inputs, trainable: bool) -> nn.Linear:
    layer = nn.Linear(given.w.shape[1], given.w.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(given.w.clone(), requires_grad=trainable)
    return layer


def _peft(given: Inputs, autocast_adapter_dtype: bool = True) -> tuple[Any, dict[str, Tensor]]:
    from peft import LoraConfig, get_peft_model

    rank = given.a.shape[0]
    config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=["0"])
    model = get_peft_model(
        nn.Sequential(_linear(given, trainable=False)), config, autocast_adapter_dtype=autocast_adapter_dtype
    )
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if not autocast_adapter_dtype:
        a.data, b.data = a.data.to(given.w.dtype), b.data.to(given.w.dtype)
    with torch.no_grad():
        a.copy_(given.a)
        b.copy_(given.b)
    return layer, {"da": a, "db": b}


def _frozen(given: Inputs) -> tuple[Any, dict[str, Tensor]]:
    return _linear(given, trainable=False), {}


def _full(given: Inputs) -> tuple[Any, dict[str, Tensor]]:
    layer = _linear(given, trainable=True)
    return layer, {"dw": layer.weight}


def _peft_half(given: Inputs) -> tuple[Any, dict[str, Tensor]]:
    return _peft(given, autocast_adapter_dtype=False)


def _lorafuse(given: Inputs, backend: str = "auto") -> tuple[Any, dict[str, Tensor]]:
    layer, wanted = _peft(given)
    patch(layer, backend=backend, strict=True)
    return layer, wanted


def _single(given: Inputs, backend: str) -> tuple[Any, dict[str, Tensor]]:
    layer, wanted = _lorafuse(given, backend)

    def call(x: Tensor) -> Tensor:
        with only("single_kernel"):
            return layer(x)

    return call, wanted


class _AddmmFunction(torch.autograd.Function):
    """The base product, then the low-rank one added into its result; only x is saved, so backward computes xa again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, a, b)
        return torch.mm(x, w.t()).addmm_(torch.mm(x, a.t()), b.t(), alpha=SCALE)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, a, b = ctx.saved_tensors
        dyb = torch.mm(dy, b)
        da = torch.mm(dyb.t(), x).mul_(SCALE)
        db = torch.mm(dy.t(), torch.mm(x, a.t())).mul_(SCALE)
        dx = torch.mm(dy, w).addmm_(dyb, a, alpha=SCALE)
        return dx, None, da, db


def _addmm(given: Inputs) -> tuple[Any, dict[str, Tensor]]:
    w = given.w.clone()
    a, b = (t.to(w.dtype).requires_grad_() for t in (given.a, given.b))
    return (lambda x: _AddmmFunction.apply(x, w, a, b)), {"da": a, "db": b}


VARIANTS: dict[str, Callable[[Inputs], tuple[Any, dict[str, Tensor]]]] = {
    "frozen": _frozen,
    "full": _full,
    "peft": _peft,
    "peft-half": _peft_half,
    "addmm": _addmm,
    "lorafuse": _lorafuse,
}
# the ways that the plan of "lorafuse" chooses from, on GPUs
_GPU_VARIANTS: dict[str, Callable[[Inputs], tuple[Any, dict[str, Tensor]]]] = {
    "lorafuse-eager": partial(_lorafuse, backend="eager"),
    "lorafuse-triton": partial(_lorafuse, backend="triton"),
    "lorafuse-single": partial(_single, backend="triton"),
    "lorafuse-cuda": partial(_lorafuse, backend="cuda"),
    "lorafuse-cuda-single": partial(_single, backend="cuda"),
}


def variants(device: torch.device) -> tuple[str, ...]:
    """The names of those that run on a device; those of CUDA kernels where such were built for it."""
    if device.type != "cuda":
        return tuple(VARIANTS)
    cuda = base.availability("cuda").ok
    return (*VARIANTS, *(name for name in _GPU_VARIANTS if cuda or "cuda" not in name))


def build(name: str, given: Inputs) -> Variant:
    """A variant by name: `peft` as shipped (fp32 adapters), `peft-half` with adapters in the base's dtype, `addmm` the
    base GEMM and `addmm_` in one autograd.Function, `full` fine-tuning, `lorafuse` a patched PEFT layer, run as its
    plan says or, with a suffix, as the suffix says."""
    call, parameters = (VARIANTS | _GPU_VARIANTS)[name](given)
    x = given.x.clone().requires_grad_()
    return Variant(name, call, x, given.dy, {"dx": x, **parameters})


def reference(given: Inputs) -> dict[str, Tensor]:
    """y and every gradient in fp64: of an adapted layer, and as "frozen y", "frozen dx" and "dw" of the base alone."""
    base = {"frozen y": given.x.double() @ given.w.double().t(), "frozen dx": given.dy.double() @ given.w.double()}
    adapted = lora_formula(given.x, given.w, given.a, given.b, given.dy, SCALE)
    return adapted | base | {"dw": given.dy.double().t() @ given.x.double()}


def check(variant: Variant, expected: dict[str, Tensor]) -> str:
    """ "" when y and every gradient are those of `reference` and not zero; else what is wrong."""
    y = variant.forward()
    actual = {"y": y, **dict(zip(variant.wanted, variant.backward(y), strict=True))}
    bound = tolerance(y.dtype)
    for name, tensor in actual.items():
        key = name if "da" in variant.wanted or name == "dw" else f"frozen {name}"
        error = relative_l2(tensor, expected[key])
        if error > bound or not tensor.any():
            return f"{variant.name}: {name} is wrong by {error:.2e} relative, the bound is {bound:.0e}"
    return ""
