"""Rows of many adapters by a loop over them: each adapter's rows by lorafuse's layer of one adapter."""

import torch

from lorafuse.bench.problem import SCALE
from lorafuse.functional import lora_linear

LABEL = "lorafuse, a loop over adapters"


def multi(given):
    trained = given.trained()
    parts = given.split(trained)

    def call(x):
        return torch.cat([lora_linear(x[rows], given.w, a, b, scale=SCALE) for rows, a, b in parts])

    return call, trained
