"""Layers of one x without adapters, as one operator of `lorafuse.functional`: one sum for dx, one pass for SwiGLU.

It is the best known frozen group: what siblings gain by sharing x and dx counts as LoRA's floor, not as its merit.
"""

from lorafuse import functional as LF

LABEL = "frozen, by lorafuse in groups"
TRAINS = "nothing"


def _projections(given):
    return [LF.Projection(one.w) for one in given]


def group(given):
    layers = _projections(given)
    return (lambda x: LF.lora_linears(x, layers)), {}


def mlp(given):
    layers = _projections(given)
    return (lambda x: LF.lora_gated_mlp(x, *layers)), {}
