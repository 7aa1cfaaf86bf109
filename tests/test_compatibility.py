"""docs/compatibility.md: every row says how a feature runs and names a test that exists, or why there is none (T0)."""

import ast
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
HEADER = "| feature | runs | test |"
# a test, or of what is not run a sentence
ROW = re.compile(r"\| (?P<feature>.+) \| (?P<runs>.+) \| (`(?P<test>tests/[^`|]+)`|(?P<why>[^|]{30,})) \|")
RUNS = re.compile(r"fused|PEFT|not run|refused: `(?P<message>[^`]+)`( \(PEFT's own\))?")


def rows(text):
    """`(feature, how it runs, test)` of every row; test is None for what is not run. Raises ValueError for others."""
    actual = []
    for line in text.splitlines():
        if not line.startswith("|") or line == HEADER or not line.strip("|-"):
            continue
        match = ROW.fullmatch(line)
        if (
            match is None
            or not RUNS.fullmatch(match["runs"])
            or (match["test"] is None) != (match["runs"] == "not run")
        ):
            raise ValueError(f"{line!r} is not a row of feature, fused, PEFT or refused with its message, and a test")
        actual.append((match["feature"], match["runs"], match["test"]))
    return actual


def names_in(path):
    """Names of the tests of a file, as pytest writes them without parameters."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        names |= {prefix + m.name for m in members if isinstance(m, ast.FunctionDef) and m.name.startswith("test_")}
    return names


def missing(text):
    """The tests that rows name and that do not exist."""
    requested = [test.split("::", 1) for _, _, test in rows(text) if test]
    return [
        f"{file}::{name}"
        for file, name in requested
        if not (ROOT / file).is_file() or name.partition("[")[0] not in names_in(ROOT / file)
    ]


def test_every_row_names_a_test():
    assert len(rows(PAGE.read_text())) > 50
    assert missing(PAGE.read_text()) == []


def test_features_are_named_once():
    features = [feature for feature, _, _ in rows(PAGE.read_text())]
    assert sorted(features) == sorted(set(features))


def test_cases_that_rows_name_exist():
    """Of the parameters in brackets each part is in the file: a case that was renamed is gone."""
    for _, _, test in rows(PAGE.read_text()):
        name, _, case = (test or "").partition("[")
        source = (ROOT / name.split("::")[0]).read_text() if case else ""
        assert [part for part in re.split(r", |-(?=\d)", case.removesuffix("]")) if part not in source] == []


def test_messages_are_those_of_the_code():
    sources = "\n".join(path.read_text() for path in (ROOT / "lorafuse").rglob("*.py"))
    for feature, runs, _ in rows(PAGE.read_text()):
        match = RUNS.fullmatch(runs)
        if match["message"] and "PEFT's own" not in runs:
            assert match["message"] in sources, feature


@pytest.mark.parametrize(
    "wrong",
    [
        "| x | works | `tests/a.py::b` |",
        "| x | fused | none |",
        "| x | refused | `tests/a.py::b` |",
        "| x | not run | `tests/a.py::b` |",
        "| x | fused | because it would take a machine with a GPU |",
        "| x | not run | no GPU |",
    ],
)
def test_a_row_that_says_nothing_is_found(wrong):
    with pytest.raises(ValueError, match="is not a row"):
        rows(f"{HEADER}\n|---|---|---|\n{wrong}\n")


def test_a_test_that_is_gone_is_found():
    row = "| x | fused | `tests/test_compatibility.py::test_of_old` |"
    assert missing(f"{HEADER}\n|---|---|---|\n{row}\n") == ["tests/test_compatibility.py::test_of_old"]


def test_the_example_of_a_policy_runs():
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    names = {}
    exec(code, names)
    from lorafuse.nn import LoRAGatedMLP, LoRALinear, LoRAQKV

    linears = [torch.nn.Linear(k, n) for n, k in ((8, 8), (4, 8), (4, 8), (12, 8), (12, 8), (8, 12))]
    layers = LoRALinear(16, 8, 2), LoRAQKV.from_linears(*linears[:3], 2), LoRAGatedMLP.from_linears(*linears[3:], 2)
    for name, parameter in torch.nn.ModuleList(layers).named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    o, qkv, mlp = layers

    def block(x):
        return mlp(o(torch.cat(qkv(x), 1)).tanh())

    x = torch.randn(3, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    calls = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with Counting():
        (dx,) = torch.autograd.grad(names["run"](block, x).sum(), x)
    assert torch.equal(dx, expected)
    # of experts: tests/ops/test_flops.py
    experts = torch.ops.lorafuse.lora_experts.default
    assert {name: calls.count(name) for name in names["SAVED"] - {experts}} == dict.fromkeys(
        names["SAVED"] - {experts}, 1
    )
