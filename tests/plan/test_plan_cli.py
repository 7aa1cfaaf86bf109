"""`lorafuse plan` (T1): every modelled number says so, the choice is the planner's, bad input is one clear line."""

import json
import re

import pytest
import torch

from lorafuse import cli
from lorafuse.formats import FORMATS
from lorafuse.formats.sizes import DECODED_IN_LOOP, stored_bytes
from lorafuse.plan import DEVICES, Problem, cost, find, select

ASK = ["plan", "--gpu", "H200", "--shape", "8192,4096,4096"]
# a time or a share that the model gives
NUMBER = re.compile(r"\d(\.\d+)? us\b|\d%")


def test_every_number_says_whether_it_is_modelled_or_measured(capsys):
    assert cli.main([*ASK, "--backward"]) == 0
    lines = capsys.readouterr().out.splitlines()
    numbers = [line for line in lines if NUMBER.search(line)]
    assert len(numbers) > 30
    for line in numbers:
        assert ("model" in line) != ("measured on H200" in line), line


@pytest.mark.parametrize("gpu", DEVICES)
def test_it_prints_the_planners_choice(gpu, capsys):
    assert cli.main(["plan", "--gpu", gpu, "--shape", "8192,4096,4096", "--rank", "32", "--backward"]) == 0
    out = capsys.readouterr().out
    problem = Problem(8192, 4096, 4096, 32, "bfloat16", "float32")
    available = (("eager", ""), ("triton", ""), ("cuda", ""))
    plan = select(problem, find(gpu), available)
    assert f"forward: {plan.backend} {plan.kernel}\n" in out
    assert f"-> {plan.backend} {plan.kernel}" in out
    for reason in plan.reasons:
        assert f"why: {reason}" in out
    assert f"{'frozen':<28}{cost.frozen((problem,), find(gpu)).seconds * 1e6:9.1f} us (model)" in out
    for candidate in plan.candidates:
        # the time of a candidate of one part stands in its own line
        for part in candidate.parts if len(candidate.parts) > 1 else ():
            assert f"{part.name:<25}{part.seconds * 1e6:9.1f} us (model)" in out
    assert "backward: " in out
    assert re.search(r"this plan +\d+\.\d% +\(model\)", out)


def test_json_holds_the_same(capsys):
    assert cli.main([*ASK, "--backward", "--json", "--dropout", "--bias"]) == 0
    actual = json.loads(capsys.readouterr().out)
    assert actual["device"]["name"] == "H200"
    assert list(actual["directions"]) == ["forward", "backward"]
    forward = actual["directions"]["forward"]
    (problem,) = forward["problems"]
    assert problem["dropout"] is True
    assert problem["bias"] is True
    for candidate in (*forward["candidates"].values(), forward["frozen"]):
        assert candidate["model_us"] == pytest.approx(sum(part["model_us"] for part in candidate["parts"]))
    assert actual["lora_tax_model"] > 0


def test_a_case_by_name_and_forward_alone(capsys):
    assert cli.main(["plan", "--gpu", "a100", "--case", "llama-3.1-8b.down", "--m", "512"]) == 0
    out = capsys.readouterr().out
    assert "M 512, N 4096, K 14336, R 16" in out
    assert "backward" not in out


@pytest.mark.parametrize("quant", FORMATS)
def test_a_quantized_base(quant, capsys):
    """Each candidate decodes first, or in its main loop; the LoRA tax is over a frozen layer that decodes too."""
    ask = ["plan", "--gpu", "H200", "--shape", "16,4096,4096", "--backward", "--quant", quant]
    assert cli.main([*ask, "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    moved = 2 * 4096**2 + stored_bytes(quant, 4096, 4096)
    seconds = 1e6 * moved / find("H200").sustained_bandwidth
    for direction in actual["directions"].values():
        assert direction["problems"][0]["format"] == quant
        assert ("triton packed" in direction["candidates"]) == (quant in DECODED_IN_LOOP)
        for name, one in (*direction["candidates"].items(), ("frozen", direction["frozen"])):
            first = one["parts"][0]
            if name != "triton packed":
                assert first == {"name": f"decode {quant} of the layer", "model_us": pytest.approx(seconds)}
    few_rows, is_codec = quant in ("nf4", "fp4"), quant == "intx"
    assert len(actual["notes"]) == few_rows + is_codec
    assert cli.main(ask) == 0
    out = capsys.readouterr().out
    assert f"adapter_dtype float32, base {quant}" in out
    assert out.count(f"decode {quant} of the layer") >= 6
    assert ("packed is chosen only where measured" in out) == (quant in DECODED_IN_LOOP)
    assert ("to bitsandbytes' kernel" in out, "passes over the weight several times" in out) == (few_rows, is_codec)


def test_quantized_experts(capsys):
    assert cli.main(["plan", "--gpu", "H200", "--moe", "qwen3-30b-a3b", "--quant", "mxfp4", "--backward"]) == 0
    out = capsys.readouterr().out
    assert all(f"decode mxfp4 of {name}" in out for name in ("gate_up", "down"))
    assert "note:" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu", "H200", "--shape", "1,64,100", "--quant", "mxfp4"], "of 32 elements of a row, and K is 100"),
        (["--gpu", "H200", "--shape", "1,64,100", "--quant", "nvfp4"], "of 16 elements of a row, and K is 100"),
        (["--gpu", "H200", "--shape", "1,64,100", "--quant", "nf4_torchao"], "multiples of 16384 elements"),
        (["--gpu", "H200", "--moe", "qwen3-30b-a3b", "--quant", "nvfp4"], "no library stores stacks of experts so"),
        (["--gpu", "H20", "--shape", "1,2,3"], "did you mean H200"),
        (["--gpu", "H200", "--shape", "1,2"], "--shape 8192,4096,4096"),
        (["--gpu", "H200", "--shape", "1,2,x"], "--shape 8192,4096,4096"),
        (["--gpu", "H200", "--shape", "0,2,3"], "--shape 0,2,3: it must be tokens, out and in features, each from 1"),
        (["--gpu", "H200", "--shape", "1,2,3", "--rank", "0"], "--rank 0: it must be at least 1"),
        (["--gpu", "H200", "--case", "llama"], "case 'llama' is not known"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, message, capsys):
    assert cli.main(["plan", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_a_gpu_one_must_be_named(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["plan", "--shape", "1,2,3"]) == 2
    assert "--gpu H200" in capsys.readouterr().err
