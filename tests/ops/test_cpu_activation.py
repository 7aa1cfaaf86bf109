"""Gated activations by csrc/cpu/activation.cpp, built anew: against fp64, for any strides, threads and numbers."""

import pytest
import torch
from cpu_source import SOURCES, UNREADABLE, compiled, torch_threads
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from lorafuse import activation
from lorafuse.activation import ACTIVATIONS, GATES, GateLayout, gate_backward, gate_forward, lookup
from lorafuse.formats import cpu
from lorafuse.functional import Projection, lora_gated_mlp
from lorafuse.testing.numerics import relative_l2, tolerance

SOURCE = (SOURCES / "activation.cpp").read_text()
NAMES = [*ACTIVATIONS, *GATES]
EPS = torch.finfo(torch.float32).eps
# h in fp64, without a difference of almost equal numbers
EXACT = {
    "silu": lambda gate, up: gate * torch.sigmoid(gate) * up,
    "gelu": lambda gate, up: gate * torch.special.erfc(-gate * 0.5**0.5) / 2 * up,
    "gelu_tanh": lambda gate, up: gate * torch.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate**3)) * up,
    "relu": lambda gate, up: F.relu(gate) * up,
    "relu2": lambda gate, up: F.relu(gate) ** 2 * up,
    "clamped_swiglu": GATES["clamped_swiglu"][0],
}
# what is rounded before its exponential is computed: that has as many more wrong roundings
EXPONENTS = {
    "gelu_tanh": lambda gate: 1.5957691216057308 * (gate + 0.044715 * gate**3),
    "clamped_swiglu": lambda gate: 1.702 * gate,
}


def made(folder, source, *flags):
    """`lorafuse_gated` of `activation.cpp`, or of what was made of it."""
    library = cpu.library()
    if library is None or not library.lorafuse_rank_runs():
        pytest.skip("csrc/cpu/activation.cpp is for CPUs with AVX2 and FMA and without AVX-512")
    return compiled(folder, "activation.cpp", source, *flags).lorafuse_gated


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return made(tmp_path_factory.mktemp("activation"), SOURCE, "-O1", "-ffp-contract=off")


@pytest.fixture
def use(monkeypatch):
    """Makes the activations call this function, whatever the sizes."""
    monkeypatch.setattr(activation, "MANY", 1)
    monkeypatch.setattr(activation, "OF_THREAD", 1)
    return lambda function: monkeypatch.setattr(activation, "function", lambda: function)


@pytest.fixture(params=[1, 3])
def threads(request):
    with torch_threads(request.param):
        yield request.param


def run(name, gate, up, dh):
    """`{h, dgate, dup, h of backward}`."""
    h, again = gate_forward(name, gate, up), torch.full_like(gate, torch.nan)
    dgate, dup = gate_backward(name, dh.clone(), gate, up, again)
    return {"h": h, "dgate": dgate, "dup": dup, "h again": again}


def exact(name, gate, up, dh):
    leaves = [t.double().requires_grad_() for t in (gate, up)]
    h = EXACT[name](*leaves)
    return dict(zip(("h", "dgate", "dup"), (h.detach(), *torch.autograd.grad(h, leaves, dh.double())), strict=True))


def in_torch(name, gate, up, dh, use):
    use(None)
    return run(name, gate, up, dh)


def check(name, gate, up, dh, function, use):
    """Each result within some roundings of its terms, and with no larger an error than torch's."""
    torchs, right = in_torch(name, gate, up, dh, use), exact(name, gate, up, dh)
    use(function)
    results = run(name, gate, up, dh)
    # of sums that may cancel, their larger term: 1 of a slope, up of up + 1
    around, size = up.double().abs() + (name in GATES), gate.double().abs()
    scale = {"h": right["h"].abs(), "dgate": (dh * around).abs(), "dup": right["dup"].abs()}
    if name in GATES:
        scale["h"] = around * (gate.double().clamp(max=7) * torch.sigmoid(1.702 * gate.double().clamp(max=7))).abs()
    if name == "relu2":
        scale["dgate"] = scale["dgate"] * size
    roundings = 1 + EXPONENTS[name](-gate.double()).clamp(0, 100) if name in EXPONENTS else 1
    assert torch.equal(results["h"], results.pop("h again")), "h of backward"
    for of, result in results.items():
        error, of_torch = (result - right[of]).abs(), (torchs[of] - right[of]).abs()
        worst = (error / (EPS * scale[of] * roundings + 1e-40)).max()
        assert worst <= 12, f"{of}: {worst:.1f} roundings"
        assert error.max() <= of_torch.max() + EPS * right[of].abs().max(), f"{of}: torch's error is smaller"
        assert relative_l2(result, right[of]) <= 2 * relative_l2(torchs[of], right[of]) + 1e-7, (
            f"{of}: torch's is smaller"
        )


def check_all(gate, up, dh, function, use):
    for name in NAMES:
        check(name, gate, up, dh, function, use)


def operands(M, C, size=6.0):
    """gate, up and dh: parts of wider tensors."""
    return [factor * torch.randn(M, C + 3)[:, 1 : C + 1] for factor in (size, 2.0, 1.0)]


@pytest.mark.parametrize("size", [0.1, 1.0, 6.0, 40.0])
@pytest.mark.parametrize("name", NAMES)
def test_random_numbers(built, use, name, size):
    check(name, *operands(200, 1003, size), built, use)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_every_size(built, use, name):
    """A grid of exponents, and one of steps where exponentials leave fp32's range."""
    sizes = torch.cat([torch.logspace(-44, 18, 4000), torch.linspace(1e-4, 110, 8001)])
    gate = torch.cat([sizes, -sizes]).view(-1, 1).expand(-1, 3).contiguous()
    up, dh = torch.tensor([1.0, -3.0, 0.7]).expand_as(gate), torch.tensor([1.0, 0.4, -2.0]).expand_as(gate)
    check(name, gate, up.contiguous(), dh.contiguous(), built, use)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_what_torch_makes_so(built, use, name):
    """But slopes of gelu_tanh: torch's are NaN where a square leaves fp32's range."""
    # but numbers whose act is 0 in torch alone
    large, small = [torch.nan, torch.inf, 3e38, 1e19], [1.0, 1e-38, 1e-45, 0.0]
    some = torch.tensor([*large, *(-value for value in large), *small, *(-value for value in small), 104.0, 88.8, 7.0])
    dhs = torch.tensor([1.0, -0.0, 1e-40, -2.0, torch.inf, torch.nan])
    gate, up, dh = (t.contiguous().view(-1, 1) for t in torch.cartesian_prod(some, some, dhs).unbind(1))
    torchs = in_torch(name, gate, up, dh, use)
    use(built)
    for of, result in run(name, gate, up, dh).items():
        right, compared = torchs[of], torch.ones_like(gate, dtype=torch.bool)
        if name == "gelu_tanh" and of == "dgate":
            compared = gate.abs() < 1e19
            slope = (dh * up) * (gate > 0)
            torch.testing.assert_close(result[gate.abs() >= 1e19], slope[gate.abs() >= 1e19], equal_nan=True)
        for of_kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(of_kind(result)[compared], of_kind(right)[compared]), (of, of_kind.__name__)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("M", "C"), [(1, 1), (7, 8), (5, 9), (64, 31), (2, 1000)])
def test_bits_depend_on_the_operands_alone(built, use, threads, name, M, C):
    """Whatever an element's place, its row's pitch and the threads."""
    use(built)
    gate, up, dh = operands(M, C)
    moved = [t.reshape(-1).repeat(5)[3 : 3 + M * C].view(1, -1) for t in (gate, up, dh)]
    for actual, expected in zip(run(name, *moved).values(), run(name, gate, up, dh).values(), strict=True):
        assert torch.equal(actual.view(-1), expected.reshape(-1).roll(-3))


@pytest.mark.parametrize("concatenated", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_of_an_expert(built, use, name, concatenated):
    """gate and up side by side, and their gradients; interleaved ones are torch's."""
    u, dh, act = 3 * torch.randn(9, 34), torch.randn(9, 17), lookup(name, GateLayout.of(True, concatenated))
    use(None)
    expected = act.forward(u), act.backward(u, dh)
    calls = []
    use(lambda *given: calls.append(given) or built(*given))
    kept = dh.clone()
    for actual, right in zip((act.forward(u), act.backward(u, dh)), expected, strict=True):
        torch.testing.assert_close(actual, right)
    assert torch.equal(dh, kept)
    assert len(calls) == (2 if concatenated else 0)


def test_only_rows_are_written(built, use, threads):
    use(built)
    gate, up, _ = operands(20, 37)
    around = torch.full((22, 50), torch.nan)
    around[1:-1, 5:42] = 1.0
    dgate, dup = gate_backward("silu", around[1:-1, 5:42], gate, up)
    assert dgate.data_ptr() == around[1:-1, 5:42].data_ptr()
    assert torch.equal(dup, gate_backward("silu", torch.ones(20, 37), gate, up)[1])
    dgate.fill_(torch.nan)
    assert around.isnan().all()


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("if (i < count)", "if (i + 1 < count)"),
        ("n, set(2.12194440e-4f)", "n, set(2.1219e-4f)"),
        ("_mm256_fnmadd_ps(e, rounding, e)", "e"),
        ("power_of_2(_mm256_sub_epi32(whole, half))", "power_of_2(half)"),
        ("x = at_least(x, -104.0f);", ""),
        ("{_mm256_blendv_ps(large, small, x), _mm256_blendv_ps(small, large, x)}", "{large, small}"),
        ("_CMP_NLE_UQ", "_CMP_NLT_UQ"),
        ("mul(mul(mul(dh, raised), slope), gate_passes)", "mul(mul(dh, raised), slope)"),
        ("std::min(of->M, (i + 1) * step)", "(i + 1) * step - 1"),
    ],
    ids=["tail", "ln2", "rounded square", "odd power", "denormals", "sign", "relu at 0", "limit", "rows of a thread"],
)
def test_a_wrong_line_is_seen(use, tmp_path, line, wrong):
    assert SOURCE.count(line) == 1
    function = made(tmp_path, SOURCE.replace(line, wrong), "-O1", "-ffp-contract=off")
    gate, up, dh = operands(60, 35)
    gate[0, :9] = torch.tensor([0.0, -0.0, 7.5, -95.0, -1e30, 60.0, -60.0, 5.5, -5.5])
    with torch_threads(3), pytest.raises(AssertionError):
        check_all(gate, up, dh, function, use)


@pytest.fixture
def counted(built, use):
    """The calls."""
    calls = []
    use(lambda *given: calls.append(given) or built(*given))
    return calls


OTHERS = UNREADABLE | {"transposed": lambda t: t.t().contiguous().t(), "no rows": lambda t: t[:0]}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_what_torch_computes(counted, change):
    gate, up, dh = (change(t) for t in operands(9, 14))
    assert gate_forward("silu", gate, up).shape == gate.shape
    gate_backward("silu", dh, gate, up)
    assert not counted


def test_what_has_no_memory_is_torchs(counted):
    with FakeTensorMode():
        gate_backward("silu", *operands(9, 14))
    torch.vmap(lambda gate: gate_forward("silu", gate, gate))(torch.ones(2, 3, 4))
    assert not counted


def test_an_activation_that_was_added_is_torchs(counted, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "cube", (lambda x: x**3, lambda dy, x: 3 * dy * x**2))
    gate, up, dh = operands(9, 14)
    torch.testing.assert_close(gate_forward("cube", gate, up), gate**3 * up)
    torch.testing.assert_close(gate_backward("cube", dh.clone(), gate, up)[0], 3 * dh * up * gate**2)
    assert not counted


def test_few_elements_forward_are_torchs(counted, monkeypatch):
    monkeypatch.setattr(activation, "MANY", 100)
    gate, up, _ = operands(9, 11)
    gate_forward("silu", gate, up)
    assert not counted
    gate_forward("silu", *operands(9, 14)[:2])
    assert len(counted) == 1


def test_without_the_module_torch_computes(monkeypatch):
    gate, up, dh = operands(30, 40)
    monkeypatch.setattr(cpu, "library", lambda: None)
    monkeypatch.setattr(activation, "MANY", 1)
    activation.function.cache_clear()
    try:
        assert torch.equal(gate_forward("silu", gate, up), F.silu(gate) * up)
        assert activation.function() is None
    finally:
        activation.function.cache_clear()


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_gated_mlp_runs_it(counted, name, compiles):
    """h forward, once more with the gradients backward."""
    ws = [torch.randn(sizes) / 4 for sizes in ((40, 24), (40, 24), (24, 40))]
    factors = [torch.randn(sizes) / 4 for n, k in ((40, 24), (40, 24), (24, 40)) for sizes in ((8, k), (n, 8))]
    x, dy = torch.randn(20, 24), torch.randn(20, 24)

    def fused(x, *f):
        return lora_gated_mlp(
            x, *(Projection(w, *f[2 * i : 2 * i + 2], 0.5) for i, w in enumerate(ws)), activation=name
        )

    def formula(x, *f):
        gate, up, down = (w.double() + 0.5 * f[2 * i + 1] @ f[2 * i] for i, w in enumerate(ws))
        return EXACT[name](x @ gate.T, x @ up.T) @ down.T

    def results(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, *factors)]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    run_it = torch.compile(fused, backend="aot_eager", fullgraph=True) if compiles else fused
    for i, (result, right) in enumerate(
        zip(results(run_it, torch.float32), results(formula, torch.float64), strict=True)
    ):
        assert relative_l2(result, right) <= tolerance(torch.float32), i
    assert len(counted) == 2
