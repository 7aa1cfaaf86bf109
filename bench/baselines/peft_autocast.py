"""PEFT as shipped under torch.autocast, as the Hugging Face Trainer runs it with `bf16=True`: adapters in fp32.

PEFT casts x to fp32 for the adapters, and autocast casts it back for their products.
"""

import torch

from lorafuse.bench.layers import peft_experts, peft_linear

LABEL = "PEFT, autocast"
# on a float32 base autocast computes in bfloat16, which is other work
DTYPES = ("bfloat16", "float16")


def _under_autocast(layer):
    def call(x, *rest):
        with torch.autocast(x.device.type, dtype=x.dtype):
            return layer(x, *rest)

    return call


def linear(given):
    layer, trained = peft_linear(given)
    return _under_autocast(layer), trained


def quantized(given):
    layer, trained = peft_linear(given, quantized=given.layer)
    return _under_autocast(layer), trained


def layer(call):
    return _under_autocast(call)


def experts(given):
    block, trained = peft_experts(given)
    return _under_autocast(block), trained


def model(given):
    return given.adapted(), {"autocast": True}
