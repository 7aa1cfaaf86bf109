"""The Triton decode kernels in the interpreter (T2): bit for bit what the codecs of the formats give."""

import math

import pytest
import torch

from lorafuse.backends.aten import BACKEND as ATEN
from lorafuse.backends.triton import BACKEND as TRITON
from lorafuse.kernels import decode
from lorafuse.operands import Weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter rounds bfloat16 wrongly
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
NF4 = torch.tensor(
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626]
    + [0.7230, 1.0]
)  # fmt: skip


def check(w, dtype):
    sizes = w.stored
    w = Weight(w.data.to(DEVICE), statistics=tuple(t.to(DEVICE) for t in w.statistics), format=w.format)
    # NaN in what nobody writes, and behind it
    memory = torch.full((math.prod(sizes) + 8,), float("nan"), dtype=dtype, device=DEVICE)
    out = memory[: -8 if memory.numel() > 8 else 0].view(sizes)
    assert w.kernel is not None
    assert TRITON.decode(w, dtype, out) is out
    expected = w.decoded(dtype).data
    # bits, so that zeros have their signs; those of NaN are free
    nan, bits = expected.isnan(), {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert torch.equal(out.isnan(), nan)
    assert torch.equal(out[~nan].view(bits), expected[~nan].view(bits))
    assert memory[-8:].isnan().all()


def four_bits(*sizes, block=64, rounded="float32", nested=False, first=0, scale=1.0, name="nf4"):
    count = math.prod(sizes) + first
    blocks = -(-count // block)
    data = torch.randint(0, 256, (-(-count // 2),), dtype=torch.uint8)
    statistics = torch.rand(blocks).mul_(scale), NF4
    if nested:
        outer = torch.rand(-(-blocks // 256)), torch.linspace(-1, 1, 256) * scale, torch.tensor(0.3)
        statistics = torch.randint(0, 256, (blocks,), dtype=torch.uint8), NF4, *outer
    start = f";first={first}" if first else ""
    text = f"{name}:{','.join(map(str, sizes))};block={block};dtype={rounded}{start}"
    return Weight(data, statistics=statistics, format=text)


@by_dtype
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("sizes", [(64, 128), (1, 1), (3, 5), (7, 1301), (2, 33, 96), (100, 200)])
def test_four_bits(sizes, block, nested, dtype):
    check(four_bits(*sizes, block=block, nested=nested), dtype)


@by_dtype
@pytest.mark.parametrize("rounded", ["float32", "float16"])
@pytest.mark.parametrize("scale", [1e-42, 1e-7, 1e4, 3e38])
def test_four_bits_at_the_ends_of_the_range(scale, rounded, dtype):
    check(four_bits(8, 96, scale=scale, rounded=rounded), dtype)


@by_dtype
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("sizes", "start", "stop"), [((5, 33, 24), 1, 4), ((5, 3, 5), 1, 2), ((5, 3, 5), 4, 5)])
def test_matrices_of_a_stack(sizes, start, stop, nested, dtype):
    """Blocks cross matrices, and a matrix may begin in the middle of a byte."""
    check(four_bits(*sizes, nested=nested).select(start, stop), dtype)


@by_dtype
@pytest.mark.parametrize("is_absmax", [False, True])
@pytest.mark.parametrize("sizes", [(64, 128), (1, 1), (5, 4099), (3, 7, 130)])
def test_int8(sizes, is_absmax, dtype):
    data = torch.randint(-128, 128, sizes, dtype=torch.int8)
    scale = torch.rand(sizes[:-1]) if is_absmax else torch.rand(*sizes[:-1], 1)
    check(Weight(data, statistics=(scale,), format="int8"), dtype)


def every_code(*sizes, of=torch.uint8):
    """All 256 bytes, repeated or cut."""
    return torch.arange(math.prod(sizes)).to(torch.uint8).view(of).view(sizes)


@by_dtype
@pytest.mark.parametrize("of", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("order", ["", ";scale=rounded"])
@pytest.mark.parametrize(
    ("sizes", "block", "scales"),
    [
        ((64, 128), (1, 128), (64, 1)),
        ((30, 70), (30, 70), (1,)),
        ((3, 20, 48), (20, 48), (1,)),
        ((300, 200), (128, 128), (3, 2)),
        ((2, 33, 67), (16, 32), (2, 3, 3)),
    ],
    ids=["rows", "matrix", "stack", "blocks", "stack of blocks"],
)
def test_fp8(sizes, block, scales, order, of, dtype):
    scale = torch.randn(scales)
    check(
        Weight(every_code(*sizes, of=of), statistics=(scale,), format=f"fp8:block={block[0]}x{block[1]}{order}"), dtype
    )


@by_dtype
@pytest.mark.parametrize("order", ["", ";scale=rounded"])
def test_fp8_with_exponents(order, dtype):
    """Every exponent, of 2 ** -127 to 2 ** 127 and NaN."""
    scale = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e8m0fnu)
    check(
        Weight(every_code(32, 64, of=torch.float8_e4m3fn), statistics=(scale,), format=f"fp8:block=2x4{order}"), dtype
    )


@by_dtype
@pytest.mark.parametrize(
    "scale", [torch.arange(256, dtype=torch.uint8), torch.randn(256)], ids=["exponents", "numbers"]
)
def test_mxfp4(scale, dtype):
    check(Weight(every_code(2, 32, 64), statistics=(scale.view(2, 32, 4),), format="mxfp4"), dtype)


@by_dtype
@pytest.mark.parametrize("rounded", DTYPES, ids=str)
def test_nf4_of_torchao(rounded, dtype):
    """Table, scales and product are of the weight's dtype."""
    data, scalers = every_code(96, 32).view(-1), torch.randint(-128, 128, (96,), dtype=torch.int8)
    statistics = scalers, torch.tensor([31.0, 17.3]), torch.tensor(4.7), NF4
    statistics = scalers, *(t.to(rounded) for t in statistics[1:])
    check(Weight(data, statistics=statistics, format="nf4_torchao:96,64;block=64;outer=48"), dtype)


@by_dtype
def test_nvfp4(dtype):
    """Every scale; their quotients round."""
    scale = every_code(32, 8, of=torch.float8_e4m3fn)
    check(Weight(every_code(32, 64), statistics=(scale, torch.tensor([0.3])), format="nvfp4"), dtype)


def test_what_no_kernel_reads():
    """Strided codes and formats without a kernel run the codec, into the same memory."""
    data = every_code(8, 32, of=torch.float8_e4m3fn)[:, ::2]
    # blocks that no tile has
    of_48 = torch.randint(-128, 128, (3,), dtype=torch.int8), torch.tensor([31.0]), torch.tensor(4.7), NF4
    for w in (
        Weight(every_code(64), statistics=of_48, format="nf4_torchao:8,16;block=48;outer=3"),
        Weight(data, statistics=(torch.ones(1),), format="fp8:block=8x16"),
        Weight(
            torch.ones(8, 16, dtype=torch.int8), statistics=(torch.rand(8, 1),), format="intx:block=1x16;dtype=float32"
        ),
    ):
        assert w.kernel is None
        out = torch.empty(8, 16)
        assert TRITON.decode(w, torch.float32, out) is out
        torch.testing.assert_close(out, w.decoded(torch.float32).data, rtol=0, atol=0, equal_nan=True)


def cut(w, scale=0, code=0):
    """A weight whose tensors end too early."""
    scales, *others = w.statistics
    data = w.data.flatten()[: w.data.numel() - code]
    return Weight(data, statistics=(scales.flatten()[: scales.numel() - scale], *others), format=w.format)


def test_what_a_kernel_would_read_beyond():
    fp8 = Weight(every_code(64, 64, of=torch.float8_e4m3fn), statistics=(torch.rand(4, 4),), format="fp8:block=16x16")
    short = Weight(fp8.data, statistics=(torch.rand(4, 3),), format=fp8.format)
    for w, message in (
        (cut(four_bits(8, 64), scale=1), "scale has 7 elements, its sizes and blocks make it 8"),
        (cut(four_bits(8, 64), code=1), "code has 255 elements, its sizes and blocks make it 256"),
        (short, "scale has 12 elements, its sizes and blocks make it 16"),
    ):
        with pytest.raises(ValueError, match=message):
            TRITON.decode(w, torch.float32, torch.empty(w.stored))


def test_fp64_runs_the_codec():
    w = Weight(
        every_code(8, 16, of=torch.float8_e4m3fn), statistics=(torch.rand(1),), format="fp8:block=8x16;scale=rounded"
    )
    out = torch.empty(8, 16, dtype=torch.float64)
    assert TRITON.decode(w, torch.float64, out) is out
    assert torch.equal(out.nan_to_num(), w.decoded(torch.float64).data.nan_to_num())


@pytest.mark.gpu
def test_other_backends_run_the_same_kernels_on_a_gpu(monkeypatch):
    w = four_bits(64, 128, nested=True)
    w = Weight(w.data.cuda(), statistics=tuple(t.cuda() for t in w.statistics), format=w.format)
    launched = []
    monkeypatch.setitem(decode.KERNELS, "codebook", lambda **given: launched.append(given))
    ATEN.decode(w, torch.bfloat16, torch.empty(64, 128, dtype=torch.bfloat16, device="cuda"))
    assert len(launched) == 1
