"""Wrong kernels of many adapters turn the gate red (T2): one place is changed, and the named tensor betrays it."""

from functools import cache

import pytest
import torch
from kernel_mutations import install
from multi_forms import make, reference, run

from lorafuse.kernels import gates, multi
from lorafuse.testing.numerics import relative_l2, tolerance

# (module, form, what is changed, into what, the tensor that turns red first); sizes are off every block, and rows,
# ranks and columns take several tiles
MUTATIONS = {
    "xa of the first expert": (multi, "experts", "p_fr = p_f + (group // (L + 1)).to(tl.int64) * stride_f[0]", "p_fr = p_f", "y0"),
    "xa skips the last K block": (multi, "siblings", "for i_k in range(0, K, BLOCK_K):", "for i_k in range(0, K - BLOCK_K, BLOCK_K):", "y0"),
    "xa of the first ranks only": (multi, "siblings", "i_r = tl.program_id(1) * BLOCK_R\n    if i_r >= R:", "i_r = tl.program_id(1) * BLOCK_R\n    if i_r >= tl.minimum(R, BLOCK_R):", "y0"),
    "xa of the rows in order": (multi, "experts", "p_xm = p_x + source_rows(p_source,", "p_xm = p_x + source_rows(None,", "y0"),
    "xa with the mask of the batch's rows": (multi, "siblings", "adapter, L, o_m - start, i_k,", "adapter, L, o_m, i_k,", "y0"),
    "a mask of the first seed": (multi, "siblings", "p_seeds + tl.minimum(adapter, L - 1)", "p_seeds", "y0"),
    "ranks of the first adapter": (multi, "siblings", "    return first, tl.load(p_rank_ends + adapter,", "    return first * 0, tl.load(p_rank_ends + adapter,", "y0"),
    "y with the first ranks only": (multi, "siblings", "tl.range(0, R, BLOCK_R, num_stages=1)", "tl.range(0, tl.minimum(R, BLOCK_R), BLOCK_R, num_stages=1)", "y0"),
    "y without the scale": (multi, "siblings", "(b_f.to(tl.float32) * scale)", "b_f.to(tl.float32)", "y0"),
    "y of the first expert": (multi, "experts", "adapter, expert = group % (L + 1), group // (L + 1)", "adapter, expert = group % (L + 1), group * 0", "y0"),
    "y with the bias of the first expert": (multi, "experts", "p_bias + expert.to(tl.int64) * N", "p_bias", "y0"),
    "dx with the mask of the batch's rows": (multi, "siblings", "o_s = o_m - _first_of(p_row_ends, group)", "o_s = o_m", "dx"),
    "dx of the last layer alone": (multi, "siblings", "acc += tl.load(p_out, mask=mask, other=0.0).to(tl.float32)", "pass", "dx"),
    "da of the first rows only": (multi, "siblings", "for m in range(start, end, BLOCK_M):", "for m in range(start, tl.minimum(end, start + BLOCK_M), BLOCK_M):", "da0"),
    "da without the mask": (multi, "siblings", "b_x = tl.where(keep, b_x, 0.0)", "pass", "da0"),
    "da of the rows in order": (multi, "experts", "o_x = source_rows(p_source, o_m, start, end)", "o_x = source_rows(None, o_m, start, end)", "da0"),
    "da of the neighbour's rows": (multi, "siblings", "    end = tl.load(p_row_ends + group)", "    end = tl.load(p_row_ends + group + 1)", "da0"),
    "da of the first expert": (multi, "experts", "p_o = p_out + expert.to(tl.int64) * stride_out[0]", "p_o = p_out", "da0"),
    "da without the scale": (multi, "siblings", "    acc *= tl.load(p_scales + adapter)", "    pass", "da0"),
    "da in the place of what is there": (multi, "siblings", "acc += tl.load(p_o, mask=mask, other=0.0).to(tl.float32)", "pass", "da0"),
    "an accumulator that depends on the neighbours": (multi, "siblings", "tl.float32) if IS_MASKABLE else acc", "tl.float32) if p_seeds is not None else acc", "bits"),
    "du without the router's weight": (gates, "experts", "(dh * row_scale * slope)", "(dh * slope)", "dx"),
    "the router's gradient without the bias": (gates, "experts", "dots += tl.sum(dy * bias, 1)", "pass", "dweight"),
    "h of gate alone": (gates, "gated", "_gated(gate, tl.load(p_up + o_g, mask=mask, other=0.0).to(tl.float32), ACT)\n    tl", "_gated(gate, gate, ACT)\n    tl", "y0"),
    "dup with gate's slope": (gates, "gated", "(dh * row_scale * d_up)", "(dh * row_scale * slope)", "dx"),
}  # fmt: skip


@cache
def _case(form):
    torch.manual_seed(3)
    given = make(form, [2, 0, 33, 1], [1, 2, 17, 33], H=36, I=8, rest=1)
    if form == "siblings":
        # two are enough
        del given.layers[1:2], given.dy[1:2]
    return given, reference(given)


def check(form, backward=True):
    """AssertionError that begins with the first tensor that is wrong."""
    given, expected = _case(form)
    ones = [[torch.ones_like(torch.cat(t, dim)) for t, dim in ((layer.a, -2), (layer.b, -1))] for layer in given.layers]
    actual = run(given, buffers=ones, backward=backward, backend="triton")
    for name, mine in actual.items():
        t = expected[name]
        if isinstance(t, list):
            mine, t = (torch.cat([one.reshape(-1) for one in some]) for some in (mine, t))
            mine = mine - 1
        assert relative_l2(mine, t) <= 2 * tolerance(torch.float32), f"{name}:"


def check_bits(form):
    """That an adapter has the bits that it has alone, where no dropout is drawn in one layer."""
    given, _ = _case(form)
    assert 0.0 in [layer.p[2] for layer in given.layers]
    every, alone = (run(some, backend="triton") for some in (given, given.pick([2])))
    assert torch.equal(every["dx"][given.rows(2)], alone["dx"]), "bits: dx"


@pytest.mark.parametrize("form", ["siblings", "gated", "experts"])
def test_the_right_kernels_are_green(form):
    check(form)


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_red(name, monkeypatch, tmp_path):
    module, form, old, new, red = MUTATIONS[name]
    install(module, old, new, monkeypatch, tmp_path)
    with pytest.raises(AssertionError) as failure:
        check_bits(form) if red == "bits" else check(form, backward=red != "y0")
    assert str(failure.value).startswith(f"{red}:"), failure.value
