"""`lorafuse._cpu` (csrc/cpu), built anew: the bits of the codecs in torch, for any sizes, parts and threads."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from quantized_weights import FP4, NF4, four_bits, fp8

from lorafuse.formats import cpu, mxfp4
from lorafuse.operands import Weight

BUILD = Path(__file__).parents[2] / "csrc" / "build.py"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    file = tmp_path_factory.mktemp("cpu") / "_cpu.so"
    done = subprocess.run([sys.executable, BUILD, "cpu", file], capture_output=True, text=True, timeout=300)
    if "was not found" in done.stderr:
        pytest.skip(f"lorafuse._cpu cannot be built: {done.stderr.strip()}")
    assert (done.returncode, done.stderr) == (0, "")
    library, reason = cpu.opened(str(file))
    assert reason == ""
    return library


@pytest.fixture
def decoded(built, monkeypatch):
    """`(by it, by torch)` of a weight."""
    # nor by bitsandbytes' own
    monkeypatch.delitem(sys.modules, "bitsandbytes.backends.cpu.ops", raising=False)
    kinds = []

    def counted(kind, *arguments):
        kinds.append(kind)
        built.lorafuse_decode(kind, *arguments)

    def both(w, dtype, threads=1, reads=True):
        results = []
        former = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            for library in (SimpleNamespace(lorafuse_decode=counted), None):
                monkeypatch.setattr(cpu, "library", lambda library=library: library)
                kinds.clear()
                results.append(w.decoded(dtype).data)
                assert bool(kinds) == (reads and library is not None and results[0].numel() > 0)
        finally:
            torch.set_num_threads(former)
        return results

    return both


def bits(t):
    """Of numbers, signs of zeros among them; every NaN is the same."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.masked_fill(t.isnan(), torch.nan).view(integers[t.itemsize])


def assert_same(results):
    ours, expected = results
    assert expected.nan_to_num(0.0).abs().max() > 0
    assert torch.equal(bits(ours), bits(expected))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("rounded", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("sizes", "block"), [((64, 128), 64), ((33, 65), 64), ((5, 3), 32), ((40, 96), 256), ((7, 4096), 4096)], ids=str
)
def test_bit_exact(sizes, block, rounded, nested, decoded):
    for kind, code in (("nf4", NF4), ("fp4", FP4)):
        w = four_bits(*sizes, block=block, rounded=rounded, nested=nested, code=code, kind=kind)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            assert_same(decoded(w, dtype))


@pytest.mark.parametrize("scale", [1e-36, 1e30], ids=["subnormal", "large"])
def test_subnormal_products_are_kept(scale, decoded):
    w = four_bits(64, 128, rounded="float32", scale=scale)
    results = decoded(w, torch.float32)
    assert_same(results)
    assert scale > 1 or ((results[0] != 0) & (results[0].abs() < 1.17e-38)).any()


@pytest.mark.parametrize("sizes", [(5, 64, 64), (5, 9, 7)], ids=str)
def test_a_part_of_a_stack_and_threads(sizes, decoded):
    """Of odd sizes a part begins within a byte."""
    w = four_bits(*sizes, rounded="float32", nested=True)
    for start, stop in ((0, 5), (1, 4), (3, 3)):
        ours, expected = decoded(w.select(start, stop), torch.float32)
        assert torch.equal(ours, expected)
    assert_same(decoded(four_bits(129, 1000, rounded="float32"), torch.float32, threads=3))


def int8(*sizes, library="bitsandbytes", scale_dtype=torch.float32):
    data = torch.randint(-128, 128, sizes, dtype=torch.int8)
    scale = (torch.randn(sizes[:-1]) * 3).to(scale_dtype)
    return Weight(data, False, (scale if library == "bitsandbytes" else scale.unsqueeze(-1),), "int8")


def mx(*sizes, exponents=True):
    blocks = torch.randint(0, 256, (*sizes[:-1], sizes[-1] // 2), dtype=torch.uint8)
    of_blocks = *sizes[:-1], sizes[-1] // 32
    # the last, 255, is no number by the standard
    scales = torch.randint(0, 255, of_blocks).byte() if exponents else torch.randn(of_blocks)
    if exponents:
        # subnormal, and too large for some
        scales.view(-1)[0], scales.view(-1)[-1] = 0, 254
    return mxfp4.weight(blocks, scales)


ue8m0 = torch.float8_e8m0fnu
BYTES = {
    "int8 of bitsandbytes": lambda *sizes: int8(*sizes),
    "int8 of torchao": lambda *sizes: int8(*sizes, library="torchao"),
    "int8 of torchao, scales of 16 bits": lambda *sizes: int8(*sizes, library="torchao", scale_dtype=torch.bfloat16),
    "fp8 in blocks": lambda *sizes: fp8(*sizes, blocks=(16, 32)),
    "fp8 in blocks, exponents": lambda *sizes: fp8(*sizes, blocks=(16, 32), scale_dtype=ue8m0),
    "fp8 of torchao, rows": lambda *sizes: fp8(*sizes, blocks=(1, sizes[-1]), rounded=False),
    "fp8, one scale": lambda *sizes: fp8(*sizes, blocks=None),
    "mxfp4": mx,
    "mxfp4, scales of fp32": lambda *sizes: mx(*sizes, exponents=False),
}
by_bytes = pytest.mark.parametrize("make", BYTES.values(), ids=BYTES)


@by_bytes
@pytest.mark.parametrize("sizes", [(3, 24, 96), (40, 160), (17, 64)], ids=str)
def test_other_formats_are_bit_exact(make, sizes, decoded):
    w = make(*sizes)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_same(decoded(w, dtype))
    if len(sizes) == 3:
        assert_same(decoded(w.select(1, 3), torch.float32, threads=2))


@by_bytes
def test_a_large_weight_on_threads(make, decoded):
    assert_same(decoded(make(257, 288), torch.float32, threads=3))


def test_what_is_in_another_order_is_left_to_torch(decoded):
    """The product in fp64; a short block at the end of a row."""
    assert_same(decoded(fp8(40, 160, blocks=(16, 32)), torch.float64, reads=False))
    assert_same(decoded(fp8(40, 80, blocks=(16, 32)), torch.float32, reads=False))
    assert_same(decoded(int8(40, 80, scale_dtype=torch.float64), torch.float32, reads=False))
    assert_same(decoded(int8(80, 40).t, torch.float32))
    strided = int8(80, 40)
    assert_same(decoded(Weight(strided.data.t(), False, (torch.rand(40),), "int8"), torch.float32, reads=False))


def test_what_it_cannot_read_is_left_to_torch(built, monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: built)
    w, out = four_bits(64, 128, nested=True), torch.empty(64, 128)
    absmax, table, outer, scale_table, offset = w.statistics
    codes = cpu.Codes("nibbles", w.data, 64, absmax, table, scale_table, outer, offset)

    def reads(out=out, first=0, **changes):
        return cpu.decode(codes._replace(first=first, **changes), out)

    assert reads()
    out.zero_()
    assert not reads(first=1)
    assert not reads(data=w.data[:-1])
    assert not reads(data=w.data.int())
    assert not reads(out=out.t())
    for name in ("scale", "table", "scale_table", "outer", "offset"):
        t = getattr(codes, name)
        # one number has no stride
        strided = [torch.stack([t, t], -1)[..., 0]] if t.numel() > 1 else []
        for other in (t.view(-1)[:-1], t.double(), t.to("meta"), *strided):
            assert not reads(**{name: other})
    assert not reads(scale=absmax.float())
    assert not reads(scale_table=None)
    assert torch.equal(out, torch.zeros(64, 128))
    of_strided = Weight(
        w.data, False, (absmax, torch.stack([table, table], 1)[:, 0], outer, scale_table, offset), w.format
    )
    assert torch.equal(of_strided.decoded(torch.float32).data, w.decoded(torch.float32).data)


def test_without_it_the_reason_is_known(tmp_path):
    broken = tmp_path / "_cpu.so"
    broken.write_text("no library")
    for file, expected in ((None, "was not built"), (str(broken), "does not load here")):
        library, reason = cpu.opened(file)
        assert library is None
        assert expected in reason
