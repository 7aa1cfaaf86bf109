"""LoRA layers that other libraries wrote themselves, run by lorafuse: their class is changed to a subclass.

As with PEFT's, the layer stays the same object and its library the owner of parameters, names and files; `forward`
alone is replaced, reads the layer's present state, and runs what the library ships where that does not run fused.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.backends import base as backends
from lorafuse.functional import run_linear
from lorafuse.integrations import calls
from lorafuse.integrations.hf_common import altered, interception, warn_once
from lorafuse.integrations.report import Patched, PatchReport, Skipped
from lorafuse.operands import Weight

__all__ = ["Operands", "factors_of", "patch_owned", "unpatch_owned"]

# weight, a, b, scale, bias, dropout_p; or why there are none
Operands = tuple[Tensor | Weight, Tensor, Tensor, float, Tensor | None, float] | str


@functools.cache
def _fused(shipped: Any, read: Callable[[Any], Operands]) -> type:
    """The subclass of a layer's class that runs `read(layer)` as one operator."""

    def forward(self: Any, x: Tensor) -> Tensor:
        operands: Any = interception(x)
        if operands is None:
            operands = read(self)
        if type(operands) is tuple:
            rows = x if x.dim() <= 4 else x.flatten(0, -4)
            y = run_linear(rows, *operands, None, self._lorafuse_backend)  # type: ignore[call-arg]
            calls.ran(self)
            return y if rows is x else y.unflatten(0, x.shape[:-3])
        if operands and not torch.compiler.is_compiling():
            warn_once(f"a patched {shipped.__name__} runs as it was shipped", operands)
        calls.fell_back(self, operands or calls.OFF)
        return shipped.forward(self, x)

    def reduced(self: Any, protocol: int) -> tuple[Any, ...]:
        # of a copy, or for pickle, which looks for a class in its module
        return _blank, (shipped, read), *shipped.__reduce_ex__(self, max(2, int(protocol)))[2:]

    # recipes and reports know a layer by its name
    body = {"forward": forward, "__reduce_ex__": reduced, "_lorafuse_owned": shipped, "__module__": shipped.__module__}
    return type(shipped.__name__, (shipped,), body)


def _blank(shipped: Any, read: Callable[[Any], Operands]) -> Any:
    kind: Any = _fused(shipped, read)
    return kind.__new__(kind)


def patch_owned(
    model: nn.Module,
    kinds: tuple[Any, ...],
    read: Callable[[Any], Operands],
    backend: str,
    strict: bool,
    library: str,
    *,
    others: Mapping[type, str] | None = None,
    switches: Mapping[str, Any] | None = None,
) -> PatchReport:
    """Patch every layer in a model that runs the forward of one of `kinds`, of which the first is the base of all; what
    `lorafuse.patch` is to PEFT's.

    `others` are the `library`'s adapted modules of other classes, with the reason why they are left to it. `switches`
    are attributes of a layer, set while it is patched, by which the library's kernels above it know to call it.

    Raises what `lorafuse.patch` raises, and warns as it does.
    """
    backends.require(backend)
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch got a {type(model).__name__}; it takes a torch.nn.Module")
    report, adopted = PatchReport(library=library), []
    for name, layer in model.named_modules():
        if reason := next((why for kind, why in (others or {}).items() if isinstance(layer, kind)), ""):
            report.skipped.append(Skipped(name, type(layer).__name__, reason))
        if not isinstance(layer, kinds[0]):
            continue
        shipped = getattr(type(layer), "_lorafuse_owned", type(layer))
        operands: Operands = f"its class {shipped.__name__} has a forward of its own"
        if shipped.forward in [kind.forward for kind in kinds] and "forward" not in layer.__dict__:
            operands = read(layer)
        if isinstance(operands, str) and operands:
            report.skipped.append(Skipped(name, "linear", operands))
            continue
        able = backends.candidates(next(layer.parameters()).device.type)
        report.patched.append(Patched(name, "linear", able[0] if backend == "auto" and len(able) == 1 else backend))
        adopted.append((layer, shipped))
    problem = (
        "" if report.patched else f"{type(model).__name__} has no {kinds[0].__name__} that can run fused\n{report}"
    )
    if strict and (problem or report.skipped):
        raise ValueError(f"lorafuse changed nothing: {problem or report}")
    if problem:
        warnings.warn(f"lorafuse patched nothing: {problem}", stacklevel=3)
    for layer, shipped in adopted:
        layer.__class__ = _fused(shipped, read)  # type: ignore[arg-type]
        layer._lorafuse_backend = None if backend == "auto" else backend
        if "_lorafuse_switched" not in layer.__dict__:
            layer._lorafuse_switched = {key: getattr(layer, key) for key in switches or {} if hasattr(layer, key)}
        for key in layer._lorafuse_switched:
            setattr(layer, key, (switches or {})[key])
        calls.begin(layer)
    return report


def unpatch_owned(model: nn.Module) -> int:
    """Give every layer of `patch_owned` back to its library; returns how many there were."""
    layers: list[Any] = [layer for layer in model.modules() if "_lorafuse_owned" in vars(type(layer))]
    for layer in layers:
        layer.__class__ = type(layer)._lorafuse_owned
        del layer._lorafuse_backend
        for key, value in layer.__dict__.pop("_lorafuse_switched").items():
            setattr(layer, key, value)
        calls.end(layer)
    return len(layers)


def factors_of(layer: nn.Module, lora_a: nn.Module, lora_b: nn.Module) -> tuple[Tensor, Tensor] | str:
    """The weights of a layer's two factors, or why they are not read."""
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear or altered(lora_a, lora_b):
        return "its factors are not plain nn.Linear without hooks"
    if lora_a.bias is not None or lora_b.bias is not None:
        return "one of its factors has a bias"
    weight = layer._parameters.get("weight")
    if weight is None or weight.requires_grad:
        return "its base weight is trainable; lorafuse computes no gradient for it"
    return lora_a.weight, lora_b.weight
