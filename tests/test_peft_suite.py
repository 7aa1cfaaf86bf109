"""The harness of `make test-peft` (T1), without PEFT's tests: what it selects, counts and compares."""

import json
import os
import sys

import pytest
import warm_python
from peft_suite.results import Result, compare
from test_hygiene import ROOT

ONE = """
import pytest, torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from lorafuse.integrations.hf_peft import FusedLinear

def model():
    return get_peft_model(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), LoraConfig(target_modules=["0", "1"]))

def test_fused():
    two = model()
    two.add_adapter("other", LoraConfig(target_modules=["0"]))
    for _ in range(3):
        two(torch.randn(5, 4))

def test_that_fails_patched():
    assert not isinstance(model().base_model.model[0], FusedLinear), "it is patched"

@pytest.mark.parametrize("kind", [LoraConfig, {"one": [IA3Config]}, IA3Config(), (IA3Config, LoraConfig())], ids="abcd")
def test_kinds(kind):
    assert kind

def test_that_fails_always():
    raise ValueError("the hub")

def test_that_is_skipped():
    pytest.skip("no GPU")
"""


# the runs are forks of one process: importing PEFT took each of them longer than its tests
RUNS = """
import json, os, sys
import lorafuse.integrations.hf_peft, pytest
for arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        os._exit(pytest.main(arguments))
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`{mode: {test: Result}}`, of all tests as PEFT ships it, then of those that passed."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_one.py").write_text(ONE)
    files = {mode: folder / f"{mode}.json" for mode in ("stock", "patched", "cycled")}
    arguments = [
        ["-p", "peft_suite.plugin", f"--mode={mode}", f"--results={file}", "test_one.py"]
        + ([] if mode == "stock" else [f"--only={files['stock']}"])
        for mode, file in files.items()
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", RUNS, json.dumps(arguments)]
    warm_python.run(command, warm_python.PeftPopen, cwd=folder, env=environment, check=True, timeout=300)
    return {
        mode: {name.partition("::")[2]: Result(*values) for name, values in json.loads(file.read_text()).items()}
        for mode, file in files.items()
    }


def test_a_stock_run_holds_the_tests_of_lora(runs):
    assert {name: result.outcome for name, result in runs["stock"].items()} == {
        "test_fused": "passed",
        "test_that_fails_patched": "passed",
        "test_kinds[a]": "passed",
        "test_kinds[d]": "passed",
        "test_that_fails_always": "failed",
        "test_that_is_skipped": "skipped",
    }
    assert sum(result.calls for result in runs["stock"].values()) == 0


@pytest.mark.parametrize("mode", ["patched", "cycled"])
def test_a_patched_run_holds_what_passed_and_counts(runs, mode):
    assert runs[mode].keys() == {"test_fused", "test_that_fails_patched", "test_kinds[a]", "test_kinds[d]"}
    assert runs[mode]["test_fused"] == Result("passed", calls=6, modules=2)
    comparison = compare(runs["stock"], runs[mode])
    assert not comparison.is_good
    assert str(comparison).startswith(
        "3 of 4 pass; 6 fused calls, in 2 modules\n  FAILED test_that_fails_patched: failed"
    )
    assert "it is patched" in str(comparison)


def test_a_comparison():
    stock = {"a": Result(), "b": Result(), "c": Result("failed"), "d": Result("skipped")}
    good = compare(stock, {"a": Result(calls=3, modules=1), "b": Result(calls=2, modules=2)})
    assert good.is_good
    assert (good.expected, good.failed, good.calls, good.modules) == (2, {}, 5, 3)
    assert not compare(stock, {"a": Result(), "b": Result()}).is_good
    bad = compare(stock, {"a": Result("skipped", calls=1, why="")})
    assert bad.failed == {"a": "skipped: ", "b": "it did not run"}
    assert not bad.is_good
