"""What a new capability touches: one file, and rows of tables.

Each kind is added here the way a contributor adds it, by its row and its file alone, and runs on every backend of this
machine; and of each kind an existing one is looked up in the package, so that a second place shows.
"""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lorafuse
from lorafuse import activation, formats
from lorafuse import functional as LF
from lorafuse.operands import Dropout, LowRank, Rows, Weight
from lorafuse.ops.choose import choose
from lorafuse.plan import Problem, devices, find, select

PACKAGE = Path(lorafuse.__file__).parent
by_backend = pytest.mark.parametrize("backend", ["eager", "triton"])


def files_that_name(*words):
    """The files of the package in which one of `words` stands, without tests' tools."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(word in path.read_text() for word in words) and path.relative_to(PACKAGE).parts[0] != "testing"
    }


@pytest.mark.parametrize(
    ("words", "file", "tables"),
    [
        # the table of formats, what they cost, and the advisor's names of bases
        (
            ['"int8"', "formats.int8"],
            "formats/int8.py",
            {"formats/__init__.py", "formats/sizes.py", "advise/bases.py"},
        ),
        # transformers' class of it, by its name here, and its number in csrc
        (
            ["relu2"],
            "kernels/epilogues.py",
            {"activation.py", "integrations/hf_transformers.py", "backends/cuda_siblings.py"},
        ),
        # and what links it, for the model of many devices
        (["RTX 5090"], "plan/devices.py", {"advise/links.py"}),
        # the public function, and the formulas of FLOPs
        (["lora_grouped_linear"], "ops/grouped.py", {"functional/__init__.py", "ops/flops.py"}),
    ],
    ids=["format", "epilogue", "gpu", "operator"],
)
def test_what_exists_stands_in_one_file_and_tables(words, file, tables):
    assert files_that_name(*words) - IN_MESSAGES.get(file, set()) == {file, *tables}


# where a word is part of what is said to users, or is torch's own name of a device
IN_MESSAGES = {
    # the names of `bench --quant` and `tune --quant`, by which weights to be measured are made
    "formats/int8.py": {"demo/quantized.py", "tune/stored.py"},
    "ops/grouped.py": {"ops/plain.py"},
}


def test_a_second_place_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text('FORMAT = "int8"\n')
    assert files_that_name('"int8"') == {"one.py", "two.py"}


@pytest.fixture
def toy_format(monkeypatch):
    """One module, one row: weights stored negated."""
    module = ModuleType("toy_format")
    module.shape = lambda data, statistics, parameters: tuple(data.shape)
    module.decode = lambda data, statistics, parameters, dtype, out: data.to(dtype).neg()
    module.select = lambda data, statistics, parameters, start, stop: (data[start:stop], statistics, parameters)
    module.adopt = lambda storage, name: None
    monkeypatch.setitem(sys.modules, "toy_format", module)
    monkeypatch.setitem(formats.FORMATS, "toy", "toy_format")


@by_backend
def test_a_format(backend, toy_format):
    x, w = torch.randn(5, 16, requires_grad=True), torch.randn(8, 16)
    a, b = torch.randn(2, 16, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    y = LF.lora_linear(x, Weight(w.neg(), format="toy"), a, b, backend=backend)
    expected = LF.lora_linear(x, w, a, b, backend=backend)
    assert torch.equal(y, expected)
    for actual, right in zip(*(torch.autograd.grad(t.sum(), (x, a, b)) for t in (y, expected)), strict=True):
        assert torch.equal(actual, right)
    up, down = torch.randn(3, 8, 16), torch.randn(3, 16, 8)
    routed = torch.randint(0, 3, (5, 2)), torch.rand(5, 2)
    stored = (Weight(t.neg(), format="toy") for t in (up, down))
    given = {"has_gate": False, "backend": backend}
    assert torch.equal(LF.lora_experts(x, *routed, *stored, **given), LF.lora_experts(x, *routed, up, down, **given))


def test_a_format_is_planned(toy_format):
    problem = Problem(8192, 4096, 4096, 16, "bfloat16", "float32", format="toy")
    available = (("eager", ""), ("triton", ""), ("cuda", ""))
    dense = select(replace(problem, format="dense"), find("H200"), available)
    plan = select(problem, find("H200"), available)
    assert (plan.backend, plan.kernel) == (dense.backend, dense.kernel) != ("eager", "aten_beta1")
    unknown = select(replace(problem, format="nobody's"), find("H200"), available)
    assert unknown.backend == "eager"
    assert sum("dense weights, not nobody's" in reason for reason in unknown.reasons) == 2


@by_backend
def test_an_epilogue(backend, monkeypatch):
    """One row of activations runs everywhere; a kernel fuses it where its file knows it."""
    monkeypatch.setitem(activation.ACTIVATIONS, "cube", (lambda x: x**3, lambda dy, x: 3 * dy * x**2))
    x = torch.randn(6, 16, dtype=torch.float32, requires_grad=True)
    up, down = torch.randn(3, 16, 16) / 4, torch.randn(3, 16, 8) / 4
    routed = torch.randint(0, 3, (6, 2)), torch.rand(6, 2)
    y = LF.lora_experts(x, *routed, up, down, activation="cube", backend=backend)
    expected = LF.lora_experts(x, *routed, up, down, activation=lambda u: u[:, :8] ** 3 * u[:, 8:], backend="eager")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    actual, right = (torch.autograd.grad(t.sum(), x)[0] for t in (y, expected))
    torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-4)


def test_a_gpu(monkeypatch):
    row = replace(find("H200"), name="H300", model="H300", sms=160, hbm_bandwidth=9e12)
    monkeypatch.setitem(devices.DEVICES, "H300", row)
    plan = select(Problem(8192, 4096, 4096, 16, "bfloat16", "float32"), find("h300"), (("eager", ""), ("triton", "")))
    assert plan.backend == "triton"
    assert plan.chosen.seconds > 0


def twice(x, w, a, b, backend):
    """An operator of two projections of one x, by primitives alone: `(x wᵀ + xa bᵀ, its gradient of x for ones)`."""

    def problem():
        return Problem(
            x.shape[0], *w.shape, a.shape[0], "float32", "float32", dropout=True, gradients=("dx", "da", "db")
        )

    run, plan = choose(backend, x, problem)
    weight, dropout = Weight(w), Dropout(torch.tensor([3]), 0.5)
    forward = choose(backend, x, lambda: replace(problem(), gradients=()))[1]
    xa = run.project(x, a, None, forward, dropout=dropout)
    y = run.matmul(x, weight, None, forward, low=LowRank(xa, b, 2.0))
    dy = torch.ones_like(y)
    dyb, db, dbias = run.project_outer(dy, b, xa, plan, scale=2.0, need_dyb=True, need_dbias=True)
    dx = run.matmul(dy, weight.t, None, plan, low=LowRank(dyb, a, is_transposed=True, dropout=dropout))
    return y, xa, dyb, db, dbias, dx, run.outer(dyb, x, None, plan, like=a, dropout=dropout)


def test_an_operator():
    """Of the same primitives on every backend, and so with the same results."""
    torch.manual_seed(0)
    operands = torch.randn(40, 32), torch.randn(24, 32), torch.randn(4, 32), torch.randn(24, 4)
    for one, other in zip(twice(*operands, "eager"), twice(*operands, "triton"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_grouped_operator():
    x, w, a = torch.randn(12, 16), torch.randn(3, 8, 16), torch.randn(3, 2, 16)
    offsets = torch.tensor([5, 5, 11])
    problem = Problem(12, 8, 16, 2, "float32", "float32", groups=3, is_ragged=True)
    actual = []
    for backend in ("eager", "triton"):
        run, plan = choose(backend, x, lambda: problem)
        rows = Rows(12, offsets)
        xa = rows.zero_rest(run.project(x, a, rows, plan))
        actual.append((xa, rows.zero_rest(run.matmul(x, Weight(w), rows, plan))))
    for one, other in zip(*actual, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not actual[0][1][11:].any()
