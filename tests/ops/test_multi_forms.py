"""Siblings, gated MLP and experts over rows of many adapters (T1; Triton in its interpreter, T2): fp64 and bits."""

import pytest
import torch
from multi_forms import CHOICES, EXPERTS, FORMS, make, reference, run
from multi_reference import count_reads
from quantized_weights import four_bits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from lorafuse.backends import triton as triton_backend
from lorafuse.backends import workspace
from lorafuse.functional import MultiProjection, lora_experts_multi, lora_gated_mlp_multi, lora_linears_multi
from lorafuse.kernels import rows
from lorafuse.ops import multi_experts
from lorafuse.testing.numerics import relative_l2, tolerance

COUNTS, RANKS = [3, 0, 7, 1], [2, 4, 1, 20]
# the interpreter takes a second for a batch; `tests/kernels/test_multi_mutations.py` compares the other forms there
RUNS = [*((form, "eager", torch.float64) for form in FORMS), ("shared", "triton", torch.float32)]
by_form = pytest.mark.parametrize("form", FORMS)


def each(actual, expected):
    """The tensors of one name, one for each adapter where they are gradients of factors."""
    return zip(actual, expected, strict=True) if isinstance(expected, list) else [(actual, expected)]


def check(actual, expected, dtype):
    assert actual.keys() == expected.keys()
    for name, t in expected.items():
        for g, (mine, one) in enumerate(each(actual[name], t)):
            assert mine.dtype is dtype, name
            if one.count_nonzero():
                assert relative_l2(mine, one) <= tolerance(dtype), (name, g)
            else:
                assert not mine.any(), (name, g)


@pytest.mark.parametrize(("form", "backend", "dtype"), RUNS)
def test_every_tensor(form, backend, dtype):
    given = make(form, COUNTS, RANKS, dtype)
    expected = reference(given)
    # the adapter without rows, and the ranks that a layer does not have
    assert all(t.count_nonzero() for g, t in enumerate(expected["da0"]) if COUNTS[g])
    check(run(given, backend=backend), expected, dtype)


@pytest.mark.parametrize(("form", "backend"), [("experts", "eager"), ("shared", "triton")])
def test_layouts_of_experts(form, backend):
    """Gate and up alternating, a function of both, weights as they are transposed, no bias, an fp32 xa over fp16."""
    # rows start on 16-byte boundaries, which TMA reads
    given = make(form, COUNTS, RANKS, torch.float16, 16, 8, activation="clamped_swiglu", interleaved=True, bias=False)
    expected = reference(given)
    for layer in given.layers:
        layer.w = layer.w.mT.contiguous()
        layer.a, layer.b = ([t.float() for t in some] for some in (layer.a, layer.b))
    actual = run(given, backend=backend, is_transposed=True)
    for name, t in expected.items():
        both = each(actual[name], t)
        assert all(relative_l2(mine, one) <= tolerance(torch.float16) for mine, one in both if one.any()), name


# rows 0 to 300 and ranks 1 to 128 in plain torch; less where the interpreter computes
SHAPES = {
    "eager": {
        1: ([300], [128]), 2: ([1, 299], [128, 1]), 7: ([0, 3, 130, 2, 64, 1, 31], [64, 1, 13, 128, 2, 8, 33]),
        64: ([i * i % 51 for i in range(64)], [1 + i * 7 % 128 for i in range(64)]),
        2000: ([0 if i % 90 else i % 7 for i in range(2000)], [1 + i % 4 for i in range(2000)]),
    },
    "triton": {
        1: ([19], [40]), 2: ([1, 19], [40, 1]), 7: ([0, 3, 12, 2, 0, 1, 5], [64, 1, 13, 128, 2, 8, 33]),
        64: ([0 if i % 24 else 1 + i % 5 for i in range(64)], [1 + i * 7 % 40 for i in range(64)]),
        # more groups than are compared with tiles
        2000: ([0 if i % 700 else 1 + i % 7 for i in range(2000)], [0 if i % 100 else 1 + i % 4 for i in range(2000)]),
    },
}  # fmt: skip


def differing(given, every, chosen, **more):
    """The names of tensors of which an adapter has other bits in the batch, whose results are `every`, than alone."""
    names = []
    for g in chosen:
        for name, expected in run(given.pick([g]), **more).items():
            mine = every[name][g] if isinstance(expected, list) else every[name][given.rows(g)]
            if not torch.equal(mine, expected[0] if isinstance(expected, list) else expected):
                names.append((g, name))
    return names


# every form at seven adapters, and every number of them; all combinations passed on 2026-11-29, in plain torch
CASES = [("eager", 7, form) for form in FORMS]
CASES += [("eager", 1, "shared"), ("eager", 2, "gated"), ("eager", 64, "shared"), ("eager", 2000, "experts")]
CASES += [("triton", 1, "gated"), ("triton", 2, "siblings"), ("triton", 7, "gated"), ("triton", 7, "shared")]
CASES += [("triton", 64, "siblings"), ("triton", 64, "shared"), ("triton", 2000, "experts")]


@pytest.mark.parametrize(("backend", "L", "form"), CASES)
def test_bits_are_those_of_an_adapter_alone(backend, L, form):
    counts, ranks = SHAPES[backend][L]
    given = make(form, counts, ranks)
    every = run(given, backend=backend)
    # an adapter alone takes as long as a batch; those of the most and of the fewest rows
    used = sorted((g for g, count in enumerate(counts) if count), key=lambda g: counts[g])
    assert differing(given, every, sorted({used[0], used[-1]}), backend=backend) == []
    for g in [g for g, count in enumerate(counts) if not count][:20]:
        assert not any(t[g].any() for t in every.values() if isinstance(t, list))


@by_form
def test_bits_do_not_depend_on_the_order(form):
    given, order = make(form, COUNTS, RANKS), [3, 2, 0, 1]
    first, moved = run(given, backend="eager"), given.pick(order)
    second = run(moved, backend="eager")
    for name, t in first.items():
        for at, g in enumerate(order):
            mine, other = (t[g], second[name][at]) if isinstance(t, list) else (
                t[given.rows(g)], second[name][moved.rows(at)]
            )  # fmt: skip
            assert torch.equal(mine, other), (name, g)


def test_one_product_over_all_rows_is_not_invariant():
    """That the tests above can fail."""
    given = make("experts", [1, 2, 1, 30], [2, 3, 4, 8], H=512, I=64, rest=0)
    every = run(given, backend="eager", batch_invariant=False)
    check(every, reference(given), torch.float32)
    assert differing(given, every, range(4), backend="eager", batch_invariant=False)


@by_form
def test_gradients_are_added_to_buffers(form):
    """In Triton's kernels `tests/kernels/test_multi_mutations.py` shows it."""
    given = make(form, COUNTS, RANKS)
    expected = run(given, backend="eager")
    buffers = [
        [torch.ones_like(torch.cat(t, dim)) for t, dim in ((layer.a, -2), (layer.b, -1))] for layer in given.layers
    ]
    for i, layer in enumerate(given.layers):
        first = sum(layer.ranks[:1])
        buffers[i][0][..., first : first + layer.ranks[1], :] = float("nan")
    actual = run(given, buffers=buffers, backend="eager")
    for name, t in expected.items():
        if not isinstance(t, list):
            assert torch.equal(actual[name], t), name
            continue
        for g, (mine, one) in enumerate(zip(actual[name], t, strict=True)):
            # an adapter without rows keeps what was there
            is_kept = mine.isnan().all() if name.startswith("da") else (mine == 1).all()
            assert is_kept if g == 1 else relative_l2(mine - 1, one) <= 1e-5 or not one.any(), (name, g)


def test_nothing_waits_for_the_device(monkeypatch):
    """That the counter counts is shown in `test_multi.py`."""
    given = make("shared", COUNTS, RANKS)
    run(given, backend="triton")
    for module in (multi_experts, triton_backend):
        # of a CPU's values, which is where it reads them
        monkeypatch.setattr(module, "refuse_negative", lambda *_: None)
    seen = count_reads(monkeypatch)
    given.counts = [2, 5, 0, 4]
    run(given, backend="triton")
    assert not seen, seen


@pytest.mark.parametrize(("backend", "form"), [*(("eager", form) for form in FORMS), ("triton", "experts")])
def test_quantized_base(backend, form, monkeypatch):
    """Of experts one matrix at a time is in the workspace, whose groups kernels number from 0."""
    given = make(form, COUNTS, RANKS, H=64, I=32)
    weights = [four_bits(*layer.w.shape, rounded="float32") for layer in given.layers]
    for layer, weight in zip(given.layers, weights, strict=True):
        layer.w = weight.decoded(torch.float32).data
    expected = run(given, backend=backend)
    for layer, layer.weight in zip(given.layers, weights, strict=True):
        assert layer.weight.format_name != "dense"
    monkeypatch.setattr(workspace, "budget", lambda: 64 * 64 * 4)
    actual = run(given, backend=backend)
    for name, t in expected.items():
        assert all(torch.equal(mine, one) for mine, one in each(actual[name], t)), name


def formula(given):
    def call(x, weight, *factors):
        given_now = given.offsets
        layers = [
            MultiProjection(layer.w, a, b, layer.ranks, layer.scales, layer.bias, layer.p,
                            layer.seeds if layer.p else None)
            for layer, a, b in zip(given.layers, factors[::2], factors[1::2], strict=True)
        ]  # fmt: skip
        if given.form == "siblings":
            return lora_linears_multi(x, given_now, layers)
        if given.form == "gated":
            return lora_gated_mlp_multi(x, given_now, *layers)
        return lora_experts_multi(x, given_now, given.index, weight, *layers)

    factors = [t for layer in given.layers for t in (torch.cat(layer.a, -2), torch.cat(layer.b, -1))]
    return call, [None if t is None else t.clone().requires_grad_() for t in (given.x, given.weight, *factors)]


@pytest.mark.parametrize("form", ["gated", "shared"])
def test_gradcheck_of_both_orders(form):
    call, leaves = formula(make(form, [1, 0, 2], [1, 1, 2], torch.float64, H=4, I=2, rest=1))
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_functional_transform():
    given = make("shared", [1, 0, 2], [1, 1, 2], torch.float64)
    call, leaves = formula(given)
    _, gradients = torch.func.vjp(call, *leaves)
    expected = run(given)
    assert relative_l2(gradients(given.dy[0])[0], expected["dx"]) <= tolerance(torch.float64)


def test_compiled():
    given = make("shared", COUNTS, RANKS)
    call, leaves = formula(given)
    torch.compile(call, backend="aot_eager", fullgraph=True)(*leaves).backward(given.dy[0])
    expected = run(given)
    assert torch.equal(leaves[0].grad, expected["dx"])
    assert torch.equal(leaves[1].grad, expected["dweight"])
    for i in range(len(given.layers)):
        assert torch.equal(leaves[2 + 2 * i].grad, torch.cat(expected[f"da{i}"], -2))
        assert torch.equal(leaves[3 + 2 * i].grad, torch.cat(expected[f"db{i}"], -1))


@pytest.mark.parametrize("form", ["gated", "shared"])
def test_opcheck(form):
    """And FLOPs: those of the formula with every row of the largest rank."""
    given, seen = make(form, [2, 0, 3], [2, 1, 3], dropout=False), []
    if given.index is not None:
        # what a sentinel's rows hold is nobody's
        given.index %= EXPERTS

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "lorafuse":
                seen.append((op, tree_map_only(torch.Tensor, torch.Tensor.detach, args)))
            return op(*args, **(kwargs or {}))

    with Recording():
        run(given)
    assert len(seen) == 2
    for op, args in seen:
        torch.library.opcheck(op, args)
    with FlopCounterMode(display=False) as counter:
        run(given)
    T, R = given.x.shape[0] * (CHOICES if form == "shared" else 1), 3
    # y, dx; xa, xa b, dyb, dyb a, da, db
    products = sum(2 * N * K + 3 * R * (N + K) for N, K in (layer.w.shape[-2:] for layer in given.layers))
    assert counter.get_total_flops() == 2 * T * products


def test_what_does_not_fit_is_refused():
    given = make("experts", [2, 3], [2, 3])
    up, down = [
        MultiProjection(layer.w, torch.cat(layer.a, -2), torch.cat(layer.b, -1), layer.ranks, layer.scales)
        for layer in given.layers
    ]
    operands = given.x, given.offsets, given.index, given.weight
    for change, message in (
        ((up._replace(b=up.b[0]), down), "the rule is weight"),
        ((up._replace(weight=up.weight[0]), down), r"the rule is \[E, N, K\]"),
        ((up._replace(dropout_p=(0.5, 0.0)), down), "no dropout"),
        ((up._replace(a=None), down), "only one of a and b"),
        ((down, up), "out features|the rule is"),
    ):
        with pytest.raises(ValueError, match=message):
            lora_experts_multi(*operands, *change)
    dense = MultiProjection(torch.zeros(8, 20))
    with pytest.raises(ValueError, match="no projection"):
        lora_linears_multi(given.x, given.offsets, [])
    with pytest.raises(ValueError, match="gate and up"):
        lora_gated_mlp_multi(given.x, given.offsets, dense, dense, dense)
    with pytest.raises(ValueError, match="must be one of"):
        lora_gated_mlp_multi(given.x, given.offsets, dense, dense, dense, activation="swish")
    adapted = MultiProjection(torch.zeros(8, 20), torch.zeros(2, 20), torch.zeros(8, 2), (1, 1), (1.0, 1.0))
    with_buffers = adapted._replace(grad_buffers=(adapted.a, adapted.b))
    with pytest.raises(ValueError, match="or none"):
        lora_linears_multi(given.x, given.offsets, [adapted, with_buffers])


def test_tiles_of_more_groups_than_are_compared(monkeypatch):
    counts = torch.tensor([0, 5, 0, 0, 70, 16, 1, 0])
    ends = counts.cumsum(0).int()
    for part in (None, slice(2, 6)):
        expected = rows.ragged_tiles(ends, 100, 16, part)
        with monkeypatch.context() as patch:
            patch.setattr(rows, "MOST_COMPARED", 1)
            actual = rows.ragged_tiles(ends, 100, 16, part)
        count = int(expected[0, 1])
        assert torch.equal(actual[0, :2], expected[0, :2])
        assert torch.equal(actual[1 : 1 + count], expected[1 : 1 + count])
        assert (actual[1 + count :, 0] == expected[0, 0]).all()
