"""The backend "emu": the CUDA kernels on CPU tensors in their emulator, planned as for an H200. For tests.

`lorafuse._emu.configure` says how launches run. Seconds where a GPU takes microseconds.
"""

from functools import cache

import torch

from lorafuse.backends import native
from lorafuse.backends.cuda import Cuda
from lorafuse.plan import DeviceSpec, interpreted_as

__all__ = ["backend"]


def _spec(device: torch.device) -> DeviceSpec:
    if device.type != "cpu":
        raise ValueError(f"backend='emu' got a tensor on {device}; the emulator runs on CPU tensors: use 'cuda'")
    return interpreted_as()


@cache
def backend() -> Cuda:
    """The one instance. Raises ImportError where `lorafuse._emu` was not built."""
    run = Cuda("emu", native.load("_emu"), _spec, stream=lambda device: 0, is_capturing=lambda: False)
    # tests watch every call of a pass, but for those of recordings
    run.repeats = False
    return run
