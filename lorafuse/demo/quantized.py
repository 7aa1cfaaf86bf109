"""Layers whose weight bitsandbytes or torchao stores in 4 or 8 bits, made of dense ones."""

from typing import Any

from torch import nn

from lorafuse.errors import MissingDependency

__all__ = ["TYPES", "bits_of_bitsandbytes", "keep_packing", "linear_4bit", "linear_8bit", "linear_as"]

TYPES = ("nf4", "fp4", "int8", "int8_torchao")


def linear_as(layer: nn.Linear, kind: str) -> Any:
    """The layer stored as `kind`, one of TYPES: by `linear_4bit`, or by `linear_8bit` of bitsandbytes or torchao."""
    if bits_of_bitsandbytes(kind) == 4:
        return linear_4bit(layer, kind)
    return linear_8bit(layer, "torchao" if kind == "int8_torchao" else "bitsandbytes")


def bits_of_bitsandbytes(kind: str | None) -> int:
    """Bits of a weight that bitsandbytes stores as `kind`; 0 for other libraries, and without one."""
    return {"nf4": 4, "fp4": 4, "int8": 8}.get(kind or "", 0)


def linear_4bit(layer: nn.Linear, kind: str) -> Any:
    """bitsandbytes' `Linear4bit` of a dense layer, with its bias, on its device; the weight is not kept.

    `kind` is nf4 or fp4; blocks are bitsandbytes' own, of 64, with nested statistics ("double quantization").
    Raises MissingDependency without bitsandbytes.
    """
    try:
        from bitsandbytes import nn as bnb
    except ImportError as error:
        raise MissingDependency("a quantized base needs bitsandbytes: pip install bitsandbytes") from error
    weight = layer.weight
    made = bnb.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, weight.dtype, device="meta")
    made.weight = bnb.Params4bit(weight.data, requires_grad=False, quant_type=kind, compress_statistics=True)
    made.bias = layer.bias
    # the move to a device quantizes
    return made.to(weight.device)


def linear_8bit(layer: nn.Linear, library: str = "bitsandbytes") -> Any:
    """The layer with an int8 weight of a scale for each row: bitsandbytes' `Linear8bitLt`, or a layer like the dense
    one with "torchao"'s tensor; with its bias, on its device.

    Raises MissingDependency without the library.
    """
    weight, sizes, has_bias = layer.weight, (layer.in_features, layer.out_features), layer.bias is not None
    try:
        if library == "torchao":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            made: Any = nn.Linear(*sizes, has_bias, device="meta")
            made.weight = nn.Parameter(weight.data, requires_grad=False)
        else:
            from bitsandbytes import nn as bnb

            made = bnb.Linear8bitLt(*sizes, has_bias, has_fp16_weights=False, device="meta")
            made.weight = bnb.Int8Params(weight.data, requires_grad=False, has_fp16_weights=False)
    except ImportError as error:
        raise MissingDependency(f"a base in int8 needs {library}: pip install {library}") from error
    made.bias = layer.bias
    if library == "torchao":
        quantize_(made, Int8WeightOnlyConfig())
        return made
    # the move to a device quantizes
    made = made.to(weight.device)
    # as its first forward does: the weight leaves the parameter, which layers of other models may hold as well
    made.init_8bit_state()
    return made


def keep_packing(model: nn.Module) -> None:
    """Leave bitsandbytes' layers in training mode, whatever the rest of `model` is in.

    In eval mode, on a CPU with AVX512-BF16, they repack their weight for good and round its scales to bfloat16: a
    model that was trained is another one afterwards.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes."):
            module.train()
