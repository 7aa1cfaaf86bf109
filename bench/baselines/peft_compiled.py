"""PEFT with adapters in the base's dtype, the layer under torch.compile."""

import torch

from lorafuse.bench.layers import peft_linear

LABEL = "PEFT, torch.compile"


def linear(given):
    layer, trained = peft_linear(given, autocast_adapter_dtype=False)
    # every shape is a program of its own, as in a training run of one shape
    return torch.compile(layer, dynamic=False), trained


def layer(call):
    return torch.compile(call, dynamic=False)


def model(given):
    """Each decoder layer compiled, which share one program."""
    whole = given.adapted(half=True)
    for layer in whole.get_base_model().model.layers:
        layer.compile(dynamic=False)
    return whole, {}
