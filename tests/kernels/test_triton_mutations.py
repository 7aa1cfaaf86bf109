"""Wrong kernels turn the gate red (T2): one line of a kernel's source is changed, and the named tensor betrays it."""

import pytest
import torch
from group_reference import Case, linears, make, mlp, plain_linears, plain_mlp, results
from kernel_mutations import install

from lorafuse.kernels import common, epilogues, gated, lowrank, matmul, philox, product, siblings
from lorafuse.plan import find, override
from lorafuse.testing.check_linear import LinearCase, check_linear
from lorafuse.testing.numerics import relative_l2, tolerance

# in the interpreter and on a GPU alike: sizes off every block, several tiles and splits, a rank of several tiles
GATE = (
    LinearCase(leading=(150,), N=96, K=136, R=13, dtype=torch.float16),
    LinearCase(leading=(150,), N=72, K=136, R=40, dtype=torch.float16, dropout_p=0.3, bias=False),
    LinearCase(leading=(150,), N=65, K=130, R=13, dtype=torch.float32, dropout_p=0.3),
    LinearCase(leading=(70,), N=33, K=67, R=6, dtype=torch.float32, base=0.0, bias=False),
)

# (module, what is changed, into what, the tensor that turns red first)
MUTATIONS = {
    "xa skips the last K block": (lowrank, "range(0, K, BLOCK_K):", "range(0, K - BLOCK_K, BLOCK_K):", "y"),
    "xa ignores the mask": (lowrank, "b_x = tl.where(keep_tile(", "b_x = tl.where(True | keep_tile(", "y"),
    "y skips the last K block (TMA)": (product, "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K * (len(d_w) > 0 and ROWS == 'nk'), BLOCK_K)", "y"),
    "y skips the last K block (pointers)": (product, "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K * (len(d_w) == 0 and ROWS == 'nk'), BLOCK_K)", "y"),
    "y without the low-rank product": (product, "return tl.dot(b_xa, b_b.T if RANKS_LAST else b_b, acc, input_precision=PRECISION)", "return tl.dot(b_xa, b_b, acc, input_precision=PRECISION) if not RANKS_LAST else acc", "y"),
    "y without the scale": (product, "b_b = b_b.to(tl.float32) * scale", "pass", "y"),
    "y with the first ranks only": (product, "tl.range(0, R, BLOCK_R,", "tl.range(0, BLOCK_R if RANKS_LAST else R, BLOCK_R,", "y"),
    "y without the bias": (matmul, "if p_bias is not None:", "if p_bias is not None and False:", "y"),
    "y stores the left half twice": (common, "shape[1] // 2], right", "shape[1] // 2], left", "y"),
    "tiles in the wrong order": (common, "first + within % height, within // height", "first + within // height, within % height", "y"),
    "the mask of the row below": (philox, "first = o_m.to(tl.int64)[:, None] * K", "first = (o_m + 1).to(tl.int64)[:, None] * K", "y"),
    "the words of a group swapped": (philox, "tl.join(tl.join(w0, w2), tl.join(w1, w3))", "tl.join(tl.join(w0, w1), tl.join(w2, w3))", "y"),
    "a drop probability of its own": (philox, "word > drop_below", "word > (drop_below // 2)", "y"),
    "dyb without the last columns": (lowrank, "b_b = load_rank_tile(p_b, o_n, N,", "b_b = load_rank_tile(p_b, o_n, N - 5,", "dx"),
    "db of the first split only": (lowrank, "tl.store(p_db + o_db, acc_db,", "tl.store(p_db + o_db, acc_db * (i_s == 0),", "db"),
    "db with a stale xa": (lowrank, "b_xa = tl.load(p_xa + o_m.to(tl.int64)", "b_xa = tl.load(p_xa + (o_m * 0).to(tl.int64)", "db"),
    "dbias halved": (lowrank, "acc_dbias += tl.sum(b_dy.to(tl.float32), 0)", "acc_dbias += tl.sum(b_dy.to(tl.float32), 0) * 0.5", "dbias"),
    "partials without the first": (lowrank, "p = p_part + o\n        for _ in range(count)", "p = p_part + o + size\n        for _ in range(count - 1)", "dx"),
    "partials without their scale": (lowrank, "(acc * scale).to(p_out.dtype.element_ty), mask=o < size", "(acc * 1.0).to(p_out.dtype.element_ty), mask=o < size", "dx"),
    "dx without the low-rank product": (product, "return tl.dot(b_xa, b_b.T if RANKS_LAST else b_b, acc, input_precision=PRECISION)", "return tl.dot(b_xa, b_b.T, acc, input_precision=PRECISION) if RANKS_LAST else acc", "dx"),
    "dx without the mask": (product, "keep_tile(p_seed, drop_below,", "True | keep_tile(p_seed, drop_below,", "dx"),
    "dx with the first ranks only": (product, "tl.range(0, R, BLOCK_R,", "tl.range(0, R if RANKS_LAST else BLOCK_R, BLOCK_R,", "dx"),
    "dx skips the last N block (TMA)": (product, "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K * (len(d_w) > 0 and ROWS == 'kn'), BLOCK_K)", "dx"),
    "dx skips the last N block (pointers)": (product, "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K * (len(d_w) == 0 and ROWS == 'kn'), BLOCK_K)", "dx"),
    "da without the mask": (lowrank, "b_left = tl.where(keep_tile(", "b_left = tl.where(True | keep_tile(", "da"),
    "da of the first split only": (lowrank, "tl.store(p_o, (acc * scale)", "tl.store(p_o, (acc * scale * (i_g == 0))", "da"),
    "da without the last rows": (lowrank, "mask = (o_m < end)[:, None] & (o_n < C)[None, :]\n        b_left", "mask = (o_m < end - 7)[:, None] & (o_n < C)[None, :]\n        b_left", "da"),
}  # fmt: skip


def check():
    for case in GATE:
        check_linear(case, "triton", "cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _planned_as(request):
    """On an A100 the plan takes the pointer form; splits need more rows than the gate has."""
    with override(interpreted_as=find("A100" if "pointers" in request.node.name else "H200")):
        yield


def test_the_right_kernels_are_green():
    check()


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_red(name, monkeypatch, tmp_path):
    module, old, new, red = MUTATIONS[name]
    install(module, old, new, monkeypatch, tmp_path)
    with pytest.raises(AssertionError) as failure:
        check()
    assert str(failure.value).startswith(f"{red}:"), failure.value


QKV = Case(N=(72, 40, 24), K=40, R=(13, 4, 5), leading=(130,), dtype=torch.float16)
MASKED = Case(
    N=(72, 40, 24), K=40, R=(5, 4, 13), p=(0.3, 0.5, 0.0), bias=(False,) * 3, leading=(20,), dtype=torch.float16
)
MLP = Case(N=(72, 72, 24), K=40, R=(13, 4, 5), leading=(20,), dtype=torch.float16)
# of siblings in one launch: (case, module, what is changed, into what, the tensor that turns red first)
SIBLINGS = {
    "y without the tiles of a part of the programs": (QKV, siblings, "tiles_n % programs) % programs", "tiles_n % programs)", "y 1"),
    "y with the first bias": (QKV, siblings, "p_bias[i] + o_n", "p_bias[0] + o_n", "y 2"),
    "y with an xa of another pitch": (QKV, siblings, "stride_xa[i], stride_b[i], BLOCK_R, RANK_STEPS[i]", "R[i], stride_b[i], BLOCK_R, RANK_STEPS[i]", "y 0"),
    "dx of the first layers only": (QKV, siblings, "for i in tl.static_range(len(p_w)):\n            d_xi", "for i in tl.static_range(len(p_w) - 1):\n            d_xi", "dx"),
    "dx without the unmasked product": (MASKED, siblings, "for j in tl.static_range(PLAIN):", "for j in tl.static_range(0):", "dx"),
    "dx without the last mask": (MASKED, siblings, "tl.range(0, len(p_xa) - PLAIN,", "tl.range(0, len(p_xa) - PLAIN - 1,", "dx"),
    "dx with one mask for all": (MASKED, siblings, "_pick(p_seed[PLAIN:], j)", "_pick(p_seed[PLAIN:], 0)", "dx"),
    "up of gate's weight": (MLP, gated, "weight_descriptor(p_w[1]", "weight_descriptor(p_w[0]", "y 0"),
    "up without its low-rank product": (MLP, gated, "if p_xa[i] is not None:", "if p_xa[i] is not None and i == 0:", "y 0"),
    "gate stored as up": (MLP, epilogues, "tl.store(p_up + o_u, up,", "tl.store(p_up + o_u, gate,", "dx"),
    "dup is dgate": (MLP, epilogues, "tl.store(p_du[1] + o_u, (dh * row_scale * d_up)", "tl.store(p_du[1] + o_u, (dh * row_scale * d_gate)", "dx"),
    "h is not stored again": (MLP, epilogues, "tl.store(p_h + o_s * N + o_n[None, :], h.to(dtype), mask=mask)\n    return", "tl.store(p_h + o_s * N + o_n[None, :], (h * 0).to(dtype), mask=mask)\n    return", "da 2"),
}  # fmt: skip


def red(case):
    """The first tensor of siblings in one launch that differs from fp64; "" where none does."""
    of_mlp = case is MLP
    o, run, reference = make(case, of_mlp=of_mlp), *((mlp, plain_mlp) if of_mlp else (linears, plain_linears))
    exact = results(reference, o.fresh(dtype=torch.float64))
    with override(force_kernel="siblings"):
        actual = results(lambda o: run(o, backend="triton"), o)
    wrong = (
        n for n, t in actual.items() if n != "differentiable" and not relative_l2(t, exact[n]) < tolerance(t.dtype)
    )
    return next(wrong, "")


@pytest.mark.parametrize("case", [QKV, MASKED, MLP], ids=["qkv", "masked", "mlp"])
def test_the_right_siblings_are_green(case):
    assert red(case) == ""


@pytest.mark.parametrize("name", SIBLINGS)
def test_each_mutation_of_siblings_is_red(name, monkeypatch, tmp_path):
    case, module, old, new, tensor = SIBLINGS[name]
    install(module, old, new, monkeypatch, tmp_path)
    assert red(case) == tensor
