"""PEFT as shipped: adapters in fp32, whatever the base is."""

from lorafuse.bench.layers import peft_experts, peft_linear, peft_multi

LABEL = "PEFT as shipped"


def linear(given):
    return peft_linear(given)


def quantized(given):
    return peft_linear(given, quantized=given.layer)


def multi(given):
    return peft_multi(given)


def experts(given):
    return peft_experts(given)


def model(given):
    return given.adapted(), {}
