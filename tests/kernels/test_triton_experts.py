"""Triton kernels over ragged rows (T2; on a GPU, T6): experts and grouped layers, every tensor by name against fp64."""

import contextlib
from dataclasses import replace

import pytest
import torch
from experts_reference import block, check, differentiated, fused, plain
from kernel_mutations import install

from lorafuse.activation import ACTIVATIONS, GATES
from lorafuse.backends import problems
from lorafuse.functional import lora_grouped_linear
from lorafuse.kernels import combine, epilogues, lowrank, matmul, product, rows
from lorafuse.operands import Weight
from lorafuse.plan import find, override
from lorafuse.plan.configs_triton import best, candidates
from lorafuse.testing.numerics import relative_l2, tolerance

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if ON_GPU else ())
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def check_here(**case):
    return check("triton", device=DEVICE, **case)


def test_every_activation_has_an_epilogue():
    assert set(epilogues.ACTIVATIONS) == set(ACTIVATIONS)
    assert set(epilogues.GATES) == set(GATES)


@by_dtype
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("concatenated", [True, False])
def test_every_layout(dtype, gate, transposed, concatenated):
    given = {"gate": gate, "transposed": transposed, "concatenated": concatenated, "bias": transposed == gate}
    check_here(dtype=dtype, **given)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, gate):
    check_here(dtype=torch.float32, activation=activation, gate=gate)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("concatenated", [True, False])
@pytest.mark.parametrize("activation", GATES)
def test_functions_of_gate_and_up(activation, concatenated, transposed, bias):
    """Numbers beyond the limits of a clamp on all sides."""
    layout = {"concatenated": concatenated, "transposed": transposed, "bias": bias}
    check_here(dtype=torch.float32, activation=activation, size=6.0, **layout)


@pytest.fixture
def planned():
    """Makes the planner take the largest tiles that are legal on a GPU, of few SMs, so that programs walk several."""
    forms = []

    def largest(kernel, problem, device):
        if kernel != "matmul":
            return best(kernel, problem, device)
        config = max(candidates(kernel, problem, device), key=lambda c: c.block_m * c.block_n)
        forms.append((config.form, config.block_m, config.block_n))
        return config

    with contextlib.ExitStack() as overridden:

        def take(gpu):
            overridden.enter_context(override(interpreted_as=replace(find(gpu), sms=3), triton_config=largest))
            return forms

        yield take


# one expert of several tiles, one of one, one of none, a sentinel; columns just past the last full tile
LARGE = {"dtype": torch.float16, "T": 19, "E": 3, "k": 8, "H": 72, "I": 136, "R": 6, "adapter_dtype": torch.float32}


def large_index():
    index = torch.zeros(19, 8, dtype=torch.int64)
    index[3:9, 1], index[15, 4] = 2, 3
    return index


# the GPUs whose tiles the interpreter runs: descriptors, pointers
GPUS = {"H200": ("tma", 128), "B200": ("tma", 128), "A100": ("pointer", 128)}
CLAMPED = {"activation": "clamped_swiglu", "bias": "levels", "size": 0.3}
LAYOUTS = {
    "concatenated": {"bias": True},
    "concatenated, transposed": {"transposed": True, "bias": True, "activation": "gelu_tanh"},
    "interleaved": {"concatenated": False, **CLAMPED},
    "interleaved, transposed": {"concatenated": False, "transposed": True, **CLAMPED},
    "no gate": {"gate": False, "bias": True, "activation": "relu2"},
}


@pytest.mark.skipif(ON_GPU, reason="these are tiles of other GPUs")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gpu", ["H200", "A100"])
def test_the_largest_tiles(gpu, layout, planned):
    forms = planned(gpu)
    check_here(**LARGE, **LAYOUTS[layout], index=large_index())
    assert {form[:2] for form in forms} == {GPUS[gpu]}
    assert max(form[2] for form in forms) == (256 if gpu == "H200" else 128)


@pytest.mark.skipif(ON_GPU, reason="these are tiles of other GPUs")
@pytest.mark.parametrize(("gpu", "R"), [("H200", 1), ("H200", 40), ("B200", 16), ("A100", 40)])
def test_the_largest_tiles_at_every_rank(gpu, R, planned):
    forms = planned(gpu)
    check_here(**(LARGE | {"R": R}), index=large_index())
    assert {form[0] for form in forms} == {GPUS[gpu][0]}


@pytest.mark.parametrize("change", ["offset", "columns apart", "odd gate"])
def test_weights_that_no_descriptor_describes(change):
    """Pointers, chosen by strides and addresses."""
    misaligned = change == "odd gate"
    o, settings = block(dtype=torch.float16, device=DEVICE, H=32, I=12 if misaligned else 16, transposed=misaligned)
    exact = {n: t if n == "topk_index" else t.double() for n, t in o.items()}
    expected = differentiated(lambda o, s: plain(o, **s), exact, settings)
    wide = torch.zeros(5, 32, 128, dtype=torch.float16, device=DEVICE)
    view = {"offset": wide[:, :, 1:33], "columns apart": wide[:, :, :64:2], "odd gate": wide[:, :, :24]}[change]
    view.copy_(o["gate_up"])
    weights = Weight(view, misaligned), Weight(o["down"], misaligned)
    assert not problems.experts_problems(o["x"], 1, *weights, None, None, True, False)[0].aligned
    for name, tensor in differentiated(lambda o, s: fused(o | {"gate_up": view}, s, "triton"), o, settings).items():
        assert relative_l2(tensor, expected[name]) <= tolerance(torch.float16), name


@by_dtype
@pytest.mark.parametrize("R", [1, 2, 3, 4, 6, 8, 16, 40, 100])
def test_every_rank(R, dtype):
    check_here(dtype=dtype, R=R, T=9, H=16, I=24)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("H", "I"), [(64, 64), (128, 72), (33, 67), (72, 136)])
def test_every_size(H, I, adapter_dtype):  # noqa: E741
    check_here(dtype=torch.float16, T=40, E=3, H=H, I=I, R=6, adapter_dtype=adapter_dtype)


def test_groups_of_several_tiles():
    """300 rows of one expert, one of another, none of the third."""
    index = torch.zeros(300, 1, dtype=torch.int64)
    index[7] = 2
    check_here(dtype=torch.float16, T=300, E=3, k=1, H=64, I=16, index=index)


@pytest.mark.parametrize(("T", "E", "k"), [(0, 3, 2), (1, 3, 2), (1, 1, 1), (5, 1, 1), (3, 70, 8)])
def test_edges(T, E, k):
    check_here(dtype=torch.float32, T=T, E=E, k=k)


@pytest.mark.parametrize("sentinels", [0.3, 1.0])
def test_sentinels_add_nothing(sentinels):
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(23, 5, generator=generator).topk(2, 1).indices
    index[torch.rand(23, 2, generator=generator) < sentinels] = 6
    check_here(dtype=torch.float32, index=index)


@pytest.mark.parametrize("adapters", [("gate_up",), ("down",), ()])
def test_without_some_adapters(adapters):
    check_here(dtype=torch.float32, adapters=adapters)


@pytest.mark.parametrize("shared", [("gate_up_a", "down_b"), ("gate_up_b", "down_a")])
def test_shared_factors(shared):
    check_here(dtype=torch.float32, shared=shared)


def test_any_activation_between_the_kernels():
    def clamped(u):
        gate, up = u.chunk(2, -1)
        return torch.sigmoid(gate.clamp(max=0.5)) * (up + 1)

    check_here(dtype=torch.float32, activation=clamped)


def test_rows_of_x_apart():
    o, settings = block(dtype=torch.float32, device=DEVICE)
    expected = differentiated(lambda o, s: plain(o, **s), o, settings)
    wide = torch.zeros(23, 30, device=DEVICE)
    wide[:, 5:17] = o["x"]
    out = fused(o | {"x": wide[:, 5:17]}, settings, "triton")
    assert relative_l2(out, expected["out"]) <= tolerance(torch.float32)


def test_two_runs_are_equal_bit_for_bit():
    o, settings = block(dtype=DTYPES[-1], device=DEVICE, T=60, H=64, I=32)
    one, two = (differentiated(lambda o, s: fused(o, s, "triton"), o, settings) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.skipif(ON_GPU, reason="on a GPU a device-side assertion ends the process")
def test_a_negative_index():
    o, settings = block(dtype=torch.float32, index=torch.full((23, 2), -1))
    with pytest.raises(ValueError, match=r"topk_index holds -1; it must be an expert, 0 to 4"):
        fused(o, settings, "triton")


@by_dtype
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [(3, 0, 5, 1), (0, 0, 0), (70, 2), (0, 4)])
def test_grouped_linear(sizes, transposed, dtype):
    generator = torch.Generator().manual_seed(1)
    E, S, K, N, R = len(sizes), sum(sizes) + 2, 24, 40, 3
    shapes = (S, K), (E, K, N) if transposed else (E, N, K), (E, R, K), (E, N, R), (E, N)
    x, w, a, b, bias = (torch.randn(s, generator=generator).to(DEVICE, dtype) / 3 for s in shapes)
    ends, dy = torch.tensor(sizes, device=DEVICE).cumsum(0), torch.ones(S, N, dtype=dtype, device=DEVICE)
    result = []
    for name, wide in (("triton", False), ("eager", True)):
        given = [t.double() if wide else t.clone() for t in (x, w, a, b, bias, dy)]
        leaves = [given[i].requires_grad_() for i in (0, 2, 3)]
        low = {"scale": 1.3, "bias": given[4], "is_transposed": transposed, "backend": name}
        y = lora_grouped_linear(given[0], ends, *given[1:4], **low)
        result.append((y.detach(), *torch.autograd.grad(y, leaves, given[5])))
    for name, actual, expected in zip(("y", "dx", "da", "db"), *result, strict=True):
        assert relative_l2(actual, expected) <= tolerance(dtype), name
        assert not actual[sum(sizes) :].any() or name in ("da", "db"), name


@pytest.mark.parametrize("block_m", [16, 128])
def test_tiles_cover_every_row_once(block_m):
    sizes = [0, 1, 16, 17, 0, 300, 0]
    ends = torch.tensor(sizes, device=DEVICE).cumsum(0)
    table = rows.ragged_tiles(ends, sum(sizes) + 5, block_m).tolist()
    assert table[0][:2] == [len(sizes), sum(-(-n // block_m) for n in sizes)]
    covered = [(g, row) for g, first, end in table if g < len(sizes) for row in range(first, min(first + block_m, end))]
    assert covered == [(g, row) for g, n in enumerate(sizes) for row in range(sum(sizes[:g]), sum(sizes[:g]) + n)]


# (module, what is changed, into what, the tensor that turns red first, layout and GPU whose largest tiles show it)
MUTATIONS = {
    "a tile reads its neighbour's rows": (rows, "o_m = tl.where(o_m < end, o_m, row)", "o_m = tl.where(o_m < end, o_m, row) * 0", "out"),
    "a tile is not counted": (rows, "tl.sum(tiles, 0), row)", "tl.sum(tiles, 0) - 1, row)", "out"),
    "the sum forgets a choice": (combine, "for j in range(CHOICES)", "for j in range(CHOICES - 1)", "out"),
    "the sum reads sentinels": (combine, "tl.where(row < rows, H, 0)", "H", "out"),
    "the sum without weights": (combine, "y *= tl.load(p_weight + t * CHOICES + j, mask=row < rows, other=0.0).to(tl.float32)", "pass", "out"),
    "xa of the first expert": (lowrank, "p_a + group.to(tl.int64) * stride_a[0]", "p_a + 0 * stride_a[0]", "out"),
    "gradients of all rows": (lowrank, "tl.load(p_ends + i_g - 1, mask=i_g > 0, other=0)", "tl.load(p_ends, mask=i_g > 99, other=0)", "gate_up_a"),
    "no router weight in the gradient": (lowrank, "* row_scale[:, None]", "* 1.0", "down_a"),
    "no low-rank product": (product, "return tl.dot(b_xa, b_b.T if RANKS_LAST else b_b, acc, input_precision=PRECISION)", "return acc", "out"),
    "b of the first expert": (matmul, "p_b + group_w * stride_b[0]", "p_b + 0 * stride_b[0]", "out"),
    "b of up is that of gate": (product, "o_n.to(tl.int64)[:, None] * stride_b", "(o_n % 136).to(tl.int64)[:, None] * stride_b", "out", "concatenated", "H200"),
    "the bias of up is that of gate": (matmul, "group_w * N + o_n, mask", "group_w * N + o_n % 136, mask", "out", "concatenated", "H200"),
    "up's columns from gate (pointers)": (matmul, "o_n += tl.arange(0, BLOCK_N) // COLUMNS * limit", "pass", "out", "concatenated", "A100"),
    "up's columns from gate (TMA)": (product, "[stride_w[0], half * stride_w[1], stride_w[1], 1]", "[stride_w[0], (half - 8) * stride_w[1], stride_w[1], 1]", "out", "concatenated", "H200"),
    "up's columns from gate (TMA, transposed)": (product, "[stride_w[0], stride_w[2], half, 1]", "[stride_w[0], stride_w[2], half - 8, 1]", "out", "concatenated, transposed", "H200"),
    "the first expert's gate and up (TMA)": (product, "d_w.load([group, 0, i_n, i_k])", "d_w.load([0, 0, i_n, i_k])", "out", "concatenated", "H200"),
    "the first expert's gate and up (TMA, transposed)": (product, "d_w.load([group, i_k, 0, i_n])", "d_w.load([0, i_k, 0, i_n])", "out", "concatenated, transposed", "H200"),
    "the first expert's weight (TMA)": (product, "d_w.load([group, i_n, i_k])", "d_w.load([0, i_n, i_k])", "out", "concatenated", "H200"),
    "the first expert's weight (TMA, transposed)": (product, "d_w.load([group, i_k, i_n])", "d_w.load([0, i_k, i_n])", "x", "concatenated", "H200"),
    "the first expert's weight (pointers)": (product, "p_w[i] + group.to(tl.int64) * stride_w[i][0]", "p_w[i] + 0 * stride_w[i][0]", "out", "concatenated", "A100"),
    "the last block of K is left out (TMA)": (product, "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K * (len(d_w) > 0), BLOCK_K)", "out", "concatenated", "H200"),
    "the last block of K is left out (pointers)": (product, "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K * (len(d_w) == 0), BLOCK_K)", "out", "concatenated", "A100"),
    "programs skip tiles": (matmul, "tiles_m * tiles_n, tl.num_programs(0)", "tiles_m * tiles_n, 2 * tl.num_programs(0)", "out", "concatenated", "H200"),
    "an expert's last row is not stored": (matmul, "rows = o_m < end", "rows = o_m < end - 1", "out", "concatenated", "H200"),
    "up is not multiplied": (epilogues, "return h * up, slope * up, h", "return h, slope * up, h", "out", "concatenated", "H200"),
    "gate's slope without up": (epilogues, "return h * up, slope * up, h", "return h * up, slope, h", "x", "concatenated", "H200"),
    "up's slope is gate": (epilogues, "return h * up, slope * up, h", "return h * up, slope * up, gate", "x", "concatenated", "H200"),
    "gate and up swapped": (epilogues, "gate, up = split_columns(u)", "up, gate = split_columns(u)", "out", "concatenated", "H200"),
    "interleaved gate and up swapped": (epilogues, "gate, up = tl.split(", "up, gate = tl.split(", "out", "interleaved", "H200"),
    "gate is saved as up": (epilogues, "tl.store(p_gate + half, up,", "tl.store(p_gate + half, gate,", "x", "concatenated", "H200"),
    "the right part of h stored left": (epilogues, "_activate_concatenated(right, right_up, first + WIDTH // 2", "_activate_concatenated(right, right_up, first", "out", "concatenated", "H200"),
    "the right part of interleaved stored left": (epilogues, "_activate_columns(right, first + WIDTH // 2", "_activate_columns(right, first", "out", "interleaved", "H200"),
    "h of interleaved at their own columns": (epilogues, "o_h = first // 2 + tl", "o_h = first + tl", "out", "interleaved", "H200"),
    "the right part of du stored left": (epilogues, "right, first + HALF, o_s", "right, first, o_s", "x", "concatenated", "A100"),
    "du of interleaved stored left": (epilogues, "o_2 = 2 * first + tl", "o_2 = first + tl", "x", "interleaved", "A100"),
    "d_up is d_gate": (epilogues, "p_du + o_u + N, (dh * row_scale * d_up)", "p_du + o_u + N, (dh * row_scale * d_gate)", "x", "concatenated", "H200"),
    "du of interleaved swapped": (epilogues, "tl.join((dh * row_scale * d_gate).to(dtype), (dh * row_scale * d_up)", "tl.join((dh * row_scale * d_up).to(dtype), (dh * row_scale * d_gate)", "x", "interleaved", "H200"),
    "d_gate without the router weight": (epilogues, "p_du + o_u, (dh * row_scale * d_gate)", "p_du + o_u, (dh * d_gate)", "x", "concatenated", "H200"),
    "du of no gate without the router weight": (epilogues, "(dh * row_scale * slope)", "(dh * slope)", "x", "no gate", "H200"),
    "the router's gradient from the right part": (epilogues, "return of_left + _backward", "return _backward", "topk_weight", "concatenated", "H200"),
    "the router's gradient without h": (epilogues, "dh * h, 0.0", "dh, 0.0", "topk_weight", "concatenated", "H200"),
    "gate is not clamped": (epilogues, "tl.where(gate > 7.0, 7.0, gate)", "gate", "out", "interleaved", "H200"),
    "up is clamped on one side": (epilogues, "tl.where(up < -7.0, -7.0, up)", "up", "out", "interleaved", "H200"),
    "gate's gradient beyond its limit": (epilogues, "tl.where(gate <= 7.0,", "tl.where(gate <= 1e9,", "x", "interleaved", "H200"),
    "up's gradient above its limit": (epilogues, "& (up <= 7.0)", "& (up <= 1e9)", "x", "interleaved", "H200"),
    "up's gradient below its limit": (epilogues, "(up >= -7.0) &", "(up >= -1e9) &", "x", "interleaved", "H200"),
    "a sigmoid of its own": (epilogues, "tl.sigmoid(1.702 * low)", "tl.sigmoid(low)", "out", "interleaved", "H200"),
    "up is not raised": (epilogues, "-7.0, up)) + 1", "-7.0, up))", "out", "interleaved", "H200"),
}  # fmt: skip


def gate_of_mutations(layout=None):
    if layout is not None:
        return check_here(**LARGE, **LAYOUTS[layout], index=large_index())
    index = torch.arange(46).view(23, 2) % 5
    index[3, 1] = 5
    return check_here(dtype=torch.float16, H=64, I=40, index=index)


@pytest.mark.skipif(ON_GPU, reason="these are tiles of other GPUs")
@pytest.mark.parametrize(("layout", "gpu"), sorted({red[4:] for red in MUTATIONS.values() if len(red) > 4}))
def test_the_right_kernels_are_green(layout, gpu, planned):
    planned(gpu)
    gate_of_mutations(layout)


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_red(name, monkeypatch, tmp_path, planned):
    module, old, new, red, *case = MUTATIONS[name]
    if case and ON_GPU:
        pytest.skip("shown by tiles of other GPUs")
    install(module, old, new, monkeypatch, tmp_path)
    if case:
        planned(case[1])
    with pytest.raises(AssertionError) as failure:
        gate_of_mutations(*case[:1])
    assert str(failure.value).startswith(f"{red}:"), failure.value
