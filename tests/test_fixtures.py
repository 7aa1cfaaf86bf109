"""What tests/conftest.py promises (T0)."""

import gc
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import native_build
import pytest
import torch
import warm_python
from operators import Linear

from lorafuse.plan import find, override
from lorafuse.testing.check_linear import LinearCase, make_operands


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


def run_alone(folder, *options):
    """What pytest prints of the tests in a folder, with this conftest.py."""
    for name in ("conftest.py", "fast_interpreter.py"):
        shutil.copy(Path(__file__).with_name(name), folder)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(folder)]
    return warm_python.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=300).stdout


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
    (tmp_path / "test_a.py").write_text(source)
    before, closing = run_alone(tmp_path).rstrip().rsplit("\n", 1)
    assert message in before.partition("what was skipped and why")[2]
    assert "passed" in closing or "skipped" in closing


def test_what_takes_long_starts_first(tmp_path):
    (tmp_path / "test_a.py").write_text("def test_a(): pass\ndef test_b(): pass\n")
    (tmp_path / "test_b.py").write_text("import pytest\n@pytest.mark.first\ndef test_c(): pass\ndef test_d(): pass\n")
    assert re.findall(r"::(\w+) PASSED", run_alone(tmp_path, "-v")) == ["test_c", "test_a", "test_b", "test_d"]


def test_garbage_is_collected_again_but_not_searched_for_in_imports():
    assert gc.isenabled()
    assert gc.get_freeze_count() > 10_000


def test_nothing_is_built_while_tests_are_collected(monkeypatch):
    """pytest reads attributes of what a module of tests imports."""
    monkeypatch.setattr(native_build, "build", lambda *_: pytest.fail("the emulator was built"))
    assert not hasattr(native_build.EMULATOR, "_mock_name")


KERNEL = """
import triton
import triton.language as tl

@triton.jit
def _kernel(p_out, p_x, number, real, large, literal: tl.constexpr):
    columns = tl.arange(0, 4)
    x = tl.load(p_x + columns)
    y = x + 1
    tl.store(p_out + columns, y * y)
    tl.store(p_out + 4 + columns, y * x)
    tl.store(p_out + 8 + columns, y * literal + number)
    tl.store(p_out + 12 + columns, (columns - literal) * 2 + 1)
    tl.store(p_out + 16 + columns, x * real + 1 - y / 4)
    tl.store(p_out + 20 + columns, columns.to(tl.int64) + large)
    tl.store(p_out + 24 + columns, tl.where(columns < literal, y, -y))
    tl.store(p_out + 28 + columns, tl.load(p_x + 1, mask=number > 0, other=number) + y)
    tl.store(p_out + 32 + columns, 1 + (columns[:, None] == columns[None, :]).to(tl.int32).sum(1))
    low, high = tl.split(tl.join(x, y))
    tl.store(p_out + 36 + columns, high - low)
    for i in range(literal, literal + 3):
        tl.store(p_out + 40 + columns, y + i, mask=columns <= i)
    tl.store(p_out + 44 + columns, (x * 3).to(tl.int32) % 2 + (columns >> 1) + 1)
"""


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="there is a GPU: no kernel is interpreted")
class TestFastInterpreter:
    @pytest.fixture
    def fast(self):
        fast = pytest.importorskip("fast_interpreter")
        assert fast.triton.__version__.startswith(fast.VERSION), "it is not installed for this Triton"
        yield fast
        fast.install()

    @pytest.mark.parametrize("gpu", ["A100", "H200"])
    def test_it_computes_the_same(self, fast, gpu):
        """Every bit, of pointers and of descriptors, when a call is recorded and when it is repeated."""
        case = LinearCase(leading=(40,), N=72, K=64, R=6, dtype=torch.float16, dropout_p=0.1)
        runs = []
        for functions in (fast.ORIGINALS, fast.REPLACEMENTS, fast.REPLACEMENTS):
            fast.install(functions)
            torch.manual_seed(0)
            o, operator, seed = make_operands(case), Linear("triton"), torch.tensor([5])
            with override(interpreted_as=find(gpu)):
                y, xa = operator.forward(o.x, o.w, o.bias, o.a, o.b, seed, 1.7, 0.1)
                grads = operator.backward(o.dy, o.x, xa, o.w, o.a, o.b, seed, 1.7, 0.1, True, True, True, True)
            runs.append((y, xa, *grads))
        assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))

    def test_operands_of_the_same_types_are_told_apart(self, fast, tmp_path, monkeypatch):
        """The same tensor twice, numbers within and beyond a type, one value that decides; recorded and repeated."""
        (tmp_path / "told_apart.py").write_text(KERNEL)
        monkeypatch.syspath_prepend(tmp_path)
        kernel = importlib.import_module("told_apart")._kernel
        values = (0, 5), (3, -3), (1, 1), (2, 2**31), (200, 2**40), (-200, 0), (5, 3)
        outs = []
        for functions in (fast.ORIGINALS, fast.REPLACEMENTS, fast.REPLACEMENTS):
            fast.install(functions)
            for small, large in values:
                out = torch.zeros(12, 4, dtype=torch.float64)
                kernel[(1,)](out, torch.arange(4, dtype=torch.float32), small, small / 2, large, small)
                outs.append(out)
        assert not outs[0].isnan().any()
        assert outs[1].any(1).all()
        for i, out in enumerate(outs):
            assert torch.equal(out, outs[i % len(values)]), values[i % len(values)]

    def test_types_and_shapes_are_the_same(self, fast):
        core = fast.core
        for kind in (core.float16, core.int64, core.pointer_type(core.float32), core.pointer_type(core.float32, 3)):
            for shape in ([4], [2, core.constexpr(8)], core.tuple([16, 1])):
                made = []
                for functions in (fast.ORIGINALS, fast.REPLACEMENTS, fast.REPLACEMENTS):
                    fast.install(functions)
                    block = core.block_type(kind, shape)
                    assert block.element_ty == kind
                    tensor = core.tensor(None, block)
                    made.append([{name: str(value) for name, value in vars(one).items()} for one in (block, tensor)])
                assert made[0] == made[1] == made[2]

    @pytest.mark.parametrize(("shape", "error"), [([3], ValueError), ([], TypeError), ([4.0], TypeError)])
    def test_what_is_refused_is_refused_again(self, fast, shape, error):
        fast.core.block_type(fast.core.float32, [4])
        for _ in range(2):
            with pytest.raises(error):
                fast.core.block_type(fast.core.float32, shape)


WHAT_STARTED = """
import json, os, sys
print(json.dumps([__name__, sys.argv, sys.path, sys.warnoptions, os.getcwd(), os.getppid(), dict(os.environ)]))
sys.stdout.flush()
print(len(sys.stdin.read()), file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("how", [["-c", WHAT_STARTED], ["-W", "error", "-m", "module"], ["folder/module.py"]])
def test_a_fork_that_has_imported_torch_is_what_python_starts(how, tmp_path):
    for folder in (tmp_path, tmp_path / "folder"):
        folder.mkdir(exist_ok=True)
        (folder / "module.py").write_text(WHAT_STARTED)
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{tmp_path / 'more'}", "PATH": os.environ["PATH"]}
    results = [
        run([sys.executable, *how, "an argument"], cwd=tmp_path, env=environment, input="text", capture_output=True,
            text=True, timeout=300)
        for run in (subprocess.run, warm_python.run)
    ]  # fmt: skip
    expected, actual = ([json.loads(done.stdout), done.stderr, done.returncode] for done in results)
    # set while Python starts
    expected[0][-1].pop("LC_CTYPE", None)
    assert actual == expected
    assert expected[1:] == ["4\n", 3]


def test_signals_reach_a_fork_that_has_imported_torch():
    process = warm_python.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    assert os.getpgid(process.pid) == process.pid
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
