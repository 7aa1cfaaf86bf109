"""The layer without adapters and without training, by cuBLAS, oneDNN or transformers' own experts."""

from lorafuse.bench.layers import plain_experts, plain_linear

LABEL = "frozen"
TRAINS = "nothing"


def linear(given):
    return plain_linear(given), {}


def quantized(given):
    return given.layer, {}


def multi(given):
    return plain_linear(given), {}


def experts(given):
    return plain_experts(given), {}


def model(given):
    return given.frozen(), {}
