"""The Triton decode kernels in the interpreter (T2): bit for bit what the codecs of the formats give."""

import math

import pytest
import torch

from lorafuse.backends.triton import BACKEND as TRITON
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
    # bits, so that zeros have their signs
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert torch.equal(out.view(bits), expected.view(bits))
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
