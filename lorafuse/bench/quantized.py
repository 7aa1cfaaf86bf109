"""One linear layer over a base stored in 4 or 8 bits, forward and backward, with every baseline.

The references are those of the weight as it is decoded. LoRA tax = time(adapted) / time(frozen, quantized) - 1;
"over dense" = time / time(lorafuse over the same weight decoded once and kept) - 1: what the format costs. No number
is printed for a wrong result: on a GPU that leaves bitsandbytes' int8 out where LLM.int8 rounds x to 8 bits.
"""

import argparse
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import nn

from lorafuse import formats
from lorafuse.bench import linear
from lorafuse.bench.layers import plain_linear
from lorafuse.bench.linear import Inputs, Linear
from lorafuse.bench.problem import Variant, Work
from lorafuse.demo.quantized import TYPES, linear_as
from lorafuse.formats.sizes import stored_bytes
from lorafuse.operands import Weight

SUMMARY = "one linear layer over a base in 4 or 8 bits, with PEFT and bitsandbytes"

__all__ = ["SUMMARY", "TYPES", "Quantized", "QuantizedInputs", "add_arguments", "cases"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    linear.add_arguments(parser)
    parser.add_argument("--quant", choices=TYPES, nargs="+", default=["nf4"], help="type of the base (nf4)")


def cases(args: argparse.Namespace) -> list["Quantized"]:
    """Every layer at every M and rank in every type, with the errors of `lorafuse.bench.linear.cases`."""
    return [
        Quantized(c.name, args.dtype, m, c.N, c.K, r, quant)
        for c, m, r in linear.settings(args)
        for quant in dict.fromkeys(args.quant)
    ]


@dataclass(frozen=True)
class QuantizedInputs(Inputs):
    """`w` is the decoded weight; `layer` is bitsandbytes' `Linear4bit` or `Linear8bitLt`, or an `nn.Linear` with
    torchao's tensor, `stored` its weight by reference.
    """

    layer: nn.Module
    stored: Weight


@dataclass(frozen=True)
class Quantized(Linear):
    """`lorafuse.bench.linear.Linear` over a weight stored as `quant`, one of TYPES: 4 bits in blocks of 64 with nested
    statistics, int8 with a scale for each row.
    """

    kind: ClassVar[str] = "quantized"

    quant: str

    def inputs(self, device: torch.device) -> QuantizedInputs:
        dense = super().inputs(device)
        layer = linear_as(plain_linear(dense), self.quant)
        stored = formats.adopt(layer)
        assert stored is not None
        given = {field.name: getattr(dense, field.name) for field in fields(dense)}
        return QuantizedInputs(**given | {"w": stored.decoded(self.torch_dtype).data}, layer=layer, stored=stored)

    def variant(self, name: str, baseline: Any, given: Any, **options: Any) -> Variant:
        call, trained = baseline.quantized(given, **options)
        x = given.x.detach().requires_grad_()
        return Variant(name, lambda: (call(x),), ("y",), (given.dy,), {"dx": x, **trained})

    def work(self, trains: str) -> dict[str, Work]:
        """Of a dense base, but for the passes over its weight, which are over what is stored."""
        size = self.N * self.K * self.torch_dtype.itemsize
        stored = round(stored_bytes(self.quant.partition("_")[0], self.N, self.K))
        return {part: Work(one.flops, one.bytes - size + stored) for part, one in super().work(trains).items()}
