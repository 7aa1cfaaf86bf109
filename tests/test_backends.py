"""The choice of a backend (T1): who may ask for which, what happens on refusal, and what the planner says."""

import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch

import lorafuse
from lorafuse.backends import base, eager
from lorafuse.errors import BackendUnavailable
from lorafuse.functional import lora_linear, plan_linear
from lorafuse.plan import Plan, Problem, select

PROBLEM = Problem(M=8, N=16, K=32, R=4, dtype="bfloat16", adapter_dtype="float32")


@pytest.fixture(autouse=True)
def _no_choice_yet(monkeypatch):
    monkeypatch.setattr(base, "_current", None)
    monkeypatch.delenv("LORAFUSE_BACKEND", raising=False)


@pytest.fixture
def spy(monkeypatch):
    """A backend "triton" that exists, computes as eager does, and records which of its functions ran."""
    module = ModuleType("lorafuse.backends.triton")
    module.calls = []
    for name in ("linear_forward", "linear_backward"):

        def run(*args, name=name):
            module.calls.append(name)
            return getattr(eager, name)(*args)

        setattr(module, name, run)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(base._AVAILABILITY, "triton", base.Availability(True))
    return module


def operands():
    x, w = torch.randn(3, 8), torch.randn(6, 8)
    return x, w, torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)


def test_the_default_is_auto():
    assert base.current() == "auto"


class TestUseBackend:
    def test_as_setter(self):
        lorafuse.use_backend("eager")
        assert base.current() == "eager"
        lorafuse.use_backend("auto")
        assert base.current() == "auto"

    def test_as_context_manager(self):
        with lorafuse.use_backend("eager") as entered:
            assert isinstance(entered, lorafuse.use_backend)
            assert base.current() == "eager"
        assert base.current() == "auto"

    def test_nested(self, spy):
        with lorafuse.use_backend("eager"):
            with lorafuse.use_backend("triton"):
                assert base.current() == "triton"
                with lorafuse.use_backend("auto"):
                    assert base.current() == "auto"
                assert base.current() == "triton"
            assert base.current() == "eager"
        assert base.current() == "auto"

    def test_restores_after_an_exception(self):
        lorafuse.use_backend("auto")
        with pytest.raises(KeyError), lorafuse.use_backend("eager"):
            raise KeyError
        assert base.current() == "auto"

    @pytest.mark.parametrize("name", ["triton", "cuda", "cuDNN"])
    def test_a_refusal_changes_nothing(self, name):
        lorafuse.use_backend("eager")
        with pytest.raises((BackendUnavailable, ValueError)):
            lorafuse.use_backend(name)
        assert base.current() == "eager"

    def test_calls_follow_it(self, spy):
        with lorafuse.use_backend("triton"):
            y = lora_linear(*operands())
        assert spy.calls == ["linear_forward"]
        # backward runs where forward ran, whatever is set by then
        y.sum().backward()
        assert spy.calls == ["linear_forward", "linear_backward"]
        lora_linear(*operands())
        assert len(spy.calls) == 2

    def test_a_named_backend_wins(self, spy):
        with lorafuse.use_backend("triton"):
            lora_linear(*operands(), backend="eager").sum().backward()
        assert spy.calls == []
        with lorafuse.use_backend("eager"):
            lora_linear(*operands(), backend="triton")
        assert spy.calls == ["linear_forward"]


@pytest.mark.parametrize("name", ["triton", "cuda"])
class TestUnavailable:
    def test_the_reason_and_the_fix_are_said(self, name):
        state = base.availability(name)
        if state.ok:
            pytest.skip(f"{name} is available on this machine")
        assert state.reason
        assert state.fix
        for ask in (
            base.require,
            base.load,
            lorafuse.use_backend,
            lambda name: lora_linear(*operands(), backend=name),
        ):
            with pytest.raises(BackendUnavailable) as error:
                ask(name)
            for part in (repr(name), state.reason, state.fix):
                assert part in str(error.value)


ASKS = [base.check_name, base.require, base.availability, base.load, lorafuse.use_backend]


@pytest.mark.parametrize("ask", ASKS)
def test_an_unknown_name_lists_the_known_ones(ask):
    with pytest.raises(ValueError, match="'cuDNN'") as error:
        ask("cuDNN")
    for name in ("auto", *base.BACKENDS):
        assert repr(name) in str(error.value)
    with pytest.raises(ValueError, match="'cuDNN'"):
        lora_linear(*operands(), backend="cuDNN")


def test_auto_is_a_choice_and_no_backend():
    assert base.require("auto") == "auto"
    with pytest.raises(ValueError, match="'auto'"):
        base.availability("auto")


def test_eager_runs_everywhere_and_comes_last(spy):
    assert base.availability("eager").ok
    for device in ("cpu", "cuda", "meta"):
        assert base.candidates(device)[-1] == "eager"
    assert "triton" in base.candidates("cuda")
    assert base.candidates("cpu") == ("eager",)
    assert base.load("eager") is eager


def _process(value, statement):
    code = f"import lorafuse\nfrom lorafuse.backends import base\n{statement}"
    environment = {**os.environ, "LORAFUSE_BACKEND": value}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_the_variable_sets_the_default():
    done = _process("eager", "print(base.current())\nlorafuse.use_backend('auto')\nprint(base.current())")
    assert done.stdout.split() == ["eager", "auto"], done.stderr


@pytest.mark.parametrize(("value", "said"), [("cuDNN", "'cuDNN'"), ("", "''")])
def test_a_wrong_variable_is_said(value, said):
    done = _process(value, "base.current()")
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("ValueError")
    assert said in error
    assert "'auto', 'eager', 'triton', 'cuda'" in error


class TestPlan:
    def test_reasons_name_every_backend_passed_over(self):
        plan = select(PROBLEM, (("eager", ""), ("triton", "no compiler"), ("cuda", "no extension")))
        assert isinstance(plan, Plan)
        assert plan.backend == "eager"
        assert "triton: no compiler" in plan.reasons
        assert "cuda: no extension" in plan.reasons
        assert plan.reasons[-1].startswith("eager: ")

    def test_a_device_is_a_reason(self):
        x, w, a, _ = operands()
        plan = plan_linear(x, w, a)
        assert plan.backend == "eager"
        for name in ("triton", "cuda"):
            assert f"{name}: runs on CUDA devices, the input is on cpu" in plan.reasons

    def test_without_a_backend_the_problem_is_shown(self):
        with pytest.raises(ValueError, match="no extension") as error:
            select(PROBLEM, (("eager", "broken"), ("cuda", "no extension")))
        assert "M=8" in str(error.value)

    def test_is_pure(self):
        available = (("eager", ""), ("triton", "no compiler"), ("cuda", "no extension"))
        assert select(PROBLEM, available) == select(PROBLEM, available)

    def test_what_the_planner_is_told(self, monkeypatch):
        seen = []
        monkeypatch.setattr("lorafuse.functional.select", lambda *told: seen.append(told))
        x, w, a, _ = operands()
        plan_linear(x.bfloat16().expand(2, 5, 3, 8), w.bfloat16(), a, bias=torch.zeros(6), dropout_p=0.1)
        ((problem, available),) = seen
        assert problem == Problem(30, 6, 8, 2, "bfloat16", "float32", "cpu", bias=True, dropout=True)
        assert [name for name, _ in available] == list(base.BACKENDS)
        plan_linear(torch.empty(0, 8), w, a)
        assert seen[-1][0].M == 0
