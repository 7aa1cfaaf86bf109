"""Products of ragged rows that lie anywhere in x, tiles by ticket (csrc/kernels/gathered_sm90.cuh), emulated (T5).

Called directly: no operator takes them before a GPU has measured them. Against fp64 and, bit for bit, against the
kernel with fixed tiles over a gathered copy of x, in every tiling and under every schedule.
"""

from dataclasses import replace

import pytest
import torch
from gathered_reference import ACTIVATIONS, TILINGS, TYPES, Case, Gated, GatedCase, Gradients, Operands, same

from lorafuse.activation import gate_forward
from lorafuse.testing.numerics import relative_l2, tolerance

pytest_plugins = "emu_fixtures"
pytestmark = pytest.mark.usefixtures("emu")


def check(emu, case, tiling=TILINGS[0]):
    o = Operands(case)
    y, expected, end = o.through_order(emu, tiling), o.expected(), case.ends[-1]
    assert relative_l2(y[:end], expected[:end]) < tolerance(case.dtype)
    assert y[end:].isnan().all(), "a row of no group was written"
    assert same(y, o.in_order(emu, tiling)), "rows that TMA has loaded"
    return o, y


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_layout(emu, transposed, dtype):
    """Columns behind those of a tile, several of them, ranks that end in a short block, and without bias."""
    o, y = check(emu, Case(transposed=transposed, dtype=dtype, N=264, bias=not transposed))
    assert same(y, o.grouped(emu))


@pytest.mark.parametrize("tiling", TILINGS[1:])
def test_every_tiling(emu, tiling):
    """No bit depends on it, since each tile sums in the same order."""
    o = Operands(Case(N=264, K=72, R=8))
    assert same(o.through_order(emu, tiling), o.grouped(emu))


@pytest.mark.parametrize("R", [0, 8, 16, 64, 80])
def test_every_rank(emu, R):
    check(emu, Case(R=R, ends=(9, 40), rows=40, choices=2, N=72, K=72, transposed=R == 16))


GROUPS = {
    "none has rows": ((0, 0), 8, 4),
    "some have none": ((0, 130, 130, 131, 300), 300, 3),
    "one has all": ((0, 0, 260, 260), 260, 2),
    "whole tiles": ((128, 256), 300, 1),
    "a row each": ((1, 2, 3, 4, 5, 6, 7, 8), 8, 8),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_every_kind(emu, name):
    ends, rows, choices = GROUPS[name]
    case = Case(ends=ends, rows=rows, choices=choices, N=72, K=72, R=8)
    if ends[-1] == 0:
        assert Operands(case).through_order(emu).isnan().all()
        return
    for tiling in TILINGS[:1] if rows > 200 else (TILINGS[0], TILINGS[2]):
        check(emu, case, tiling)


@pytest.mark.parametrize("K", [8, 60, 64, 130])
def test_columns_of_x_that_fill_no_block(emu, K):
    """Where w is stored by columns, K need not be a multiple of 8 either."""
    check(emu, Case(ends=(20, 24), rows=24, K=K, N=72, R=8, transposed=K % 8 != 0))


def test_integers_are_exact(emu):
    o = Operands(Case(R=16))
    for t in (o.x, o.w, o.xa, o.b, o.bias):
        t.copy_(torch.randint(-2, 3, t.shape, generator=torch.Generator().manual_seed(1)))
    y, expected = o.through_order(emu), o.expected()
    assert torch.equal(y[:190].double(), expected[:190].bfloat16().double())


FEW = GatedCase(ends=(20, 20, 90), rows=92, N=2 * 72, K=72, R=8)


@pytest.mark.parametrize("kind", [Operands, Gated, Gradients])
def test_many_schedules(emu, request, kind):
    """No bit depends on who computes a tile, or when; w by rows and by columns in turn."""
    few = replace(FEW, bias=kind is not Gradients)
    forms, first = [kind(few), kind(replace(few, transposed=True))], {}
    for i in range(max(20 if kind is Gradients else 50, request.config.getoption("--seeds") // 4)):
        emu.configure(seed=i, resident=1 + i % 3, multiprocessors=1 + i // 2 % 5)
        y = forms[i % 2].through_order(emu, TILINGS[i % 3 if kind is Operands else 0])
        assert same(y, first.setdefault(i % 2, y)), i


def test_late_blocks_leave_their_tiles_to_others(emu):
    """One block at a time: the first has all the tiles, and each of the others draws one ticket and ends."""
    o = Operands(Case(N=72, K=72, R=8))
    emu.configure(seed=5, resident=1, multiprocessors=3)
    y = o.through_order(emu)
    assert emu.statistics()["wgmmas"] > 0
    assert same(y, o.in_order(emu))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation(emu, activation):
    """h of the u that is stored, in tiles that end with a group's rows and in those that do not; u as without h."""
    index = ACTIVATIONS.index(activation)
    case = GatedCase(
        ends=(20, 20, 150, 152), N=2 * 136, K=72, R=8, activation=activation, transposed=index % 2 == 1,
        bias=index % 3 > 0, dtype=(torch.bfloat16, torch.float16)[index // 3],
    )  # fmt: skip
    o, end = Gated(case), case.ends[-1]
    u, h = o.through_order(emu).split([case.N, case.N // 2], 1)
    assert same(u, Operands(case).through_order(emu))
    exact = gate_forward(activation, *u[:end].double().chunk(2, 1))
    assert relative_l2(h[:end], exact) < tolerance(case.dtype)
    assert h[end:].isnan().all(), "a row of no group was written"


def check_gradients(emu, case):
    o = Gradients(case)
    launched = o.through_order(emu)
    for name, actual, exact in zip(("du", "h", "⟨dh, h⟩"), o.results(launched), o.expected_results(), strict=True):
        assert relative_l2(actual, exact) < tolerance(case.dtype), name
        assert actual.count_nonzero() > 0, name
    assert launched[case.ends[-1] :].isnan().all(), "a row of no group was written"
    return o, launched


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_s_backward(emu, activation):
    """The gradients of gate and up, h and the parts of a router's gradient, of the dh that is nowhere stored."""
    index = ACTIVATIONS.index(activation)
    check_gradients(
        emu,
        GatedCase(
            ends=(20, 20, 150, 152), N=(136, 264)[index // 5], K=72, R=(8, 0, 24)[index % 3], activation=activation,
            transposed=index % 2 == 0, bias=False, dtype=(torch.bfloat16, torch.float16)[index // 3],
        ),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["some have none", "whole tiles", "a row each"])
def test_gradients_in_groups_of_every_kind(emu, name):
    """The last one's rows end where the matrix does, or before."""
    ends, rows, choices = GROUPS[name]
    check_gradients(emu, GatedCase(ends=ends, rows=rows, choices=choices, N=72, K=72, R=8, bias=False))


def test_gradients_of_rows_that_are_alike(emu):
    """Without factors of rows, and without the router's gradient."""
    o, launched = check_gradients(emu, replace(FEW, bias=False))
    o.row_scale.fill_(1)
    assert same(o.launch(emu, row_scale=0, products=0)[:, :-1], o.launch(emu)[:, :-1])
    assert not same(o.launch(emu), launched)


def test_what_is_refused(emu):
    o = Operands(Case())
    _, given = o.arguments(o.x, TILINGS[0])
    given |= {"order": o.order.data_ptr(), "choices": 4, "workspace": o.word.data_ptr()}
    for message, change in {
        "choices of 0; a token has at least 1": {"choices": 0},
        "choices of 4 without an order": {"order": 0},
        "order at .* is not on a 8-byte boundary": {"order": o.order.data_ptr() + 4},
        "workspace is null": {"workspace": 0},
        "offsets is null": {"offsets": 0},
        "N of 12 is not a positive multiple of 8": {"N": 12},
        "stride 128 of x is below its 136 columns": {"stride_x": 128},
        "clusters of 2 blocks; grouped kernels have none": {"tiling": (256, 3, 2)},
        "block_m of 32; tiles have 64 or 128 rows": {"tiling": (256, 3, 1, 16, 0, 32)},
        "block_m of 64 with block_n of 128 has no kernel": {"tiling": (128, 3, 1, 16, 0, 64)},
        "5 stages of 49152 bytes need": {"tiling": (256, 5, 1)},
        "xa is null": {"xa": 0},
        "rows of -1": {"rows": -1},
        "activation 6; there are 0 to 5": {"h": o.x.data_ptr(), "stride_h": 136, "stride_y": 272, "activation": 6},
        "h without an order": {"h": o.x.data_ptr(), "stride_h": 136, "stride_y": 272, "order": 0, "choices": 1},
        "stride 136 of y is below its 272 columns": {"h": o.x.data_ptr(), "stride_h": 136},
        "tiles of 128 x 128; those of gate and up are 128 x 256": {
            "h": o.x.data_ptr(),
            "stride_h": 136,
            "stride_y": 272,
            "tiling": (128, 3, 1),
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            emu.gathered_linear(**given | change)
    backward = given | {"h": o.x.data_ptr(), "stride_h": 136, "stride_y": 272, "u": o.x.data_ptr(), "stride_u": 272}
    for message, change in {
        "u without h": {"h": 0, "stride_y": 136},
        "stride 136 of u is below its 272 columns": {"stride_u": 136},
        "a bias of dh": {},
        "row_scale at .* is not on a 4-byte boundary": {"bias": 0, "row_scale": o.order.data_ptr() + 2},
        "products at .* is not on a 4-byte boundary": {"bias": 0, "products": o.order.data_ptr() + 2},
    }.items():
        with pytest.raises(ValueError, match=message):
            emu.gathered_linear(**backward | change)
    with pytest.raises(TypeError, match="missing keyword workspace"):
        emu.gathered_linear(**{key: value for key, value in given.items() if key != "workspace"})
    emu.gathered_linear(**given | {"rows": 0, "workspace": 0})


def test_a_wide_layer_has_tiles_of_every_kind(emu):
    """Several columns of tiles over several row blocks of a group, more than blocks."""
    emu.configure(seed=7, multiprocessors=2)
    check(emu, replace(Case(), ends=(150, 280), rows=280, N=264, K=72, R=16, dtype=torch.float16))
