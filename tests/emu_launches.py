"""Launches for layers of one x in the emulator, by the primitives of its backend: without what an operator adds."""

from dataclasses import replace

import torch
from group_reference import Case, make

from lorafuse.backends import base
from lorafuse.operands import Dropout, LowRank, Weight
from lorafuse.plan import Plan, configs_cuda
from lorafuse.plan.devices import find
from lorafuse.plan.problem import Problem

__all__ = ["gated", "gated_ha", "gated_masked", "masked", "words_are_zero"]


def _plan(tiling, kernel="siblings"):
    """That of a (block_n, stages, cluster), whatever the sizes."""
    problem = Problem(300, 200, 200, 8, "bfloat16", "bfloat16")
    return Plan("cuda", kernel, configs_cuda.matmuls(problem, find("H200"), [tiling]))


def words_are_zero():
    """Whether launches had words, from which blocks draw work or by which they signal, and left them zero."""
    words = list(base.load("emu").flags.values())
    return bool(words) and not any(one.any() for one in words)


def gated(tiling):
    """Gate, up and h, and down's backward through them, in two launches: of three tiles one program has two."""
    case = Case(N=(264, 264, 72), R=(40, 24, 72), K=72, leading=(150,), dtype=torch.bfloat16, bias=(True,) * 3)
    o, backend = make(case, of_mlp=True), base.load("emu")
    of_gate, of_up, of_down = o.projections
    weights, biases = [Weight(one.weight) for one in (of_gate, of_up)], [of_gate.bias, of_up.bias]
    # any numbers are xa and dyb
    lows = [LowRank(o.x[:, :40], of_gate.b, 0.7), LowRank(o.x[:, 40:64], of_up.b, 1.3)]
    gate, up, h, _ = backend.matmul_gated(o.x, weights, _plan(tiling), lows=lows, biases=biases, activation="silu")
    low = LowRank(o.x, of_down.a, is_transposed=True)
    back = backend.gated_backward(
        o.dys[0], Weight(of_down.weight).t, _plan(tiling), low=low, gate=gate, up=up, activation="silu"
    )
    return [gate, up, h, *back]


def gated_ha(tiling):
    """Gate, up, h and ha, whose ranks take two products of sixteen, and b of down; every adapter is rounded before."""
    case = Case(N=(264, 264, 72), R=(40, 24, 24), K=72, leading=(150,), dtype=torch.bfloat16)
    o, backend = make(replace(case, adapter_dtype=torch.float32), of_mlp=True), base.load("emu")
    of_gate, of_up, of_down = o.projections
    lows = [LowRank(o.x[:, :40], of_gate.b, 0.7), LowRank(o.x[:, 40:64], of_up.b, 1.3)]
    given = {"lows": lows, "biases": [None, of_up.bias], "activation": "silu", "down": (of_down.a, of_down.b, 1.3)}
    weights = [Weight(of_gate.weight), Weight(of_up.weight)]
    *results, low = backend.matmul_gated(o.x, weights, _plan(tiling, "siblings_ha"), **given)
    assert torch.equal(low.b, (1.3 * of_down.b).bfloat16())
    return [*results, low.xa]


def gated_masked(tiling):
    """Down's backward through gate and up with dropout on h, ranks of one step: of six tiles one program has two."""
    case = Case(N=(264, 264, 72), R=(16, 16, 16), K=72, leading=(150,), dtype=torch.bfloat16)
    o, generator = make(case, of_mlp=True), torch.Generator().manual_seed(1)
    of_down = o.projections[2]
    gate, up = (torch.randn(150, 264, generator=generator).bfloat16() for _ in range(2))
    low = LowRank(o.x[:, :16], of_down.a, 1.3, is_transposed=True, dropout=Dropout(torch.tensor([9]), 0.4))
    given = o.dys[0], Weight(of_down.weight).t, _plan(tiling)
    return list(base.load("emu").gated_backward(*given, low=low, gate=gate, up=up, activation="silu"))


def masked(tiling):
    """dx of three layers, of which two have masks, by its launch."""
    case = Case(N=(40, 24, 8), R=(8, 16, 80), K=200, leading=(150,), dtype=torch.bfloat16, adapter_dtype=torch.float32)
    o = make(case)
    terms = [(dy, Weight(one.weight).t) for dy, one in zip(o.dys, o.projections, strict=True)]
    masks = Dropout(torch.tensor([7]), 0.5), None, Dropout(torch.tensor([8]), 0.3)
    lows = [
        LowRank(o.x[:, : one.a.shape[0]], one.a, is_transposed=True, dropout=mask)
        for one, mask in zip(o.projections, masks, strict=True)
    ]
    return [base.load("emu").matmul_sum(terms, lows, _plan(tiling))[0]]
