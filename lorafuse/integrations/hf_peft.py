"""PEFT's LoRA layers, run by lorafuse.

A patched layer is the same object with its class changed from `peft.tuners.lora.Linear` to `FusedLinear`, a subclass
that replaces `forward` only; PEFT's classes over quantized bases have a subclass each. PEFT stays the owner of
everything else. Each forward reads the layer's present state, so adapters may be switched, scaled, added, deleted,
merged or disabled at any time, and weights moved, sharded and loaded.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import ParamWrapper
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn

from lorafuse.functional import run_linear
from lorafuse.integrations import calls
from lorafuse.integrations.groups import is_small, join
from lorafuse.integrations.hf_common import (
    CALL,
    CALL_IMPL,
    FSDP1,
    ZERO3,
    altered,
    as_served,
    described,
    interception,
    is_dtensor,
    is_fsdp1,
    is_zero3,
    original,
    trainable,
    warn_once,
)
from lorafuse.integrations.hf_experts import why_not_wrapped
from lorafuse.integrations.hf_mixed import Mixed, end_mixed, mixed_parts, run_mixed
from lorafuse.integrations.hf_plain import LINEAR_FORWARD, dropout_p, plain_operands
from lorafuse.integrations.hf_quantized import PACKED, is_quantized, multiplies_packed, run_quantized, stored
from lorafuse.integrations.hf_tensor_parallel import TWO_MESHES, Sharded, run_sharded, sharded_parts
from lorafuse.integrations.hf_variants import Dora, Masked, column_factor, magnitude_of, run_dora_layer, variant_of
from lorafuse.operands import Weight
from lorafuse.philox import draw_mask

__all__ = [
    "FusedLinear",
    "FusedTorchaoLinear",
    "FusedWeight",
    "Member",
    "fused",
    "operands_of",
    "rejoins",
    "why_not_fused",
]

# weight, a, b, scale, bias, dropout_p
_Operands = tuple[Tensor | Weight, Tensor, Tensor, float, Tensor | None, float]
# of each active adapter: a, b, bias of b, scale, factor for each column of b or None
_Factors = tuple[Tensor, Tensor, Tensor | None, Any, Tensor | None]


class _Unfolded(NamedTuple):
    """What has to be computed before the operator can take it."""

    weight: Tensor | Weight
    bias: Tensor | None
    factors: list[_Factors]
    dropout_p: float


_APART = {"alora": "aLoRA", "dora": "DoRA"}
# PEFT's class: the forward that it shipped, None where that was replaced before lorafuse came
_forwards: dict[type, Any] = {}


def fused(shipped: type) -> Any:
    """The forward of the subclass of one of PEFT's classes: one lorafuse operator, or what PEFT `shipped`."""
    own = _forwards[shipped] = original(shipped, "forward")
    is_wrapper = shipped is ParamWrapper

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # who kept this method (accelerate's hooks) calls it after unpatch too
        if type(self) is shipped:
            return shipped.forward(self, x, *args, **kwargs)  # type: ignore[attr-defined]
        parts: Any = None
        state = self.__dict__
        # disabled and merged adapters cost no more in PEFT's own paths; aLoRA's models give all layers its offsets
        is_plain = not kwargs or kwargs.keys() == {"alora_offsets"}
        if is_plain and "_lorafuse_mixed" in state:
            end_mixed(self)
        if is_plain and not (args or self._disable_adapters or self.merged_adapters):
            parts = interception(x)
            if parts is None:
                if multiplies_packed(self._modules["base_layer"], x):
                    calls.fell_back(self, PACKED)
                    return shipped.forward(self, x, **kwargs)  # type: ignore[attr-defined]
                if shipped.forward is not own:  # type: ignore[attr-defined]
                    parts = _replaced(shipped)
                else:
                    parts = _parts(self) if is_wrapper else _present(self)
            # absent from layers with the numerics of lorafuse's kernels
            numerics = state.get("_lorafuse_numerics")
            if numerics is not None:
                parts = as_served(parts, numerics)
            if type(parts) is _Unfolded:
                parts = _folded(*parts)
            mask = None
            if type(parts) is tuple:
                mask = _mask(self, x, parts) if parts[5] else None
                # (group, index); absent from layers in no group
                group = state.get("_lorafuse_siblings") if mask is None else None
                if group is not None and not is_small(x):
                    y = group[0].output(group[1], self, x, parts, operands_of)
                    if y is not None:
                        calls.ran_grouped(self)
                        return y
                if numerics is None and type(parts[0]) is not Weight and x.dim() <= 4:
                    y = run_linear(x, *parts, mask, self._lorafuse_backend)  # type: ignore[call-arg]
                    calls.ran(self)
                    return y
            if type(parts) is Masked:
                names = [name for name in self.active_adapters if name in self.lora_A] * len(x)
                parts = run_mixed(self, x, names, _parts, kwargs.get("alora_offsets"))
            elif parts is not None and type(parts) is not str:
                parts = _output(self, x, parts, mask, numerics)
            if isinstance(parts, Tensor):
                calls.ran(self)
                return parts
            if parts and not torch.compiler.is_compiling():
                warn_once("a patched linear layer runs as PEFT ships it", parts)
        elif kwargs.keys() in ({"adapter_names"}, {"adapter_names", "alora_offsets"}) and not args:
            parts = interception(x)
            if parts is None and "_lorafuse_numerics" in self.__dict__:
                parts = "a mixed batch with the numerics of a server"
            elif parts is None and kwargs["adapter_names"] is not None:
                parts = run_mixed(self, x, kwargs["adapter_names"], _parts, kwargs.get("alora_offsets"))
            if isinstance(parts, Tensor):
                calls.ran(self)
                return parts
            if parts and not torch.compiler.is_compiling():
                warn_once("a patched linear layer runs a mixed batch as PEFT ships it", parts)
        calls.fell_back(self, parts or calls.OFF)
        return shipped.forward(self, x, *args, **kwargs)  # type: ignore[attr-defined]

    return forward


def _output(layer: Any, x: Tensor, parts: Any, mask: Tensor | None, numerics: str | None) -> Tensor:
    """y of a layer that runs alone: `parts` are `_Operands`, Dora or Sharded; `numerics` of a server, None of ours."""
    if type(parts) is Sharded:
        return run_sharded(x, parts, layer._lorafuse_backend)
    # the operators take x of up to four dimensions
    rows = x if x.dim() <= 4 else x.flatten(0, -4)
    if type(parts) is Dora:
        y = run_dora_layer(layer, rows, parts)
    else:
        # the usual one where it is None
        run: Any = None if numerics is None else partial(run_linear, numerics=numerics)
        if type(parts[0]) is not Weight:
            y = (run or run_linear)(rows, *parts, mask, layer._lorafuse_backend)  # type: ignore[call-arg]
        else:
            y = run_quantized(layer._modules["base_layer"], rows, parts, layer._lorafuse_backend, run, mask)
    return y if rows is x else y.unflatten(0, x.shape[:-3])


def _mask(layer: Any, x: Tensor, operands: _Operands) -> Tensor | None:
    """The mask that PEFT would draw for x, by whom `dropout_rng="torch"` is set; as the operator reads it."""
    a, p = operands[1], operands[5]
    if not p or "_lorafuse_dropout_rng" not in layer.__dict__:
        return None
    mask = draw_mask(x, a.dtype if layer.cast_input_dtype_enabled else x.dtype, p)
    return mask if x.dim() <= 4 else mask.flatten(0, -4)


def _replaced(shipped: type) -> str:
    return f"{shipped.__module__.removesuffix('.layer')}.{shipped.__name__}.forward was replaced"


class Member:
    """A base of our classes of linear layers whose objects may run in one operator with others.

    The last base, without slots: Python gives an object another class only where the layout stays, by the first base.
    """

    __slots__ = ()
    # PEFT's class
    _lorafuse_kind: type
    _lorafuse_backend: str | None


def rejoins(shipped: Any) -> Any:
    """`__setstate__` of such a class: of a copy, or of what pickle loads."""

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        shipped.__setstate__(self, state)
        join(self)

    return __setstate__


class FusedLinear(PeftLinear, Member):
    """`peft.tuners.lora.Linear` whose forward is one lorafuse operator; created by `lorafuse.patch`, not by hand."""

    _lorafuse_kind = PeftLinear
    forward = fused(PeftLinear)
    __setstate__ = rejoins(PeftLinear)


class FusedTorchaoLinear(TorchaoLoraLinear, Member):
    """The same of `peft.tuners.lora.torchao.TorchaoLoraLinear`."""

    _lorafuse_kind = TorchaoLoraLinear
    forward = fused(TorchaoLoraLinear)
    __setstate__ = rejoins(TorchaoLoraLinear)


class FusedWeight(ParamWrapper):
    """`ParamWrapper` over the weight of an `nn.Linear`, run as `FusedLinear` runs: PEFT builds W + BA there.

    PEFT adapts the linear layers of a model with experts by their weights where they are named as experts' projections
    were in transformers 4: DeepSeek's dense MLP and shared experts.
    """

    forward = fused(ParamWrapper)


# PEFT's reports, and PEFT itself, know a layer by this name; pickle goes by __module__ and __qualname__
FusedLinear.__name__ = PeftLinear.__name__
FusedTorchaoLinear.__name__ = TorchaoLoraLinear.__name__
FusedWeight.__name__ = ParamWrapper.__name__


def _parts(
    layer: Any, active: Any = None, is_resting: bool = False
) -> _Operands | _Unfolded | Dora | Masked | Sharded | str | None:
    """The operands of the layer's present state, or what they are to be computed from: nothing is computed here.
    `active` are the names of the adapters, None for the layer's own active ones.

    None when no adapter is active in this layer, so that there is nothing to fuse; a str, the reason, when there is
    but it cannot be fused. The one statement of which layers lorafuse takes: the report and every forward ask here.
    A layer that `is_resting` lies in a module that FSDP2 shards: its weight is a DTensor now and whole in a forward.
    """
    is_wrapper = ParamWrapper in type(layer).__mro__  # PEFT's abstract class answers isinstance in Python
    if is_wrapper:
        if reason := why_not_wrapped():
            return reason
        if layer.parameter_name != "weight":
            return f"it adapts {layer.parameter_name} of an nn.Linear, not its weight"
    modules = layer._modules
    lora_a, lora_b = modules["lora_A"]._modules, modules["lora_B"]._modules
    active = layer._active_adapter if active is None else active
    names = [active] if type(active) is str else active
    if len(names) != 1 or names[0] not in lora_a:
        names = [name for name in names if name in lora_a]
        if not names:
            return None
    base = modules["base_layer"]
    kind = type(base)
    is_linear = kind.forward is LINEAR_FORWARD
    is_known = is_linear or (is_quantized(kind) and not is_wrapper)
    if not is_known or kind.__call__ is not CALL or kind._call_impl is not CALL_IMPL:
        return _why_not_linear(base)
    if layer.fan_in_fan_out:
        return "fan_in_fan_out: its base stores the weight transposed"
    weight: Any = base._parameters.get("weight")
    if weight is not None and weight.requires_grad:
        return trainable(base, "weight")
    is_plain = is_linear and (type(weight) is nn.Parameter or type(weight) is Tensor)
    if not is_plain and is_linear and is_dtensor(weight):
        if weight.device_mesh.ndim > 1 and "tp" in (weight.device_mesh.mesh_dim_names or ()):
            return TWO_MESHES
        if not is_resting:
            return _sharded(layer, names)
    if not is_plain and not (is_resting and is_dtensor(weight)):
        weight = None if is_wrapper else stored(base)
        if type(weight) is not Weight:
            return weight or f"its base weight {described(base, 'weight')}"
    if "bias" not in base._parameters:
        return f"its base bias {described(base, 'bias')}"
    factors: list[_Factors] = []
    for name in names:
        variant = "lora"
        if layer.lora_variant:
            variant, reason = variant_of(layer, name)
            if reason:
                return reason
            if variant in _APART and len(names) > 1:
                return f"several active adapters, one of them {_APART[variant]}"
        a, b, dropout = lora_a[name], lora_b[name], modules["lora_dropout"]._modules[name]
        if type(a) is not nn.Linear or type(b) is not nn.Linear or altered(base, a, b, dropout):
            return _why_not_plain(base, a, b)
        if a._parameters["bias"] is not None:
            return "its lora_A has a bias"
        drawn = dropout_p(dropout)
        if isinstance(drawn, str):
            return drawn
        p = drawn
        a_weight, b_weight = a._parameters.get("weight"), b._parameters.get("weight")
        if a_weight is None or b_weight is None:
            return f"its lora_A or lora_B {described(b if a_weight is not None else a, 'weight')}"
        if p and len(names) > 1:
            return "several active adapters with dropout; PEFT draws a mask for each"
        b_bias, scale = b._parameters["bias"], layer.scaling[name]
        if variant in _APART:
            if b_bias is not None or isinstance(scale, Tensor):
                return f"{_APART[variant]} with a bias of lora_B, or with its scale in a tensor"
            operands = weight, a_weight, b_weight, scale, base._parameters["bias"], p
            if variant == "alora":
                return Masked(*operands)
            magnitude = magnitude_of(layer, name, a_weight.device)
            return magnitude if isinstance(magnitude, str) else Dora(*operands, magnitude)
        columns = column_factor(layer, name) if variant == "kasa" else None
        if len(names) == 1 and b_bias is None and columns is None and not isinstance(scale, Tensor):
            return weight, a_weight, b_weight, scale, base._parameters["bias"], p
        factors.append((a_weight, b_weight, b_bias, scale, columns))
    return _Unfolded(weight, base._parameters["bias"], factors, p)


def _sharded(layer: Any, names: list[str]) -> Sharded | str:
    """The operands of a layer whose weight is a DTensor in its forward: tensor parallelism."""
    if len(names) > 1 or names[0] in layer.lora_variant:
        return "tensor parallelism with several active adapters, or with a variant of LoRA"
    dropout = layer.lora_dropout[names[0]]
    p = "its dropout has hooks or a replaced forward" if altered(dropout) else dropout_p(dropout)
    if p and "_lorafuse_dropout_rng" in layer.__dict__:
        return 'tensor parallelism with dropout_rng="torch"'
    return p if isinstance(p, str) else sharded_parts(layer, names[0], p)


def _present(layer: Any) -> Any:
    """`_parts` of a layer that is no `ParamWrapper`."""
    return (None if calls.is_tracing() else plain_operands(layer)) or _parts(layer)


def operands_of(layer: Any, *batch: Any) -> _Operands | Mixed | None:
    """The operands of one of our layers where it runs fused in its present state, with nothing to compute before; with
    `batch`, what `mixed_parts` takes of one, those of a mixed batch.
    """
    kind = layer._lorafuse_kind
    if layer._disable_adapters or layer.merged_adapters or kind.forward is not _forwards[kind]:
        return None
    parts: Any = mixed_parts(layer, _parts, *batch) if batch else _present(layer)
    # torch's masks are drawn when PEFT would draw them, in the call of each layer
    is_drawn_apart = type(parts) is tuple and parts[5] and "_lorafuse_dropout_rng" in layer.__dict__
    return parts if type(parts) in (tuple, Mixed) and not is_drawn_apart else None


def _why_not_linear(base: nn.Module) -> str:
    """What stands against a base that is not called as torch ships nn.Linear."""
    if is_fsdp1(base):
        return FSDP1
    if not isinstance(base, nn.Linear) or type(base).forward is not nn.Linear.forward:
        return f"its base is a {type(base).__name__}, not an nn.Linear"
    return "the forward of nn.Linear or the call of nn.Module was replaced"


def _why_not_plain(base: nn.Module, a: nn.Module, b: nn.Module) -> str:
    """Which of a layer's modules is altered or of another class."""
    if is_zero3(base):
        return ZERO3
    if altered(base):
        return "its base layer has hooks or a replaced forward"
    if is_fsdp1(a) or is_fsdp1(b):
        return FSDP1
    if type(a) is not nn.Linear or type(b) is not nn.Linear or altered(a, b):
        return "its lora_A or lora_B is not a plain nn.Linear without hooks"
    return "its dropout has hooks or a replaced forward"


def _folded(weight: Tensor | Weight, bias: Tensor | None, factors: list[_Factors], dropout_p: float) -> _Operands:
    """What the operator takes: the bias of B in the bias, several adapters as one."""
    pairs = []
    for a, b, b_bias, scale, columns in factors:
        if columns is not None:
            b = b * columns
        if b_bias is not None:
            b_bias = b_bias * scale
            if isinstance(weight, Tensor):
                b_bias = b_bias.to(weight.dtype)
            bias = b_bias if bias is None else bias + b_bias
        # hot swapping keeps scales in tensors, so that a new one needs no compilation; the operator takes floats
        if isinstance(scale, Tensor):
            b, scale = b * scale, 1.0
        pairs.append((a, b, scale))
    if len(pairs) == 1:
        return weight, *pairs[0], bias, dropout_p
    # active adapters add up, so together they are one adapter of the summed rank
    a = torch.cat([a for a, *_ in pairs])
    b = torch.cat([b * scale for _, b, scale in pairs], dim=1)
    return weight, a, b, 1.0, bias, dropout_p


def why_not_fused(layer: Any, shipped: type, is_resting: bool, numerics: str = "fused") -> str:
    """Why a layer of one of PEFT's classes cannot run fused in its present state, or "" if it can."""
    parts: Any = _parts(layer, None, is_resting) if _forwards[shipped] is shipped.forward else _replaced(shipped)  # type: ignore[attr-defined]
    if numerics != "fused":
        parts = as_served(parts, numerics)
    return parts if isinstance(parts, str) else ""
