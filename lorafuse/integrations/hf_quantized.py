"""Quantized bases under PEFT's LoRA layers: how their weight is adopted, and in which dtypes they compute.

| base | the product is computed in | y has |
| --- | --- | --- |
| bitsandbytes `Linear4bit` | its compute_dtype, under autocast too | x's dtype |
| torchao's `Int8Tensor` in `nn.Linear` | x's dtype, under autocast too | x's dtype |
| its other weight-only tensors | autocast's dtype, else x's | the same |
| bitsandbytes `Linear8bitLt`, transformers' `FP8Linear` | autocast's dtype, else x's | x's dtype |

A CPU without instructions for products of 16 bits (`lorafuse.backends.aten_wide`) multiplies in fp32 in any case: there
an x of another dtype than a `Linear4bit` computes in is not rounded to it, and the product is in fp32.

Those of the last row quantize x too. lorafuse does not: it decodes the weight, which is nearer to the exact product,
but not equal to theirs. The others give what their libraries give.

Nothing of a library is imported here: whoever holds such a layer has brought it.
"""

import contextlib
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafuse import formats
from lorafuse.backends.aten_wide import has_products
from lorafuse.formats.sizes import LIBRARY_ROWS
from lorafuse.functional import run_linear
from lorafuse.integrations.hf_common import original
from lorafuse.operands import Weight
from lorafuse.ops.autocast import autocast_is_on, outside_autocast

__all__ = [
    "HAS_PRODUCTS",
    "PACKED",
    "Dtypes",
    "described_format",
    "dtypes_of",
    "has_finite_scales",
    "is_quantized",
    "multiplies_packed",
    "notes",
    "run_quantized",
    "stored",
]

PACKED = "few rows without gradients: bitsandbytes multiplies by the weight as it is packed"
# where the classes of linear layers with a forward of their own are defined
_CLASSES = (
    ("bitsandbytes.nn.modules", "Linear4bit"),
    ("bitsandbytes.nn.modules", "Linear8bitLt"),
    ("transformers.integrations.finegrained_fp8", "FP8Linear"),
)
# the forwards of those that are loaded, and whose they are
_forwards: dict[Any, str] = {}
# whether this CPU has instructions for products of 16 bits; looked up where a compiler cannot call the function
HAS_PRODUCTS = {dtype: has_products(dtype) for dtype in (torch.bfloat16, torch.float16)}
# the format that a class of layers or tensors was last adopted as
_formats: dict[type, str] = {}


def is_quantized(kind: type[nn.Module]) -> bool:
    """Whether a class has the forward of a library's quantized linear layer, and nobody replaced it."""
    forward = kind.forward
    if forward not in _forwards and not torch.compiler.is_compiling():
        for module, name in _CLASSES:
            if module in sys.modules and (own := original(getattr(sys.modules[module], name), "forward")):
                _forwards[own] = name
    return forward in _forwards


def stored(base: nn.Module) -> Weight | str | None:
    """The quantized weight of a base layer by reference, as it is now.

    A str, the reason, for a known one that cannot be held; None where no format knows it.
    """
    storage: Any = base if type(base).forward in _forwards else base._parameters.get("weight")
    if reason := _refused(base):
        return reason
    kind = type(storage)
    try:
        # the format of the class first; the others cost as much again
        weight = formats.adopt_as(_formats[kind], storage) if kind in _formats else None
        weight = formats.adopt(storage) if weight is None else weight
    except ValueError as error:
        return f"its base cannot be adopted: {error}"
    if weight is not None and _formats.get(kind) != weight.format_name:
        _formats[kind] = weight.format_name
    return weight


def _refused(base: nn.Module) -> str:
    """Why a known layer does not compute what its quantized weight alone says, or ""."""
    kind = _forwards.get(type(base).forward)
    if kind == "Linear8bitLt" and getattr(getattr(base, "state", None), "has_fp16_weights", False):
        return "its base is a Linear8bitLt with has_fp16_weights=True, whose weight is not stored quantized"
    scheme = getattr(base, "activation_scheme", None)
    if kind == "FP8Linear" and scheme != "dynamic":
        return (
            f"its base is an FP8Linear with activation_scheme={scheme!r}, which clips x by a "
            "calibrated scale; lorafuse runs those with 'dynamic'"
        )
    return ""


def run_quantized(
    base: nn.Module, x: Tensor, operands: tuple[Any, ...], backend: str | None,
    run: Callable[..., Tensor] | None = None, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y of `run`, or `run_linear`, over a quantized base, in the dtypes of the table above."""
    run = run or run_linear
    weight, a, b, scale, bias, dropout_p = operands
    dtypes = dtypes_of(base, x, operands)
    if bias is not None:
        bias = bias.to(dtypes.computed)
    with dtypes.block(x):
        y = run(x.to(dtypes.computed), weight, a, b, scale, bias, dropout_p, seed, backend, wide=dtypes.wide)
    return y.to(dtypes.returned)


class Dtypes(NamedTuple):
    """The row of the table above that a call of a layer has.

    Attributes:
        computed, returned: the dtypes of the product and of y.
        wide: whether the low-rank path is computed in fp32.
        is_outside: whether autocast, which has another dtype, is kept out.
    """

    computed: torch.dtype
    returned: torch.dtype
    wide: bool
    is_outside: bool

    def block(self, x: Tensor) -> contextlib.AbstractContextManager[object]:
        """Where the operator is called."""
        return outside_autocast(x) if self.is_outside else contextlib.nullcontext()

    def run(self, several: Callable[..., Any], x: Tensor, layers: Sequence[Any], *rest: Any) -> Any:
        """The results of `several` layers that have these, before they are cast to `returned`."""
        dtype = self.computed
        layers = [one if one.bias is None else one._replace(bias=one.bias.to(dtype)) for one in layers]
        with self.block(x):
            return several(x.to(dtype), layers, *rest, self.wide)


def dtypes_of(base: nn.Module, x: Tensor, operands: tuple[Any, ...]) -> Dtypes:
    """Those of a layer over a quantized base called with x."""
    a, b = operands[1:3]
    kind, is_autocast = _forwards.get(type(base).forward), autocast_is_on(x)
    dtype = returned = x.dtype
    if kind == "Linear4bit":
        # as its own forward does: the first x decides
        if not base.compute_type_is_set:
            base.set_compute_type(x)  # type: ignore[operator]
            base.compute_type_is_set = True
        dtype = base.compute_dtype or dtype  # type: ignore[assignment]
        # what x has more of is kept where that costs nothing: PEFT's low-rank path has it
        if x.is_cpu and dtype.itemsize == 2 and dtype is not x.dtype and not HAS_PRODUCTS[dtype]:
            dtype = torch.promote_types(x.dtype, torch.float32)
    elif is_autocast and (kind is not None or type(base._parameters["weight"]).__name__ != "Int8Tensor"):
        dtype = torch.get_autocast_dtype(x.device.type)
        # torchao decodes, as bitsandbytes does in training on a CPU, and multiplies by a function that autocast knows
        if kind is None or (kind == "Linear8bitLt" and x.is_cpu and base.training):
            returned = dtype
    is_outside = is_autocast and dtype is not torch.get_autocast_dtype(x.device.type)
    # GPU kernels add the low-rank path to fp32 sums; on a CPU it is rounded apart, unless it is fp32 as in PEFT
    is_fp32 = a.dtype is b.dtype is torch.float32 and not is_autocast and kind != "FP8Linear"
    return Dtypes(dtype, returned, dtype is torch.bfloat16 and x.is_cpu and is_fp32, is_outside)


def multiplies_packed(base: nn.Module, x: Tensor) -> bool:
    """Whether the library has a kernel for these rows that reads the weight as it is packed: generation on a GPU.

    It moves half a byte a weight, where decoding first moves 4.5. Backward has none, so calls with gradients decode.
    """
    return (
        x.is_cuda
        and not torch.is_grad_enabled()
        and x.numel() <= LIBRARY_ROWS * x.shape[-1]
        and _forwards.get(type(base).forward) == "Linear4bit"
    )


def described_format(weight: Weight) -> str:
    """How a report names a format: "NF4, block 64, nested"."""
    fields = dict(item.split("=") for item in weight.parameters.split(";") if "=" in item)
    parts = [weight.format_name.replace("_", " ").upper()]
    if "block" in fields:
        parts.append(f"block {fields['block']}")
    # scales that are themselves quantized come with theirs
    if len(weight.statistics) > 2:
        parts.append("nested")
    return ", ".join(parts)


def has_finite_scales(weight: Weight) -> bool:
    """Whether what scales a weight is finite; looked at by `lorafuse.patch` alone, since it waits for a GPU."""
    plain = (t for t in weight.statistics if type(t) in (Tensor, nn.Parameter) and not t.is_meta)
    return all(bool(t.float().isfinite().all()) for t in plain if t.is_floating_point())


def notes(model: nn.Module) -> list[str]:
    """What the user of a quantized model may not know of its experts: not quantized, or not adapted; one line each."""
    modules = dict(model.named_modules())
    is_loaded_quantized = any(is_quantized(type(module)) for module in modules.values())
    lines, dense, bare = [], defaultdict[torch.dtype, list[Tensor]](list), []
    for name, module in modules.items():
        if hasattr(module, "num_experts"):
            for key, p in module._parameters.items():
                is_stack = p is not None and p.dim() == 3 and "lora_" not in key
                if is_loaded_quantized and is_stack and p.is_floating_point() and p.element_size() > 1:
                    dense[p.dtype].append(p)
            parts = [part for over in getattr(module, "parametrizations", {}).values() for part in over]
            if any(type(part).__name__ == "Bnb4bitParametrization" for part in parts):
                bare.append(name)
    for dtype, stacks in dense.items():
        size = sum(p.numel() * p.element_size() for p in stacks) / 2**30
        text = f"{len(stacks)} stacks of experts are {str(dtype)[6:]}, {size:.2f} GiB: "
        text += "loading in 4 or 8 bits quantizes nn.Linear alone"
        if dtype is torch.float32:
            text += (
                ", and peft.prepare_model_for_kbit_training casts the rest to float32 (cast the stacks back: "
                "parameter.data = parameter.data.to(torch.bfloat16))"
            )
        lines.append(
            f"{text}; quantize them with bitsandbytes.nn.parametrize.replace_parameter_4bit and adapt them with "
            "lorafuse.integrations.adapt_experts"
        )
    if bare:
        lines.append(
            f"{len(bare)} quantized experts modules have no adapter, the first is {bare[0]}: PEFT adapts no "
            "parametrized stack; lorafuse.integrations.adapt_experts does, after get_peft_model"
        )
    return lines
