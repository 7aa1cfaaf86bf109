"""Layers whose weight bitsandbytes stores in 4 or 8 bits, made of dense ones."""

from typing import Any

from torch import nn

from lorafuse.errors import MissingDependency

__all__ = ["keep_packing", "linear_4bit", "linear_8bit"]


def linear_4bit(layer: nn.Linear, kind: str) -> Any:
    """bitsandbytes' `Linear4bit` of a dense layer, with its bias, on its device; the weight is not kept.

    `kind` is nf4 or fp4; blocks are bitsandbytes' own, of 64, with nested statistics ("double quantization").
    Raises MissingDependency without bitsandbytes.
    """
    bnb, weight = _library(), layer.weight
    made = bnb.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, weight.dtype, device="meta")
    made.weight = bnb.Params4bit(weight.data, requires_grad=False, quant_type=kind, compress_statistics=True)
    return _moved(made, layer)


def linear_8bit(layer: nn.Linear) -> Any:
    """The same of `Linear8bitLt`, with its usual threshold of 6."""
    bnb = _library()
    made = bnb.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=6.0,
        device="meta",
    )  # fmt: skip
    made.weight = bnb.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return _moved(made, layer)


def _library() -> Any:
    try:
        from bitsandbytes import nn as bnb
    except ImportError as error:
        raise MissingDependency("a quantized base needs bitsandbytes: pip install bitsandbytes") from error
    return bnb


def _moved(made: Any, layer: nn.Linear) -> Any:
    made.bias = layer.bias
    # the move to a device quantizes
    return made.to(layer.weight.device)


def keep_packing(model: nn.Module) -> None:
    """Leave bitsandbytes' layers in training mode, whatever the rest of `model` is in.

    In eval mode, on a CPU with AVX512-BF16, they repack their weight for good and round its scales to bfloat16: a
    model that was trained is another one afterwards.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes."):
            module.train()
