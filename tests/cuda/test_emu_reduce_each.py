"""The reductions over dy of several layers in one launch (csrc/kernels/reduce_each_sm80.cu), emulated (T5).

Bit for bit what each layer's own launch gives, whose results test_emu_skinny.py compares with fp64.
"""

from typing import NamedTuple

import pytest
import torch
from native_build import EMULATOR as emu
from test_emu_skinny import BF16, FP32, TYPES, declare, nan, reduce_dy, rows

pytestmark = pytest.mark.no_poison
DTYPE = BF16


class Layer(NamedTuple):
    N: int
    R: int
    b_dtype: torch.dtype = DTYPE
    want: tuple = (True, True, True)
    more: int = 0


CASES = {
    "q, k and v": (200, [Layer(600, 16), Layer(72, 16), Layer(264, 16)]),
    "every kind of ranks and adapters": (150, [Layer(264, 13, FP32), Layer(72, 80, more=8), Layer(8, 32, FP32)]),
    "some results": (70, [Layer(40, 8, want=(True, False, False)), Layer(300, 40, FP32, (False, True, False))]),
    "four, one row": (1, [Layer(8, 1), Layer(16, 2, want=(False, False, True)), Layer(8, 3), Layer(520, 64)]),
    "one": (130, [Layer(72, 5)]),
}


@pytest.fixture(autouse=True)
def _standard_emulator():
    yield
    emu.configure()
    emu.forget_memory()


def make(M, layers):
    torch.manual_seed(3)
    dys = [rows(torch.randn(M, one.N).to(DTYPE), one.more) for one in layers]
    bs = [torch.randn(one.N, one.R).to(one.b_dtype) for one in layers]
    return dys, bs, [rows(torch.randn(M, one.R).to(DTYPE)) for one in layers]


def each(layers, dys, bs, xas, **more):
    """`[(dyb, db, dbias)]`; the dyb lie side by side, with what belongs to nobody between them."""
    emu.forget_memory()
    M, widths = len(dys[0]), [-(-one.R // 8) * 8 + 8 for one in layers]
    whole = nan(M, sum(widths), dtype=DTYPE)
    declare("dyb", whole)
    dyb = [part if one.want[0] else None for part, one in zip(whole.split(widths, 1), layers, strict=True)]
    db = [nan(*b.shape, dtype=b.dtype) if one.want[1] else None for b, one in zip(bs, layers, strict=True)]
    dbias = [nan(one.N, dtype=DTYPE) if one.want[2] else None for one in layers]

    def places(name, tensors):
        return tuple(0 if t is None else declare(name, t) for t in tensors)

    arguments = {
        "type": TYPES[DTYPE], "count": len(layers), "M": M, "sms": 4, "b_type": tuple(TYPES[b.dtype] for b in bs),
        "N": tuple(one.N for one in layers), "R": tuple(one.R for one in layers), "dy": places("dy", dys),
        "stride_dy": tuple(dy.stride(0) for dy in dys), "b": places("b", bs),
        "stride_b": tuple(b.stride(0) for b in bs), "xa": places("xa", xas),
        "stride_xa": tuple(xa.stride(0) for xa in xas), "scale": tuple(0.5 + i for i in range(len(layers))),
        "dyb": tuple(0 if t is None else t.data_ptr() for t in dyb), "stride_dyb": (sum(widths),) * len(layers),
        "db": places("db", db), "dbias": places("dbias", dbias), **more,
    }  # fmt: skip
    workspace = nan(emu.reduce_each_workspace(**arguments) // 4, dtype=FP32)
    emu.reduce_each(**arguments, workspace=declare("workspace", workspace, unwritten=True))
    for part, one in zip(whole.split(widths, 1), layers, strict=True):
        # eight columns more, and all where no dyb is written
        assert part[:, -8 if one.want[0] else 0 :].isnan().all()
    return list(zip([None if t is None else t[:, :-8] for t in dyb], db, dbias, strict=True))


def check(layers, operands, **more):
    """As many launches as `each` needed."""
    before = emu.statistics()["launches"]
    actual = each(layers, *operands, **more)
    launches = emu.statistics()["launches"] - before
    for i, (one, dy, b, xa) in enumerate(zip(layers, *operands, strict=True)):
        expected = reduce_dy(dy, b, xa, 0.5 + i, one.want, **more)
        for name, mine, other in zip(("dyb", "db", "dbias"), actual[i], expected, strict=True):
            assert (mine is None) == (other is None), (i, name)
            assert mine is None or torch.equal(mine, other), (i, name)
    return launches


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_a_launch_each(name):
    M, layers = CASES[name]
    emu.configure(seed=5, resident=3)
    assert check(layers, make(M, layers)) == 2


def test_small_shared_memory():
    """Blocks of 32 rows, and of 32 ranks at most."""
    emu.configure(seed=6, shared_memory=100 * 1024)
    M, layers = 150, [Layer(264, 40), Layer(72, 8)]
    assert check(layers, make(M, layers)) == 2


@pytest.mark.parametrize(
    ("most", "launches"),
    # of dyb's partial sums: those of both layers in turn, those of the first in chunks too, all in chunks
    [(256 * 3 * 16 * 4, 4), (256 * 2 * 16 * 4, 6), (1, 16)],
)
def test_partial_sums_are_bounded(most, launches):
    layers = [Layer(600, 16), Layer(264, 16)]
    assert check(layers, make(200, layers), dyb_bytes=most) == launches


def test_what_is_refused():
    M, layers = 40, [Layer(40, 8), Layer(72, 16)]
    operands = make(M, layers)
    given = {"type": 0, "count": 2, "M": M, "b_type": (0, 0), "N": (40, 72), "R": (8, 16), "scale": (1.0, 1.0)}
    given |= {"dy": tuple(t.data_ptr() for t in operands[0]), "stride_dy": (40, 72), "dbias": (64, 64), "workspace": 64}
    for message, change in {
        "0 layers in one launch; there are 1 to 4": {"count": 0},
        "5 layers in one launch": {"count": 5},
        "layer 1 has neither dyb nor db nor dbias": {"dbias": (64,)},
        "dy is null": {"dy": (64, 0)},
        "b is null, and dyb needs it": {"dyb": (64, 64), "stride_dyb": (8, 16)},
        "stride 8 of dyb is below its 16 columns": {
            "dyb": (64, 64), "stride_dyb": (8, 8), "b": (64, 64), "stride_b": (8, 16),
        },
        "sizes 40, 72 and rank 0 must be positive": {"R": (8, 0)},
        "adapter's type 1 is neither FP32 nor that of x, 0": {"b_type": (0, 1)},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            emu.reduce_each(**given | change)
