"""Three grouped GEMMs for each projection of the experts, the base's and the two low-rank ones, and a sum.

Written from the formula; adapters in the base's dtype.
"""

import torch
from torch.nn import functional as F

from lorafuse.bench.problem import SCALE

LABEL = "split grouped GEMM"


def experts(given):
    names = ("gate_up_a", "gate_up_b", "down_a", "down_b")
    factors = {name: getattr(given, name).clone().to(given.x.dtype).requires_grad_() for name in names}

    def project(rows, ends, w, a, b):
        low = F.grouped_mm(F.grouped_mm(rows, a.mT, offs=ends), b.mT, offs=ends)
        return F.grouped_mm(rows, w.mT, offs=ends) + SCALE * low

    def call(x, index, weight):
        tokens, k = index.shape
        chosen, order = index.flatten().sort(stable=True)
        every = torch.arange(given.gate_up.shape[0], device=x.device)
        # not bincount, which waits for the device
        ends = torch.searchsorted(chosen, every, right=True).int()
        u = project(x[order // k], ends, given.gate_up, factors["gate_up_a"], factors["gate_up_b"])
        gate, up = u.chunk(2, -1)
        y = project(F.silu(gate) * up, ends, given.down, factors["down_a"], factors["down_b"])
        y = y * weight.flatten()[order].unsqueeze(1)
        return torch.empty_like(y).index_copy(0, order, y).view(tokens, k, -1).sum(1)

    return call, {f"d_{name}": t for name, t in factors.items()}
