"""PEFT with adapters in the base's dtype, the layer under torch.compile."""

import torch

from lorafuse.bench.layers import peft_linear

LABEL = "PEFT, torch.compile"


def linear(given):
    layer, trained = peft_linear(given, autocast_adapter_dtype=False)
    # every shape is a program of its own, as in a training run of one shape
    return torch.compile(layer, dynamic=False), trained
