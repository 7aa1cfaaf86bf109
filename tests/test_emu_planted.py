"""Bugs planted in the sm_90 kernels, each of which their emulation must report or show in a result (T5).

A bug is a condition `LF_PLANTED` in a kernel that g++ compiles and nvcc does not. The kernels without one are right
under the same schedules. Those of the memory-bound passes are in test_emu_skinny.py.
"""

import re

import pytest
import torch
from native_build import EMULATOR as emu
from native_build import ROOT, emulator
from test_emu_experts import grouped, results

from lorafuse.backends import base
from lorafuse.plan import override
from lorafuse.testing.check_linear import LinearCase, make_operands

# (which launch, (block_n, stages, cluster), blocks that run at a time) that a bug shows in, where it is not the first
FIRST = ("two_kernel", (256, 3, 2), 0)
ONE_BLOCK = ("fused_xa", (256, 3, 1), 0)
SCENARIOS = {
    "early_flag_read": ONE_BLOCK,
    "half_flag": ONE_BLOCK,
    "no_flag_reset": ONE_BLOCK,
    "no_publish_sync": ONE_BLOCK,
    "relaxed_flag": ONE_BLOCK,
    "no_proxy_fence": ONE_BLOCK,
    "no_ticket_reset": ONE_BLOCK,
    # blocks take their turns by number, and those with the first turns may not have started
    "no_program_ticket": ("fused_xa", (128, 4, 1), 1),
    "sum_no_sync": ("concurrent_backward", (256, 3, 1), 0),
    "sum_no_wait_read": ("concurrent_backward", (128, 4, 1), 0),
    "sum_no_launch_wait": ("concurrent_backward", (256, 3, 1), 0),
    "group_overrun": ("grouped", None, 0),
    "wrong_group": ("grouped", None, 0),
}


def planted():
    """Names of all bugs of the sm_90 kernels."""
    texts = (path.read_text() for path in sorted((ROOT / "csrc" / "kernels").glob("*_sm90.c*")))
    return sorted({name for text in texts for name in re.findall(r'LF_PLANTED\("([^"]*)"\)', text)})


@pytest.fixture(scope="module", autouse=True)
def _built():
    emulator()
    yield
    emu.configure()


def run(kind, tiling):
    """What a scenario computes, as tensors; a launch that computes xa too leaves flags for a second one."""
    if kind == "grouped":
        return list(results(*grouped([60, 60, 190], 200, torch.bfloat16), "emu").values())
    backend = base.load("emu")
    # flags that a bug left set are not those of the next run
    backend._RUN.flags.clear()
    # sums over few rows, so that the ring holds an item and one consumer can be an item ahead
    rows = 100 if kind == "concurrent_backward" else 300
    o = make_operands(LinearCase(leading=(rows,), N=264, K=200, R=24, dtype=torch.bfloat16))
    if kind == "concurrent_backward":
        _, xa = backend.linear_forward(o.x, o.w, None, o.a, o.b, None, 1.7, 0.0)
        with override(force_kernel=f"cuda {kind}", cuda_tiles=[tiling]):
            return list(backend.linear_backward(o.dy, o.x, xa, o.w, o.a, o.b, None, 1.7, 0.0, True, True, True, False))[
                :3
            ]
    launches = range(2 if kind == "fused_xa" else 1)
    with override(force_kernel=f"cuda {kind}", cuda_tiles=[tiling]):
        found = [backend.linear_forward(o.x, o.w, o.bias, o.a, o.b, None, 1.7, 0.0) for _ in launches]
    return [tensor for pair in found for tensor in pair]


@pytest.mark.parametrize("bug", planted())
def test_it_is_seen(bug, request):
    """Under one of ten schedules at least: the rarest, a block that ends too early, is seen under one of four."""
    schedules = max(10, request.config.getoption("--seeds") // 20)
    kind, tiling, resident = SCENARIOS.get(bug, FIRST)
    emu.configure()
    right = run(kind, tiling)
    seen, said = 0, set()
    for seed in range(schedules):
        emu.configure(seed=seed, resident=resident, multiprocessors=4, planted=bug)
        try:
            found = run(kind, tiling)
        except emu.EmulationError as error:
            seen += 1
            said.add(str(error).splitlines()[0])
        else:
            seen += any(not torch.equal(one, other) for one, other in zip(found, right, strict=True))
        assert emu.statistics()["planted_reached"], "the line did not run: give it another scenario"
    assert seen >= schedules // 10, f"seen under {seen} of {schedules} schedules: {said}"


def test_every_bug_has_a_name_of_a_kernel():
    names = planted()
    assert len(names) > 25
    assert SCENARIOS.keys() <= set(names)
