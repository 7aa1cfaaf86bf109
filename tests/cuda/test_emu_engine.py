"""The emulator itself (csrc/emu): small kernels that must pass under every seed, and planted bugs that it must report.

The cases are C++, in csrc/emu/selftest, where what each bug's report must say stands beside the bug. Here they are
compiled by g++, anew when the sources have changed, linked with the emulator that other tests run, and run.
"""

import hashlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from native_build import PLANTED, emulator
from native_commands import ROOT

pytestmark = pytest.mark.first

CSRC = ROOT / "csrc"
FLAGS = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
CASES = (
    "ring K-major",
    "ring K-major n256",
    "ring K-major n16",
    "ring MN-major",
    "ring MN-major n32",
    "ring in a cluster",
    "TMA store",
    "TMA store to TMA load",
    "copy_async and mma",
    "copy_async and mma, transposed",
    "warp operations",
    "numbers",
    "copy_async and mbarrier",
    "wgmma from registers",
    "wgmma from registers, MN-major",
    "boxes without a swizzle",
    "boxes with each swizzle",
    "boxes that are refused",
    "narrow K-major, no swizzle",
    "narrow K-major, 32 bytes",
    "narrow K-major, 64 bytes",
    "narrow MN-major, no swizzle",
    "narrow MN-major, 32 bytes",
    "narrow MN-major, 64 bytes",
    "flag to TMA",
    "flag to loads",
    "ticket",
    "words of a cluster",
    "loads from a cluster",
    "launches that overlap",
    "reports",
)


def _build(compiler: str) -> Path:
    files = [f for folder in ("emu", "include") for f in sorted((CSRC / folder).rglob("*")) if f.is_file()]
    digest = hashlib.sha256(" ".join([compiler, *FLAGS]).encode())
    for file in files:
        digest.update(f"{file.relative_to(CSRC)}\0".encode() + file.read_bytes())
    folder = ROOT / "build" / "csrc" / "emu-selftest"
    program = folder / f"selftest-{digest.hexdigest()[:16]}"
    if program.exists():
        return program
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    include = ["-I", str(CSRC / "emu" / "include"), "-I", str(CSRC / "include")]
    sources = sorted((CSRC / "emu" / "selftest").glob("*.cpp"))

    def compile_one(source: Path) -> str:
        out = folder / f"{source.stem}.o"
        done = subprocess.run(
            [compiler, *FLAGS, *include, "-c", str(source), "-o", str(out)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return str(out)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    objects += sorted(PLANTED.glob("emu-*.cpp.o"))
    assert len(objects) == len(list((CSRC / "emu").rglob("*.cpp")))
    subprocess.run([compiler, *objects, "-o", str(program)], check=True, timeout=300)
    return program


@pytest.fixture(scope="module")
def selftest():
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on PATH: the emulator is not compiled")
    emulator()
    return _build(compiler)


def test_every_case_is_run(selftest):
    listed = subprocess.run([selftest, "list"], capture_output=True, text=True, check=True, timeout=300).stdout
    assert tuple(listed.splitlines()) == CASES


@pytest.mark.parametrize("case", CASES)
def test_case(selftest, case, request):
    seeds = request.config.getoption("--seeds")
    done = subprocess.run([selftest, case, str(seeds)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_a_launch_is_the_same_again_with_the_same_seed(selftest):
    runs = [
        subprocess.run([selftest, "TMA store", "20"], capture_output=True, text=True, timeout=300).stdout
        for _ in range(2)
    ]
    assert "seen under" in runs[0]
    assert runs[0] == runs[1]
