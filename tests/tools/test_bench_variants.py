"""The variants of `lorafuse bench model`: dtypes, autocast, optimizer, loss curves, whole models of peers."""

import argparse
import copy
import functools
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import fake_peers
import gguf
import pytest
import torch
import warm_python
from tiny_transformers import TINY, TINY_MOE

from lorafuse.bench import curves, model, model_run, plugins, training, transformer
from lorafuse.bench.result import Wrong
from lorafuse.bench.training import Trainee
from lorafuse.bench.transformer import Given
from lorafuse.bench.transformer_cost import VARIANTS, Sizes
from lorafuse.demo import model as demo_model

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _tiny_models(monkeypatch):
    monkeypatch.setitem(transformer.MODELS, "tiny", TINY)
    monkeypatch.setitem(transformer.MODELS, "tiny-moe", TINY_MOE)
    monkeypatch.setattr(model_run.peaks, "matmul_flops", lambda dtype, device: 2.0e9)


def run(**changes):
    parser = argparse.ArgumentParser()
    model.add_arguments(parser)
    short = {"case": ["tiny"], "layers": 2, "tokens": 8, "accumulate": [1], "checkpointing": "off", "rank": 4}
    engine = {"device": "cpu", "dtype": "float32", "rounds": 2, "seconds": 60.0, "timeout": 300.0, "warm_x": None}
    engine |= {"only": None, "baselines": None, "graphs": True, "variants": list(VARIANTS)}
    args = argparse.Namespace(**vars(parser.parse_args([])) | short | engine | changes)
    (case,) = model.cases(args)
    return model.run_case(case, args, CPU, lambda *_: None)


def made(name, tiny=TINY, dtype=BF16, checkpointing=False):
    """A variant's trainee and facts, two layers deep, and what it was built from."""
    given = Given(tiny, Sizes.of(tiny.config(num_hidden_layers=2)), dtype, CPU, 4, 8, checkpointing)
    (one,) = (one for one in plugins.load("model", CPU) if one.name == name)
    return *training.built(one, given), given


def test_bfloat16_is_held_to_the_three_way_rule():
    first = run(dtype="bfloat16")["parity"]["first_micro_batch"]["lorafuse"]
    for what in ("logits", "gradients"):
        # one rounding at least, and much less than what the adapters do
        assert 2.0**-8 < first[f"{what}_bound"] < first["adapters_effect"]
        assert first[f"{what}_error"] <= first[f"{what}_bound"]


EVERY = ["frozen", "full", "addmm", "addmm-saved", "addmm-saved-fp32", "peft", "peft-autocast", "peft-compiled"]
EVERY += ["peft-half", "lorafuse", "lorafuse-autocast", "lorafuse-half"]


def test_every_variant_trains_and_is_compared(monkeypatch):
    # one of them is compiled: a layer, and without Inductor, which takes half a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    result = run(dtype="bfloat16", variants=None, layers=1)
    assert sorted(result["variants"]) == sorted(EVERY), result["failed"]
    assert {name: reason for name, reason in result["failed"].items() if name != "frozen-lorafuse"} == {}
    assert result["failed"]["frozen-lorafuse"] == "without experts it is the frozen model"
    adapted = set(EVERY) - {"frozen", "full", "peft"}
    assert result["parity"]["first_micro_batch"].keys() == result["parity"]["losses"].keys() == adapted
    assert result["optimizer"] == "AdamW, fused, moments in each parameter's dtype"
    assert {result["variants"][name]["patched"] for name in ("addmm", "lorafuse", "lorafuse-half")} == {7}
    # two moments in the dtype of the adapters
    small, large = (result["variants"][name]["optimizer_bytes"] for name in ("peft-half", "peft"))
    assert small < 0.6 * large


def test_frozen_experts_of_our_own_are_the_floor_where_they_are_faster():
    result = run(case=["tiny-moe"], variants=["frozen", "frozen-lorafuse", "lorafuse", "peft"])
    assert {"frozen", "frozen-lorafuse"} <= result["variants"].keys()
    assert result["floor"]["step"] in ("frozen", "frozen-lorafuse")
    assert result["parity"]["frozen-lorafuse_from_base"] < 1e-4
    assert "tax" not in result["variants"]["frozen-lorafuse"]


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("frozen", "peft-compiled")])
def test_every_optimizer_is_fused(name):
    one, _, _ = made(name)
    assert one.optimizer.defaults["fused"] is True
    half = name in ("full", "peft-half", "lorafuse-half", "addmm", "addmm-saved")
    assert {p.dtype for p in one.trained} == {BF16 if half else torch.float32}


@pytest.mark.parametrize("name", ["peft", "peft-autocast", "lorafuse", "lorafuse-autocast"])
def test_autocast_is_around_forward(name):
    one, facts, _ = made(name)
    seen = []
    one.model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    one.evaluate(torch.arange(8)[None])
    assert seen == [name.endswith("autocast")] == [bool(facts.get("autocast"))]
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", ["addmm", "addmm-saved", "addmm-saved-fp32", "lorafuse-half", "peft-autocast"])
def test_a_wrong_variant_has_no_numbers(name, monkeypatch):
    built = training.built

    def wrong(baseline, given):
        one, facts = built(baseline, given)
        if baseline.name == name:
            for parameter in (p for n, p in one.model.named_parameters() if "lora_B" in n):
                parameter.data.mul_(1.5)
        return one, facts

    monkeypatch.setattr(training, "built", wrong)
    with pytest.raises(Wrong, match=f"{name}: logits of the first micro-batch"):
        run(variants=["peft", name], dtype="bfloat16")


def test_adapters_are_the_same_whatever_the_variant_and_begin_as_pefts():
    values = [dict(made(name)[0].model.named_parameters()) for name in ("peft", "lorafuse")]
    names = [name for name in values[0] if "lora_" in name]
    assert len(names) == 28
    assert all(torch.equal(values[0][name], values[1][name]) for name in names)
    one, _, given = made("peft")
    whole = one.model
    assert whole.peft_config["default"].lora_alpha == 8
    transformer.set_adapters(whole, b_std=0.0)
    assert all(not p.any() for name, p in whole.named_parameters() if "lora_B" in name)
    # PEFT's own bound
    a = next(p for name, p in whole.named_parameters() if "lora_A" in name)
    assert 0.9 * a.shape[1] ** -0.5 < a.abs().max() <= a.shape[1] ** -0.5
    assert given.targets == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


def test_loss_curves_begin_at_the_base_and_are_compared_step_by_step():
    result = run(steps=6, accumulate=[2])
    actual = result["curves"]
    assert actual.keys() == {"full", "peft", "lorafuse"}
    starts = {name: one["losses"][0] for name, one in actual.items()}
    # B is 0, and the trained base is the frozen one again
    assert max(starts.values()) - min(starts.values()) < 1e-5
    assert actual["peft"]["losses"] != [starts["peft"]] * 6
    assert [len(one["losses"]) for one in actual.values()] == [6] * 3
    ours = actual["lorafuse"]["from_peft"]
    assert ours["low"] <= ours["median"] <= ours["high"]
    assert ours["largest"] < 1e-4
    recorded = {name: {"rate": one["rate"], "losses": one["losses"]} for name, one in actual.items()}
    assert curves.summary(copy.deepcopy(recorded)) == actual
    assert run(steps=0)["curves"] == {}


def test_a_real_model_is_trained_on_text(monkeypatch):
    """Steps, curves and held-out blocks take it; the wiring, by a small model that counts as real."""
    real = replace(TINY, name="real", real=True)
    build, seen = transformer.build, []

    class Texts:
        def __init__(self, steps, size, device):
            seen.append((steps, size))
            self.ids = torch.arange(steps * 8).remainder(200).view(steps, *size)
            self.held_out = torch.arange(32).view(4, 8)

        def __call__(self, step):
            return self.ids[step % len(self.ids)]

    monkeypatch.setitem(transformer.MODELS, "real", real)
    monkeypatch.setattr(transformer, "build", lambda model, *rest: build(replace(model, real=False), *rest))
    monkeypatch.setattr(model_run, "Texts", Texts)
    result = run(case=["real"], layers=None, steps=5, variants=["peft", "lorafuse"])
    assert seen == [(5, (1, 1, 8))]
    assert (result["weights"], result["data"]) == ("real", "gsm_symbolic")
    ours, peft = result["curves"]["lorafuse"], result["curves"]["peft"]
    assert ours["held_out"] == pytest.approx(peft["held_out"], abs=1e-5)
    assert ours["from_peft"]["largest"] < 1e-4


def test_the_real_weights_know_the_text(monkeypatch):
    # transformers parses the file four times, and makes the names of all tensors once a module
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
    # text and weights have the same tokenizer
    monkeypatch.setattr(demo_model, "load_tokenizer", functools.cache(demo_model.load_tokenizer))
    texts, sizes = transformer.Texts(2, (1, 1, 96), CPU), Sizes.of(transformer.MODELS["smollm2-135m"].config())
    assert texts(0).shape == (1, 1, 96)
    assert torch.equal(texts(2), texts(0))
    assert not torch.equal(texts(1), texts(0))
    assert texts.held_out.shape == (4, 96)
    assert not any(torch.equal(texts(step)[0, 0], block) for step in (0, 1) for block in texts.held_out)
    given = Given(transformer.MODELS["smollm2-135m"], sizes, torch.float32, CPU, 4, 96, False)
    # of random tokens a trained model knows nothing: ln of its 49,152 words is 10.8
    one = Trainee("frozen", given.base, "nothing")
    assert one.evaluate(texts(0)[0]) < 8 < one.evaluate(training.batches(49152, (1, 1, 96), 0, CPU)[0])


def test_steps_of_curves_are_those_of_a_real_models_first_case():
    parser = argparse.ArgumentParser()
    model.add_arguments(parser)
    engine = {"device": "cpu", "dtype": "float32", "rounds": 2, "seconds": 60.0, "warm_x": None, "only": None}
    usual = vars(parser.parse_args([])) | engine | {"baselines": None, "graphs": True}
    assert [case.steps for case in model.cases(argparse.Namespace(**usual))] == [30, 0, 0, 0, 0, 0]
    other = {"case": ["tiny"], "layers": 1, "accumulate": [1], "checkpointing": "off"}
    assert [case.steps for case in model.cases(argparse.Namespace(**usual | other))] == [0]
    assert [case.steps for case in model.cases(argparse.Namespace(**usual | other | {"steps": 5}))] == [5]


PEER = """
LABEL, REQUIRES, ISOLATED = "a peer", ("json",), True
FORMS = {"": {}, "wrong": {"factor": 2.0}, "broken": {"factor": None}}

def model(given, factor=1.0):
    if factor is None:
        raise RuntimeError("no such model")
    whole = given.adapted()
    for name, parameter in whole.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(factor)
    return whole, {"autocast": False}
"""


def test_a_peers_model_runs_in_its_process_and_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", warm_python.PeftPopen)
    folder = tmp_path / "baselines"
    shutil.copytree(plugins.folder(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "peer.py").write_text(PEER)
    names = ["peft", "lorafuse", "peer", "peer-wrong", "peer-broken"]
    result = run(baselines=folder, variants=names)
    assert result["variants"].keys() == {"peft", "lorafuse", "peer"}
    peer, peft = result["variants"]["peer"], result["variants"]["peft"]
    assert peer["first_loss"] == pytest.approx(peft["first_loss"], abs=1e-5)
    assert peer["last_loss"] == pytest.approx(peft["last_loss"], abs=1e-5)
    assert (peer["trained"], peer["weights_bytes"]) == (peft["trained"], peft["weights_bytes"])
    assert result["parity"]["losses"]["peer"]["largest_difference"] < 1e-5
    assert result["failed"].keys() == {"peer-wrong", "peer-broken"}
    assert "begins at a loss of" in result["failed"]["peer-wrong"]
    assert result["failed"]["peer-broken"] == "RuntimeError: no such model"


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    fake_peers.install(tmp_path / "fakes")
    monkeypatch.syspath_prepend(tmp_path / "fakes")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fakes"), prepend=os.pathsep)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("unsloth", "axolotl")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["unsloth", "axolotl"])
def test_a_peers_whole_model_is_made_by_its_own_functions(fakes, name):
    given = Given(TINY, Sizes.of(TINY.config(num_hidden_layers=2)), torch.float32, CPU, 4, 8, False)
    (one,) = plugins.load_file(plugins.folder() / f"{name}.py", "model", torch.device("cuda"))
    assert (one.isolated, one.peer, one.label) == (True, True, name.capitalize())
    whole, facts = one.module.model(given)
    assert facts == {"autocast": True}
    ids = training.batches(256, (1, 1, 8), 0, CPU)[0]
    expected = Trainee("peft", given.adapted()).evaluate(ids)
    assert Trainee(name, whole).evaluate(ids) == pytest.approx(expected, rel=1e-5)
    if name == "axolotl":
        assert sys.modules["axolotl.monkeypatch.lora_kernels"].patched == ["llama"]
