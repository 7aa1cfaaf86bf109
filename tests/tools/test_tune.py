"""`lorafuse tune` (T1, T2): shapes of a model, the gate, what is recorded, resuming.

The candidates run in Triton's interpreter. Times come from the test, except where a run is measured from end to end.
"""

import json
from contextlib import contextmanager

import pytest
import tiny_models
import torch
from rich.console import Console

from lorafuse import cli
from lorafuse.cli import _common, tune
from lorafuse.ops import linear
from lorafuse.plan import Problem, clear_cache, find, override, select, tuned
from lorafuse.tune import measure
from lorafuse.tune.measure import Target

H200 = find("H200")
AVAILABLE = (("eager", ""), ("triton", ""), ("cuda", "not built"))
SMALL = ["tune", "--shape", "32,64", "--m", "16", "48", "--rank", "4", "--dtype", "float16", "--rounds", "3"]
# seconds of the candidates of both passes
TIMES = {"aten_beta1": 7e-6, "aten_addmm": 5e-6, "two_kernel": 3e-6, "one_pass_backward": 6e-6}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter stands for the GPU here")


@pytest.fixture
def target(tmp_path, monkeypatch):
    """CPU tensors that are planned as on an H200, and a cache folder of this test."""
    monkeypatch.setenv("LORAFUSE_CACHE_DIR", str(tmp_path / "cache"))
    here = Target(torch.device("cpu"), H200, AVAILABLE)
    monkeypatch.setattr(tune, "live_target", lambda name: here)
    clear_cache()
    yield here
    clear_cache()


@pytest.fixture
def times(monkeypatch):
    """`TIMES`, which the test may change, in the place of the clock; the calls that would be timed are listed."""
    measured = dict(TIMES)
    timed = []

    def measure_calls(calls, rounds, warm_up, device):
        timed.append(list(calls))
        each = {name: measured[name] for name in calls}
        return {name: one if isinstance(one, list) else [one] * rounds for name, one in each.items()}

    monkeypatch.setattr(measure, "measure_calls", measure_calls)
    measured["timed"] = timed
    return measured


def of_triton(monkeypatch, direction, change):
    """The results of the Triton backend in one direction go through `change`."""
    run = getattr(linear, direction)

    def changed(backend, *args):
        actual = run(backend, *args)
        return change(*actual) if backend.name == "triton" else actual

    monkeypatch.setattr(linear, direction, changed)


def entries():
    return tuned.read(tuned.own_file("H200"))


def recorded():
    """`{(pass, M range): kernel}` of the file."""
    return {("backward" if entry.gradients else "forward", entry.M): entry.kernel for entry in entries()}


def plan(M, gradients=()):
    return select(Problem(M, 32, 64, 4, "float16", "float32", gradients=gradients), H200, AVAILABLE)


class TestRun:
    def test_end_to_end(self, target, capsys):
        assert cli.main(SMALL) == 0
        out = capsys.readouterr().out
        assert {(entry.gradients, entry.R) for entry in entries()} == {((), (4, 4)), (("dx", "da", "db"), (4, 4))}
        points = {(entry.gradients, M): seconds for entry in entries() for M, _, seconds in entry.points}
        assert points.keys() == {(gradients, M) for gradients in measure.PASSES.values() for M in (16, 48)}
        assert min(points.values()) > 0
        for entry in entries():
            assert {"device", "torch", "triton", "lorafuse"} <= entry.conditions.keys()
        assert out.startswith(entries()[0].conditions["device"])
        assert "32 × 64, float16" in out
        assert "before → after, measured:" in out
        assert str(tuned.own_file("H200")) in out

    def test_plans_of_this_process_follow_at_once(self, target, times, capsys):
        assert plan(16).backend == "eager"
        assert cli.main(SMALL) == 0
        assert recorded() == {("forward", (16, 48)): "two_kernel", ("backward", (16, 48)): "aten_addmm"}
        assert plan(16).kernel == "two_kernel"
        assert (
            plan(30).reasons[-1].startswith("triton: two_kernel was fastest within noise when measured on H200: 3 us")
        )
        assert "by lorafuse tune" in plan(16).reasons[-1]
        assert plan(49).backend == "eager"
        assert "measured" not in plan(49).reasons[-1]
        out = capsys.readouterr().out
        # before: 2 forwards of 5 us and 2 backwards of 5 us; after: 3 us forward
        assert "0.020 → 0.016 ms" in out
        assert "gain 1.291×" in out
        assert "1.67×" in out

    def test_every_candidate_runs_as_its_own_kernel(self, target, times, monkeypatch):
        ran, forced = set(), []

        @contextmanager
        def watched_override(force_kernel):
            forced.append(force_kernel)
            with override(force_kernel=force_kernel):
                yield
            forced.pop()

        monkeypatch.setattr(measure, "override", watched_override)

        for run in (linear.forward, linear.backward):

            def call(backend, *args, run=run):
                ran.add((backend.name, run.__name__, forced[-1]))
                return run(backend, *args)

            monkeypatch.setattr(linear, run.__name__, call)
        assert cli.main([*SMALL, "--m", "16"]) == 0
        assert ran == {
            ("eager", "forward", "aten_beta1"), ("eager", "backward", "aten_beta1"),
            ("eager", "forward", "aten_addmm"), ("eager", "backward", "aten_addmm"),
            ("triton", "forward", "two_kernel"), ("triton", "forward", "one_pass_backward"),
            ("triton", "backward", "one_pass_backward"),
        }  # fmt: skip

    def test_within_noise_the_models_choice_is_recorded_and_it_is_said(self, target, times, capsys):
        times["two_kernel"] = [4e-6, 4.5e-6, 5.5e-6]
        assert cli.main([*SMALL, "--m", "16"]) == 0
        assert recorded()["forward", (16, 16)] == "aten_addmm"
        assert "1.00×, aten_addmm recorded" in " ".join(capsys.readouterr().out.split())

    def test_it_goes_on_where_it_stopped(self, target, times, capsys):
        assert cli.main(SMALL) == 0
        assert len(times["timed"]) == 4
        capsys.readouterr()
        assert cli.main(SMALL) == 0
        assert len(times["timed"]) == 4
        assert "nothing left to measure" in capsys.readouterr().out
        assert cli.main([*SMALL, "--m", "16", "96"]) == 0
        assert len(times["timed"]) == 6
        # the points of both runs are one range
        assert recorded()["forward", (16, 96)] == "two_kernel"
        assert cli.main([*SMALL, "--again"]) == 0
        assert len(times["timed"]) == 10

    def test_again_replaces(self, target, times):
        assert cli.main(SMALL) == 0
        times["aten_addmm"] = 1e-6
        assert cli.main([*SMALL, "--again", "--m", "16"]) == 0
        # isqrt(16 * 48) = 27
        assert recorded() == {
            ("forward", (16, 27)): "aten_addmm",
            ("forward", (28, 48)): "two_kernel",
            ("backward", (16, 48)): "aten_addmm",
        }
        assert plan(16).backend == "eager"

    def test_other_shapes_and_kinds_stay(self, target, times):
        assert cli.main(SMALL) == 0
        before = entries()
        assert cli.main([*SMALL, "--shape", "64,64", "--dropout", "0.25"]) == 0
        assert set(map(repr, before)) < set(map(repr, entries()))
        assert {(entry.N, entry.dropout) for entry in entries()} == {(32, False), (32, True), (64, True)}

    def test_out_names_another_file(self, target, times, tmp_path, capsys):
        assert cli.main([*SMALL, "--out", str(tmp_path / "there" / "x.json")]) == 0
        assert not tuned.own_file("H200").exists()
        assert len(tuned.read(tmp_path / "there" / "x.json")) == 2
        assert "plans do not look there" in capsys.readouterr().out
        assert plan(16).backend == "eager"

    def test_interruption_keeps_what_is_done(self, target, times, monkeypatch, capsys):
        once = measure.measure

        def interrupted(target, problems, p, rounds):
            if problems[0].M == 48:
                raise KeyboardInterrupt
            return once(target, problems, p, rounds)

        monkeypatch.setattr(measure, "measure", interrupted)
        assert cli.main([*SMALL, "--shape", "64,64"]) == 130
        assert {entry.M for entry in entries()} == {(16, 16)}
        assert {entry.N for entry in entries()} == {32}
        out = capsys.readouterr().out
        assert "interrupted; what is done is kept" in out
        assert "nothing was recorded" not in out
        assert "two_kernel" in out
        monkeypatch.setattr(measure, "measure", once)
        assert cli.main(SMALL) == 0
        assert recorded()["forward", (16, 48)] == "two_kernel"
        assert len(times["timed"]) == 4

    def test_layers_of_a_model_are_weighed(self, target, times, tmp_path, capsys):
        tiny_models.tiny().config.save_pretrained(tmp_path)
        assert cli.main(["tune", "--model", str(tmp_path), "--m", "16", "--rank", "4", "--dtype", "float16"]) == 0
        out = capsys.readouterr().out
        assert {(entry.N, entry.K) for entry in entries()} == {(32, 32), (16, 32), (40, 32), (32, 40)}
        assert "q_proj, o_proj (32 × 32), 4 layers" in out
        # 14 layers, forward and backward of 5 us each, before; 3 us forward after
        assert "0.140 → 0.112 ms" in out

    def test_interruption_before_anything_is_done(self, target, monkeypatch, capsys):
        def interrupted(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(measure, "measure", interrupted)
        assert cli.main(SMALL) == 130
        assert "nothing was recorded" in capsys.readouterr().out
        assert not tuned.own_file("H200").exists()

    def test_a_narrow_terminal_cuts_nothing_off(self, target, times, monkeypatch, capsys):
        monkeypatch.setattr(_common, "console", lambda: Console(width=80))
        assert cli.main(SMALL) == 0
        out = capsys.readouterr().out
        assert "before" in out
        assert "…" not in out


class TestGate:
    def test_a_wrong_candidate_is_never_recorded(self, target, times, monkeypatch, capsys):
        """It would be the fastest everywhere, and is wrong at one M alone."""
        of_triton(monkeypatch, "forward", lambda y, xa: (y * 2 if y.shape[0] == 48 else y, xa))
        assert cli.main(SMALL) == 1
        assert recorded()["forward", (16, 48)] == "aten_addmm"
        assert "two_kernel" not in {entry.kernel for entry in entries()}
        out = " ".join(capsys.readouterr().out.split())
        assert "M 48, R 4: two_kernel is not recorded, y is wrong by 1.00e+00 relative, the bound is 4e-03" in out
        assert "M 16, R 4: two_kernel is not recorded" not in out
        assert times["timed"][2] == ["aten_beta1", "aten_addmm"]

    @pytest.mark.parametrize("broken", ["dx", "da", "db"])
    @pytest.mark.parametrize("how", ["zero", "NaN", "1 % off"])
    def test_every_gradient_is_looked_at(self, target, times, monkeypatch, broken, how):
        def backward(*grads):
            grads = list(grads)
            i = ["dx", "da", "db"].index(broken)
            grads[i] = grads[i] * {"zero": 0.0, "NaN": float("nan"), "1 % off": 1.01}[how]
            return tuple(grads)

        of_triton(monkeypatch, "backward", backward)
        times["one_pass_backward"] = 1e-6
        assert cli.main([*SMALL, "--m", "16"]) == 1
        assert recorded()["backward", (16, 16)] == "aten_addmm"

    def test_what_was_recorded_and_is_wrong_now_goes(self, target, times, monkeypatch):
        assert cli.main(SMALL) == 0
        of_triton(monkeypatch, "forward", lambda y, xa: (y * 2, xa))
        assert cli.main([*SMALL, "--again", "--m", "16"]) == 1
        assert recorded() == {("forward", (16, 16)): "aten_addmm", ("backward", (16, 48)): "aten_addmm"}

    def test_dropout_is_compared_with_the_same_mask(self, target, times):
        assert cli.main([*SMALL, "--m", "16", "--dropout", "0.25"]) == 0
        assert {entry.dropout for entry in entries()} == {True}
        assert recorded()["forward", (16, 16)] == "two_kernel"

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (
                torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                "OutOfMemoryError: CUDA out of memory",
            ),
            (RuntimeError("CUDA error: invalid configuration"), "RuntimeError: CUDA error: invalid configuration"),
        ],
    )
    @pytest.mark.parametrize("when", ["first", "while timed"])
    def test_one_candidate_fails_and_the_others_are_recorded(self, target, monkeypatch, capsys, error, message, when):
        calls = []

        def forward(y, xa):
            calls.append(y)
            if when == "first" or len(calls) > 2:
                raise error
            return y, xa

        def measure_calls(calls, rounds, warm_up, device):
            for call in list(calls.values()) * rounds:
                call()
            return {name: [TIMES[name]] * rounds for name in calls}

        of_triton(monkeypatch, "forward", forward)
        monkeypatch.setattr(measure, "PASSES", {"forward": ()})
        monkeypatch.setattr(measure, "measure_calls", measure_calls)
        assert cli.main([*SMALL, "--m", "16"]) == 0
        assert recorded() == {("forward", (16, 16)): "aten_addmm"}
        out = " ".join(capsys.readouterr().out.split())
        assert f"two_kernel is left out, {message}" in out

    def test_operands_that_do_not_fit_leave_one_size_out(self, target, times, monkeypatch, capsys):
        make_operands = measure.make_operands

        def full(case, device):
            if case.leading == (16,):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return make_operands(case, device=device)

        monkeypatch.setattr(measure, "make_operands", full)
        assert cli.main(SMALL) == 0
        assert {entry.M for entry in entries()} == {(48, 48)}
        assert "M 16, R 4: operands and reference is left out" in " ".join(capsys.readouterr().out.split())

    def test_a_device_that_is_lost_ends_the_run_and_keeps_what_is_done(self, target, times, monkeypatch, capsys):
        def forward(y, xa):
            if y.shape[0] == 48:
                monkeypatch.setattr(torch, "zeros", lost)
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return y, xa

        def lost(*args, **kwargs):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        of_triton(monkeypatch, "forward", forward)
        assert cli.main(SMALL) == 2
        assert "runs nothing any more since two_kernel failed" in capsys.readouterr().err
        assert recorded() == {("forward", (16, 16)): "two_kernel", ("backward", (16, 16)): "aten_addmm"}


class TestInput:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--case", "llama-3.1-8b.dwn"], "did you mean llama-3.1-8b.down"),
            (["--shape", "12"], "--shape 12"),
            (["--shape", "32,64", "--m", "16", "0"], "--m 0"),
            (["--shape", "32,64", "--rank", "0"], "--rank 0"),
            (["--shape", "32,64", "--dropout", "1"], "--dropout 1.0"),
            (["--shape", "32,64", "--rounds", "0"], "--rounds 0"),
            (["--shape", "32,64", "--gpu", "H200"], "add --dry-run"),
            (["--shape", "32,64", "--dry-run", "--gpu", "H20"], "The known ones: A100, L40S"),
            (["--shape", "33,67"], "there is nothing to tune"),
            (["--model", "nowhere"], "no config.json"),
            (["--shape", "32,64", "--out", "."], "it is a folder"),
            (["--shape", "32,64", "--out", "/proc/x/y.json"], "cannot be written"),
        ],
    )
    def test_bad_input_says_the_value_and_the_fix(self, target, argv, message, capsys):
        assert cli.main(["tune", *argv]) == 2
        assert message in capsys.readouterr().err

    def test_a_broken_file_is_refused_before_anything_runs(self, target, times, capsys):
        path = tuned.own_file("H200")
        path.parent.mkdir(parents=True)
        path.write_text("{")
        assert cli.main(SMALL) == 2
        assert f"{path}: " in capsys.readouterr().err
        assert path.read_text() == "{"
        assert times["timed"] == []

    def test_without_a_home_a_file_must_be_named(self, target, times, monkeypatch, capsys):
        monkeypatch.setenv("LORAFUSE_CACHE_DIR", "~nobody-of-this-name/cache")
        assert cli.main(SMALL) == 2
        assert "the home folder is not known; name another file by --out" in capsys.readouterr().err
        assert times["timed"] == []

    def test_a_layer_without_a_choice_is_named_and_the_others_are_tuned(self, target, times, capsys):
        assert cli.main([*SMALL, "--shape", "33,67"]) == 0
        assert "33 × 67: left out" in capsys.readouterr().out
        assert {entry.N for entry in entries()} == {32}


def test_the_written_file_is_json_of_version_4(target, times):
    assert cli.main(SMALL) == 0
    written = json.loads(tuned.own_file("H200").read_text())
    assert written["version"] == 4
    assert written["entries"][0]["points"][0] == [16, 4, 3e-6]
