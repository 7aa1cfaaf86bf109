"""What patched layers of every kind need: whether somebody would miss the inner modules' calls, and one warning.

A patched layer does not call its inner modules. Where a hook, a mode or a function replaced on a class would see those
calls, and where torch transforms the call, the layer runs as PEFT ships it.
"""

import functools
import logging
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, compiler, nn
from torch.nn import functional
from torch.nn.modules import module as _hooks
from torch.nn.utils import parametrize
from torch.utils._device import DeviceContext

from lorafuse.ops.transforms import is_transformed

__all__ = [
    "CALL",
    "CALL_IMPL",
    "FSDP1",
    "ZERO3",
    "altered",
    "as_served",
    "described",
    "interception",
    "is_called_otherwise",
    "is_dtensor",
    "is_fsdp1",
    "is_fsdp2",
    "is_zero3",
    "is_zero3_leaf",
    "original",
    "trainable",
    "warn_once",
    "watched",
]

FSDP1 = (
    "FSDP1 (FullyShardedDataParallel) holds its weights: shard by FSDP2 (torch.distributed.fsdp.fully_shard, "
    "fsdp_version 2 in accelerate) to run it fused"
)

ZERO3 = (
    "DeepSpeed's ZeRO-3 gathers its weights for the modules inside it: call lorafuse.integrations.prepare_zero3 after "
    "lorafuse.patch and before deepspeed.initialize"
)

_linear = torch._C._nn.linear
_has_torch_function = torch._C._has_torch_function_unary


class _FallbackWarning(UserWarning):
    """Its own class, so that `warn_once` catches nothing else."""


@functools.cache
def warn_once(what: str, reason: str) -> None:
    """Warn once for each reason that `what` ("a patched linear layer runs as PEFT ships it") does not run fused.

    The layer computes what it computes without lorafuse, so the warning never ends a training step: where warnings are
    errors (`python -W error`) it goes to the log "lorafuse". `lorafuse.patch(strict=True)` is there to refuse a model.
    """
    text = f"lorafuse: {what}: {reason}"
    try:
        # above this function: forward, two functions of nn.Module's call, and the caller of the layer
        warnings.warn(text, _FallbackWarning, stacklevel=5)
    except _FallbackWarning:
        logging.getLogger("lorafuse").warning(text)


def original(owner: Any, name: str) -> Any:
    """The function `name` of a class or module; None, which is no function, when it was put there from elsewhere.

    A function belongs where its globals are: `functools.wraps` copies names, never those.
    """
    function = getattr(owner, name)
    if isinstance(owner, type):
        definer = next(kind for kind in owner.__mro__ if name in vars(kind))
        owner = sys.modules[definer.__module__]
    return function if getattr(function, "__globals__", None) is vars(owner) else None


CALL = original(nn.Module, "__call__")
CALL_IMPL = original(nn.Module, "_call_impl")


def altered(*modules: nn.Module, but_before: bool = False) -> bool:
    """Whether calling one of the modules does more than the forward of its class: hooks (`but_before`: but for those
    before it), a replaced call or forward.
    """
    for module in modules:
        state = module.__dict__
        if (
            state["_forward_hooks"]
            or (state["_forward_pre_hooks"] and not but_before)
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            # accelerate leaves the class's own forward there when it removes its hooks
            or (
                "forward" in state
                and getattr(state["forward"], "__func__", None) is not type(module).forward
                and not _only_moves_x(module)
            )
        ):
            return True
    return False


def _only_moves_x(module: nn.Module) -> bool:
    """Whether a forward is the class's own over an x that is moved to the weight's device, and does nothing else.

    Such are ms-swift's `keep_device_forward`, which its trainers put on every lora_A and lora_B, and accelerate's hook
    on a layer of a `device_map` whose weights stay in memory.
    """
    state = module.__dict__
    hook = state.get("_hf_hook")
    if hook is None:
        function, own = getattr(state["forward"], "__func__", None), state.get("forward_origin")
        is_known = getattr(function, "__name__", "") == "keep_device_forward" and getattr(
            function, "__module__", ""
        ).startswith("swift.")
    else:
        # a module without weights calls others, which have hooks of their own
        function, own = getattr(state["forward"], "func", None), state.get("_old_forward")
        shipped = sys.modules.get("accelerate.hooks")
        is_known = (
            shipped is not None
            and getattr(function, "__globals__", None) is vars(shipped)
            and type(hook) is shipped.AlignDevicesHook
            and not (hook.offload or hook.no_grad)
            and bool(module._parameters)
        )
    return is_known and getattr(own, "__func__", None) is type(module).forward


def is_called_otherwise(kind: type) -> bool:
    """Whether modules of a class are called by other functions than torch's, as profilers and tracers arrange it."""
    return kind.__call__ is not CALL or kind._call_impl is not CALL_IMPL  # type: ignore[attr-defined,operator]


def as_served(parts: Any, numerics: str) -> Any:
    """The operands of a layer that is to compute what a server does, or the reason why it cannot."""
    if parts is None or isinstance(parts, str):
        return parts
    if type(parts) is not tuple:
        return f"numerics={numerics!r} is that of one plain LoRA adapter"
    return f"numerics={numerics!r} has no dropout" if parts[5] else parts


def interception(x: Tensor) -> str | None:
    """Why any layer runs as PEFT ships it for this x: a reason, or "" for one not worth a warning. None: it runs fused.

    Holds what belongs to the process and to x; hooks and functions of the layer's modules are the layer's to check.
    """
    # one expression: the call sits on the hot path of every layer
    if (
        _hooks._global_forward_hooks
        or _hooks._global_forward_pre_hooks
        or _hooks._global_backward_hooks
        or _hooks._global_backward_pre_hooks
        or functional.linear is not _linear
        or _has_torch_function(x)
        or compiler._is_exporting_flag
        or is_transformed(x)
    ):
        return _cause(x)
    return None


def watched() -> str:
    """Why no layer of this process runs fused at present, or ""."""
    hooks = (
        _hooks._global_forward_hooks,
        _hooks._global_forward_pre_hooks,
        _hooks._global_backward_hooks,
        _hooks._global_backward_pre_hooks,
    )
    if any(hooks):
        return "global module hooks are registered"
    if functional.linear is _linear or functional.linear is _linear_of_zero3():
        return ""
    return "torch.nn.functional.linear was replaced"


def _linear_of_zero3() -> Any:
    """What DeepSpeed puts in the place of `functional.linear` under ZeRO-3; it multiplies as torch does."""
    module = sys.modules.get("deepspeed.runtime.zero.linear")
    return None if module is None else original(module, "zero3_linear_wrap")


def _cause(x: Tensor) -> str | None:
    reason = watched()
    # an exported or traced file must load without lorafuse, and a symbolic x of torch.fx has no truth value
    if reason or compiler._is_exporting_flag or not isinstance(x, Tensor) or is_transformed(x):
        return reason
    modes = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    for mode in modes:
        # torch.set_default_device is a mode too, and changes nothing in a linear layer
        if not isinstance(mode, DeviceContext):
            return f"a TorchFunctionMode is active ({type(mode).__name__})"
    own = getattr(type(x).__torch_function__, "__func__", None)
    if own is not Tensor.__torch_function__.__func__:
        return f"x is a {type(x).__name__}, which overrides torch functions"
    return None


def is_fsdp1(module: nn.Module) -> bool:
    """Whether a module is a `FullyShardedDataParallel`, which nobody can have made without importing it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def is_fsdp2(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module: the parameters in it are whole while its forward runs."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`, which nobody can have made without importing it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_zero3(module: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 has put its hooks on a module."""
    return "pre_bwd_fn" in module.__dict__


def is_zero3_leaf(module: nn.Module) -> bool:
    """Whether ZeRO-3 gathers a module as a whole, around its own forward and backward alone (`prepare_zero3`)."""
    return bool(module.__dict__.get("_z3_leaf"))


def trainable(module: nn.Module, name: str) -> str:
    """Why a base parameter that requires a gradient is refused."""
    # FSDP1 puts views of its flat parameter there, which require one as soon as any adapter in it does
    if getattr(module, "_is_fsdp_managed_module", False) and type(module._parameters.get(name)) is Tensor:
        return FSDP1
    return f"its base {name} is trainable; lorafuse computes no gradient for it"


def described(module: nn.Module, name: str) -> str:
    """What stands where an ordinary parameter should, as the end of a sentence: "its base weight …"."""
    tensor = module._parameters.get(name)
    if getattr(module, "_is_fsdp_managed_module", False) and tensor is None:
        return f"is not its own: {FSDP1}"
    if parametrize.is_parametrized(module, name):
        kinds = ", ".join(type(part).__name__ for part in module.parametrizations[name])
        return f"is parametrized ({kinds}), not an ordinary parameter"
    if tensor is None and module._forward_pre_hooks:
        # weight_norm and spectral_norm of torch.nn.utils, pruning
        hooks = ", ".join(getattr(h, "__qualname__", type(h).__name__) for h in module._forward_pre_hooks.values())
        return f"is computed before every forward ({hooks}), not an ordinary parameter"
    return f"is a {type(tensor).__name__}, not an ordinary parameter"
