"""Detects calls that need plain, differentiable torch instead of one opaque operator."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["is_transformed", "needs_plain_backward"]

_functorch_is_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
# that of `torch.autograd`'s own vmap; its name takes 4.8 us to look up (EPYC, 2026-11-28)
_VMAP = torch._C._parse_dispatch_key("VmapMode")
_tls_includes = torch._C._dispatch_tls_is_dispatch_key_included


def is_transformed(x: Tensor) -> bool:
    """True under a functorch transform, forward-mode AD or `torch.jit.trace`, and for a nested x.

    A custom operator has no batching rule and no tangent, a traced file must load without lorafuse, and the kernels
    take one matrix. Dynamo traces this function.
    """
    # the conditions in one expression: the call sits on the hot path of every layer (0.3 us)
    return _functorch_is_active() or forward_ad._current_level >= 0 or _tracing_state() is not None or x.is_nested


def needs_plain_backward(dy: Tensor) -> bool:
    """True in a backward that is differentiated again (`create_graph`), transformed or batched (`is_grads_batched`)."""
    # grad mode is on in backward only under create_graph
    return torch.is_grad_enabled() or is_transformed(dy) or _tls_includes(_VMAP)
