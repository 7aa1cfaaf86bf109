"""Tiles by ticket (T2): the results of tiles that programs own, bit for bit, whoever computes a tile."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_mutations import install

from lorafuse.backends import triton as backend
from lorafuse.functional import lora_grouped_linear
from lorafuse.kernels import matmul, tickets
from lorafuse.plan import find, override
from lorafuse.plan.configs_triton import best, by_tickets, candidates
from lorafuse.testing.check_linear import LinearCase, check_linear

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import schedule  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# fewer programs than tiles
GPU = replace(find("H200"), sms=3)
CASES = {
    "fp16": LinearCase(leading=(150,), N=264, K=72, R=13, dtype=torch.float16, adapter_dtype=torch.float32),
    "mask": LinearCase(leading=(150,), N=72, K=136, R=40, dtype=torch.float16, dropout_p=0.3, bias=False),
}


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    """How often each main loop was launched."""
    counts = dict.fromkeys(("matmul", "tickets"), 0)
    for module in (matmul, tickets):
        name, run = module.__name__.rpartition(".")[2], module.matmul

        def counted(*args, name=name, run=run, **more):
            counts[name] += 1
            return run(*args, **more)

        monkeypatch.setattr(module, "matmul", counted)
    return counts


@pytest.mark.parametrize("name", CASES)
def test_bit_for_bit_what_owned_tiles_give(name, ran):
    with override(interpreted_as=GPU):
        owned = check_linear(CASES[name], "triton", DEVICE)
        before = dict(ran)
        with override(triton_config=by_tickets):
            drawn = check_linear(CASES[name], "triton", DEVICE)
    assert before["matmul"] == ran["matmul"] == ran["tickets"] > 0
    assert before["tickets"] == 0
    assert [name for name in owned if not torch.equal(owned[name], drawn[name])] == []


def tiled(kernel, problem, device):
    """A configuration with descriptors, also where few rows would be read through pointers."""
    legal = candidates(kernel, problem, device)
    return next((config for config in legal if config.form == "tma"), best(kernel, problem, device))


def with_tickets(config):
    return replace(config, tickets=config.kernel == "matmul")


def test_ragged_rows(ran):
    """Groups of which one is empty, and rows of none, which are not written."""
    generator = torch.Generator().manual_seed(0)
    sizes, K, N, R = [0, 17, 130, 1], 40, 136, 6
    shapes = (160, K), (4, N, K), (4, R, K), (4, N, R)
    x, w, a, b = (torch.randn(s, generator=generator).to(DEVICE, torch.float16) / 3 for s in shapes)
    ends = torch.tensor(sizes, device=DEVICE).cumsum(0)
    out = []
    for pick in (tiled, lambda *given: with_tickets(tiled(*given))):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        with override(interpreted_as=GPU, triton_config=pick):
            y = lora_grouped_linear(leaves[0], ends, w, *leaves[1:], scale=1.3, backend="triton")
            out.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    assert ran == {"matmul": 2, "tickets": 2}
    for owned, drawn in zip(*out, strict=True):
        assert owned.any()
        assert torch.equal(owned, drawn)


def test_only_what_has_the_form_is_taken_by_ticket(ran):
    with override(interpreted_as=find("A100"), triton_config=by_tickets):
        check_linear(CASES["fp16"], "triton", DEVICE)
    assert ran["tickets"] == 0


MUTATIONS = {
    "a ticket is drawn twice": ("t = ahead", "t = ahead + 1"),
    "a program draws once": ("while t < tiles_m * tiles_n:", "while t < 1:"),
    "the last tile is left out": ("while t < tiles_m * tiles_n:", "while t < tiles_m * tiles_n - 1:"),
    "no low-rank product": ("if p_xa is not None:", "if p_xa is not None and False:"),
    "no bias": ("if p_bias is not None:", "if p_bias is not None and False:"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_red(name, monkeypatch, tmp_path):
    install(tickets, *MUTATIONS[name], monkeypatch, tmp_path)
    assert backend.tickets is not tickets
    with override(interpreted_as=GPU, triton_config=by_tickets), pytest.raises(AssertionError, match="^y:"):
        check_linear(CASES["fp16"], "triton", DEVICE)


def test_every_tile_once_under_any_arrival_order():
    for seed in range(1000):
        draw = random.Random(seed)
        tiles, programs = draw.randrange(40), draw.randrange(1, 12)
        # some programs begin late, or not until the others have ended
        eager = draw.sample(range(programs), draw.randrange(1, programs + 1))
        steps = [draw.choice(eager) for _ in range(draw.randrange(80))]
        assert sorted(schedule.walked(tiles, programs, steps)) == list(range(tiles)), seed


@pytest.mark.parametrize("microseconds", [100, 300, 1000, 10000])
@pytest.mark.parametrize("tiles", [1024, 2048, 3584])
def test_sixteen_sms_held_by_another_kernel_cost_their_share(tiles, microseconds):
    """At most 15 % over work that is divided as finely as one likes, by simulation; tiles that are owned cost more."""
    free = [microseconds / 45] * 16 + [0.0] * 116
    least = schedule.proportional(tiles, free)
    assert least <= schedule.tickets(tiles, 132, free) <= 1.15 * least
    # the longer the launch, the less one tile more is
    assert schedule.owned(tiles, 132, free) >= 1.15 * least or microseconds < tiles / 132 * 45


def test_an_idle_gpu_takes_as_many_waves():
    for tiles in (1, 131, 132, 133, 1024):
        waves = -(-tiles // 132)
        assert schedule.tickets(tiles, 132, [0.0] * 132) == schedule.owned(tiles, 132, [0.0] * 132) == waves
