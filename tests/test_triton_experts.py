"""Triton kernels over ragged rows (T2; on a GPU, T6): experts and grouped layers, every tensor by name against fp64."""

import importlib

import pytest
import torch
from experts_reference import block, check, differentiated, fused, plain
from test_triton_mutations import mutated

from lorafuse.activation import ACTIVATIONS
from lorafuse.backends import eager_experts, triton_experts
from lorafuse.functional import lora_grouped_linear
from lorafuse.kernels import ragged, ragged_rank, routing
from lorafuse.testing.numerics import relative_l2, tolerance

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if ON_GPU else ())
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def check_here(**case):
    return check("triton", device=DEVICE, **case)


def test_every_activation_has_an_epilogue():
    assert set(ragged.ACTIVATIONS) == set(ACTIVATIONS)


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
    with pytest.raises(RuntimeError, match="negative expert"):
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
    found = []
    for backend, wide in (("triton", False), ("eager", True)):
        given = [t.double() if wide else t.clone() for t in (x, w, a, b, bias, dy)]
        leaves = [given[i].requires_grad_() for i in (0, 2, 3)]
        low = {"scale": 1.3, "bias": given[4], "is_transposed": transposed, "backend": backend}
        y = lora_grouped_linear(given[0], ends, *given[1:4], **low)
        found.append((y.detach(), *torch.autograd.grad(y, leaves, given[5])))
    for name, actual, expected in zip(("y", "dx", "da", "db"), *found, strict=True):
        assert relative_l2(actual, expected) <= tolerance(dtype), name
        assert not actual[sum(sizes) :].any() or name in ("da", "db"), name


@pytest.mark.parametrize("block_m", [16, 128])
def test_tiles_cover_every_row_once(block_m):
    sizes = [0, 1, 16, 17, 0, 300, 0]
    ends = torch.tensor(sizes, device=DEVICE).cumsum(0)
    table = routing.ragged_tiles(ends, sum(sizes) + 5, block_m).tolist()
    covered = [(g, row) for g, first, end in table if g < len(sizes) for row in range(first, min(first + block_m, end))]
    assert covered == [(g, row) for g, n in enumerate(sizes) for row in range(sum(sizes[:g]), sum(sizes[:g]) + n)]


MUTATIONS = {
    "a tile reads its neighbour's rows": (routing, "o_m = tl.where(o_m < end, o_m, row)", "o_m = tl.where(o_m < end, o_m, row) * 0", "out"),
    "the sum forgets a choice": (routing, "for j in range(CHOICES)", "for j in range(CHOICES - 1)", "out"),
    "the sum reads sentinels": (routing, "(row < rows)", "(row < rows + 1000)", "out"),
    "the sum without weights": (routing, "y *= tl.load(p_weight + t * CHOICES + j).to(tl.float32)", "pass", "out"),
    "the last block of K is left out": (ragged, "for i_k in range(0, K, BLOCK_K)", "for i_k in range(0, K - BLOCK_K, BLOCK_K)", "out"),
    "no low-rank product": (ragged, "acc = tl.dot(b_xa, b_b, acc, input_precision=PRECISION)", "pass", "out"),
    "the weight of the first expert": (ragged, "p_w + group * stride_wg", "p_w + 0 * stride_wg", "out"),
    "b of the first expert": (ragged, "p_b + group * stride_bg", "p_b + 0 * stride_bg", "out"),
    "up is not multiplied": (ragged, "h *= up.to(tl.float32)", "pass", "out"),
    "du without the router weight": (ragged, "acc * factor * slope", "acc * slope", "x"),
    "d_up from u": (ragged, "d_up = acc * factor * h", "d_up = acc * factor * gate", "x"),
    "the router's gradient without up": (ragged, "acc * h, 0.0", "acc * gate, 0.0", "topk_weight"),
    "xa of the first expert": (ragged_rank, "p_a + group * stride_ag", "p_a + 0 * stride_ag", "out"),
    "gradients of all rows": (ragged_rank, "tl.load(p_ends + group - 1, mask=group > 0, other=0)", "tl.load(p_ends, mask=group > 99, other=0)", "gate_up_a"),
    "no router weight in the gradient": (ragged_rank, "* factor[:, None]", "* 1.0", "down_a"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_red(name, monkeypatch, tmp_path):
    module, old, new, red = MUTATIONS[name]
    for user in (routing, ragged, ragged_rank) if module is routing else (module,):
        changed = (
            mutated(user, old, new, tmp_path)
            if user is module
            else mutated(user, "import triton\n", "import triton\n\n", tmp_path)
        )
        monkeypatch.setitem(importlib.sys.modules, user.__name__, changed)
        monkeypatch.setattr(triton_experts, user.__name__.rpartition(".")[2], changed)
        if user is routing:
            monkeypatch.setattr(triton_experts, "Tiles", changed.Tiles)
    index = torch.arange(46).view(23, 2) % 5
    index[3, 1] = 5
    with pytest.raises(AssertionError) as failure:
        check_here(dtype=torch.float16, H=64, I=40, index=index)
    assert str(failure.value).startswith(f"{red}:"), failure.value


def test_the_backends_have_the_same_functions():
    assert triton_experts.__all__ == eager_experts.__all__
