"""Passes that are repeated from recordings (T5): bit for bit what the pass itself gives for the same tensors."""

import gc
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import group_reference as groups
import pytest
import torch
from native_build import emulator

from lorafuse import plan
from lorafuse.backends import base, recorder
from lorafuse.functional import lora_linear
from lorafuse.ops import choose, repeat
from lorafuse.plan import override
from lorafuse.testing.check_linear import LinearCase, gradients, make_operands

pytest_plugins = "emu_fixtures"
# memory is filled here but for a pass that is watched: the filling would be a part of it
pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("emu", "repeats", "poison")]

BF16, HALF, FP32 = torch.bfloat16, torch.float16, torch.float32
LINEAR = LinearCase(leading=(21,), N=72, K=136, R=16, dtype=BF16)
GROUP = groups.Case(N=(72, 40, 264), K=136, R=(8, 16, 24), leading=(2, 18), dtype=BF16, adapter_dtype=FP32)
MLP = replace(GROUP, N=(72, 72, 40), p=(0.0,) * 3)


@pytest.fixture
def repeats(monkeypatch):
    emulator()
    monkeypatch.setattr(base.load("emu"), "repeats", True)
    repeat.clear()
    with override(force_kernel="cuda siblings"):
        yield
    repeat.clear()


@pytest.fixture
def poison(monkeypatch):
    """Memory reads as NaN until it is written, scratch too, unless a recorder watches."""
    for owner, name in [(torch, "empty"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]:
        allocate = getattr(owner, name)

        def allocate_ones(*args, _allocate=allocate, **kwargs):
            out = _allocate(*args, **kwargs)
            if not recorder.is_watching():
                out.untyped_storage().fill_(255)
            return out

        monkeypatch.setattr(owner, name, allocate_ones)


def linear(case, sample):
    """Every tensor of a call by name."""
    o = make_operands(case, sample)
    for t in (o.x, o.a, o.b, o.bias):
        if t is not None:
            t.requires_grad_()
    more = {"bias": o.bias, "scale": case.scale, "dropout_p": case.dropout_p, "seed": case.seed + sample}
    return gradients(lora_linear(o.x, o.w, o.a, o.b, backend="emu", **more), o)


def siblings(case, sample):
    return groups.results(partial(groups.linears, backend="emu"), groups.make(case, sample))


def gated(case, sample, **more):
    return groups.results(partial(groups.mlp, backend="emu", **more), groups.make(case, sample, of_mlp=True))


PASSES = {
    "linear": (linear, LINEAR),
    "linear, a bias and no scale": (linear, replace(LINEAR, scale=1.0, leading=(2, 3, 5))),
    "linear, fp32 adapters, a mask, an odd rank": (linear, replace(LINEAR, adapter_dtype=FP32, dropout_p=0.3, R=13)),
    "linear, no bias": (linear, replace(LINEAR, bias=False, dtype=HALF)),
    "siblings": (siblings, GROUP),
    "siblings, odd ranks": (siblings, replace(GROUP, R=(13, 6, 3), dtype=HALF, adapter_dtype=None)),
    "siblings, masks": (siblings, replace(GROUP, p=(0.3, 0.0, 0.5))),
    "siblings, one without an adapter": (siblings, replace(GROUP, R=(8, 0, 16), bias=(False,) * 3)),
    "gated MLP": (gated, MLP),
    "gated MLP, up again": (partial(gated, recompute_up=True), MLP),
    "gated MLP, gelu, odd ranks": (partial(gated, activation="gelu"), replace(MLP, R=(13, 6, 3))),
    "gated MLP, a mask on down": (gated, replace(MLP, p=(0.0, 0.0, 0.4))),
    "gated MLP, no adapter of up": (gated, replace(MLP, R=(16, 0, 8))),
}


def in_python(call, *arguments):
    backend = base.load("emu")
    backend.repeats = False
    former, repeat.KINDS = repeat.KINDS, {}
    try:
        return call(*arguments)
    finally:
        backend.repeats, repeat.KINDS = True, former


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, t in expected.items():
        assert actual[name].dtype is t.dtype, name
        assert actual[name].stride() == t.stride(), name
        assert torch.equal(actual[name], t), name


@pytest.mark.parametrize("name", PASSES)
def test_bits_are_those_of_the_pass(name, launched):
    """With other tensors each time, in one call of csrc or two for all launches of a direction."""
    call, case = PASSES[name]
    expected = [in_python(call, case, sample) for sample in range(4)]
    for sample in (0, 1):
        assert_same(call(case, sample), expected[sample])
    assert all(known is not None and known[1] is not None for known in repeat.KINDS.values())
    assert len(repeat.KINDS) == 2
    launched.clear()
    for sample in (2, 3, 0):
        assert_same(call(case, sample), expected[sample])
    assert launched == []
    assert len(repeat.KINDS) == 2


KERNELS = {
    "linear": ("two_kernel", "split_k", "fused_forward", "xa_in_tiles"),
    "linear, no bias": ("one_pass_backward", "concurrent_backward", "fused_backward"),
    "gated MLP": ("siblings_ha",),
}


@pytest.mark.parametrize(("name", "kernel"), [(name, kernel) for name in KERNELS for kernel in KERNELS[name]])
def test_every_kernel(name, kernel, launched):
    """Also those that share zeros, and those whose launches overlap."""
    call, case = PASSES[name]
    with override(force_kernel=f"cuda {kernel}"):
        expected = [in_python(call, case, sample) for sample in range(3)]
        for sample in (0, 1, 2):
            launched.clear()
            assert_same(call(case, sample), expected[sample])
    assert launched == []


OTHER = {
    "another scale": replace(LINEAR, scale=0.3),
    "another number of rows": replace(LINEAR, leading=(22,)),
    "other dimensions": replace(LINEAR, leading=(3, 7)),
    "another adapter dtype": replace(LINEAR, adapter_dtype=FP32),
    "another rank": replace(LINEAR, R=24),
    "another dtype": replace(LINEAR, dtype=HALF),
    "a mask": replace(LINEAR, dropout_p=0.3),
    "no bias": replace(LINEAR, bias=False),
}


@pytest.mark.parametrize("name", OTHER)
def test_another_call_is_no_repetition(name):
    for sample in range(3):
        linear(LINEAR, sample)
    kinds = len(repeat.KINDS)
    assert_same(linear(OTHER[name], 0), in_python(linear, OTHER[name], 0))
    assert len(repeat.KINDS) > kinds


def operands():
    o = make_operands(replace(LINEAR, bias=False), 0)
    return o.x, o.w, o.a, o.b


def forward(x, w, a, b):
    with torch.no_grad():
        return lora_linear(x, w, a, b, scale=2.0, backend="emu")


def test_strides_and_addresses_are_of_a_kind():
    x, w, a, b = operands()
    for _ in range(3):
        forward(x, w, a, b)
    wide = torch.zeros(len(x), 2 * x.shape[1], dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    expected = in_python(forward, x, w, a, b)
    assert torch.equal(forward(wide[:, : x.shape[1]], w, a, b), expected)
    assert len(repeat.KINDS) == 2
    # two bytes off a boundary: copied first, which depends on the address
    shifted = torch.empty(a.numel() + 1, dtype=a.dtype)[1:].view(a.shape).copy_(a)
    for _ in range(3):
        assert torch.equal(forward(x, w, shifted, b), expected)
    assert len(repeat.KINDS) == 2


def test_another_plan_is_another_kind():
    x, w, a, b = operands()
    for _ in range(3):
        forward(x, w, a, b)
    plan.clear_cache()
    forward(x, w, a, b)
    with override(force_kernel="cuda two_kernel"):
        forward(x, w, a, b)
    assert [known[1] is None for known in repeat.KINDS.values()] == [False, True, True]


def test_operands_that_share_memory_are_not_recorded():
    """Which of them a pointer means is not known; every call is right all the same, and later ones of others too."""
    x, w, a, b = operands()
    both = torch.cat([a.flatten(), b.flatten()])
    a, b = both[: a.numel()].view(a.shape), both[a.numel() :].view(b.shape)
    expected = in_python(forward, x, w, a, b)
    # apart in one storage, as parameters in one flat buffer are
    for _ in range(3):
        assert torch.equal(forward(x, w, a, b), expected)
    assert [known[1] is not None for known in repeat.KINDS.values()] == [True]
    square = w[: w.shape[0], : w.shape[0]].contiguous()
    rows = square.clone()
    repeat.clear()
    a, b = a[:, : len(w)].contiguous(), b
    expected = in_python(forward, square, square, a, b)
    for _ in range(3):
        assert torch.equal(forward(square, square, a, b), expected)
    assert [*repeat.KINDS.values()] == [None]
    assert torch.equal(forward(rows, square, a, b), expected)


def test_nothing_of_a_call_is_kept():
    """But the layer's parameters in autograd's graph, which ends with the results."""
    alive = []
    for _ in range(3):
        x, w, a, b = operands()
        alive += map(weakref.ref, (x, w, a, b, forward(x, w, a, b)))
    del x, w, a, b
    gc.collect()
    assert [one() for one in alive] == [None] * len(alive)


def test_a_launch_that_fails_ends_the_recording(monkeypatch, emu):
    x, w, a, b = operands()
    forward(x, w, a, b)

    def fail(**arguments):
        raise ValueError("no")

    backend = base.load("emu")
    with monkeypatch.context() as patched:
        patched.setattr(backend, "native", SimpleNamespace(Launches=emu.Launches, project_x=emu.project_x, linear=fail))
        with pytest.raises(ValueError, match="no"):
            forward(x, w, a, b)
    expected = in_python(forward, x, w, a, b)
    for _ in range(2):
        assert torch.equal(forward(x, w, a, b), expected)
    assert [known[1] is not None for known in repeat.KINDS.values()] == [True]


def test_graphs(monkeypatch):
    """A pass in a graph is not recorded; a recording in a graph draws its tiles from words of the graph."""
    backend, (x, w, a, b) = base.load("emu"), operands()
    monkeypatch.setattr(backend, "captured", {})
    monkeypatch.setattr(backend, "flags", {})
    forward(x, w, a, b)
    with monkeypatch.context() as patched:
        patched.setattr(backend, "is_capturing", lambda: True)
        expected = forward(x, w, a, b)
    assert [known[1] for known in repeat.KINDS.values()] == [None]
    for _ in range(2):
        assert torch.equal(forward(x, w, a, b), expected)
    given = backend.captured[x.device][1]
    with monkeypatch.context() as patched:
        patched.setattr(backend, "is_capturing", lambda: True)
        assert torch.equal(forward(x, w, a, b), expected)
    assert backend.captured[x.device][1] == given + 1


def test_stream_and_device_are_those_of_the_call(monkeypatch, emu):
    x, w, a, b = operands()
    backend, seen = base.load("emu"), []

    class Spied:
        def __init__(self):
            self.of = emu.Launches()

        def __len__(self):
            return len(self.of)

        def __getattr__(self, name):
            return getattr(self.of, name)

        def run(self, first, last, addresses, stream, device):
            seen.append((first, last, stream, device))
            self.of.run(first, last, addresses, 0, -1)

    native = SimpleNamespace(Launches=Spied, project_x=emu.project_x, linear=emu.linear)
    monkeypatch.setattr(backend, "native", native)
    for _ in range(2):
        forward(x, w, a, b)
    monkeypatch.setattr(backend, "stream", lambda device: 7)
    monkeypatch.setattr(backend, "flags", {})
    forward(x, w, a, b)
    assert seen == [(0, 2, 7, -1)]
    # zeros of that stream
    assert [stream for _, stream in backend.flags] == [7]


def test_the_backend_of_a_repetition_is_seen():
    x, w, a, b = operands()
    for _ in range(3):
        choose.latest.name = "eager"
        forward(x, w, a, b)
        assert choose.latest.name == "emu"


def test_kinds_are_bounded(monkeypatch):
    monkeypatch.setattr(repeat, "MOST_KINDS", 3)
    x, w, a, b = operands()
    for rows in range(1, 9):
        forward(x[:rows], w, a, b)
        assert len(repeat.KINDS) <= 3


def test_passes_with_much_memory_are_not_recorded(monkeypatch):
    """All of a recording's is there at once."""
    monkeypatch.setattr(recorder, "MOST_BYTES", 20_000)
    expected = in_python(gated, MLP, 0)
    for _ in range(3):
        assert_same(gated(MLP, 0), expected)
    assert [*repeat.KINDS.values()] == [None, None]


def test_backends_without_recordings_run_each_pass(launched):
    base.load("emu").repeats = False
    for _ in range(3):
        launched.clear()
        linear(LINEAR, 0)
    assert launched
