"""The main loop that decodes its tiles (T2; on a GPU, T6): bit for bit the product over the decoded weight; every
gradient by name against fp64, forced by the plan; wrong kernels turn red.
"""

from dataclasses import replace

import pytest
import torch
from kernel_mutations import install
from quantized_weights import FP4, four_bits

from lorafuse.functional import lora_linear
from lorafuse.kernels import decode, matmul, packed, product
from lorafuse.operands import Weight
from lorafuse.plan import KernelConfig, find, override
from lorafuse.testing.numerics import relative_l2, tolerance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = KernelConfig("packed", "pointer", 16, 32, 64, 16, 1, 4)


def grid(*sizes, scale, format, of=torch.int8):
    # both signs, and no NaN in any format
    data = torch.randint(0, 90, sizes, dtype=torch.uint8) + 128 * torch.randint(0, 2, sizes, dtype=torch.uint8)
    return Weight(data.view(of), statistics=(scale,), format=format)


# one scale for the columns of a tile, or not: of blocks across rows, of blocks shorter than a tile
WEIGHTS = {
    "nf4, nested": lambda: four_bits(72, 128, nested=True, rounded="float16"),
    "nf4 across rows": lambda: four_bits(33, 70, nested=True, rounded="float16"),
    "nf4, blocks of 32": lambda: four_bits(40, 96, block=32, rounded="float16"),
    "fp4": lambda: four_bits(40, 64, block=128, rounded="float32", code=FP4, kind="fp4"),
    "int8 of torchao": lambda: grid(33, 71, scale=torch.rand(33, 1), format="int8"),
    "int8 of bitsandbytes": lambda: grid(40, 64, scale=torch.rand(40), format="int8"),
    "fp8 in blocks": lambda: grid(40, 130, scale=torch.rand(2, 2), format="fp8:block=32x128;scale=rounded", of=torch.float8_e4m3fn),
    "fp8, short blocks": lambda: grid(33, 71, scale=torch.rand(3, 3), format="fp8:block=16x32", of=torch.float8_e5m2),
    "fp8, one scale": lambda: grid(40, 64, scale=torch.rand(1), format="fp8:block=40x64", of=torch.float8_e4m3fn),
    "mxfp4": lambda: grid(33, 32, scale=torch.randint(115, 130, (33, 2), dtype=torch.uint8), format="mxfp4", of=torch.uint8),
}  # fmt: skip


def made(name):
    w = WEIGHTS[name]()
    return Weight(w.data.to(DEVICE), statistics=tuple(t.to(DEVICE) for t in w.statistics), format=w.format)


@pytest.mark.parametrize("is_transposed", [False, True], ids=["y", "dx"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_equal_to_the_product_of_the_decoded_weight(name, is_transposed):
    """Of the same tiles, so that sums have one order."""
    w = made(name).t if is_transposed else made(name)
    N, K = w.sizes
    x, xa = (torch.randn(19, size, device=DEVICE).half() for size in (K, 5))
    b, bias = torch.randn(N, 5, device=DEVICE), torch.randn(N, device=DEVICE).half()
    actual = packed.matmul(x, w, bias, xa, b, 0.5, CONFIG)
    dense = w.decoded(torch.float16).left()
    assert actual.isfinite().all()
    assert torch.equal(actual, matmul.matmul(x, dense, bias, xa, b, 0.5, 1, replace(CONFIG, kernel="matmul")))


def test_what_it_would_read_beyond():
    w = made("nf4, nested")
    short = Weight(w.data[:-1], statistics=w.statistics, format=w.format)
    with pytest.raises(ValueError, match="code has 4607 elements, its sizes and blocks make it 4608"):
        packed.matmul(torch.randn(1, 128, device=DEVICE).half(), short, None, None, None, None, CONFIG)


def layer(w, backend, dtype, p=0.3, M=19, R=20):
    """Results and gradients by name, of numbers that do not depend on `dtype`."""
    generator = torch.Generator().manual_seed(3)
    N, K = w.sizes
    shapes = {"x": (M, K), "a": (R, K), "b": (N, R), "bias": (N,), "dy": (M, N)}
    given = {name: torch.randn(shape, generator=generator).half().to(DEVICE, dtype) for name, shape in shapes.items()}
    x, a, b = (given[name].requires_grad_() for name in "xab")
    y = lora_linear(x, w, a, b, scale=0.5, bias=given["bias"], dropout_p=p, seed=7, backend=backend)
    y.backward(given["dy"])
    return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}


def red(name, p=0.3):
    """The first result that differs from fp64; "" where none does."""
    w = made(name)
    exact = layer(Weight(w.decoded(torch.float16).data.double()), "eager", torch.float64, p)
    with override(force_kernel="packed", interpreted_as=find("H200")):
        actual = layer(w, "triton", torch.float16, p)
    bad = (n for n, t in actual.items() if not relative_l2(t, exact[n]) < tolerance(torch.float16))
    return next(bad, "")


@pytest.mark.parametrize(("name", "p"), [("nf4, nested", 0.3), ("int8 of torchao", 0.0)])
def test_every_gradient(name, p, monkeypatch):
    """Forced by the plan, both directions run it; no weight is decoded to memory."""
    runs, run = [], packed.matmul
    monkeypatch.setattr(
        packed, "matmul", lambda *args, **more: runs.append(args[1].is_transposed) or run(*args, **more)
    )
    monkeypatch.setattr(decode, "KERNELS", {})
    assert red(name, p) == ""
    assert runs == [False, True]


# (weight, module, what is changed, into what, the tensor that turns red first)
MUTATIONS = {
    "nibbles in the wrong order": ("nf4, nested", decode, "tl.load(p_table + (code >> 4)) * scale, tl.load(p_table + (code & 15))", "tl.load(p_table + (code & 15)) * scale, tl.load(p_table + (code >> 4))", "y"),
    "the scale of the first columns": ("nf4, nested", packed, "(o_row * width + first) // BLOCK[1]", "(o_row * width) // BLOCK[1]", "y"),
    "blocks that end with a row": ("nf4 across rows", packed, "(o_row[:, None] * width + o_column[None, :]) // BLOCK[1]", "o_row[:, None] * (width // BLOCK[1]) + o_column[None, :] // BLOCK[1]", "y"),
    "without the offset of nested scales": ("nf4, nested", decode, "* outer + tl.load(p_offset)", "* outer", "y"),
    "the codes of the first step": ("nf4, nested", packed, "first = next_k\n", "first = next_k * 0\n", "y"),
    "without the last columns of K": ("nf4, nested", packed, "range(0, K, BLOCK_K,", "range(0, K - BLOCK_K * (not IS_TRANSPOSED), BLOCK_K,", "y"),
    "the rows of the step before": ("nf4, nested", packed, "tl.where(o_k < K - next_k, next_k + o_k, 0)", "tl.where(o_k < K - next_k, o_k, 0)", "dx"),
    "the scale of another row": ("int8 of torchao", packed, "o_row // BLOCK[0] * stride_row", "(o_row // BLOCK[0] + 1) % 4 * stride_row", "y"),
    "without the mask": ("nf4, nested", product, "keep_tile(p_seed, drop_below,", "True | keep_tile(p_seed, drop_below,", "dx"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_red(name, monkeypatch, tmp_path):
    weight, module, old, new, tensor = MUTATIONS[name]
    install(module, old, new, monkeypatch, tmp_path)
    assert red(weight) == tensor
