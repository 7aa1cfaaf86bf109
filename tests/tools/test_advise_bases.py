"""The advisor's bytes of a weight, against what the formats hold of it."""

import pytest
import torch
from quantized_models import quantize
from torch import nn

from lorafuse import advise, formats
from lorafuse.advise.bases import BASES
from lorafuse.advise.shapes import Linear, ModelShapes
from lorafuse.formats import mxfp4
from lorafuse.plan import find

N, K, E = 256, 1024, 4
LAYERS = (
    Linear("up_proj", "mlp", N, K), Linear("lm_head", "unembedding", 100, K),
    Linear("experts.gate_up_proj", "experts", N, K, experts=E, parameter=True),
)  # fmt: skip
SHAPES = ModelShapes("m", "llama", K, 100, 1, (1 + E) * N * K + 2 * 100 * K, LAYERS, experts=E, active_experts=1)


def held(base):
    """A weight `[N, K]` as the format of a base holds it."""
    if base == "MXFP4":
        return mxfp4.weight(torch.zeros(N, K // 32, 16, dtype=torch.uint8), torch.zeros(N, K // 32, dtype=torch.uint8))
    if base == "FP8":
        finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
        return formats.adopt(finegrained.FP8Linear(K, N, block_size=(128, 128)))
    return formats.adopt(quantize(nn.Sequential(nn.Linear(K, N, bias=False)), base.lower())[0])


@pytest.mark.parametrize("base", BASES)
def test_bytes_are_those_of_the_format(base):
    weight = held(base)
    tables = {16, 256}
    counted = weight.data.nbytes + sum(t.nbytes for t in weight.statistics if t.numel() not in tables and t.dim())
    rest = 2 * 2 * 100 * K
    assert advise.frozen_bytes(SHAPES, base) == pytest.approx(rest + (1 + E) * counted, rel=1e-3)
    stacks = 2 * E * N * K
    assert advise.frozen_bytes(SHAPES, base, experts=False) == pytest.approx(rest + stacks + counted, rel=1e-3)


@pytest.mark.parametrize("base", BASES)
def test_decoding_reads_what_is_stored_and_writes_16_bits(base):
    device = find("H100")
    packed = (1 + E) * N * K
    moved = advise.frozen_bytes(SHAPES, base) - 2 * (SHAPES.parameters - packed) + 2 * packed
    seconds = advise.decode_seconds(SHAPES, base, device)
    assert seconds == pytest.approx(2 * moved / device.sustained_bandwidth, rel=1e-6)
    assert advise.decode_seconds(SHAPES, base, device, checkpointing=True) == pytest.approx(1.5 * seconds)
    assert advise.decode_seconds(SHAPES, base, device, experts=False) == pytest.approx(seconds / (1 + E))


def test_an_unknown_base():
    with pytest.raises(ValueError, match="base 'int3' is not one of NF4, FP4, int8, FP8, MXFP4"):
        advise.frozen_bytes(SHAPES, "int3")
