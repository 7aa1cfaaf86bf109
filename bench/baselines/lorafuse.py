"""A PEFT layer patched by lorafuse: as planned with PEFT's fp32 adapters, or as the suffix says.

"half": adapters in the base's dtype; "autocast": fp32 ones under torch.autocast, as the Hugging Face Trainer runs them;
the others: a backend, or one kernel of it.
"""

import lorafuse
from lorafuse.backends import base
from lorafuse.bench.layers import peft_experts, peft_linear

LABEL = "lorafuse"
# of experts alone
_GATHERED = "cuda gathered"
# candidates of plans on GPUs; those with a kernel are chosen only where measured as fastest
FORMS = {
    "": {},
    "half": {"half": True},
    "autocast": {"autocast": True},
    # the plan has a choice of orders; each has results by its name
    "eager": {"backend": "eager", "kernel": "aten_beta1"},
    "addmm": {"backend": "eager", "kernel": "aten_addmm"},
    "triton": {"backend": "triton"},
    "cuda": {"backend": "cuda"},
    "cuda-tiles": {"backend": "cuda", "kernel": "cuda xa_in_tiles"},
    "cuda-split": {"backend": "cuda", "kernel": "cuda split_k"},
    "cuda-forward": {"backend": "cuda", "kernel": "cuda fused_forward"},
    "cuda-concurrent": {"backend": "cuda", "kernel": "cuda concurrent_backward"},
    "cuda-backward": {"backend": "cuda", "kernel": "cuda fused_backward"},
    "cuda-gathered": {"backend": "cuda", "kernel": _GATHERED},
}


def unavailable(kind, device, backend="auto", kernel="", half=False, autocast=False):
    if kind == "model" and backend != "auto":
        return "whole models run as planned"
    if autocast and kind != "model":
        return "its layers are the same under autocast"
    if backend == "auto":
        return ""
    if kind == "moe" and kernel not in ("", FORMS["eager"]["kernel"], _GATHERED):
        return "experts have no such form"
    if kind != "moe" and kernel == _GATHERED:
        return "dense layers have no such form"
    # on other devices plans have one candidate
    return "needs a GPU" if device.type != "cuda" else base.availability(backend).reason


def linear(given, backend="auto", half=False, over=None):
    layer, trained = peft_linear(given, autocast_adapter_dtype=not half, quantized=over)
    lorafuse.patch(layer, backend=backend, strict=True)
    return layer, trained


def quantized(given, **options):
    return linear(given, over=given.layer, **options)


def experts(given, backend="auto", half=False):
    block, trained = peft_experts(given, autocast_adapter_dtype=not half)
    lorafuse.patch(block, backend=backend, strict=True)
    return block, trained


def model(given, half=False, autocast=False):
    whole = given.adapted(half)
    report = lorafuse.patch(whole)
    return whole, {"patched": len(report.patched), "skipped": len(report.skipped), "autocast": autocast}
