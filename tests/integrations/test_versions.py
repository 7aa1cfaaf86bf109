"""The oldest PEFT and transformers that lorafuse runs with (T1), installed beside the pinned ones; what needs newer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import moe_models
import peft
import pytest
import torch
import warm_python
from tiny_models import adapted

import lorafuse
from lorafuse.errors import MissingDependency
from lorafuse.integrations import hf_experts
from lorafuse.versions import EXPERTS, MINIMUM

pytestmark = pytest.mark.no_poison

ROOT = Path(__file__).parents[2]
# requirements: the versions, the tests that run with them. After PEFT 0.18 prepared a
# hot swap, an adapter that is not active requires gradients and has none, in the unpatched model too, and it has no
# VeLoRA; PEFT 0.19 has no second adapter with target_parameters.
OLDEST = {
    "linear": (
        MINIMUM,
        [
            "tests/integrations/test_patch_states.py",
            "-k",
            "(test_state and before or warning or wrapped) and not scales_as_tensors and not velora",
        ],
    ),
    "experts": (
        EXPERTS,
        [
            "tests/integrations/test_peft_experts.py",
            "-k",
            "test_together or test_one_projection or disabled",
        ],
    ),
}


def pins(name):
    """`{package: version}` of a file of requirements."""
    text = (ROOT / "requirements" / f"oldest-{name}.txt").read_text()
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))


def installed(name):
    """The folder with the packages of a file of requirements; skips the test where they cannot be fetched."""
    folder = ROOT / "build" / f"oldest-{name}"
    done = folder / ".done"
    pinned = repr(pins(name))
    if not done.is_file() or done.read_text() != pinned:
        file = f"requirements/oldest-{name}.txt"
        options = ["--quiet", "--disable-pip-version-check", "--no-compile", "--no-deps", "--upgrade"]
        command = [sys.executable, "-m", "pip", "install", *options, "--retries", "0", "--timeout", "10"]
        fetched = subprocess.run(
            [*command, "--target", str(folder), "-r", file], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        if fetched.returncode:
            pytest.skip(f"pip could not fetch {file}: {fetched.stderr.strip().splitlines()[-1:]}")
        done.write_text(pinned)
    return folder


@pytest.mark.parametrize("name", OLDEST)
def test_states(name):
    """The tests of the pinned versions pass with the oldest."""
    needed, tests = OLDEST[name]
    for package in ("peft", "transformers"):
        assert pins(name)[package] in (needed[package], f"{needed[package]}.0")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (installed(name), ROOT, ROOT / "tests")))
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "without_torchao", "--show-capture=no", *tests]
    done = warm_python.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)


def test_an_older_peft_is_refused(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.17.1")
    with pytest.raises(MissingDependency, match=re.escape(f"needs peft >= {MINIMUM['peft']}, found 0.17.1")):
        lorafuse.patch(adapted())


class TestFactors:
    """Of another version's layout a report tells, and no forward fails."""

    def turned_round(self):
        """A model whose factors of down_proj have in and out features exchanged, as PEFT up to 0.19.0 lays them out."""
        model = moe_models.adapted("qwen3_moe")
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.ParamWrapper) and module.parameter_name == "down_proj":
                a, b = module.lora_A["default"], module.lora_B["default"]
                ins, outs = a.weight.shape[1], b.weight.shape[0]
                assert ins != outs
                a.weight = torch.nn.Parameter(torch.randn(a.weight.shape[0], outs))
                b.weight = torch.nn.Parameter(torch.randn(ins, b.weight.shape[1]))
        return model

    def test_before_patch(self):
        with pytest.warns(UserWarning, match="patched nothing"):
            report = lorafuse.patch(self.turned_round())
        assert all(re.search(r"its lora_A .* and lora_B .* are not \[\d+·R, \d+\]", s.reason) for s in report.skipped)
        assert report.skipped

    def test_a_version_with_another_layout(self, monkeypatch):
        monkeypatch.setattr(hf_experts, "TOO_OLD", "adapted parameters need peft >= 0.19")
        with pytest.warns(UserWarning, match="patched nothing"):
            report = lorafuse.patch(moe_models.adapted("qwen3_moe"))
        assert {s.reason for s in report.skipped} == {"adapted parameters need peft >= 0.19"}


def test_the_page_has_the_versions():
    page = (ROOT / "docs" / "compatibility.md").read_text()
    for line in (
        f"linear layers: peft >= {MINIMUM['peft']}, transformers >= {MINIMUM['transformers']}",
        f"experts: peft >= {EXPERTS['peft']}, transformers >= {EXPERTS['transformers']}",
        f"all: torch >= {MINIMUM['torch']}, triton >= {MINIMUM['triton']}",
    ):
        assert line in page
