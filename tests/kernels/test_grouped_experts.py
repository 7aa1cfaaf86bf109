"""Experts by torch's grouped_mm (T1): what GPUs with its fast kernel run, here by the one for CPUs, against fp64."""

import inspect
import textwrap
from dataclasses import replace

import pytest
import torch
from experts_reference import block, check, differentiated, fused
from torch.nn import functional as F

from lorafuse.activation import GateLayout, lookup
from lorafuse.backends import aten, aten_grouped, aten_loop, base, problems
from lorafuse.functional import lora_grouped_linear
from lorafuse.operands import Rows, Weight, route
from lorafuse.ops import experts
from lorafuse.ops import grouped as grouped_layer
from lorafuse.plan import Plan, find, no_grouped_mm
from lorafuse.testing.memory import peak_bytes
from lorafuse.testing.numerics import relative_l2, tolerance

pytest_plugins = "backend_fixtures"
GROUPED_MM = Plan("eager", "grouped_mm")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def half(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.fixture
def poisoned(monkeypatch):
    """What grouped_mm leaves unwritten is NaN."""
    product = F.grouped_mm

    def poisoned(left, right, *, offs):
        out = product(left, right, offs=offs)
        if right.dim() == 3:
            out[int(offs[-1]) :] = float("nan")
        else:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = float("nan")
        return out

    monkeypatch.setattr(F, "grouped_mm", poisoned)


@pytest.fixture(autouse=True)
def grouped(poisoned, by_grouped_mm):
    """Eager multiplies by grouped_mm wherever there are rows."""
    return by_grouped_mm


@by_dtype
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("concatenated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_layout(dtype, gate, transposed, concatenated, bias):
    check("eager", dtype=dtype, gate=gate, transposed=transposed, concatenated=concatenated, bias=bias, H=16)


@by_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("R", [1, 3, 8, 16])
def test_every_rank(R, bias, dtype):
    check("eager", dtype=dtype, R=R, bias=bias, H=16, adapter_dtype=torch.float32)


@pytest.mark.parametrize(
    ("T", "E", "k"), [(0, 4, 2), (1, 4, 2), (1, 1, 1), (9, 1, 1), (9, 4, 1), (9, 4, 4), (40, 64, 3)]
)
@pytest.mark.parametrize("transposed", [True, False])
def test_every_size(T, E, k, transposed):
    check("eager", dtype=torch.float32, T=T, E=E, k=k, transposed=transposed, bias=True)


def clamped(u):
    gate, up = u[..., ::2].clamp(max=0.7), u[..., 1::2].clamp(-0.7, 0.7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def summed(u):
    """Its gradient has rows of stride 0."""
    return u.sum(1, keepdim=True).expand(-1, u.shape[1] // 2)


@pytest.mark.parametrize(
    "index",
    [
        torch.full((7, 2), 5),
        torch.tensor([[0, 5], [5, 1], [6, 99], [4, 0], [5, 5], [2, 3], [3, 2]]),
        torch.zeros(7, 2, dtype=torch.int64),
        torch.tensor([[4, 4], [4, 0], [0, 4], [4, 4], [0, 0], [4, 0], [0, 4]]),
    ],
    ids=["sentinels only", "some sentinels", "one expert for all", "an expert twice"],
)
@pytest.mark.parametrize("activation", ["silu", clamped, summed])
@pytest.mark.parametrize("bias", [True, False])
def test_routings(index, activation, bias):
    check("eager", dtype=torch.float32, T=7, index=index, activation=activation, bias=bias)


@pytest.mark.parametrize("adapters", [("gate_up",), ("down",), ()])
@pytest.mark.parametrize("bias", [True, False])
def test_one_adapter_or_none(adapters, bias):
    check("eager", dtype=torch.float32, adapters=adapters, bias=bias)


@pytest.mark.parametrize("shared", [("gate_up_a", "down_b"), ("gate_up_a", "gate_up_b", "down_a", "down_b")])
def test_shared_factors(shared):
    check("eager", dtype=torch.float32, shared=shared)


def test_packed_as_peft_packs_them():
    """lora_B `[N, R·E]`, expert-fastest: its gradient is in the same packing."""
    o, settings = block(dtype=torch.float32)
    packed = {name: o[name].permute(1, 2, 0).contiguous() for name in ("gate_up_b", "down_b")}
    expected = differentiated(lambda o, s: fused(o, s, "eager"), o, settings)
    leaves = {name: t.requires_grad_() for name, t in packed.items()}
    views = {name: t.permute(2, 0, 1) for name, t in leaves.items()}
    out = fused(o | views, settings, "eager")
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(out)
    for name, grad in zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True):
        assert torch.equal(grad.permute(2, 0, 1), expected[name]), name


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [(3, 0, 5, 1), (0, 0, 0), (7,), (0, 4)])
@by_dtype
def test_grouped_linear(sizes, transposed, dtype):
    generator = torch.Generator().manual_seed(1)
    E, S, K, N, R = len(sizes), sum(sizes) + 2, 24, 40, 3
    shapes = (S, K), (E, K, N) if transposed else (E, N, K), (E, R, K), (E, N, R), (E, N)
    x, w, a, b, bias = (torch.randn(s, generator=generator).to(dtype) / 3 for s in shapes)
    # x and dy off 16-byte boundaries, as views may be
    x = torch.cat([torch.zeros(S, 1, dtype=dtype), x], 1)[:, 1:]
    ends, dy = torch.tensor(sizes).cumsum(0), torch.ones(1, 1, dtype=dtype).expand(S, N)
    results = []
    for wide in (False, True):
        given = [t.double() if wide else t.detach() for t in (x, w, a, b, bias, dy)]
        leaves = [given[i].requires_grad_() for i in (0, 2, 3)]
        low = {"scale": 1.3, "bias": given[4], "is_transposed": transposed, "backend": "eager"}
        with pytest.MonkeyPatch.context() as patched:
            if wide:
                patched.setattr("lorafuse.ops.choose.ATEN", aten.BACKEND)
            y = lora_grouped_linear(given[0], ends, *given[1:4], **low)
            results.append((y.detach(), *torch.autograd.grad(y, leaves, given[5])))
    for name, actual, expected in zip(("y", "dx", "da", "db"), *results, strict=True):
        assert relative_l2(actual, expected) <= tolerance(dtype), name
        assert not actual[sum(sizes) :].any() or name in ("da", "db"), name
        assert actual.any() or not sum(sizes), name


def test_it_runs_where_the_plan_says(grouped, monkeypatch):
    o, settings = block(dtype=torch.float32)
    calls = []
    for name in aten_loop.__all__:
        run = getattr(grouped.grouped_mm, name)
        monkeypatch.setattr(grouped.grouped_mm, name, lambda *a, run=run, name=name: calls.append(name) or run(*a))
        monkeypatch.setattr(aten_loop, name, lambda *a, name=name: pytest.fail(f"{name} of the loop ran"))
    differentiated(lambda o, s: fused(o, s, "eager"), o, settings)
    # two projections forward, two backward, of each the gradients of a and b
    assert {name: calls.count(name) for name in calls} == {"project": 4, "matmul": 4, "outer": 4}


def test_a_negative_index(monkeypatch):
    index = torch.full((23, 2), -1)
    o, settings = block(dtype=torch.float32, index=index)
    with pytest.raises(ValueError, match="topk_index holds -1"):
        fused(o, settings, "eager")
    # as on a GPU, whose values nobody waits for
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    with pytest.raises(RuntimeError, match="negative expert"):
        route(index, 5)


@pytest.mark.parametrize("bias", [True, False])
def test_nothing_is_read_on_the_host(bias, monkeypatch):
    """Tensors without data have nothing to be read; the loop, which reads where groups end, cannot run on them."""
    monkeypatch.undo()
    o, settings = block(dtype=torch.bfloat16, H=16, bias=bias)
    o = {name: t.to("meta") for name, t in o.items()}
    x, index, weight = (o[name] for name in ("x", "topk_index", "topk_weight"))
    up, down = Weight(o["gate_up"]), Weight(o["down"])
    up_bias, down_bias, *low = (
        o.get(name) for name in ("gate_up_bias", "down_bias", "gate_up_a", "gate_up_b", "down_a", "down_b")
    )
    act, rows = lookup("silu", GateLayout.CONCATENATED), route(index, 5)

    def forward(plan):
        given = x, rows, weight, up, down, up_bias, down_bias, *low, 1.7, 0.6, act
        return experts.forward(aten.BACKEND, plan, *given)

    out, u, of_up, of_down = forward(GROUPED_MM)
    assert out.shape == x.shape
    grads = experts.backward(
        aten.BACKEND, GROUPED_MM, out, x, rows, weight, up, down, down_bias, *low, 1.7, 0.6, act, u, of_up.xa,
        of_down.xa, True, True, True, True,
    )  # fmt: skip
    assert [g.shape for g in grads] == [t.shape for t in (x, weight, *low)]
    with pytest.raises(Exception, match="meta"):
        forward(Plan("eager", "loop"))
    # a grouped layer returns rows of no group too
    rows = Rows(23, torch.empty(5, dtype=torch.int64, device="meta"))
    of_up = grouped_layer.low_rank(aten.BACKEND, GROUPED_MM, x, *low[:2], 1.3, rows)
    y = rows.zero_rest(aten.BACKEND.matmul(x, up, rows, GROUPED_MM, low=of_up, bias=up_bias))
    assert (y.shape, rows.zero_rest(of_up.xa).shape) == ((23, 16), (23, 3))
    dyb, db = aten.BACKEND.project_outer_rows(y, low[1], of_up.xa, rows, GROUPED_MM, scale=1.3)
    da = aten.BACKEND.outer(dyb, x, rows, GROUPED_MM, like=low[0], scale=1.3)
    assert [g.shape for g in (da, db)] == [t.shape for t in low[:2]]


def test_no_temporary_of_a_weights_size(grouped, monkeypatch):
    monkeypatch.undo()
    o, settings = block(T=8, E=32, k=1, H=128, I=128, R=4, dtype=torch.float32)
    leaves = {n: t.requires_grad_() for n, t in o.items() if n == "x" or n.endswith(("_a", "_b"))}
    monkeypatch.setattr("lorafuse.ops.choose.ATEN", grouped)

    def step():
        torch.autograd.grad(fused(o, settings, "eager").sum(), list(leaves.values()))

    step()
    assert peak_bytes(step, torch.device("cpu")) < o["down"].numel() * 4


class TestWhere:
    """Where torch has a fast kernel: what eager plans, with Triton and without."""

    @pytest.fixture(params=[True, False], ids=["Triton", "no Triton"])
    def on(self, request, assume, monkeypatch):
        """Weights as if they were on a GPU of a compute capability."""
        assume("triton", base.Availability(request.param, "Triton is not installed"))

        def ask(arch, *weights, dtype=torch.bfloat16):
            monkeypatch.setattr(problems, "arch", lambda device: arch)
            monkeypatch.setattr(problems, "device_spec", lambda device: replace(find("H200"), arch=arch))
            x = torch.zeros(4, 16, dtype=dtype)

            def operator():
                if len(weights) == 1:
                    return problems.grouped_problem(x, Weight(*weights), None, False)
                return problems.experts_problems(x, 1, *map(Weight, weights), None, None, True, False)

            return aten.BACKEND.plan(operator, torch.device("cuda")).kernel == "grouped_mm"

        return ask

    @pytest.mark.parametrize(
        ("arch", "runs"), [(80, False), (89, False), (90, True), (100, True), (103, True), (120, False)]
    )
    def test_gpus(self, on, arch, runs):
        assert on(arch, half(3, 8, 16)) is runs

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_dtypes(self, on, dtype):
        assert not on(90, torch.zeros(3, 8, 16, dtype=dtype), dtype=dtype)

    @pytest.mark.parametrize(
        ("w", "runs"),
        [
            (half(3, 8, 16), True),
            (half(3, 16, 8).mT, True),
            (half(6, 8, 16)[::2], True),
            (half(3, 8, 48)[..., :16], True),
            (half(1, 8, 16).expand(3, -1, -1), False),
            (half(3, 8, 20)[..., :16], False),
            (half(3, 8, 12), False),
            (half(3, 12, 16), False),
            (half(3, 8, 32)[..., ::2], False),
            (half(8, 16, 3).permute(2, 0, 1), False),
            (half(385)[1:].view(3, 8, 16), False),
            (half(1024, 8, 16), False),
        ],
    )
    def test_layouts(self, on, w, runs):
        assert on(90, half(w.shape[0], 16, 8), w) is runs

    def test_not_on_a_cpu(self):
        problem = problems.grouped_problem(half(4, 16), Weight(half(3, 8, 16)), None, False)
        assert aten.BACKEND.plan(lambda: problem, torch.device("cpu")) is None
        assert "the input is not on one" in no_grouped_mm(problem, None)


GROUPED, ATEN, BLOCK = aten_grouped.GroupedMM, aten.Aten, experts
# (where the function is, its name, what is changed, into what, the tensor that turns red first)
MUTATIONS = {
    "sentinels are summed": (ATEN, "combine", "y[-1:].masked_fill_(last < S, 0)", "pass", "out"),
    "every sentinel's own row": (ATEN, "combine", "place.masked_fill_(beyond, S - 1)", "pass", "out"),
    "no bias": (GROUPED, "_base_and_rank", "rank[:, R] = 1", "pass", "out"),
    "no low-rank product": (GROUPED, "_base_and_rank", "rank[:, :R] = low.xa", "pass", "out"),
    "no low-rank product in dx": (GROUPED, "_base_and_rank", "b.mT if low", "b.mT * 0 if low", "x"),
    "no scale": (GROUPED, "_base_and_rank", "b * low.scale", "b * 1.0", "out"),
    "da without scale": (GROUPED, "outer", "out *= scale", "out *= scale if is_transposed else 1.0", "gate_up_a"),
    "db without scale": (GROUPED, "outer", "out *= scale", "out *= 1.0 if is_transposed else scale", "gate_up_b"),
    "gradients of experts without rows": (GROUPED, "outer", ".masked_fill_(empty.view(-1, 1, 1), 0)", "", "gate_up_a"),
    "no router weight in a gradient": (ATEN, "outer", " * row_scale.to(narrow.dtype).unsqueeze(1)", "", "down_a"),
    "no router weight in du": (aten, "finish", ".mul_(epilogue.row_scale.to(product.dtype).unsqueeze(1))", "", "x"),
    "the router's gradient without the bias":
        (BLOCK, "backward", "router_grad = router_grad + of_bias", "pass", "topk_weight"),
    "the router's gradient of sentinels":
        (BLOCK, "backward", "rows.zero_rest(router_grad)", "router_grad", "topk_weight"),
}  # fmt: skip


def changed(function, old, new):
    """The function with one place of its source changed."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1
    namespace = dict(function.__globals__)
    exec(compile(source.replace(old, new), "changed", "exec"), namespace)
    return namespace[function.__name__]


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_red(name, monkeypatch):
    owner, function, old, new, red = MUTATIONS[name]
    monkeypatch.setattr(owner, function, changed(getattr(owner, function), old, new))
    # no row of expert 2
    index = torch.tensor([0, 1, 3, 4]).repeat(23)[:46].view(23, 2).clone()
    index[3, 1], index[7, 0] = 5, 9
    with pytest.raises(AssertionError) as failure:
        check("eager", dtype=torch.float32, index=index, bias=True)
    assert str(failure.value).startswith(f"{red}:"), failure.value
