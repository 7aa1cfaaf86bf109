"""`lorafuse._cpu` (csrc/cpu), built anew: the bits of the codec in torch, for any sizes, parts and threads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantized_weights import FP4, NF4, four_bits

from lorafuse.formats import cpu
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

    def both(w, dtype, threads=1):
        results = []
        former = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            for library in (built, None):
                monkeypatch.setattr(cpu, "library", lambda library=library: library)
                results.append(w.decoded(dtype).data)
        finally:
            torch.set_num_threads(former)
        return results

    return both


def assert_same(results):
    ours, expected = results
    assert expected.abs().max() > 0
    assert torch.equal(ours, expected)


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


def test_what_it_cannot_read_is_left_to_torch(built, monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: built)
    w, out = four_bits(64, 128, nested=True), torch.empty(64, 128)

    def fits(data=w.data, statistics=w.statistics, stop=64 * 128, out=out):
        return cpu.fits_4bit(data, statistics, 64, stop, out)

    assert fits()
    assert not fits(stop=64 * 128 + 1)
    assert not fits(data=w.data[:-1])
    assert not fits(out=out.t())
    for i, t in enumerate(w.statistics):
        for other in (t.view(-1)[:-1], t.double(), t.to("meta")):
            assert not fits(statistics=(*w.statistics[:i], other, *w.statistics[i + 1 :]))
    table = torch.stack([w.statistics[1]] * 2, 1)[:, 0]
    strided = Weight(w.data, False, (w.statistics[0], table, *w.statistics[2:]), w.format)
    assert not fits(statistics=strided.statistics)
    assert torch.equal(strided.decoded(torch.float32).data, w.decoded(torch.float32).data)


def test_without_it_the_reason_is_known(tmp_path):
    broken = tmp_path / "_cpu.so"
    broken.write_text("no library")
    for file, expected in ((None, "was not built"), (str(broken), "does not load here")):
        library, reason = cpu.opened(file)
        assert library is None
        assert expected in reason
