"""What tests/conftest.py promises (T0)."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import native_build
import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_memory_nobody_wrote_is_nan(dtype):
    like = torch.zeros(3, 2, dtype=dtype, requires_grad=True)
    for fresh in (
        torch.empty(3, 2, dtype=dtype, requires_grad=True),
        torch.empty_like(like),
        torch.empty_strided((3, 2), (1, 3), dtype=dtype),
        like.new_empty(3, 2),
        like.new_empty_strided((3, 2), (1, 3)),
    ):
        assert fresh.isnan().all()


def test_poisoned_functions_keep_their_meaning():
    assert torch.empty(2, requires_grad=True).is_leaf
    assert torch.empty(2, dtype=torch.int64).dtype == torch.int64
    assert torch.empty(2, 0).numel() == 0
    assert torch.empty(2, device="meta").is_meta
    out = torch.zeros(2)
    assert torch.empty(2, out=out) is out


@pytest.mark.no_poison
def test_the_marker_leaves_torch_alone():
    assert torch.empty.__name__ == "empty"


def test_poison_compiles():
    def half_written(x):
        out = x.new_empty(2, 4)
        out[0] = x
        return out + torch.empty_like(out).fill_(1.0)

    result = torch.compile(half_written, backend="aot_eager", fullgraph=True)(torch.ones(4))
    assert torch.equal(result[0], torch.full((4,), 2.0))


@pytest.mark.parametrize("again", [0, 1])
def test_every_test_draws_the_same(again):
    assert torch.randn(1).item() == torch.randn(1, generator=torch.Generator().manual_seed(0)).item()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def test_a():\n    pass\n", "nothing was skipped"),
        (
            "import pytest\n@pytest.mark.parametrize('i', '12345')\ndef test_a(i): pytest.skip('no moon')\n",
            "5 x no moon: test_a.py::test_a[1], test_a.py::test_a[2], test_a.py::test_a[3] and 2 more",
        ),
    ],
)
def test_a_run_ends_with_what_was_skipped(tmp_path, source, message):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_a.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    before, closing = done.stdout.rstrip().rsplit("\n", 1)
    assert message in before.partition("what was skipped and why")[2]
    assert "passed" in closing or "skipped" in closing


def test_what_takes_long_starts_first(tmp_path):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_a.py").write_text("def test_a(): pass\ndef test_b(): pass\n")
    (tmp_path / "test_b.py").write_text("import pytest\n@pytest.mark.first\ndef test_c(): pass\ndef test_d(): pass\n")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.findall(r"::(\w+) PASSED", done.stdout) == ["test_c", "test_a", "test_b", "test_d"]


def test_nothing_is_built_while_tests_are_collected(monkeypatch):
    """pytest reads attributes of what a module of tests imports."""
    monkeypatch.setattr(native_build, "build", lambda *_: pytest.fail("the emulator was built"))
    assert not hasattr(native_build.EMULATOR, "_mock_name")
