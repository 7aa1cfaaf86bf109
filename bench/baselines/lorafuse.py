"""A PEFT layer patched by lorafuse: as planned, or by the backend or kernel of the suffix."""

import lorafuse
from lorafuse.backends import base
from lorafuse.bench.layers import peft_experts, peft_linear
from lorafuse.plan import override

LABEL = "lorafuse"
# candidates of plans on GPUs; those with a kernel are chosen only where measured as fastest
FORMS = {
    "": {},
    "eager": {"backend": "eager"},
    "addmm": {"backend": "eager", "kernel": "aten_addmm"},
    "triton": {"backend": "triton"},
    "cuda": {"backend": "cuda"},
    "cuda-single": {"backend": "cuda", "kernel": "cuda fused_xa"},
    "cuda-concurrent": {"backend": "cuda", "kernel": "cuda concurrent_backward"},
}


def unavailable(kind, device, backend="auto", kernel=""):
    if backend == "auto":
        return ""
    if kernel and kind == "moe":
        return "experts have no such form"
    # on other devices plans have one candidate
    return "needs a GPU" if device.type != "cuda" else base.availability(backend).reason


def _forced(call, kernel):
    def run(*args):
        with override(force_kernel=kernel):
            return call(*args)

    return run if kernel else call


def linear(given, backend="auto", kernel=""):
    if backend == "eager":
        # the plan has a choice of orders; results are of this one by that name
        kernel = kernel or "aten_beta1"
    layer, trained = peft_linear(given)
    lorafuse.patch(layer, backend=backend, strict=True)
    return _forced(layer, kernel), trained


def experts(given, backend="auto"):
    block, trained = peft_experts(given)
    lorafuse.patch(block, backend=backend, strict=True)
    return block, trained
