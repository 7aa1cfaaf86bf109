"""A PEFT layer patched by lorafuse over the decoded weight, kept dense: what a base in 4 bits is compared with."""

import lorafuse
from lorafuse.bench.layers import peft_linear

LABEL = "lorafuse, dense"


def quantized(given):
    layer, trained = peft_linear(given)
    lorafuse.patch(layer, strict=True)
    return layer, trained
