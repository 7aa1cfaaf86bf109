"""`lorafuse bench quantized`: a layer over a base in 4 or 8 bits, and what it is compared with."""

import json

import pytest
import torch

from lorafuse.bench import peaks, plugins
from lorafuse.bench.linear import Linear
from lorafuse.bench.problem import title, wrong
from lorafuse.bench.quantized import TYPES, Quantized
from lorafuse.cli import main
from lorafuse.functional import plan_linear

pytest.importorskip("bitsandbytes", reason="quantized bases need bitsandbytes: pip install --no-deps bitsandbytes")
CPU = torch.device("cpu")
# K is a multiple of the block: bitsandbytes' AVX512 kernel, which PEFT runs, is right there alone
SIZES = 16, 24, 128, 3
ADAPTED = ["peft", "peft-half", "peft-autocast", "decode-addmm", "lorafuse", "lorafuse-half", "lorafuse-dense"]


@pytest.fixture(autouse=True)
def _no_peaks(monkeypatch):
    monkeypatch.setattr(peaks, "matmul_flops", lambda dtype, device: 1e11)
    monkeypatch.setattr(peaks, "copy_bytes", lambda device: 1e10)


@pytest.fixture(scope="module")
def baselines():
    return {one.name: one for one in plugins.load("quantized", CPU) if not one.absent}


def test_every_side_is_there(baselines):
    assert {"frozen", *ADAPTED} <= baselines.keys()
    # a quantized base is not trained, and a dense one is another problem
    assert not {"full", "addmm", "frozen-lorafuse"} & baselines.keys()


@pytest.mark.parametrize("quant", TYPES)
@pytest.mark.parametrize("name", ["frozen", *ADAPTED])
def test_every_variant_computes_the_formula_of_the_decoded_weight(name, quant, baselines):
    if quant == "int8_torchao":
        pytest.importorskip("torchao", reason="its int8 needs torchao: pip install --no-deps torchao")
    problem = Quantized("tiny", "bfloat16", *SIZES, quant)
    given, dense = problem.inputs(CPU), Linear("tiny", "bfloat16", *SIZES).inputs(CPU)
    one = baselines[name]
    variant = one.variant(problem, given)
    assert wrong(variant, problem.references(given)[one.trains], problem.shaped) == ""
    if "int8" in quant:
        return
    # the weight before it was quantized to 4 bits is out of reach of the tolerance
    assert "y is wrong" in wrong(variant, problem.references(dense)[one.trains], problem.shaped)


def test_the_work_counts_packed_bytes():
    for trains in ("nothing", "adapters"):
        packed = Quantized("t", "bfloat16", 8, 64, 256, 4, "nf4").work(trains)
        dense = Linear("t", "bfloat16", 8, 64, 256, 4).work(trains)
        for part in ("forward", "backward"):
            assert packed[part].flops == dense[part].flops
            # 64 · 256 elements: 2 bytes each, or half a byte and one of statistics a block of 64, 4 for 256 blocks
            assert dense[part].bytes - packed[part].bytes == 32768 - 8192 - 256 - 4
            # a byte each, and 4 a row
            int8 = Quantized("t", "bfloat16", 8, 64, 256, 4, "int8_torchao").work(trains)[part]
            assert dense[part].bytes - int8.bytes == 32768 - 16384 - 4 * 64


@pytest.mark.no_poison
def test_the_command_compares_with_the_dense_base(tmp_path, capsys):
    file = tmp_path / "q.json"
    options = ["--rounds", "3", "--device", "cpu", "--dtype", "float32", "--json", str(file)]
    sides = ["peft", "decode-addmm", "lorafuse", "lorafuse-dense"]
    command = ["bench", "quantized", "--shape", "24,128", "--m", "16", "--rank", "3", *options, "--only", *sides]
    assert main([*command, "--quant", "nf4", "fp4"]) == 0
    printed = capsys.readouterr().out
    results = json.loads(file.read_text())["results"]
    assert [one["quant"] for one in results] == ["nf4", "fp4"]
    for one in results:
        assert title(one) in printed
        assert set(one["variants"]) == {"frozen", *sides}
        assert one["variants"]["lorafuse-dense"]["over_dense"] == 0.0
        assert one["variants"]["lorafuse"]["over_dense"] != 0.0
        assert set(one["floor"].values()) == {"frozen"}


class Noted(torch.autograd.Function):
    """Notes in each pass whether a plan made there takes what is forced."""

    @staticmethod
    def forward(ctx, x, notes):
        ctx.notes = notes
        notes.append(is_forced())
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.notes.append(is_forced())
        return dy, None


def is_forced():
    x, w, a = torch.ones(2, 8), torch.ones(4, 8), torch.ones(3, 8)
    return "is forced" in plan_linear(x, w, a, gradients=()).reasons[-1]


@pytest.mark.parametrize(("name", "forced"), [("lorafuse", False), ("lorafuse-addmm", True)])
def test_a_kernel_is_forced_in_both_passes(name, forced):
    (one,) = (one for one in plugins.load("linear", CPU) if one.name == name)
    problem = Linear("tiny", "float32", 16, 24, 40, 3)
    variant, notes = one.variant(problem, problem.inputs(CPU)), []
    call = variant.call
    variant.call = lambda: (Noted.apply(call()[0], notes),)
    variant.results()
    assert notes == [forced, forced]
