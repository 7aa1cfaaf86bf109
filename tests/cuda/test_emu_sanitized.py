"""The emulated CUDA kernels under AddressSanitizer and UBSan (T5), with host code and emulator, in a process apart."""

import os
import subprocess
import sys

import pytest
from native_build import build
from native_commands import ROOT, SANITIZED, SANITIZED_BUILD

pytestmark = pytest.mark.first

LOAD = f"""
import importlib.util, os, sys
import torch
spec = importlib.util.spec_from_file_location("lorafuse._emu", {str(SANITIZED)!r})
# it lacks the units that no test calls here
flags = sys.getdlopenflags()
sys.setdlopenflags(os.RTLD_LAZY)
module = sys.modules["lorafuse._emu"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.setdlopenflags(flags)
from lorafuse.backends import base
base.availability = lambda name: base.Availability(True)
"""
CHECK = """
from lorafuse.plan import override
from lorafuse.testing.check_linear import LinearCase, check_linear
fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
check_linear(LinearCase((200,), 136, 136, 24, bf16, fp32, dropout_p=0.2), "emu")
check_linear(LinearCase((70,), 72, 136, 13, fp16, fp16), "emu")
check_linear(LinearCase((129,), 264, 72, 128, bf16, bf16), "emu")
with override(force_kernel="cuda xa_in_tiles"), torch.autocast("cpu", fp16):
    check_linear(LinearCase((200,), 136, 136, 24, fp16, fp32), "emu")
print("launches:", module.statistics()["launches"])
"""
EXPERTS = """
sys.path[:0] = ["tests", "tests/cuda"]
from test_emu_experts import grouped, results
for transposed in (False, True):
    results(*grouped([60, 60, 190], 200, torch.bfloat16, transposed), "emu")
print("launches:", module.statistics()["launches"])
"""
DECODE = """
sys.path[:0] = ["tests"]
from quantized_weights import four_bits, fp8
weights = [four_bits(33, 65, nested=True), four_bits(5, 33, 24, block=256).select(1, 4), four_bits(40, 96)]
for w in (*weights, fp8(2, 130, 208), fp8(9, 77, blocks=None)):
    out = torch.empty(w.stored, dtype=torch.bfloat16)
    base.load("emu").decode(w, torch.bfloat16, out)
    assert torch.equal(out.isfinite(), w.decoded(torch.bfloat16).data.isfinite())
print("launches:", module.statistics()["launches"])
"""
# 8 rows more than the matrix has
OVERRUN = """
a, out = torch.ones(8, 16), torch.empty(8, 16, dtype=torch.bfloat16)
places = {"in": a.data_ptr(), "stride_in": 16, "out": out.data_ptr(), "stride_out": 16}
module.round_adapter(in_type=2, type=0, rows=16, columns=16, **places)
print("not seen")
"""


@pytest.fixture(scope="module")
def sanitized():
    """Runs Python with the sanitized module in place of `lorafuse._emu`."""
    reason = build(*SANITIZED_BUILD)
    if reason:
        pytest.skip(f"the emulator cannot be built: {reason}")
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, timeout=300
        ).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    # what Python itself never frees is not ours
    environment = {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}

    def run(code):
        command = [sys.executable, "-c", LOAD + code]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)

    return run


@pytest.mark.parametrize("code", [CHECK, EXPERTS, DECODE], ids=["linear", "grouped", "decode"])
def test_nothing_is_found(sanitized, code):
    done = sanitized(code)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "launches: " in done.stdout
    assert "runtime error" not in done.stderr


def test_an_overrun_is_found(sanitized):
    done = sanitized(OVERRUN)
    assert done.returncode != 0
    assert "not seen" not in done.stdout
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
