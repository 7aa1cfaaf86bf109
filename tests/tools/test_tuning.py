"""What `lorafuse tune` decides (T1): which layers a model has, what wins, what is recorded."""

import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import tiny_models
import torch
import transformers
import warm_python

from lorafuse import cli
from lorafuse.backends import base
from lorafuse.backends.problems import linear_problem
from lorafuse.cli import tune
from lorafuse.operands import Weight
from lorafuse.plan import Problem, clear_cache, find, select, tuned
from lorafuse.testing.cases import Case
from lorafuse.testing.model_layers import linear_layers
from lorafuse.tune import measure
from lorafuse.tune.measure import Outcome, Target
from lorafuse.tune.record import record
from lorafuse.tune.stored import FORMATS, random_weight

ROOT = Path(__file__).parents[2]
H200 = find("H200")
AVAILABLE = (("eager", ""), ("triton", ""), ("cuda", "not built"))
FOUND = {"device": "GPU X", "torch": "2.13.0", "lorafuse": "1.2.3", "date": "2026-11-26 01:00 UTC", "commit": "abc"}


@pytest.fixture(autouse=True)
def target(tmp_path, monkeypatch):
    """What is planned as on an H200, and a cache folder of this test."""
    monkeypatch.setenv("LORAFUSE_CACHE_DIR", str(tmp_path / "cache"))
    clear_cache()
    yield Target(torch.device("cpu"), H200, AVAILABLE)
    clear_cache()


class TestRule:
    PROBLEM = Problem(512, 4096, 4096, 16, "bfloat16", "float32")

    @pytest.mark.parametrize(
        ("seconds", "winner"),
        [
            # apart
            ({"two_kernel": [5, 5, 5, 5, 5], "aten_beta1": [3, 3, 3, 3, 4]}, "aten_beta1"),
            # faster, and within noise
            ({"two_kernel": [3, 4, 5, 5, 5], "aten_beta1": [3, 3, 4, 4, 4]}, "two_kernel"),
            # the others' spreads do not count
            ({"two_kernel": [9, 9], "aten_beta1": [2, 4], "aten_addmm": [1, 5]}, "aten_beta1"),
            ({"aten_beta1": [3, 3], "aten_addmm": [2, 4]}, "aten_beta1"),
        ],
    )
    def test_the_usual_stays_unless_another_is_faster_beyond_noise(self, seconds, winner):
        assert Outcome(self.PROBLEM, "two_kernel", seconds).winner() == winner

    def test_the_usual_is_the_models_or_what_ships_and_never_the_users(self, target, tmp_path, monkeypatch):
        assert measure.usual(replace(self.PROBLEM, M=8192), target) == "two_kernel"
        entry = tuned.Tuned(
            4096, 4096, (16, 16), (8192, 8192), "bfloat16", False, (), "aten_beta1", 1e-3, "abc", "2026-11-26"
        )
        tuned.write(tuned.own_file("H200"), (entry,))
        clear_cache()
        assert select(replace(self.PROBLEM, M=8192), H200, AVAILABLE).backend == "eager"
        assert measure.usual(replace(self.PROBLEM, M=8192), target) == "two_kernel"
        monkeypatch.setattr(tuned, "FOLDER", tmp_path)
        tuned.write(tmp_path / "h200.json", (replace(entry, kernel="aten_addmm"),))
        clear_cache()
        assert measure.usual(replace(self.PROBLEM, M=8192), target) == "aten_addmm"

    def outcome(self, M, times, R=16, **more):
        problem = replace(self.PROBLEM, M=M, R=R)
        return Outcome(problem, "two_kernel", {name: [seconds] * 3 for name, seconds in times.items()}, **more)

    def test_ranges_and_conditions(self):
        slow, fast = {"aten_beta1": 3e-6, "two_kernel": 2e-6}, {"aten_beta1": 1e-6, "two_kernel": 2e-6}
        first = record((), [self.outcome(512, fast), self.outcome(2048, slow)], FOUND)
        assert [(e.M, e.R, e.kernel, e.seconds, e.commit) for e in first] == [
            ((512, 1024), (16, 16), "aten_beta1", 1e-6, "abc"), ((1025, 2048), (16, 16), "two_kernel", 2e-6, "abc"),
        ]  # fmt: skip
        later = FOUND | {"torch": "2.14.0", "date": "2026-12-01 01:00 UTC"}
        del later["commit"]
        second = record(first, [self.outcome(8192, slow)], later)
        assert [(e.M, e.kernel) for e in second] == [((512, 1024), "aten_beta1"), ((1025, 8192), "two_kernel")]
        assert second[0] == first[0]
        merged = second[1]
        assert merged.points == ((2048, 16, 2e-6), (8192, 16, 2e-6))
        assert (merged.commit, merged.date) == ("abc and of release 1.2.3", "2026-12-01 01:00 UTC")
        assert merged.conditions == {"device": "GPU X", "torch": "2.13.0 and 2.14.0", "lorafuse": "1.2.3"}

    def test_points_that_stay_keep_their_times(self):
        slow, fast = {"aten_beta1": 3e-6, "two_kernel": 2e-6}, {"aten_beta1": 1e-6, "two_kernel": 2e-6}
        longer = {"aten_beta1": 9e-6, "two_kernel": 8e-6}
        first = record((), [self.outcome(512, slow), self.outcome(2048, longer)], FOUND)
        assert [entry.seconds for entry in first] == [8e-6]
        # three runs, of two commits
        for commit in ("def", "abc"):
            first = record(first, [self.outcome(2048, longer)], FOUND | {"commit": commit})
        assert [entry.commit for entry in first] == ["abc and def"]
        second = record(first, [self.outcome(2048, fast)], FOUND | {"commit": "def"})
        assert [(e.points, e.seconds, e.commit) for e in second] == [
            (((512, 16, 2e-6),), 2e-6, "abc and def"), (((2048, 16, 1e-6),), 1e-6, "def"),
        ]  # fmt: skip

    def test_nothing_is_said_of_a_size_at_which_nothing_ran(self):
        fast = {"aten_beta1": 1e-6, "two_kernel": 2e-6}
        actual = record((), [self.outcome(512, fast), self.outcome(2048, {})], FOUND)
        assert [entry.M for entry in actual] == [(512, 512)]
        # a point that was measured before and does not run now goes
        assert record(actual, [self.outcome(512, {})], FOUND) == ()

    def test_an_entry_of_version_1_comes_after_what_is_measured_now(self):
        old = tuned.Tuned(
            4096, 4096, (1, 64), (1, 8192), "bfloat16", False, (), "aten_addmm", 1e-3, "abc", "2026-11-20"
        )
        assert measure.is_measured(self.PROBLEM, [old])
        actual = record([old], [self.outcome(512, {"aten_beta1": 1e-6})], FOUND)
        assert [entry.kernel for entry in actual] == ["aten_beta1", "aten_addmm"]
        assert record([old], [self.outcome(512, {}, wrong={"aten_addmm": "y"})], FOUND) == ()


@pytest.mark.parametrize(
    ("format", "N", "K", "M"),
    [("dense", 32, 64, 16), ("dense", 36, 64, 16), ("dense", 32, 68, 16)]
    + [(f, 36, 67, 16) for f in FORMATS] + [(f, 32, 68, 64) for f in FORMATS] + [("nf4", 32, 64, 65)],
)  # fmt: skip
def test_problems_are_those_that_calls_are_planned_as(format, N, K, M):
    x, w, a, dy = (torch.zeros(shape, dtype=torch.float16) for shape in ((M, K), (N, K), (4, K), (M, N)))
    weight = Weight(w) if format == "dense" else random_weight(format, N, K, w.dtype, w.device)
    forward, backward = measure.passes(Case("", N, K), M, 4, "float16", False, format)
    assert forward == linear_problem(x, weight, a.float(), False, False)
    assert backward == linear_problem(dy, weight, a.float(), False, False, ("dx", "da", "db"))


@pytest.mark.parametrize("format", FORMATS)
def test_random_weights_have_products_of_unit_size(format):
    w = random_weight(format, 96, 256, torch.bfloat16, torch.device("cpu")).decoded(torch.float32).data
    assert 0.5 < float((torch.randn(64, 256) @ w.t()).std()) < 1.5
    assert w.unique().numel() > 15


class TestModel:
    def write(self, folder, family):
        tiny_models.tiny(family).save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
        return folder

    @pytest.mark.parametrize("family", ["llama", "qwen3", "bert", "t5"])
    def test_the_layers_are_those_that_peft_adapts(self, tmp_path, family):
        layers, experts = linear_layers(self.write(tmp_path, family))
        expected = {}
        for module in tiny_models.adapted(family).modules():
            if isinstance(module, peft.tuners.lora.Linear):
                shape = module.out_features, module.in_features
                expected[shape] = expected.get(shape, 0) + 1
        assert {(case.N, case.K): count for case, count in layers.items()} == expected
        assert experts == 0

    def test_names_and_no_head(self, tmp_path):
        layers, _ = linear_layers(self.write(tmp_path, "llama") / "config.json")
        assert layers == {
            Case("q_proj, o_proj", 32, 32): 4, Case("k_proj, v_proj", 16, 32): 4, Case("gate_proj, up_proj", 40, 32): 4,
            Case("down_proj", 32, 40): 2,
        }  # fmt: skip

    def test_experts_are_counted_and_not_tuned(self, tmp_path, capsys):
        config = transformers.Qwen3MoeConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
        )  # fmt: skip
        config.save_pretrained(tmp_path)
        _, experts = linear_layers(tmp_path)
        assert experts == 2
        assert cli.main(["tune", "--model", str(tmp_path), "--dry-run", "--gpu", "H200"]) == 0
        assert "experts in 2 layers are planned by the model and not tuned" in capsys.readouterr().out

    def test_layers_that_are_no_linear_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="no linear layers"):
            linear_layers(self.write(tmp_path, "gpt2"))


class TestTarget:
    @pytest.fixture
    def gpu(self, monkeypatch):
        """A machine that seems to have two GPUs; gives what is not available there."""
        missing = {}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(tune, "device_spec", lambda device: H200)
        monkeypatch.setattr(
            tune.base, "availability", lambda name: base.Availability(name not in missing, missing.get(name, ""))
        )
        return missing

    def test_it_is_the_gpu_here_with_the_backends_that_run(self, gpu):
        gpu["cuda"] = "lorafuse._cuda is not built"
        available = (("eager", ""), ("triton", ""), ("cuda", "lorafuse._cuda is not built"))
        assert tune.live_target("") == Target(torch.device("cuda:1"), H200, available)
        assert tune.live_target("cuda:0").device == torch.device("cuda:0")

    def test_without_triton_there_is_nothing_to_tune(self, gpu):
        gpu["triton"] = "Triton is not installed"
        with pytest.raises(ValueError, match=r"nothing to tune.*cuda \(Triton is not installed\)"):
            tune.live_target("cuda")


class TestWithoutGpu:
    def test_off_gpus_there_is_nothing_to_tune(self, capsys):
        assert cli.main(["tune", "--shape", "32,64", "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert "nothing to tune: eager is the only backend on cpu" in error
        assert "--dry-run --gpu H200" in error
        assert error.count("\n") == 1

    def test_an_unknown_case_is_named_where_there_is_no_gpu_too(self, capsys):
        assert cli.main(["tune", "--case", "llama-3.1-8b.dwn"]) == 2
        assert "The known ones: square-2048" in capsys.readouterr().err

    def test_a_dry_run_measures_and_writes_nothing(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(measure, "measure", None)
        argv = ["tune", "--case", "llama-3.1-8b.q", "--case", "llama-3.1-8b.o", "--dry-run", "--gpu", "h200"]
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert out.count("4096 × 4096") == 1
        assert "cuda fused_forward" in " ".join(out.split())
        assert "6 passes" in out
        for line in out.splitlines():
            assert "us" not in line.split() or "model" in line, line
        assert not (tmp_path / "cache").exists()


def test_every_command_is_imported_without_triton():
    names = ", ".join(f"lorafuse.cli.{name}" for name in cli.COMMANDS)
    heavy = "'triton', 'peft', 'transformers', 'rich'"
    code = f"import sys, {names}\nprint(*[name for name in ({heavy}) if name in sys.modules])"
    done = warm_python.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=300
    )
    assert done.stdout.strip() == ""
