"""The host side of csrc without a GPU (T5): what launches keep, on a driver that counts; waits in builds for debugging.

`tests/cuda/csrc/cache_check.cpp` compiles the headers that launch on a GPU against `tests/cuda/csrc/fake_driver`.
"""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from test_csrc_layouts import CSRC, build, mismatches

INCLUDE = CSRC / "include" / "lorafuse"
FAKE = Path(__file__).parent / "csrc" / "fake_driver"


def check(folder, *changes):
    """Check → mismatches; `changes` are (header, a text of it, what a copy has instead)."""
    for header in {header for header, *_ in changes}:
        text = (INCLUDE / header).read_text()
        for before, after in (change[1:] for change in changes if change[0] == header):
            assert text.count(before) == 1, f"{header} holds {before!r} {text.count(before)} times"
            text = text.replace(before, after)
        path = folder / "lorafuse" / header
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return mismatches(build("cache_check", folder, folder, FAKE, CSRC / "include", options=["-pthread", "-O0"]))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
class TestKept:
    def test_maps_and_limits(self, tmp_path):
        actual = check(tmp_path)
        assert len(actual) == 9
        assert not any(actual.values()), actual

    @pytest.mark.parametrize(
        "changes",
        [
            (
                ("tensor_maps.cuh", "static_cast<uint64_t>(current_device())", "uint64_t{0}"),
                ("ptx/launch.cuh", "if (bytes <= limit) return;", "if (bytes == limit) return;"),
                ("cache.cuh", "if (values_.size() >= most_) values_.clear();", ""),
            ),
            (
                ("tensor_maps.cuh", "std::copy(std::begin(box), std::end(box), next);", ""),
                ("ptx/launch.cuh", "{kernel, current_device()}", "{kernel, 0}"),
            ),
        ],
    )
    def test_a_wrong_cache_is_seen(self, tmp_path, changes):
        actual = check(tmp_path, *changes)
        names = {"tensor_maps.cuh": "maps: each is its own", "cache.cuh": "cache: bounded"}
        names["ptx/launch.cuh"] = "limits: once for each kernel and device"
        assert [header for header, *_ in changes if not actual[names[header]]] == []


WAITS = """
#include <lorafuse/ptx/memory.cuh>
__global__ void waits(uint32_t* counter) {
  __shared__ uint64_t barrier;
  lorafuse::ptx::mbarrier_wait(&barrier, 0);
  lorafuse::ptx::wait_at_least(counter, 2);
}
"""


@pytest.mark.parametrize("flags", ["NVCC_FLAGS", "NVCC_DEBUG_FLAGS"])
def test_what_waits_too_long_stops_in_a_build_for_debugging(flags, tmp_path):
    """With a message, and in no other build; between two looks at a flag both sleep."""
    script = runpy.run_path(str(CSRC / "build.py"))
    try:
        nvcc, _ = script["find_nvcc"]()
    except script["Unavailable"] as reason:
        pytest.skip(f"the CUDA kernels cannot be built: {reason}")
    (tmp_path / "waits.cu").write_text(WAITS)
    command = [nvcc, *script[flags].split(), "-ptx", "-arch=sm_90a", f"-I{CSRC / 'include'}"]
    subprocess.run([*command, tmp_path / "waits.cu", "-o", tmp_path / "waits.ptx"], check=True, timeout=300)
    ptx = (tmp_path / "waits.ptx").read_text()
    assert len(re.findall(r"\bnanosleep\.u32", ptx)) == 1
    # of the flag and of the barrier
    stops = 2 if flags == "NVCC_DEBUG_FLAGS" else 0
    assert (len(re.findall(r"\btrap;", ptx)), len(re.findall(r"\bvprintf,", ptx))) == (stops, stops)
