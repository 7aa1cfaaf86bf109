"""The CUDA decode kernels (csrc/kernels/decode_sm80.cu), run from their own source by the emulator.

Every result is bit for bit that of the format's codec in torch. Every buffer is declared to the emulator with its exact
extent, so that a byte read or written outside is an error.
"""

import planted
import pytest
import torch
from native_build import EMULATOR as emu
from native_build import emulator
from quantized_weights import FP4, four_bits, fp8, fp8_operands

from lorafuse import functional as LF
from lorafuse.backends import base
from lorafuse.operands import Weight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TYPES = {BF16: 0, FP16: 1, FP32: 2}
BITS = {BF16: torch.int16, FP16: torch.int16, FP32: torch.int32}


@pytest.fixture(autouse=True)
def _standard_emulator():
    yield
    emu.configure()
    emu.forget_memory()


def declare(name, t):
    emu.declare_memory(begin=t.data_ptr(), bytes=t.numel() * t.element_size(), name=name)


def decoded(w, dtype):
    """What the kernel writes, of a weight in memory of its own."""
    emulator()
    emu.forget_memory()
    out = torch.full(w.stored, float("nan"), dtype=dtype)
    for name, t in (("data", w.data), ("out", out), *((f"statistics {i}", t) for i, t in enumerate(w.statistics))):
        declare(name, t)
    before = emu.statistics()["launches"]
    assert base.load("emu").decode(w, dtype, out) is out
    assert emu.statistics()["launches"] == before + 1
    return out


def check(w, dtype):
    expected = w.decoded(dtype).data
    assert_same(decoded(w, dtype), expected)
    return expected


def assert_same(actual, expected):
    """Bit for bit, but for which of the NaNs."""
    nan, bits = expected.isnan(), BITS[expected.dtype]
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual.view(bits)[~nan], expected.view(bits)[~nan])


# a last chunk of 1 … 31 values, blocks that cross rows, a short last block, fewer values than a chunk
SIZES = [(1, 1), (3, 5), (1, 31), (7, 32), (33, 65), (40, 96), (2, 33, 96), (48, 1024)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_four_bits(sizes, nested, dtype):
    block = (32, 64, 128, 4096)[SIZES.index(sizes) % 4]
    check(four_bits(*sizes, block=block, nested=nested, code=FP4, kind="fp4"), dtype)


@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_every_block_size(block, nested):
    """With more blocks than one nested scale holds, where blocks are small."""
    check(four_bits(37, 515, block=block, nested=nested), BF16)


@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_any_number_of_multiprocessors(multiprocessors):
    """One, on which a thread walks several chunks, and more than there are chunks."""
    emu.configure(multiprocessors=multiprocessors)
    check(four_bits(100, 2051, nested=True), BF16)


@pytest.mark.parametrize("rounded", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-42, 1e-7, 3e4, 3e38])
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_the_ends_of_the_range(scale, rounded, dtype):
    """Subnormal products, and infinity of those that are too large; the library's rounding comes first."""
    check(four_bits(9, 96, scale=scale, rounded=rounded), dtype)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(("sizes", "start", "stop"), [((5, 33, 32), 1, 4), ((5, 33, 24), 1, 4), ((5, 3, 5), 1, 3)])
def test_matrices_of_a_stack(sizes, start, stop, nested):
    """Blocks cross matrices; one may begin within a chunk, or within a byte."""
    w = four_bits(*sizes, nested=nested)
    assert torch.equal(check(w.select(start, stop), BF16), w.decoded(BF16).data[start:stop])


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("rounded", [False, True], ids=["torchao", "transformers"])
@pytest.mark.parametrize(
    ("sizes", "blocks", "scale_dtype"),
    [
        ((130, 208), (128, 128), FP32),
        ((3, 130, 208), (128, 128), torch.float8_e8m0fnu),
        ((33, 80), (1, 80), BF16),
        ((2, 9, 77), (9, 77), FP32),
        # one number for all matrices
        ((3, 9, 80), None, FP32),
    ],
    ids=str,
)
def test_fp8(sizes, blocks, scale_dtype, rounded, dtype):
    check(fp8(*sizes, blocks=blocks, scale_dtype=scale_dtype, rounded=rounded), dtype)


def test_fp8_matrices_of_a_stack():
    w = fp8(5, 130, 208)
    assert torch.equal(check(w.select(1, 4), BF16).nan_to_num(), w.decoded(BF16).data[1:4].nan_to_num())


def test_what_the_kernel_does_not_read_is_decoded_by_the_codec():
    w = fp8(16, 64)
    w = Weight(w.data.view(torch.uint8).view(torch.float8_e5m2), False, w.statistics, w.format)
    emulator()
    before, out = emu.statistics()["launches"], torch.empty(16, 64, dtype=BF16)
    assert torch.equal(base.load("emu").decode(w, BF16, out).nan_to_num(), w.decoded(BF16).data.nan_to_num())
    assert emu.statistics()["launches"] == before


def test_unaligned_data_is_copied():
    w = four_bits(16, 64)
    shifted = torch.empty(w.data.numel() + 1, dtype=torch.uint8)[1:].copy_(w.data)
    assert shifted.data_ptr() % 16
    out = torch.empty(16, 64, dtype=BF16)
    emulator()
    base.load("emu").decode(Weight(shifted, False, w.statistics, w.format), BF16, out)
    assert torch.equal(out, w.decoded(BF16).data)


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_nothing_to_decode(dtype):
    emulator()
    w = four_bits(4, 8, 16).select(2, 2)
    assert base.load("emu").decode(w, dtype, torch.empty(0, 8, 16, dtype=dtype)).numel() == 0


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_layer_is_that_of_the_decoded_weight(nested):
    """Decoded before the first launch of a pass: the product may overlap the launch before it."""
    emulator()
    w = four_bits(72, 136, nested=nested, scale=0.1)
    x, a, b, bias = (
        torch.randn(sizes).mul_(0.3).to(BF16).requires_grad_() for sizes in ((70, 136), (13, 136), (72, 13), (72,))
    )
    results = []
    for weight in (w, w.decoded(BF16)):
        y = LF.lora_linear(x, weight, a, b, scale=1.7, bias=bias, dropout_p=0.2, seed=7, backend="emu")
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, a, b, bias))))
    for quantized, dense in zip(*results, strict=True):
        assert dense.abs().max() > 0
        assert torch.equal(quantized, dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 48}, "block size 48 is not a power of two from 32 on"),
        ({"block_size": 16}, "block size 16 is not a power of two from 32 on"),
        ({"count": -1}, "count -1 or first 0 is negative"),
        ({"count": 2**37}, "0 \\+ 137438953472 values are more than 32 times 2\\^31"),
        ({"type": 3}, "type 3 is none of BF16, FP16 and FP32"),
        ({"rounded": 7}, "rounded 7 is none of"),
        ({"code": 0}, "code is null"),
        ({"absmax": 0}, "absmax is null"),
        ({"nested_code": 16}, "nested_code, nested_absmax and nested_offset are given together"),
        ({"out": 8}, "out at 0x8 is not on a 16-byte boundary"),
        ({"data": 8}, "data at 0x8 is not on a 16-byte boundary"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_codebook_is_refused_with_the_value(change, message):
    given = {"type": 0, "count": 64, "block_size": 64, "data": 16, "code": 16, "absmax": 16, "out": 16}
    with pytest.raises(ValueError, match=message):
        emu.decode_codebook(**given | change)


def decoded_fp8(data, scale, blocks, dtype, rounded_scale=FP32, rounded=FP32):
    """What the kernel writes: data e4m3 `[G, N, K]`, a scale `[G, …]` for each block of rows and columns."""
    emu.forget_memory()
    out = torch.full(data.shape, -7.0, dtype=dtype)
    for name, t in (("data", data), ("scale", scale), ("out", out)):
        declare(name, t)
    G, N, K = data.shape
    emu.decode_fp8(
        type=TYPES[dtype], G=G, N=N, K=K, block_rows=blocks[0], block_columns=blocks[1], data=data.data_ptr(),
        scale=scale.data_ptr(), scale_type={**TYPES, torch.float8_e8m0fnu: 3}[scale.dtype],
        rounded_scale=TYPES[rounded_scale], rounded=TYPES[rounded], out=out.data_ptr(),
    )  # fmt: skip
    return out


def check_fp8(data, scale, blocks, dtype, rounded_scale=FP32, rounded=FP32):
    _, N, K = data.shape
    every = scale.float().to(rounded_scale).float()
    every = every.repeat_interleave(blocks[0], 1)[:, :N].repeat_interleave(blocks[1], 2)[..., :K]
    expected = (data.float() * every).to(rounded).to(dtype)
    assert expected.isnan().any()
    assert_same(decoded_fp8(data, scale, blocks, dtype, rounded_scale, rounded), expected)


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("scale_dtype", [FP32, BF16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        ((1, 256, 384), (128, 128)),
        # matrices whose last blocks are short in both directions
        ((3, 130, 208), (128, 128)),
        ((2, 33, 80), (1, 80)),
        ((2, 33, 80), (33, 80)),
        # one value by one: rows that are no multiple of a chunk, blocks that are none
        ((2, 9, 77), (1, 77)),
        ((1, 40, 96), (16, 24)),
        ((1, 1, 300), (128, 128)),
    ],
    ids=str,
)
def test_fp8_scales(sizes, blocks, scale_dtype, dtype):
    check_fp8(*fp8_operands(*sizes, blocks, scale_dtype), blocks, dtype)


@pytest.mark.parametrize("rounded", BITS, ids=str)
@pytest.mark.parametrize("rounded_scale", BITS, ids=str)
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_fp8_rounds_in_the_order_of_its_library(rounded, rounded_scale, dtype):
    check_fp8(*fp8_operands(2, 40, 272, (128, 128)), (128, 128), dtype, rounded_scale, rounded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"N": -1}, "N of -1 is not in 0"),
        ({"block_rows": 0}, "blocks of 0 rows and 128 columns are empty"),
        ({"scale_type": 1}, "scale_type 1 is none of FP32, BF16 and E8M0"),
        ({"rounded_scale": 3}, "rounded_scale 3 is none of BF16"),
        ({"scale": 0}, "scale is null"),
        ({"G": 2**20, "N": 2**20}, "values are more than 16 times 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fp8_is_refused_with_the_value(change, message):
    given = {"type": 0, "N": 8, "K": 64, "block_rows": 128, "block_columns": 128, "data": 16, "scale": 16, "out": 16}
    with pytest.raises(ValueError, match=message):
        emu.decode_fp8(**given | change)


# by what the table of tests/planted.py names as seeing a bug
SCENARIOS = {
    "decode_codebook": lambda: decoded(four_bits(67, 515, nested=True, rounded="float16"), BF16),
    "decode_codebook, fp32": lambda: decoded(four_bits(67, 515, nested=True, rounded="float32"), FP32),
    "decode_fp8": lambda: decoded_fp8(*fp8_operands(2, 130, 272, (128, 128)), (128, 128), BF16, rounded_scale=BF16),
}


@pytest.mark.parametrize("schedule", range(2))
@pytest.mark.parametrize(("launch", "name"), [(launch, bug) for launch in SCENARIOS for bug in planted.names(launch)])
def test_planted_bugs_are_seen(launch, name, schedule):
    state = torch.get_rng_state()
    emu.configure(seed=schedule, multiprocessors=2)
    right = SCENARIOS[launch]()
    torch.set_rng_state(state)
    emu.configure(seed=schedule, multiprocessors=2, planted=name)
    try:
        wrong = SCENARIOS[launch]()
    except emu.EmulationError:
        wrong = None
    assert emu.statistics()["planted_reached"], "the line did not run: give it another scenario"
    assert wrong is None or not torch.equal(right.view(torch.int16), wrong.view(torch.int16)), f"{name} was not seen"
