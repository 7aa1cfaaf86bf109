"""How many of lorafuse's Python functions one call of a patched unit runs: what the host spends at a few tokens.

Counted, not timed, so that it holds on every machine; `docs/performance.md` has the times. What runs fewer lowers its
bound.
"""

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorafuse
from lorafuse.integrations import groups

OURS = str(Path(lorafuse.__file__).parent)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.self_attn, self.mlp = nn.Linear(16, 16), Attention(), Mlp()

    def forward(self, x):
        return self.linear(x)


def calls_of(function):
    """The calls of lorafuse's functions, which Python's own classes and comprehensions in them are too."""
    count, result = 0, None

    def note(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(OURS)

    sys.setprofile(note)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return count, result


# forward and backward
BOUNDS = {
    ("linear", False): (25, 26),
    ("self_attn", False): (77, 77),
    ("self_attn", True): (98, 111),
    ("mlp", False): (88, 77),
    ("mlp", True): (97, 129),
}


@pytest.mark.parametrize(("unit", "is_group"), BOUNDS)
def test_calls_of_a_step(unit, is_group, monkeypatch):
    monkeypatch.setattr(groups, "SMALL", 0 if is_group else 1 << 40)
    model = get_peft_model(Model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    lorafuse.patch(model, strict=True)
    module, x = getattr(model.base_model.model, unit), torch.randn(2, 3, 16, requires_grad=True)

    def step():
        forward, ys = calls_of(lambda: module(x))
        ys = ys if isinstance(ys, tuple) else (ys,)
        backward, _ = calls_of(lambda: torch.autograd.backward(ys, [torch.ones_like(y) for y in ys]))
        return forward, backward

    # the first call learns and loads
    step()
    counts, bounds = step(), BOUNDS[unit, is_group]
    assert all(count <= bound for count, bound in zip(counts, bounds, strict=True)), (counts, bounds)
