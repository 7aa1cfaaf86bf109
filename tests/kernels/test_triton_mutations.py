"""Wrong kernels turn the gate red (T2): one line of a kernel's source is changed, and the named tensor betrays it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from lorafuse.backends import triton as backend
from lorafuse.kernels import common, linear_bwd, linear_fwd, philox
from lorafuse.testing.check_linear import LinearCase, check_linear

# in the interpreter and on a GPU alike: sizes off every block, several tiles and splits, a rank of several tiles
GATE = (
    LinearCase(leading=(150,), N=96, K=136, R=13, dtype=torch.float16),
    LinearCase(leading=(150,), N=72, K=136, R=40, dtype=torch.float16, dropout_p=0.3, bias=False),
    LinearCase(leading=(150,), N=65, K=130, R=13, dtype=torch.float32, dropout_p=0.3),
    LinearCase(leading=(70,), N=33, K=67, R=6, dtype=torch.float32, base=0.0, bias=False),
)

# (module, what is changed, into what, the tensor that turns red first)
MUTATIONS = {
    "xa skips the last K block": (linear_fwd, "range(0, K, BLOCK_K):\n        o_k", "range(0, K - BLOCK_K, BLOCK_K):\n        o_k", "y"),
    "xa ignores the mask": (linear_fwd, "b_x = tl.where(keep_tile(", "b_x = tl.where(True | keep_tile(", "y"),
    "y skips the last K block (TMA)": (linear_fwd, "if TMA:\n            for i_k in range(0, K,", "if TMA:\n            for i_k in range(0, K - BLOCK_K,", "y"),
    "y skips the last K block (pointers)": (linear_fwd, "o_k[:, None]\n            for i_k in range(0, K,", "o_k[:, None]\n            for i_k in range(0, K - BLOCK_K,", "y"),
    "y without the low-rank product": (linear_fwd, "return tl.dot(b_xa, b_b.T, acc, input_precision=PRECISION)", "return acc", "y"),
    "y without the scale": (linear_fwd, "N, o_r, R, scale, p_xa", "N, o_r, R, 1.0, p_xa", "y"),
    "y with the first ranks only": (linear_fwd, "for i_r in tl.range(0, R, BLOCK_R", "for i_r in tl.range(0, BLOCK_R, BLOCK_R", "y"),
    "y without the bias": (linear_fwd, "if p_bias is not None:", "if p_bias is not None and False:", "y"),
    "y stores the left half twice": (common, "column + HALF], right", "column + HALF], left", "y"),
    "tiles in the wrong order": (common, "first + within % height, within // height", "first + within // height, within % height", "y"),
    "the mask of the row below": (philox, "first = o_m.to(tl.int64)[:, None] * K", "first = (o_m + 1).to(tl.int64)[:, None] * K", "y"),
    "the words of a group swapped": (philox, "tl.join(tl.join(w0, w2), tl.join(w1, w3))", "tl.join(tl.join(w0, w1), tl.join(w2, w3))", "y"),
    "a drop probability of its own": (philox, "word > drop_below", "word > (drop_below // 2)", "y"),
    "dyb without the last columns": (linear_bwd, "b_b = load_rank_tile(p_b, o_n, N,", "b_b = load_rank_tile(p_b, o_n, N - 5,", "dx"),
    "db of the first split only": (linear_bwd, "tl.store(p_db + o_db, acc_db,", "tl.store(p_db + o_db, acc_db * (i_s == 0),", "db"),
    "db with a stale xa": (linear_bwd, "b_xa = tl.load(p_xa + o_m.to(tl.int64)", "b_xa = tl.load(p_xa + (o_m * 0).to(tl.int64)", "db"),
    "dbias halved": (linear_bwd, "acc_dbias += tl.sum(b_dy.to(tl.float32), 0)", "acc_dbias += tl.sum(b_dy.to(tl.float32), 0) * 0.5", "dbias"),
    "partials without the first": (linear_bwd, "p = p_part + o\n        for _ in range(count)", "p = p_part + o + size\n        for _ in range(count - 1)", "dx"),
    "partials without their scale": (linear_bwd, "(acc * scale)", "(acc * 1.0)", "dx"),
    "dx without the low-rank product": (linear_bwd, "return tl.dot(b_dyb, b_a.to(dtype), acc, input_precision=PRECISION)", "return acc", "dx"),
    "dx without the mask": (linear_bwd, "acc += tl.where(keep_tile(", "acc += tl.where(True | keep_tile(", "dx"),
    "dx with the first ranks only": (linear_bwd, "for i_r in tl.range(0, R, BLOCK_R", "for i_r in tl.range(0, BLOCK_R, BLOCK_R", "dx"),
    "dx skips the last N block (TMA)": (linear_bwd, "if TMA:\n            for i_k in range(0, N,", "if TMA:\n            for i_k in range(0, N - BLOCK_K,", "dx"),
    "dx skips the last N block (pointers)": (linear_bwd, "step_w = tl.cast(stride_wn, tl.int64) * BLOCK_K\n            for i_k in range(0, N,", "step_w = tl.cast(stride_wn, tl.int64) * BLOCK_K\n            for i_k in range(0, N - BLOCK_K,", "dx"),
    "da without the mask": (linear_bwd, "b_x = tl.where(keep_tile(", "b_x = tl.where(True | keep_tile(", "da"),
    "da of the first split only": (linear_bwd, "tl.store(p_da + o_da, acc,", "tl.store(p_da + o_da, acc * (i_s == 0),", "da"),
    "da without the last rows": (linear_bwd, "mask = (o_m < M)[:, None] & (o_n < K)[None, :]\n        b_x", "mask = (o_m < M - 7)[:, None] & (o_n < K)[None, :]\n        b_x", "da"),
}  # fmt: skip


def check():
    for case in GATE:
        check_linear(case, "triton", "cuda" if torch.cuda.is_available() else "cpu")


def mutated(module, old, new, folder):
    """A copy of a kernel module with one place of its source changed."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    path = folder / f"{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(module.__name__, path)
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    return changed


@pytest.fixture(autouse=True)
def _planned_as(monkeypatch, request):
    """On an A100 the plan takes the pointer form; splits need more rows than the gate has."""
    pointers = "pointers" in request.node.name
    monkeypatch.setattr(backend, "_INTERPRETED_AS", "A100" if pointers else "H200")


def install(module, monkeypatch, folder):
    """Make the backend run a changed module, and the kernels that import from it too."""
    name = module.__name__.rpartition(".")[2]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    if name in ("linear_fwd", "linear_bwd"):
        monkeypatch.setattr(backend, name, module)
        return
    for user in (linear_fwd, linear_bwd):
        monkeypatch.setattr(
            backend, user.__name__.rpartition(".")[2], mutated(user, "import torch\n", "import torch\n\n", folder)
        )


def test_the_right_kernels_are_green():
    check()


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_red(name, monkeypatch, tmp_path):
    module, old, new, red = MUTATIONS[name]
    install(mutated(module, old, new, tmp_path), monkeypatch, tmp_path)
    with pytest.raises(AssertionError) as failure:
        check()
    assert str(failure.value).startswith(f"{red}:"), failure.value
