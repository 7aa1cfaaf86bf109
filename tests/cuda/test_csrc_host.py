"""The host side of csrc without a GPU (T5): waits in builds for debugging.
"""

import re
import runpy
import subprocess

import pytest
from test_csrc_layouts import CSRC

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
    subprocess.run([*command, tmp_path / "waits.cu", "-o", tmp_path / "waits.ptx"], check=True)
    ptx = (tmp_path / "waits.ptx").read_text()
    assert len(re.findall(r"\bnanosleep\.u32", ptx)) == 1
    # of the flag and of the barrier
    stops = 2 if flags == "NVCC_DEBUG_FLAGS" else 0
    assert (len(re.findall(r"\btrap;", ptx)), len(re.findall(r"\bvprintf,", ptx))) == (stops, stops)
