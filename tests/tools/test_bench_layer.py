"""`lorafuse bench layer`: the layer is transformers' own, the gate sees wrong parts, taxes have two floors."""

import argparse
import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lorafuse.bench import figures, layer, peaks, plugins
from lorafuse.bench.layer import DecoderLayer
from lorafuse.bench.problem import wrong
from lorafuse.cli import main
from lorafuse.testing.cases import DECODERS, find_any, find_decoder
from lorafuse.testing.numerics import relative_l2

CPU = torch.device("cpu")
# grouped queries, features of all queries unlike the hidden size
TINY = DecoderLayer("tiny", "float32", M=24, H=48, Q=96, KV=32, D=16, I=56, R=3)
BASELINES = {one.name: one for one in plugins.load("layer", CPU)}
BF16 = DecoderLayer(**{**vars(TINY), "dtype": "bfloat16"})
# the compiled one takes longer than all others
EVERY = [
    (one.name, problem)
    for problem in (TINY, BF16)
    for one in plugins.load("layer", CPU, dtype=problem.dtype)
    if not one.absent and one.name != "peft-compiled"
]
GIVEN = {problem.dtype: problem.inputs(CPU) for problem in (TINY, BF16)}
REFERENCES = {problem.dtype: problem.references(GIVEN[problem.dtype]) for problem in (TINY, BF16)}


def built(name, problem=TINY):
    one = BASELINES[name]
    return one.variant(problem, GIVEN[problem.dtype]), REFERENCES[problem.dtype][one.trains]


def test_the_variants_are_all_there():
    settings = {"peft", "peft-half", "peft-autocast", "addmm-group", "lorafuse", "lorafuse-group", "full"}
    assert settings | {"frozen", "frozen-lorafuse-group", "unsloth", "axolotl"} <= BASELINES.keys()
    assert BASELINES["peft-compiled"].absent == ""
    assert list(BASELINES)[:2] == ["frozen", "full"]
    assert {one.trains for one in BASELINES.values() if one.name.startswith("frozen")} == {"nothing"}


@pytest.mark.parametrize(("name", "problem"), EVERY, ids=[f"{name}-{problem.dtype}" for name, problem in EVERY])
def test_every_variant_computes_the_formula(name, problem):
    assert wrong(*built(name, problem), problem.shaped) == ""


def test_every_gradient_is_checked():
    layers = ["q", "k", "v", "o", "gate", "up", "down"]
    factors = {f"d{part} {name}" for name in layers for part in "ab"}
    weights = {f"dw {name}" for name in layers} | {"dnorm 0", "dnorm 1"}
    expected = REFERENCES["float32"]
    assert expected["nothing"].keys() == {"y", "dx"}
    assert expected["adapters"].keys() == {"y", "dx"} | factors
    assert expected["base"].keys() == {"y", "dx"} | weights
    assert built("full")[0].leaves.keys() == {"dx"} | weights


def test_frozen_is_transformers_layer():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=TINY.H, num_attention_heads=TINY.Q // TINY.D, num_key_value_heads=TINY.KV // TINY.D,
        head_dim=TINY.D, intermediate_size=TINY.I, attn_implementation="sdpa",
    )  # fmt: skip
    actual, given = LlamaDecoderLayer(config, 0), GIVEN["float32"]
    for name, one in given.linears.items():
        part = actual.mlp if name in ("gate", "up", "down") else actual.self_attn
        getattr(part, f"{name}_proj").weight = nn.Parameter(one.w, requires_grad=False)
    for norm, weight in zip((actual.input_layernorm, actual.post_attention_layernorm), given.norms, strict=True):
        norm.weight = nn.Parameter(weight, requires_grad=False)
    x = given.linears["q"].x[None].clone().requires_grad_()
    rotary = LlamaRotaryEmbedding(config)(x, torch.arange(TINY.M)[None])
    y = actual(x, position_embeddings=rotary, attention_mask=None)
    y = y[0] if isinstance(y, tuple) else y
    (dx,) = torch.autograd.grad(y, x, given.linears["q"].dy[None])
    results = built("frozen")[0].results()
    assert relative_l2(results["y"], y[0].detach()) < 1e-6
    assert relative_l2(results["dx"], dx[0]) < 1e-6


@pytest.mark.parametrize("target", ["q", "k", "v", "o", "gate", "up", "down"])
@pytest.mark.parametrize("factor", [0.0, 2.0], ids=["dropped", "doubled"])
def test_gate_sees_a_wrong_adapter_of_any_layer(target, factor):
    given, peft = GIVEN["float32"], BASELINES["peft"].module

    def linear(one):
        call, trained = peft.linear(one)
        if one is given.linears[target]:
            call.scaling["default"] *= factor
        return call, trained

    variant = TINY.variant("broken", SimpleNamespace(linear=linear), given)
    assert "is wrong by" in wrong(variant, REFERENCES["float32"]["adapters"], TINY.shaped)


def test_the_layer_is_compiled_and_autocast_as_a_whole(monkeypatch):
    compiled, call = [], object()
    monkeypatch.setattr(torch, "compile", lambda one, dynamic: compiled.append(one) or one)
    assert BASELINES["peft-compiled"].module.layer(call) is call
    assert compiled == [call]
    run = BASELINES["peft-autocast"].module.layer(lambda x: torch.is_autocast_enabled(x.device.type))
    assert run(torch.ones(1, dtype=torch.bfloat16))


def test_work_is_of_linears_and_half_of_the_scores():
    M, linears = TINY.M, [one.w.numel() for one in GIVEN["float32"].linears.values()]
    ranks = sum(TINY.R * sum(one.w.shape) for one in GIVEN["float32"].linears.values())
    scores = 2 * M * M * TINY.Q
    work = {trains: TINY.work(trains) for trains in ("nothing", "base", "adapters")}
    assert work["nothing"]["forward"].flops == 2 * M * sum(linears) + scores
    assert work["nothing"]["backward"].flops == 2 * M * sum(linears) + 2 * scores
    assert work["base"]["backward"].flops == 4 * M * sum(linears) + 2 * scores
    assert TINY.floors()["tax"] == pytest.approx(6 * M * ranks / (4 * M * sum(linears) + 3 * scores))
    # what q, k and v, and gate and up read and write once: three passes over x fewer than one by one
    alone = sum(t.numel() for one in GIVEN["float32"].linears.values() for t in (one.w,))
    alone += M * sum(sum(one.w.shape) for one in GIVEN["float32"].linears.values())
    assert work["nothing"]["forward"].bytes == 4 * (alone - 3 * M * TINY.H + 2 * M * (TINY.Q + TINY.KV + 2 * TINY.H))


def seconds(*total):
    return {"forward": [[one / 4 for one in total]], "backward": [[3 * one / 4 for one in total]]}


def test_tax_is_over_both_floors_round_by_round():
    flops = {part: {"flops": 1, "bytes": 1} for part in ("forward", "backward")}
    times = {
        "frozen": ("nothing", (2.0, 4.0, 8.0)),
        "frozen-lorafuse-group": ("nothing", (1.0, 2.0, 8.0)),
        "lorafuse-group": ("adapters", (1.5, 4.0, 8.8)),
    }
    variants = {name: {"trains": trains, "seconds": seconds(*total)} for name, (trains, total) in times.items()}
    work, rates = {trains: flops for trains, _ in times.values()}, {"flops_per_s": 1.0, "bytes_per_s": 1.0}
    result = figures.derive({"kind": "layer", "variants": variants, "work": work, "peaks": rates})
    assert result["floor"] == dict.fromkeys(("forward", "backward"), "frozen-lorafuse-group")
    own = result["variants"]["lorafuse-group"]
    # ratios of rounds: 1.5, 2.0, 1.1 over the fastest frozen; 0.75, 1.0, 1.1 over the frozen layer of transformers
    assert own["tax"] == pytest.approx(0.5)
    assert own["tax_over_frozen"] == pytest.approx(0.0)
    assert "tax_over_frozen" not in figures.derive(result | {"kind": "linear", "variants": {
        name: {"trains": one["trains"], "seconds": one["seconds"]} for name, one in variants.items()
    }})["variants"]["lorafuse-group"]  # fmt: skip


def test_command_writes_what_its_raw_rounds_give(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peaks, "matmul_flops", lambda dtype, device: 1e11)
    monkeypatch.setattr(peaks, "copy_bytes", lambda device: 1e10)
    shape = ["--shape", "40,48,16,8,56", "--m", "24", "--rank", "3", "--rounds", "3", "--device", "cpu"]
    names = ["full", "peft", "addmm-group", "lorafuse", "lorafuse-group", "frozen-lorafuse-group"]
    file = tmp_path / "layer.json"
    assert main(["bench", "layer", *shape, "--dtype", "float32", "--only", *names, "--json", str(file)]) == 0
    assert "40,48,16,8,56: M 24, H 40, Q 48, KV 16, D 8, I 56, R 3, float32" in capsys.readouterr().out
    content = json.loads(file.read_text())
    (result,) = content["results"]
    assert result["kind"] == content["kind"] == "layer"
    assert result["variants"].keys() == {"frozen", *names}
    assert all("tax_over_frozen" in one and one["peak_bytes"] > 0 for one in result["variants"].values())
    # gate, up and their product against what is kept of a group
    held = {name: one["between_bytes"] for name, one in result["variants"].items()}
    assert held["lorafuse-group"] < held["lorafuse"]
    assert held["frozen-lorafuse-group"] < held["frozen"]
    assert figures.derive(copy.deepcopy(result)) == result


def test_cases_are_those_of_models():
    args = argparse.Namespace(case=["llama-3.1-8b.layer"], all=False, shape=None, m=[8], rank=[4, 16], dtype="bfloat16")
    sized = "llama-3.1-8b.layer", "bfloat16", 8, 4096, 4096, 1024, 128, 14336
    assert layer.cases(args) == [DecoderLayer(*sized, 4), DecoderLayer(*sized, 16)]
    assert find_any("smollm2-135m.layer") == "layer"
    assert all(one.KV % one.D == one.Q % one.KV == 0 for one in DECODERS.values())
    assert find_decoder("smollm2-135m.layer").Q // find_decoder("smollm2-135m.layer").D == 9


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--shape", "40,48,16,8"], "hidden size, features of queries"),
        (["--shape", "40,48,16,12,56"], "D must be even and divide KV, KV must divide Q"),
        (["--shape", "40,40,16,8,56"], "D must be even and divide KV, KV must divide Q"),
        (["--shape", "40,48,15,5,56"], "D must be even and divide KV, KV must divide Q"),
        (["--shape", "40,48,16,8,56", "--rank", "17"], "has layers of 16 features, no rank above"),
        (["--case", "smollm2-135m.qkv"], "smollm2-135m.layer"),
    ],
)
def test_bad_input_gets_one_line(options, line, capsys):
    assert main(["bench", "layer", *options, "--device", "cpu"]) != 0
    assert line in capsys.readouterr().err
