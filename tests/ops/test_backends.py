"""The choice of a backend (T1): who may ask for which, what happens on refusal, and what the planner says."""

import os
import re
import sys
from types import ModuleType

import pytest
import torch
import warm_python
from operators import Linear

import lorafuse
from lorafuse.backends import aten, base, problems
from lorafuse.backends.protocol import Backend
from lorafuse.errors import BackendUnavailable
from lorafuse.functional import lora_linear, plan_linear
from lorafuse.plan import Plan, Problem, find, override

pytest_plugins = "backend_fixtures"
pytestmark = pytest.mark.usefixtures("no_choice_yet")


def operands():
    x, w = torch.randn(3, 8), torch.randn(6, 8)
    return x, w, torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)


@pytest.mark.parametrize("name", ["triton", "cuda"])
class TestUnavailable:
    def test_the_reason_and_the_fix_are_said(self, name, assume):
        if name == "triton":
            assume("triton", base.Availability(False, "no compiler", "install one"))
        state = base.availability(name)
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
    assert base.load("eager") is aten.BACKEND


def _process(value, statement):
    code = f"import lorafuse\nfrom lorafuse.backends import base\n{statement}"
    environment = {**os.environ, "LORAFUSE_BACKEND": value}
    return warm_python.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)


def test_the_variable_sets_the_default():
    done = _process("eager", "print(base.current())\nlorafuse.use_backend('auto')\nprint(base.current())")
    assert done.stdout.split() == ["eager", "auto"], done.stderr


@pytest.mark.parametrize(("value", "message"), [("cuDNN", "'cuDNN'"), ("", "''")])
def test_a_wrong_variable_is_said(value, message):
    done = _process(value, "base.current()")
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("ValueError")
    assert message in error
    assert "'auto', 'eager', 'triton', 'cuda'" in error


class TestPlan:
    """What the planner is told; what it makes of it is in test_plan.py."""

    def test_a_device_is_a_reason(self, spy):
        x, w, a, _ = operands()
        plan = plan_linear(x, w, a)
        assert plan.backend == "eager"
        assert "triton: runs on CUDA devices, the input is not on one" in plan.reasons
        assert any(reason.startswith("cuda: ") for reason in plan.reasons)

    def test_what_the_planner_is_told(self, monkeypatch):
        seen = []
        monkeypatch.setattr("lorafuse.ops.choose.select", lambda *planned: seen.append(planned))
        x, w, a, _ = operands()
        plan_linear(x.bfloat16().expand(2, 5, 3, 8), w.bfloat16(), a, bias=torch.zeros(6), dropout_p=0.1)
        ((problem, device, available),) = seen
        expected = Problem(30, 6, 8, 2, "bfloat16", "float32", bias=True, dropout=True, gradients=("da", "db"))
        assert problem == expected
        assert device is None
        assert [name for name, _ in available] == list(base.BACKENDS)
        plan_linear(torch.empty(0, 8).requires_grad_(), w, a)
        assert seen[-1][0].M == 0
        assert seen[-1][0].gradients == ("dx", "da", "db")

    @pytest.mark.parametrize(
        ("x", "aligned"),
        [
            (torch.empty(4, 16), True),
            (torch.empty(4, 17), False),
            (torch.empty(4, 20)[:, 4:], True),
            (torch.empty(4, 20)[:, 1:17], False),
            (torch.empty(2, 3, 16)[:, 1:], True),
        ],
    )
    def test_alignment_is_that_of_every_row(self, monkeypatch, x, aligned):
        seen = []
        monkeypatch.setattr("lorafuse.ops.choose.select", lambda *planned: seen.append(planned))
        k = x.shape[-1]
        plan_linear(x, torch.empty(8, k if k != 17 else 17), torch.empty(2, k))
        assert seen[0][0].aligned is aligned

    def test_auto_is_resolved_for_each_direction(self, monkeypatch, spy):
        """On a device with several backends, forward and backward each follow their own plan."""
        from lorafuse.ops import choose

        planned = []

        def plan(problem, device):
            planned.append(problem.gradients)
            return Plan("triton" if problem.gradients else "eager", "")

        monkeypatch.setattr(choose, "plan_for", plan)
        monkeypatch.setattr(choose, "SOLE_BACKEND", {})
        x, w, a, b = operands()
        lora_linear(x, w, a, b).sum().backward()
        assert planned == [(), ("da", "db")]
        assert spy.calls == ["linear_backward"]


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_a_backend_implements_every_primitive(name):
    backend = base.load(name)
    assert backend.name == name
    for primitive in ("plan", "project", "matmul", "outer", "combine"):
        assert getattr(type(backend), primitive) is not getattr(Backend, primitive), primitive


@pytest.mark.parametrize(("kernel", "accumulated"), [("aten_addmm", [4, 4]), ("aten_beta1", [8, 6])])
def test_eager_runs_the_planned_order_on_gpus(kernel, accumulated, assume, monkeypatch):
    """What is accumulated onto the other product, by the features it sums over: ranks, or those of x and dy."""
    x, w, a, b, dy = (torch.randn(shape) for shape in ((3, 8), (6, 8), (4, 8), (6, 4), (3, 6)))
    summed = []
    accumulate, plan = torch.Tensor.addmm_, aten.Aten.plan

    def recorded(self, left, right, **more):
        summed.append(left.shape[1])
        return accumulate(self, left, right, **more)

    # CPU tensors that pass for a GPU's
    assume("triton", base.Availability(True))
    monkeypatch.setattr(problems, "device_spec", lambda device: find("H200"))
    monkeypatch.setattr(aten.Aten, "plan", lambda self, problems, device: plan(self, problems, torch.device("cuda")))
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "addmm_", recorded)
    eager = Linear("eager")
    with override(force_kernel=kernel):
        y, xa = eager.forward(x, w, None, a, b, None, 1.7, 0.0)
        dx, *_ = eager.backward(dy, x, xa, w, a, b, None, 1.7, 0.0, need_dbias=False)
    monkeypatch.undo()
    assert summed == accumulated
    torch.testing.assert_close(y, x @ w.t() + 1.7 * x @ a.t() @ b.t())
    torch.testing.assert_close(dx, dy @ w + 1.7 * dy @ b @ a)


class TestTriton:
    """When Triton's kernels can run, and what is said when not."""

    @pytest.fixture
    def installed(self, monkeypatch):
        """Versions by package, of which nothing is installed that is not named."""
        versions = {"triton": "3.6.0", "numpy": "2.3.5"}
        monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: versions.get(name))
        monkeypatch.setattr(base.metadata, "version", versions.__getitem__)
        return versions

    def test_it_is_missing(self, installed):
        del installed["triton"]
        state = base.probe("triton")
        assert not state.ok
        assert "not installed" in state.reason
        assert "pip install" in state.fix

    @pytest.mark.parametrize("version", ["2.3.1", "3.5.1"])
    def test_it_is_too_old(self, installed, version):
        installed["triton"] = version
        state = base.probe("triton")
        assert not state.ok
        assert version in state.reason
        assert "triton>=3.6" in state.fix

    @pytest.mark.parametrize(
        ("triton", "numpy", "ok"), [("3.6.0", "2.4.0", False), ("3.6.0", "2.3.5", True), ("3.9.0", "2.4.0", True)]
    )
    def test_its_interpreter_and_numpy(self, installed, monkeypatch, triton, numpy, ok):
        installed |= {"triton": triton, "numpy": numpy}
        monkeypatch.setattr("triton.knobs.runtime.interpret", True)
        state = base.probe("triton")
        assert state.ok is ok
        if not ok:
            assert "numpy 2.4.0" in state.reason
            assert "numpy<2.4" in state.fix

    def test_no_gpu_and_no_interpreter(self, installed, monkeypatch):
        monkeypatch.setattr("triton.knobs.runtime.interpret", False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        state = base.probe("triton")
        assert not state.ok
        assert "no CUDA device" in state.reason
        assert "TRITON_INTERPRET=1" in state.fix
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert base.probe("triton").ok


class TestCuda:
    """When the CUDA kernels can run, and what is said when not."""

    @pytest.fixture
    def module(self, monkeypatch):
        """A `lorafuse._cuda` of sm_90a that loads, from the sources that are here, beside one Hopper GPU."""
        from lorafuse.backends import native

        installed = {"built": True, "stale": "", "capability": [(9, 0)], "architectures": ["sm_80", "sm_90", "sm_90a"]}
        monkeypatch.setattr(native, "built", lambda name: installed["built"])
        monkeypatch.setattr(native, "stale", lambda name: installed["stale"])
        monkeypatch.setattr(native, "info", lambda name: installed)
        monkeypatch.setattr(native, "load", lambda name: ModuleType(name))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(installed["capability"]))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(installed["capability"]))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: installed["capability"][index])
        return installed

    def test_it_can(self, module):
        assert base.probe("cuda") == base.Availability(True)
        module["capability"].insert(0, (8, 0))
        assert base.probe("cuda").ok

    @pytest.mark.parametrize(
        ("change", "reason", "fix"),
        [
            ({"built": False}, "lorafuse._cuda is not built", "make cuda.*nvcc 12.8"),
            ({"stale": "lorafuse._cuda was built from other sources"}, "other sources", "make cuda"),
            ({"capability": []}, "torch sees no CUDA device", "Hopper"),
            ({"capability": [(8, 0), (10, 0)]}, "built for sm_90a, the devices here are sm_100, sm_80", "'triton'"),
            ({"architectures": ["sm_80"]}, "built for .*the devices here are sm_90", "'triton'"),
        ],
    )
    def test_why_not(self, module, change, reason, fix):
        module |= change
        state = base.probe("cuda")
        assert not state.ok
        assert re.search(reason, state.reason)
        assert re.search(fix, state.fix)

    def test_a_module_that_does_not_load(self, module, monkeypatch):
        def load(name):
            raise ImportError("undefined symbol: x")

        monkeypatch.setattr("lorafuse.backends.native.load", load)
        state = base.probe("cuda")
        assert "does not load: undefined symbol: x" in state.reason
        assert "make cuda" in state.fix

    def test_a_stale_module_is_told_from_a_fresh_one(self, tmp_path, monkeypatch):
        from lorafuse.backends import native, native_sources

        (tmp_path / "build.py").write_text("1")
        monkeypatch.setattr(native, "CSRC", tmp_path)
        here = native_sources.source_hash(tmp_path, emulated=False)
        for sources, message in ((here, ""), ("0123", "built from other sources (0123) than those of csrc here")):
            monkeypatch.setattr(native, "info", lambda name, sources=sources: {"sources": sources})
            native.stale.cache_clear()
            assert message in native.stale("_cuda")
            assert bool(message) == bool(native.stale("_cuda"))
        # an installed package has no sources beside it
        (tmp_path / "build.py").unlink()
        native.stale.cache_clear()
        assert native.stale("_cuda") == ""
        native.stale.cache_clear()


class TestEmulator:
    """A backend for tests: known where it was built, and never chosen."""

    def test_it_is_a_name_only_where_it_was_built(self, monkeypatch):
        for there in (True, False):
            monkeypatch.setattr("lorafuse.backends.native.built", lambda name, there=there: there)
            if there:
                assert base.check_name("emu") == "emu"
            else:
                with pytest.raises(ValueError, match="'emu' is not known"):
                    base.check_name("emu")

    def test_nobody_chooses_it(self):
        assert base.EMULATOR not in base.BACKENDS
        for device in ("cpu", "cuda"):
            assert base.EMULATOR not in base.candidates(device)
