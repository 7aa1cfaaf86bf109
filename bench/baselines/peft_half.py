"""PEFT with `autocast_adapter_dtype=False`: adapters in the base's dtype."""

from lorafuse.bench.layers import peft_experts, peft_linear

LABEL = "PEFT, adapters in the base's dtype"


def linear(given):
    return peft_linear(given, autocast_adapter_dtype=False)


def quantized(given):
    return peft_linear(given, autocast_adapter_dtype=False, quantized=given.layer)


def experts(given):
    return peft_experts(given, autocast_adapter_dtype=False)


def model(given):
    return given.adapted(half=True), {}
