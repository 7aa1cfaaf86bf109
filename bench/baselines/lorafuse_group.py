"""Layers of one x as one operator of `lorafuse.functional`, with fp32 adapters, as planned or as the suffix says.

"half": adapters in the base's dtype; the others: a backend, "siblings" its kernels of one launch, and "ha" with xa of
down in that of h.
"""

import torch

from lorafuse import functional as LF
from lorafuse.backends import base
from lorafuse.bench.problem import SCALE, numbered

LABEL = "lorafuse, one operator"
FORMS = {
    "": {},
    "half": {"half": True},
    "recompute-up": {"recompute_up": True},
    "eager": {"backend": "eager"},
    "triton": {"backend": "triton"},
    "siblings": {"backend": "triton", "kernel": "siblings"},
    "cuda": {"backend": "cuda"},
    "cuda-siblings": {"backend": "cuda", "kernel": "cuda siblings"},
    "cuda-siblings-ha": {"backend": "cuda", "kernel": "cuda siblings_ha"},
}


def unavailable(kind, device, backend="auto", kernel="", recompute_up=False, half=False):
    if recompute_up and kind not in ("mlp", "layer"):
        return "only a gated MLP has an up to compute again"
    if kernel == "cuda siblings_ha" and kind not in ("mlp", "layer"):
        return "only a gated MLP has a down whose xa comes with h"
    if backend == "auto":
        return ""
    return "needs a GPU" if device.type != "cuda" else base.availability(backend).reason


def _projections(given, half):
    layers = []
    for one in given:
        dtype = one.w.dtype if half else torch.float32
        a, b = (t.clone().to(dtype).requires_grad_() for t in (one.a, one.b))
        layers.append(LF.Projection(one.w, a, b, SCALE))
    return layers, numbered([{"da": one.a, "db": one.b} for one in layers])


def group(given, backend="auto", recompute_up=False, half=False):
    layers, trained = _projections(given, half)
    return (lambda x: LF.lora_linears(x, layers, backend=backend)), trained


def mlp(given, backend="auto", recompute_up=False, half=False):
    layers, trained = _projections(given, half)
    return (lambda x: LF.lora_gated_mlp(x, *layers, recompute_up=recompute_up, backend=backend)), trained
