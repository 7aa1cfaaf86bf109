"""Launches name their device (T5): the module's own CUDA runtime makes it current, and the former one afterwards."""

import pytest
import torch
from native_build import EMULATOR as emu
from native_build import emulator

from lorafuse.backends import base
from lorafuse.plan import configs_cuda, find
from lorafuse.plan.problem import Problem


@pytest.fixture(autouse=True)
def first_device():
    """Device 0 is current, and again afterwards."""
    emulator()
    emu.swap_device(0)
    yield
    emu.swap_device(0)


def current():
    device = emu.swap_device(0)
    emu.swap_device(device)
    return device


def launch(**where):
    words = torch.zeros(3, dtype=torch.int32)
    emu.probe_flags(rounds=2, words=words.data_ptr(), **where)
    return words.tolist()


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("device", [-1, 0, 1])
def test_the_former_device_is_current_afterwards(before, device):
    emu.swap_device(before)
    assert launch(device=device, stream=0) == [2, 2, 4]
    assert current() == before


def test_an_error_leaves_it_too():
    emu.swap_device(1)
    with pytest.raises(ValueError, match="rounds of 0"):
        emu.probe_flags(rounds=0, words=4, device=0)
    assert current() == 1


def test_a_device_that_does_not_exist():
    with pytest.raises(ValueError, match="device 2: there are 2"):
        launch(device=2)
    assert current() == 0


def test_every_launch_of_the_backend_names_the_device_of_its_tensors():
    backend = base.load("emu")
    assert backend.place(torch.device("cpu")) == {"stream": 0, "device": -1}
    assert backend.place(torch.device("cuda", 1)) == {"stream": 0, "device": 1}


def test_tiles_that_wait_for_flags_walk_fewer_row_blocks():
    problem, gpu = Problem(8192, 4096, 4096, 16, "bfloat16", "float32"), find("H200")
    groups = {
        fused: {c.group_m for c in configs_cuda.matmuls(problem, gpu, fused_forward=fused)} for fused in (False, True)
    }
    assert groups == {False: {16}, True: {8}}
