"""Full fine-tuning: the base weight is trained, there are no adapters."""

from lorafuse.bench.layers import plain_experts, plain_linear

LABEL = "full fine-tuning"
TRAINS = "base"


def linear(given):
    layer = plain_linear(given, trainable=True)
    return layer, {"dw": layer.weight}


def experts(given):
    block = plain_experts(given, trainable=True)
    return block, {"d_gate_up": block.gate_up_proj, "d_down": block.down_proj}


def model(given):
    return given.trainable(), {}
