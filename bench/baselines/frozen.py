"""The layer without adapters and without training: what the LoRA tax is measured from."""

from lorafuse.bench.layers import plain_experts, plain_linear

LABEL = "frozen"
TRAINS = "nothing"


def linear(given):
    return plain_linear(given), {}


def experts(given):
    return plain_experts(given), {}
