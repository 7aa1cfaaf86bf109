"""Products of ragged rows with the rank, both from one read of rows that lie anywhere, emulated (T5), against fp64.

The kernel is csrc/kernels/ragged_ranks_sm80.cuh.
"""

from dataclasses import replace

import pytest
import torch
from gathered_reference import TYPES, Case, Ranks, same

from lorafuse.testing.numerics import relative_l2, tolerance

pytest_plugins = "emu_fixtures"
pytestmark = pytest.mark.usefixtures("emu")


def check(emu, case, dtype=torch.float32):
    """Both; each alone, and of a gathered copy, is the same bit for bit."""
    o, end = Ranks(case), case.ends[-1]
    projected, outer = o.launch(emu, dtype=dtype)
    exact, exact_outer = o.expected()
    if end:
        assert relative_l2(projected[:end], exact[:end]) < tolerance(case.dtype)
        assert relative_l2(outer, exact_outer) < tolerance(case.dtype)
        assert torch.equal(outer == 0, exact_outer == 0), "of a group without rows alone it is zero"
    else:
        assert not outer.count_nonzero()
    for gathered in (False, True):
        assert same(o.launch(emu, (True, False), gathered=gathered)[0][:end], projected[:end])
        assert same(o.launch(emu, (False, True), dtype, gathered)[1], outer)
    return projected, outer


@pytest.mark.parametrize("R", [8, 16, 24, 40])
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_rank(emu, R, dtype):
    """Of a fragment's half, one, two, and of two tiles; results of both types and in both orders."""
    case = Case(ends=(20, 20, 90), rows=92, K=264 if R == 24 else 72, R=R, dtype=dtype, transposed=R % 16 == 0)
    check(emu, case, torch.float32 if R < 24 else dtype)


GROUPS = {
    "none has rows": ((0, 0), 8, 4),
    "some have none": ((0, 130, 130, 131, 200), 200, 3),
    "one has all": ((0, 0, 150, 150), 150, 2),
    "whole steps": ((64, 128), 130, 1),
    "a row each": ((1, 2, 3), 3, 3),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_every_kind(emu, name):
    ends, rows, choices = GROUPS[name]
    check(emu, Case(ends=ends, rows=rows, choices=choices, K=72, R=8))


@pytest.mark.parametrize("K", [8, 60, 256])
def test_columns_that_fill_no_block(emu, K):
    check(emu, Case(ends=(20, 24), rows=24, K=K, R=8))


def test_many_schedules(emu, request):
    """No bit depends on when a block runs, nor on how many run at a time."""
    o = Ranks(Case(ends=(20, 20, 90), rows=92, K=264, R=16))
    first = None
    for i in range(max(20, request.config.getoption("--seeds") // 4)):
        emu.configure(seed=i, resident=1 + i % 3, multiprocessors=1 + i // 2 % 5)
        projected, outer = o.launch(emu)
        first = first or (projected, outer)
        assert same(projected[:90], first[0][:90]), i
        assert torch.equal(outer, first[1]), i


def test_integers_are_exact(emu):
    o = Ranks(Case(ends=(20, 20, 90), rows=92, K=264, R=16))
    for t in (o.x, o.b, o.xa):
        t.copy_(torch.randint(-2, 3, t.shape, generator=torch.Generator().manual_seed(1)))
    projected, outer = o.launch(emu, scale=1.0)
    exact, exact_outer = o.expected(1.0)
    assert torch.equal(projected[:90].double(), exact[:90].to(o.case.dtype).double())
    assert torch.equal(outer.double(), exact_outer)


def test_no_rows(emu):
    """Of every group the sum is zero."""
    o = Ranks(replace(Case(), ends=(0, 0), rows=4, K=72, R=8))
    o.launch(emu)
    outer = torch.full((2, 72, 8), float("nan"))
    emu.ragged_ranks(**o.last | {"rows": 0, "wide": 0, "narrow": 0, "outer": outer.data_ptr()})
    assert not outer.count_nonzero()


def test_what_is_refused(emu):
    o = Ranks(Case(ends=(20, 24), rows=24, K=72, R=8))
    o.launch(emu)
    for message, change in {
        "R of 12 is not a multiple of 8": {"R": 12},
        "rows of fp32": {"type": 2},
        "choices of 0; a token has at least 1": {"choices": 0},
        "choices of 4 without an order": {"order": 0},
        "neither projected nor outer": {"projected": 0, "outer": 0},
        "offsets is null": {"offsets": 0},
        "b is null": {"b": 0},
        "narrow is null": {"narrow": 0},
        "workspace is null": {"workspace": 0},
        "stride 64 of wide is below its 72 columns": {"stride_wide": 64},
        "order at .* is not on a 8-byte boundary": {"order": o.order.data_ptr() + 4},
        "rows of -1": {"rows": -1},
    }.items():
        with pytest.raises(ValueError, match=message):
            emu.ragged_ranks(**o.last | change)
