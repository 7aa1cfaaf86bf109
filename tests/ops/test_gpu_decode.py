"""Quantized weights decoded on a GPU (T6), by csrc's kernels and by Triton's: bit for bit the codec's, on a CPU."""

import pytest
import torch
from quantized_weights import FP4, four_bits, fp8

from lorafuse.backends import base
from lorafuse.functional import lora_linear
from lorafuse.operands import Weight

pytestmark = [pytest.mark.gpu, pytest.mark.no_poison]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(params=["triton", "cuda"])
def kernels(request):
    state = base.availability(request.param)
    if not state.ok:
        pytest.skip(f"backend {request.param}: {state.reason}")
    return base.load(request.param)


def on_gpu(w):
    return Weight(w.data.cuda(), w.is_transposed, tuple(t.cuda() for t in w.statistics), w.format)


WEIGHTS = {
    "whole blocks": lambda: four_bits(512, 1024),
    "a tail, blocks across rows": lambda: four_bits(333, 515, block=128, code=FP4, kind="fp4"),
    "nested": lambda: four_bits(333, 515, nested=True),
    "nested, rounded to another dtype": lambda: four_bits(512, 1024, block=32, nested=True, rounded="float16"),
    "subnormal": lambda: four_bits(64, 1024, scale=1e-40, rounded="float32"),
    "infinite": lambda: four_bits(64, 1024, scale=3e38),
    "matrices of a stack": lambda: four_bits(5, 33, 96, nested=True).select(1, 4),
    "that begin within a chunk": lambda: four_bits(5, 33, 24).select(1, 4),
    "fp8": lambda: fp8(3, 300, 528),
    "fp8, torchao": lambda: fp8(300, 528, blocks=(1, 528), rounded=False),
    "fp8, powers of two": lambda: fp8(256, 512, scale_dtype=torch.float8_e8m0fnu),
    "fp8, one scale": lambda: fp8(3, 9, 77, blocks=None),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", WEIGHTS)
def test_the_bits_of_the_codec(storage, dtype, kernels):
    w = WEIGHTS[storage]()
    # NaN in what nobody writes, and behind it
    memory = torch.full((w.decoded(dtype).data.numel() + 64,), float("nan"), dtype=dtype, device="cuda")
    out = memory[:-64].view(w.stored)
    assert kernels.decode(on_gpu(w), dtype, out) is out
    actual, expected = out.cpu(), w.decoded(dtype).data
    bits, nan = {2: torch.int16, 4: torch.int32}[dtype.itemsize], expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual.view(bits)[~nan], expected.view(bits)[~nan])
    assert memory[-64:].isnan().all()


@pytest.mark.parametrize("nested", [False, True])
def test_a_layer_is_that_of_the_decoded_weight(nested, kernels):
    """The product must not begin before the weight is there."""
    w = on_gpu(four_bits(1536, 1024, nested=nested, scale=0.05))
    dense = w.decoded(torch.bfloat16)
    x, a, b = (torch.randn(s, device="cuda").bfloat16().requires_grad_() for s in ((700, 1024), (16, 1024), (1536, 16)))
    for _ in range(20):
        results = []
        for weight in (w, dense):
            y = lora_linear(x, weight, a, b, scale=1.5, backend=kernels.name)
            results.append((y, *torch.autograd.grad(y.float().square().mean(), (x, a, b))))
        for quantized, expected in zip(*results, strict=True):
            assert torch.equal(quantized, expected)


def test_more_values_than_2_to_the_31(kernels):
    sizes = 9, 2**14, 2**14
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("8 GiB of GPU memory are not free")
    w = four_bits(1, 2**14, 2**14, nested=True)
    absmax, code, outer, *rest = w.statistics
    # the same matrix nine times
    data = w.data.cuda().repeat(9)
    statistics = absmax.cuda().repeat(9), code.cuda(), outer.cuda().repeat(9), *(t.cuda() for t in rest)
    every = Weight(data, False, statistics, w.format.replace("1,16384,16384", ",".join(map(str, sizes))))
    out = kernels.decode(every, torch.bfloat16, torch.empty(sizes, dtype=torch.bfloat16, device="cuda"))
    expected = kernels.decode(
        on_gpu(w), torch.bfloat16, torch.empty(1, *sizes[1:], dtype=torch.bfloat16, device="cuda")
    )
    assert all(torch.equal(each, expected[0]) for each in out)
