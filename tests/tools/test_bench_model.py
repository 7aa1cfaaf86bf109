"""`lorafuse bench model`: its figures, its checks against planted errors, memory that runs out, bad input."""

import argparse
import io
import json
import statistics
from dataclasses import replace
from unittest import mock

import pytest
import torch
from rich.console import Console
from tiny_transformers import TINY, TINY_64, TINY_MOE

from lorafuse.bench import figures, model, model_run, training, transformer
from lorafuse.bench.result import Wrong
from lorafuse.bench.training import Trainee
from lorafuse.bench.transformer_cost import VARIANTS, Sizes, Training, step_flops, training_bytes
from lorafuse.cli import main
from lorafuse.integrations import hf_experts, hf_peft, hf_quantized, patch

CPU = torch.device("cpu")
# what matrix products reach is made up here, so that it is known
PEAK = 2.0e9
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory.\nTried to")


@pytest.fixture(autouse=True)
def _tiny_models(monkeypatch):
    monkeypatch.setitem(transformer.MODELS, "tiny", TINY)
    monkeypatch.setitem(transformer.MODELS, "tiny-moe", TINY_MOE)
    monkeypatch.setitem(transformer.MODELS, "tiny-64", TINY_64)
    monkeypatch.setattr(model_run.peaks, "matmul_flops", lambda dtype, device: PEAK)
    # several threads wait for each other longer than such products take
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def options(**changes):
    """Arguments as the command gives them, of a run that is short."""
    parser = argparse.ArgumentParser()
    model.add_arguments(parser)
    short = {"case": ["tiny"], "layers": 2, "tokens": 8, "accumulate": [1], "checkpointing": "off", "rank": 4}
    short["variants"] = list(VARIANTS)
    engine = {"device": "cpu", "dtype": "float32", "rounds": 2, "seconds": 60.0}
    engine |= {"only": None, "baselines": None, "graphs": True, "warm_x": None, "timeout": 60.0}
    return argparse.Namespace(**vars(parser.parse_args([])) | short | engine | changes)


def run(progress=lambda *_: None, **changes):
    """The result of the only case."""
    args = options(**changes)
    (case,) = model.cases(args)
    return model.run_case(case, args, CPU, progress)


def test_every_figure_of_a_result():
    shown = []
    with mock.patch.object(hf_peft, "run_linear", wraps=hf_peft.run_linear) as calls:
        result = run(progress=lambda *call: shown.append(call), accumulate=[3], variants=list(VARIANTS))
    # 14 layers of one variant: a micro-batch in the comparison, three in each of three steps, two in the measured one
    assert calls.call_count == 14 * (1 + 3 * 3 + 2)
    assert json.loads(json.dumps(result)) == result
    expected = {"model": "tiny", "layers": 2, "layers_of_model": 4, "vocabulary": 256, "weights": "random"}
    expected |= {"accumulate": 3, "batch": 1, "tokens": 8, "tokens_per_step": 24, "checkpointing": False, "R": 4}
    expected |= {"dtype": "float32", "turns": [list(VARIANTS)], "failed": {}, "peak_flops_per_s": PEAK}
    assert {key: result[key] for key in expected} == expected
    sizes = replace(Sizes.of(TINY.config()), layers=2)
    frozen, full, peft, ours = (result["variants"][name] for name in VARIANTS)
    for name, figure in result["variants"].items():
        step = figure["step"]
        assert 0 < step["p20"] <= step["median"] <= step["p80"]
        assert figure["rounds"] == 2
        assert figure["tokens_per_s"] == pytest.approx(24 / step["median"])
        assert figure["model_flops"] == step_flops(sizes, name, 4, 24, 8)
        assert figure["mfu"] == pytest.approx(figure["model_flops"] / step["median"] / PEAK)
        ratios = (a / b for a, b in zip(figure["seconds"][0], full["seconds"][0], strict=True))
        assert figure["ratio_to_full"] == pytest.approx(statistics.median(ratios))
        assert figure["gradient_bytes"] == 4 * figure["trained"]
        (own,), (floor,) = figure["seconds"], frozen["seconds"]
        tax = pytest.approx(statistics.median(a / b for a, b in zip(own, floor, strict=True)) - 1)
        assert figure.get("tax") == (tax if name in ("peft", "lorafuse") else None)
        # two moments, and a counter of each parameter
        assert 0 <= figure["optimizer_bytes"] - 8 * figure["trained"] <= 0.02 * figure["optimizer_bytes"]
        assert figure["step_peak_bytes"] > figure["gradient_bytes"]
        assert figure["peak_bytes"] == sum(figure[f"{p}_bytes"] for p in ("weights", "optimizer", "step_peak"))
    # 6 FLOPs for each weight of an adapter over 4 for each frozen one, and attention
    frozen_flops = 4 * sizes.active_weights() + 12 * 2 * sizes.D * 8
    assert result["floors"]["tax"] == pytest.approx(6 * sizes.adapter_weights(4, 0) / frozen_flops)
    assert frozen["trained"] == frozen["optimizer_bytes"] == 0
    assert frozen["first_loss"] != frozen["last_loss"], "each step has tokens of its own"
    assert full["trained"] == full["parameters"] == peft["parameters"] == full["weights_bytes"] / 4
    assert peft["trained"] == ours["trained"] == sizes.adapter_weights(4, 0)
    assert (ours["patched"], ours["skipped"]) == (14, 0)
    # losses move, and PEFT's and ours are the same
    assert peft["first_loss"] != peft["last_loss"]
    assert ours["last_loss"] == pytest.approx(peft["last_loss"], abs=1e-5)
    parity = result["parity"]
    assert parity["losses"]["lorafuse"]["steps"] == 3
    assert parity["losses"]["lorafuse"]["largest_difference"] < 1e-5
    assert max(parity["full_from_base"], parity["frozen_from_base"]) < 1e-5
    assert parity["first_micro_batch"]["lorafuse"]["adapters_effect"] > 0.1
    assert [text for _, _, text in shown][-1] == "memory of lorafuse"
    assert all(0 <= done <= total for done, total, _ in shown)


@pytest.mark.parametrize(("quant", "bits"), [("nf4", 4.5), ("int8", 8.5)])
def test_a_quantized_base(quant, bits):
    """Without its training, and with its memory; parameters are those of the dense base."""
    pytest.importorskip("bitsandbytes")
    with mock.patch.object(hf_quantized, "run_linear", wraps=hf_quantized.run_linear) as calls:
        result = run(quant=quant, variants=list(VARIANTS), case=["tiny-64"])
    assert calls.call_count == 14 * (1 + 3 + 1)
    assert result["case"] == f"tiny-64 over {quant}, accumulate 1, checkpointing off"
    assert (result["quant"], result["failed"]) == (quant, {})
    assert result["absent"] == {"full": f"it does not run over a base in {quant}"}
    frozen, peft, ours = (result["variants"][name] for name in ("frozen", "peft", "lorafuse"))
    sizes = replace(Sizes.of(TINY_64.config()), layers=2)
    packed = sizes.active_weights() - sizes.vocabulary * sizes.H
    rest = frozen["weights_bytes"] - 4 * (frozen["parameters"] - packed)
    # absmax, code and nested statistics of small weights
    assert packed * int(bits) / 8 < rest < packed * bits / 8 + 14 * 2000
    assert ours["weights_bytes"] == peft["weights_bytes"] == frozen["weights_bytes"] + 4 * peft["trained"]
    assert ours["last_loss"] == pytest.approx(peft["last_loss"], abs=1e-5)
    assert result["parity"]["first_micro_batch"]["lorafuse"]["adapters_effect"] > 0.1
    assert {"tax", "peak_bytes"} <= ours.keys()


def test_experts_run_fused_and_are_compared():
    with mock.patch.object(hf_experts, "lora_experts", wraps=hf_experts.lora_experts) as calls:
        result = run(case=["tiny-moe"], checkpointing="on", variants=["peft", "lorafuse"])
    # two layers, twice with checkpointing, in the comparison, the three steps, and the measured one
    assert calls.call_count == 2 * 2 * 5
    assert result["variants"].keys() == {"peft", "lorafuse"}
    # four linear layers and one block of experts in each layer
    assert result["variants"]["lorafuse"]["patched"] == 10
    assert result["parity"]["losses"]["lorafuse"]["steps"] == 3
    assert result["variants"]["peft"]["trained"] == replace(Sizes.of(TINY_MOE.config()), layers=2).adapter_weights(4, 8)


def _scaled(patched):
    for module in patched.modules():
        # attention has a number of that name
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 1.01


def _doubled_gradients(patched):
    for parameter in patched.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: 2 * gradient)


def _dead_gradient(patched):
    next(p for p in patched.parameters() if p.requires_grad).register_hook(torch.zeros_like)


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (_scaled, "logits of the first micro-batch"),
        (_doubled_gradients, "gradients of the first micro-batch"),
        (_dead_gradient, "no gradient reaches base_model"),
    ],
)
@pytest.mark.parametrize("names", [["peft", "lorafuse"], ["lorafuse"]])
def test_a_wrong_patch_has_no_numbers(planted, message, names, monkeypatch):
    def wrong_patch(patched):
        report = patch(patched)
        planted(patched)
        return report

    monkeypatch.setattr("lorafuse.patch", wrong_patch)
    with pytest.raises(Wrong, match=message):
        run(variants=names)


def test_losses_that_part_have_no_numbers(monkeypatch):
    def another_rate(self):
        _init(self)
        if self.name == "lorafuse":
            self.optimizer.param_groups[0]["lr"] = 0.1

    _init = Trainee.__post_init__
    monkeypatch.setattr(Trainee, "__post_init__", another_rate)
    with pytest.raises(Wrong, match="step 2: lorafuse has loss"):
        run(variants=["peft", "lorafuse"])


@pytest.mark.parametrize("apart", [False, True])
def test_another_base_has_no_numbers(apart, monkeypatch):
    observe = training.observe

    def observe_changed(one, *rest, **more):
        if not hasattr(one, "peft_config"):
            with torch.no_grad():
                one.get_output_embeddings().weight.mul_(1.5)
        return observe(one, *rest, **more)

    monkeypatch.setattr(training, "observe", observe_changed)
    monkeypatch.setattr(model_run, "fits", lambda needed, free: not apart)
    with pytest.raises(Wrong, match="full fine-tuning begins at a loss of"):
        run()


def _another_head(frozen):
    frozen.lm_head = torch.nn.Linear(*reversed(frozen.lm_head.weight.shape), bias=False)
    return frozen


def _no_backward(frozen):
    frozen.model.layers[0].register_forward_hook(lambda module, args, out: out.detach().requires_grad_())
    return frozen


@pytest.mark.parametrize(("planted", "text"), [(_another_head, "frozen model begins"), (_no_backward, "no gradient")])
def test_a_wrong_frozen_model_has_no_numbers(planted, text, monkeypatch):
    frozen = transformer.frozen
    monkeypatch.setattr(transformer, "frozen", lambda base: planted(frozen(base)))
    with pytest.raises(Wrong, match=text):
        run(variants=["frozen", "peft"])


def test_a_loss_that_is_not_finite_has_no_numbers(monkeypatch):
    step = Trainee.step

    def broken(self, ids):
        step(self, ids)
        if self.name == "full":
            self.losses[-1] = float("nan")

    monkeypatch.setattr(Trainee, "step", broken)
    with pytest.raises(Wrong, match="full: the loss of step 1 is nan"):
        run()


def test_nothing_patched_is_an_error(monkeypatch):
    monkeypatch.setattr("lorafuse.patch", lambda patched: patch(torch.nn.Linear(2, 2)))
    with pytest.warns(UserWarning, match="patched nothing"), pytest.raises(Wrong, match="nothing was patched"):
        run(variants=["lorafuse"])


def _out_of_memory(method, *names, times=10**9, error=NO_MEMORY):
    """`method` of a trainee of those names, which runs out of memory the first `times` times."""
    original, left = getattr(Trainee, method), [times]

    def limited(self, ids):
        if self.name in names and left[0]:
            left[0] -= 1
            raise error
        return original(self, ids)

    return mock.patch.object(Trainee, method, limited)


@pytest.mark.parametrize(
    ("name", "method"), [("full", "step"), ("peft", "step"), ("frozen", "step"), ("lorafuse", "memory")]
)
def test_a_variant_out_of_memory_is_reported_and_the_others_go_on(name, method):
    with _out_of_memory(method, name):
        result = run()
    assert result["failed"] == {name: "out of memory: CUDA out of memory."}
    assert result["variants"].keys() == set(VARIANTS) - {name}
    assert result["turns"] == [["full"], ["frozen", "peft", "lorafuse"]]
    assert ("losses" in result["parity"]) == (name in ("full", "frozen") or method == "memory")
    printed = _printed(result)
    assert f"{name} failed: out of memory" in printed


def test_what_does_not_fit_beside_the_others_runs_apart():
    with _out_of_memory("step", "peft", times=1, error=RuntimeError("can't allocate memory: you tried")):
        result = run()
    assert result["failed"] == {}
    assert result["turns"] == [["full"], ["frozen", "peft", "lorafuse"]]
    assert result["variants"].keys() == set(VARIANTS)
    assert result["parity"]["full_from_base"] < 1e-5


def test_memory_that_runs_out_for_every_way_ends_the_case():
    with _out_of_memory("step", *VARIANTS), pytest.raises(MemoryError, match="lorafuse: out of memory"):
        run()


def test_another_error_is_not_taken_for_memory():
    broken = _out_of_memory("step", "peft", error=RuntimeError("shapes differ"))
    with broken, pytest.raises(RuntimeError, match="shapes differ"):
        run()


def test_where_peft_has_no_memory_it_is_said_that_nothing_was_compared(monkeypatch):
    observe = training.observe

    def limited(one, micro, gradients=True):
        if gradients and not any(type(m).__module__.startswith("lorafuse") for m in one.modules()):
            raise MemoryError("planted")
        return observe(one, micro, gradients)

    monkeypatch.setattr(training, "observe", limited)
    result = run(variants=["peft", "lorafuse"])
    assert result["failed"] == {"peft": "out of memory: planted"}
    assert result["variants"].keys() == {"lorafuse"}
    assert "nothing is compared with PEFT" in _printed(result)


def test_the_time_that_is_given_ends_a_case():
    result = run(rounds=50, seconds=0.0, variants=["peft"])
    assert result["variants"]["peft"]["rounds"] == figures.LEAST_ROUNDS


def _printed(result):
    console = Console(file=io.StringIO(), width=160)
    console.print(model.table(result))
    return console.file.getvalue()


def test_table_says_what_was_built_and_how_it_was_compared():
    printed = _printed(run())
    for message in (
        "of\n",
        "LoRA",
        "tokens/s",
        "MFU",
        "2 of 4 layers",
        "frozen and full and peft and lorafuse",
        "lorafuse: losses of 3 steps at most",
        "14 adapted layers patched",
    ):
        assert message.strip() in printed, message
    assert "(bound 1.0e-03)" in printed


def test_losses_before_memory_ran_out_are_compared(monkeypatch):
    step = Trainee.step

    def limited(self, ids):
        if self.name == "peft" and len(self.losses) == 2:
            raise NO_MEMORY
        step(self, ids)
        if self.name == planted[0]:
            self.losses[-1] += 0.1

    monkeypatch.setattr(Trainee, "step", limited)
    planted = [""]
    result = run(variants=["peft", "lorafuse"])
    assert result["parity"]["losses"]["lorafuse"]["steps"] == 2
    assert result["variants"].keys() == {"lorafuse"}
    planted[0] = "lorafuse"
    with pytest.raises(Wrong, match="step 1: lorafuse has loss"):
        run(variants=["peft", "lorafuse"])


@pytest.mark.parametrize("case", ["tiny", "tiny-moe"])
def test_what_was_estimated_holds_what_was_measured(case):
    actual = {}
    for on in (False, True):
        result = run(case=[case], checkpointing="on" if on else "off", tokens=96, layers=4)
        sizes = Sizes.of(transformer.MODELS[case].config())
        for name, figure in result["variants"].items():
            assert figure["peak_bytes"] <= training_bytes(sizes, name, Training(4, 96, 4, on)), (name, on)
            actual[name, on] = figure["step_peak_bytes"]
    assert all(actual[name, True] < actual[name, False] for name in VARIANTS)


def test_cases_are_every_combination():
    args = options(case=["tiny", "tiny-moe"], accumulate=[1, 4, 4], checkpointing="both")
    names = [case.name for case in model.cases(args)]
    assert len(names) == len(set(names)) == 2 * 2 * 2
    assert "tiny-moe, accumulate 4, checkpointing on" in names
    assert [case.model.name for case in model.cases(options(case=None, layers=None))] == ["smollm2-135m"]
    assert {case.model.name for case in model.cases(options(all=True, layers=None))} == set(transformer.MODELS)


def test_layers_are_those_of_the_hungriest_way_that_is_asked_for(monkeypatch):
    whole = Sizes.of(TINY.config())
    for names in (["full"], ["lorafuse"]):
        needed = training_bytes(replace(whole, layers=3), names[0], Training(4, 8, 4, False))
        monkeypatch.setattr(model, "free_bytes", lambda device, needed=needed: needed / 0.8)
        assert model.cases(options(variants=names, layers=None))[0].sizes == replace(whole, layers=3)
        assert model.cases(options(layers=None))[0].sizes.layers == (3 if names == ["full"] else 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"case": ["llama-3.1-8"]}, "the known ones: smollm2-135m, llama-3.1-8b, qwen3-30b-a3b"),
        ({"tokens": 1}, "--tokens 1: it must be at least 2"),
        ({"accumulate": [1, 0]}, "--accumulate 0: it must be at least 1"),
        ({"batch": 0}, "--batch 0"),
        ({"rank": 0}, "--rank 0"),
        ({"rounds": 0}, "--rounds 0"),
        ({"layers": 5}, "--layers 5: tiny has 4"),
        ({"layers": 3, "case": ["smollm2-135m"]}, "a real model of 30; leave it out"),
        ({"only": ["addmm"]}, "--only: .* by --variants"),
        ({"warm_x": True}, "--warm-x: .* by --variants"),
        ({"steps": -1}, "--steps -1: it must be at least 0"),
        ({"variants": ["addm"], "layers": None}, "--variants addm: it trains no model; the known ones: frozen, "),
        ({"graphs": False}, "--no-graphs"),
    ],
)
def test_bad_input_says_the_value_and_the_fix(changes, message):
    with pytest.raises(ValueError, match=message):
        model.cases(options(**changes))


def test_the_command_reports_a_model_that_does_not_fit_and_goes_on(tmp_path, monkeypatch, capsys):
    free = {"tiny": 10**9, "tiny-moe": 10**4}
    sizes = model.sizes_of

    def limited(one, args, device, tokens):
        with mock.patch.object(model, "free_bytes", return_value=free[one.name]):
            return sizes(one, args, device, tokens)

    monkeypatch.setattr(model, "sizes_of", limited)
    arguments = ["--case", "tiny-moe", "--case", "tiny", "--tokens", "8", "--accumulate", "1", "--rank", "4"]
    arguments += ["--checkpointing", "off", "--variants", "peft", "lorafuse", "--rounds", "2", "--device", "cpu"]
    assert main(["bench", "model", *arguments, "--dtype", "float32", "--json", str(tmp_path / "r.json")]) == 0
    written = json.loads((tmp_path / "r.json").read_text())
    assert [result["model"] for result in written["results"]] == ["tiny"]
    assert "not one layer of tiny-moe fits" in written["not_run"]["tiny-moe, accumulate 1, checkpointing off, 0 layers"]
    assert "no numbers, out of memory" in capsys.readouterr().out
