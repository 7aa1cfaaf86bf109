"""What holds for every row of formats.FORMATS: shapes, chunks, given outputs, selection, memory, compilation."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import lorafuse.formats as formats
from lorafuse.formats import codec, mxfp4
from lorafuse.operands import Weight

N, K, E = 48, 64, 3


def integers(dtype, *sizes):
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1
    return torch.randint(low, high, sizes, dtype=dtype)


def bnb(name, nested):
    def make(*sizes):
        count = math.prod(sizes)
        blocks = count // 64
        absmax, code = torch.rand(blocks), torch.randn(16)
        statistics = absmax, code
        if nested:
            outer = torch.rand(-(-blocks // 256)), torch.randn(256), torch.tensor(0.5)
            statistics = (absmax * 255).byte(), code, *outer
        text = ",".join(map(str, sizes))
        return Weight(integers(torch.uint8, count // 2), False, statistics, f"{name}:{text};block=64;dtype=bfloat16")

    return make


def nf4_torchao(*sizes):
    statistics = integers(torch.int8, N * K // 64), torch.full((2,), 31.0), torch.tensor(3.0), torch.randn(16)
    return Weight(integers(torch.uint8, N * K // 2), False, statistics, f"nf4_torchao:{N},{K};block=64;outer=32")


def int8(*sizes):
    return Weight(integers(torch.int8, *sizes), False, (torch.rand(*sizes[:-1], 1),), "int8")


def intx(*sizes):
    of_blocks = *sizes[:-1], K // 16
    statistics = torch.rand(of_blocks).bfloat16(), integers(torch.int8, *of_blocks)
    return Weight(
        integers(torch.int8, *sizes), False, statistics, f"intx:block={'1x' * (len(sizes) - 1)}16;dtype=bfloat16"
    )


def fp8(order):
    def make(*sizes):
        scale = torch.rand(*sizes[:-2], 3, 2)
        return Weight(torch.randn(sizes).to(torch.float8_e4m3fn), False, (scale,), f"fp8:block=20x48{order}")

    return make


def mx(*sizes):
    return mxfp4.weight(
        integers(torch.uint8, *sizes[:-1], K // 2), torch.randint(120, 134, (*sizes[:-1], K // 32)).byte()
    )


def nvfp4(*sizes):
    scale = torch.rand(N, K // 16).to(torch.float8_e4m3fn)
    return Weight(integers(torch.uint8, N, K // 2), False, (scale, torch.tensor([3.0])), "nvfp4")


SAMPLES = {
    "int8": int8,
    "intx": intx,
    "nf4": bnb("nf4", False),
    "fp4": bnb("fp4", True),
    "nf4_torchao": nf4_torchao,
    "fp8": fp8(";scale=rounded"),
    "fp8 of torchao": fp8(""),
    "mxfp4": mx,
    "nvfp4": nvfp4,
}
STACKED = [name for name in SAMPLES if name not in ("nf4_torchao", "nvfp4")]
by_format = pytest.mark.parametrize("name", SAMPLES)


def test_every_row_has_a_sample():
    assert {name.split()[0] for name in SAMPLES} == set(formats.FORMATS)


@by_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_decoded(name, dtype, monkeypatch):
    w = SAMPLES[name](N, K)
    actual = w.decoded(dtype)
    assert w.sizes == actual.sizes == (N, K)
    assert w.t.sizes == (K, N)
    assert actual.format == "dense"
    assert actual.data.dtype is dtype
    assert actual.data.unique().numel() > 8
    out = torch.full((N, K), math.nan, dtype=dtype)
    assert w.decoded(dtype, out).data is out
    assert torch.equal(out, actual.data)
    monkeypatch.setitem(codec.CHUNK, "cpu", 192)
    assert torch.equal(w.decoded(dtype).data, actual.data)
    for wrong in (out[1:], out.t(), out.to(torch.complex64)):
        with pytest.raises(ValueError, match="out is torch"):
            w.decoded(dtype, wrong)


@pytest.mark.parametrize("name", STACKED)
def test_matrices_of_a_stack(name):
    w = SAMPLES[name](E, N, K)
    every = w.decoded(torch.float32).data
    assert w.stored == every.shape == (E, N, K)
    part = w.select(1, 3)
    assert part.stored == (2, N, K)
    assert part.data.untyped_storage().data_ptr() == w.data.untyped_storage().data_ptr()
    assert torch.equal(part.decoded(torch.float32).data, every[1:])
    assert torch.equal(part.t.select(1, 2).decoded(torch.float32).left(), every[2:].mT)
    assert w.select(0, 0).decoded(torch.float32).data.shape == (0, N, K)


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that operators make, of those that are no views."""

    def __init__(self):
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        held = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_iter(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in held:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
                self.total += t.untyped_storage().nbytes()
        return result


@by_format
def test_no_temporary_is_as_large_as_the_weight(name, monkeypatch):
    """Of a chunk, 4 bytes an element at most, or the 2 KiB in which a byte's two values are looked up."""
    w, out = SAMPLES[name](N, K), torch.empty(N, K, dtype=torch.bfloat16)
    monkeypatch.setitem(codec.CHUNK, "cpu", 256)
    with Allocated() as allocated:
        w.decoded(torch.bfloat16, out)
    assert 0 < allocated.largest <= max(4 * 256, 2048) < out.nbytes / 2
    with Allocated() as with_output:
        w.decoded(torch.bfloat16)
    assert with_output.largest == out.nbytes


@by_format
def test_traced(name):
    """Formats are constants of a compiled graph."""
    torch.compiler.reset()
    w = SAMPLES[name](N, K)
    right = w.decoded(torch.bfloat16).data

    # torch.empty is replaced in tests, which Dynamo cannot trace
    def decode(out, data, *statistics):
        return Weight(data, False, statistics, w.format).decoded(torch.bfloat16, out).data

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    out = torch.full((N, K), math.nan, dtype=torch.bfloat16)
    assert torch.equal(compiled(out, w.data, *w.statistics), right)


@pytest.mark.parametrize("storage", [None, 3, torch.randn(2, 2), torch.nn.Linear(2, 2), torch.nn.Module()])
def test_what_is_not_quantized_is_left_alone(storage):
    assert formats.adopt(storage) is None
    assert formats.adopt(storage, "down_proj") is None


def test_an_unknown_format():
    with pytest.raises(
        ValueError, match=r"'nf5' is not one of dense, int8, intx, nf4, fp4, nf4_torchao, fp8, mxfp4, nvfp4"
    ):
        formats.load("nf5:4,4;block=64")
