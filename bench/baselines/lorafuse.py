"""A PEFT layer patched by lorafuse: as planned, or by the backend or kernel of the suffix."""

import lorafuse
from lorafuse.backends import base
from lorafuse.bench.layers import peft_experts, peft_linear
from lorafuse.plan import only

LABEL = "lorafuse"
# candidates of plans on GPUs; those with a kernel are chosen only where measured as fastest
FORMS = {
    "": {},
    "eager": {"backend": "eager"},
    "triton": {"backend": "triton"},
    "triton-single": {"backend": "triton", "kernel": "single_kernel"},
    "cuda": {"backend": "cuda"},
    "cuda-single": {"backend": "cuda", "kernel": "cuda single_kernel"},
    "cuda-beside": {"backend": "cuda", "kernel": "cuda one_launch_backward"},
}


def unavailable(kind, device, backend="auto", kernel=""):
    if backend == "auto":
        return ""
    if kernel and kind == "moe":
        return "experts have no such form"
    # on other devices plans have one candidate
    return "needs a GPU" if device.type != "cuda" else base.availability(backend).reason


def _only(call, kernel):
    def run(*args):
        with only(kernel):
            return call(*args)

    return run if kernel else call


def linear(given, backend="auto", kernel=""):
    layer, trained = peft_linear(given)
    lorafuse.patch(layer, backend=backend, strict=True)
    return _only(layer, kernel), trained


def experts(given, backend="auto"):
    block, trained = peft_experts(given)
    lorafuse.patch(block, backend=backend, strict=True)
    return block, trained
