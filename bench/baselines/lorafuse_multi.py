"""Rows of many adapters as one operator of lorafuse: batch-invariant, or "rows" with one base product on CPUs too."""

import torch

from lorafuse.bench.problem import SCALE
from lorafuse.functional import lora_linear_multi

LABEL = "lorafuse, one operator"
FORMS = {"": {}, "rows": {"batch_invariant": False}}


def multi(given, batch_invariant=True):
    trained = given.trained()
    parts = given.split(trained)
    ends = torch.tensor([rows.stop for rows, _, _ in parts], dtype=torch.int32, device=given.x.device)
    scales = [SCALE] * len(parts)

    def call(x):
        a, b = torch.cat([a for _, a, _ in parts]), torch.cat([b for _, _, b in parts], dim=1)
        return lora_linear_multi(
            x, ends, given.w, a, b, ranks=given.ranks, scales=scales, batch_invariant=batch_invariant
        )

    return call, trained
