"""The decoders of bench/decode.py (T5), on a CPU: the CUDA kernels emulated, and bitsandbytes' own."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from lorafuse.backends import base

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import decode  # noqa: E402

pytest_plugins = "emu_fixtures"
WEIGHTS = decode.weights(64, 256, torch.device("cpu"))


@pytest.mark.parametrize("storage", WEIGHTS)
def test_every_decoder_gives_the_bits_of_the_codec(storage, emu):
    w, out = WEIGHTS[storage], torch.empty(64, 256, dtype=decode.DTYPE)
    decoders = decode.calls(w, out, {"csrc": base.load("emu")})
    assert ("bitsandbytes" in decoders) == ("NF4" in storage and importlib.util.find_spec("bitsandbytes") is not None)
    with torch.compiler.set_stance("force_eager"):
        assert decode.differing(decoders, w, out) == []
        assert decode.differing({**decoders, "wrong": out.zero_, "idle": lambda: out}, w, out) == ["wrong", "idle"]


def test_bytes_are_those_that_are_stored():
    assert decode.stored_bytes(WEIGHTS["NF4"]) == 64 * 256 // 2 + 4 * 256 + 4 * 16
    assert decode.stored_bytes(WEIGHTS["NF4, nested"]) == 64 * 256 // 2 + 256 + 4 * (16 + 1 + 256 + 1)
    assert decode.stored_bytes(WEIGHTS["FP8, 128 x 128"]) == 64 * 256 + 4 * 2
