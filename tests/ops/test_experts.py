"""Experts with LoRA (T1): every tensor by name against the formula in fp64, layouts, sentinels, what is refused."""

import itertools

import pytest
import torch
from experts_reference import block, check, differentiated, fused, plain

from lorafuse.activation import ACTIVATIONS
from lorafuse.backends import aten_loop
from lorafuse.errors import BackendUnavailable
from lorafuse.functional import lora_experts, lora_grouped_linear
from lorafuse.nn import LoRAExperts
from lorafuse.testing.numerics import relative_l2, tolerance

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("concatenated", [True, False])
def test_every_layout(dtype, gate, bias, transposed, concatenated):
    check(dtype=dtype, gate=gate, bias=bias, transposed=transposed, concatenated=concatenated)


@pytest.mark.parametrize(("H", "I"), [(8, 8), (16, 8), (8, 16), (12, 7)])
@pytest.mark.parametrize("transposed", [True, False])
def test_shapes_from_which_a_layout_could_be_guessed(H, I, transposed):
    check(H=H, I=I, transposed=transposed)


@pytest.mark.parametrize("R", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rank(R, dtype):
    check(R=R, dtype=dtype)


@pytest.mark.parametrize(
    ("T", "E", "k"), [(0, 4, 2), (1, 4, 2), (1, 1, 1), (9, 1, 1), (9, 4, 1), (9, 4, 4), (40, 64, 3)]
)
def test_every_size(T, E, k):
    check(T=T, E=E, k=k)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("concatenated", [True, False])
def test_every_activation(activation, gate, concatenated):
    check(activation=activation, gate=gate, concatenated=concatenated, dtype=torch.float32)


def clamped(u):
    gate, up = u[..., ::2].clamp(max=0.7), u[..., 1::2].clamp(-0.7, 0.7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.parametrize("bias", [True, False])
def test_an_activation_of_ones_own(bias):
    check(activation=clamped, bias=bias, transposed=True)


@pytest.mark.parametrize("adapters", [("gate_up",), ("down",), ()])
@pytest.mark.parametrize("activation", ["silu", clamped])
def test_one_adapter_or_none(adapters, activation):
    check(adapters=adapters, activation=activation)


@pytest.mark.parametrize("shared", [("gate_up_a", "down_b"), ("gate_up_a", "gate_up_b", "down_a", "down_b")])
def test_shared_factors(shared):
    actual = check(shared=shared)
    assert all(actual[name].dim() == 2 for name in shared)


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
@pytest.mark.parametrize("activation", ["silu", clamped])
# rows are rounded up in 16-bit dtypes, whose tolerance hides more
@pytest.mark.parametrize("step", [1, 2, 3, 32])
def test_routings(index, activation, step, monkeypatch):
    monkeypatch.setitem(aten_loop.ROW_MULTIPLE, torch.float64, step)
    check(T=7, index=index, activation=activation)


def test_fp32_adapters_on_a_bf16_base():
    check(dtype=torch.bfloat16, adapter_dtype=torch.float32)


def apart(t):
    """The same numbers, none beside another."""
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def permuted(t):
    """The same numbers, the first dimension fastest."""
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


@pytest.mark.parametrize("strided", [apart, permuted])
def test_operands_of_any_strides(strided):
    o, settings = block(bias=True)
    expected = differentiated(fused, o, settings)
    moved = {n: t if t.dtype is torch.int64 else strided(t) for n, t in o.items()}
    assert not any(t.is_contiguous() for t in moved.values() if t.is_floating_point() and t.dim() > 1)
    for name, tensor in differentiated(fused, moved, settings).items():
        assert relative_l2(tensor, expected[name]) <= tolerance(torch.float64), name


def test_gradcheck():
    o, settings = block(T=5, E=3, H=4, I=3, R=2)
    names = [name for name in o if name in ("x", "topk_weight") or name.endswith(("_a", "_b"))]

    def run(*values):
        return fused(o | dict(zip(names, values, strict=True)), settings)

    assert torch.autograd.gradcheck(run, [o[name].requires_grad_() for name in names])


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=6)))
def test_only_what_is_needed(needed):
    o, settings = block()
    names = ("x", "topk_weight", "gate_up_a", "gate_up_b", "down_a", "down_b")
    every = differentiated(fused, o, settings)
    requested = [name for name, need in zip(names, needed, strict=True) if need]
    for name in requested:
        o[name].requires_grad_()
    out = fused(o, settings)
    assert out.requires_grad == bool(requested)
    if requested:
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        for name, grad in zip(requested, torch.autograd.grad(out, [o[n] for n in requested], dout), strict=True):
            assert torch.equal(grad, every[name]), name


def test_what_is_saved_is_no_weight_and_no_down_output():
    o, settings = block(T=40, E=4, k=2, H=64, I=16)
    o["x"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused(o, settings)
    kept = {t.data_ptr() for t in o.values()}
    own = [tuple(t.shape) for t in saved if t.data_ptr() not in kept and t.is_floating_point()]
    # u, xa, ha
    assert sorted(own) == [(80, 3), (80, 3), (80, 32)]


def test_runs_are_bitwise_equal():
    first, second = (check(T=200, dtype=torch.float32) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    o, settings = block(dtype=torch.float32)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected = differentiated(fused, o, settings)
    for name, tensor in differentiated(compiled, o, settings).items():
        assert torch.equal(tensor, expected[name]), name


def test_opcheck():
    o, settings = block(T=6, dtype=torch.float32, bias=True)
    for name in ("x", "topk_weight", "gate_up_a", "gate_up_b", "down_a", "down_b"):
        o[name].requires_grad_()
    names = ("x", "topk_index", "topk_weight", "gate_up", "down", "gate_up_bias", "down_bias")
    operands = [o[n] for n in names] + [o[n] for n in ("gate_up_a", "gate_up_b", "down_a", "down_b")]
    settings = 1.7, 0.6, False, "silu", "concatenated", "eager"
    torch.library.opcheck(torch.ops.lorafuse.lora_experts, (*operands, *settings))


class TestGroupedLinear:
    def operands(self, sizes=(3, 0, 5, 1), extra=2, K=6, N=4, R=3, transposed=False):
        E, S = len(sizes), sum(sizes) + extra
        generator = torch.Generator().manual_seed(1)
        x, w, a, b, bias = (
            torch.randn(s, generator=generator, dtype=torch.float64)
            for s in ((S, K), (E, K, N) if transposed else (E, N, K), (E, R, K), (E, N, R), (E, N))
        )
        return x, torch.tensor(sizes).cumsum(0), w, a, b, bias

    def formula(self, x, ends, w, a, b, bias, transposed):
        y = torch.zeros(x.shape[0], b.shape[1], dtype=x.dtype)
        first = 0
        for e, last in enumerate(ends.tolist()):
            rows = x[first:last]
            y[first:last] = rows @ (w[e] if transposed else w[e].t()) + bias[e] + 1.3 * (rows @ a[e].t()) @ b[e].t()
            first = last
        return y

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("sizes", [(3, 0, 5, 1), (0, 0, 0), (7,), (0, 4)])
    def test_formula(self, sizes, transposed):
        x, ends, w, a, b, bias = self.operands(sizes, transposed=transposed)
        leaves = [t.requires_grad_() for t in (x, a, b)]
        y = lora_grouped_linear(x, ends, w, a, b, scale=1.3, bias=bias, is_transposed=transposed)
        expected = self.formula(x, ends, w, a, b, bias, transposed)
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        if y.requires_grad and expected.requires_grad:
            theirs = torch.autograd.grad(expected, leaves, dy)
            for one, other in zip(torch.autograd.grad(y, leaves, dy), theirs, strict=True):
                torch.testing.assert_close(one, other)

    def test_shared_factors_and_none(self):
        x, ends, w, a, b, bias = self.operands()
        shared = lora_grouped_linear(x, ends, w, a[0], b[0], scale=1.3, bias=bias)
        each = [t[:1].expand(4, -1, -1) for t in (a, b)]
        torch.testing.assert_close(shared, self.formula(x, ends, w, *each, bias, False))
        zero = torch.zeros_like(a), torch.zeros_like(b)
        torch.testing.assert_close(
            lora_grouped_linear(x, ends, w, bias=bias), self.formula(x, ends, w, *zero, bias, False)
        )

    def test_opcheck(self):
        x, ends, w, a, b, bias = self.operands()
        leaves = [t.requires_grad_() for t in (x, a, b)]
        torch.library.opcheck(
            torch.ops.lorafuse.lora_grouped_linear, (leaves[0], ends, w, bias, *leaves[1:], 1.3, False, "eager")
        )


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"gate_up": torch.zeros(5, 16, 11).double()}, r"gate_up \[5, 16, 11\].*rule"),
            ({"gate_up_a": torch.zeros(5, 2, 12).double()}, r"a \[5, 2, 12\], b \[5, 16, 3\]"),
            ({"down_b": torch.zeros(4, 12, 3).double()}, r"b \[4, 12, 3\]"),
            ({"down": torch.zeros(4, 12, 8).double(), "down_a": None, "down_b": None}, "5 experts"),
            ({"topk_weight": torch.ones(23, 3).double()}, r"topk_weight \[23, 3\]"),
            ({"topk_index": torch.full((23, 2), -1)}, "topk_index holds -1"),
            ({"gate_up_a": None}, "a None"),
            ({"gate_up_b": torch.zeros(5, 16, 2).double()}, r"a \[5, 3, 12\], b \[5, 16, 2\]"),
            ({"down_a": torch.zeros(4, 3, 8).double()}, r"a \[4, 3, 8\]"),
            ({"gate_up": torch.zeros(16, 12).double()}, r"gate_up \[16, 12\]"),
            ({"x": torch.zeros(1, 23, 12).double()}, r"x \[1, 23, 12\]"),
            ({"x": torch.zeros(()).double()}, r"x \[\]"),
            ({"topk_index": torch.zeros(23, 0).long(), "topk_weight": torch.zeros(23, 0).double()}, "k >= 1"),
        ],
    )  # fmt: skip
    def test_what_does_not_fit(self, change, message):
        o, settings = block()
        o = {name: t for name, t in (o | change).items() if t is not None}
        with pytest.raises(ValueError, match=message):
            fused(o, settings)

    def test_a_layout_flag_that_is_wrong(self):
        o, settings = block(transposed=True)
        with pytest.raises(ValueError, match=r"gate_up \[E, N, K\]"):
            fused(o, settings | {"is_transposed": False})

    def test_a_gate_and_an_up_of_different_widths(self):
        o, settings = block(adapters=())
        with pytest.raises(ValueError, match="15 out features"):
            fused(o | {"gate_up": torch.zeros(5, 15, 12).double(), "down": torch.zeros(5, 12, 7).double()}, settings)

    @pytest.mark.parametrize("flags", [{"has_gate": False}, {"is_transposed": True}])
    def test_flags_that_do_not_fit_the_stacks(self, flags):
        o, settings = block()
        with pytest.raises(ValueError, match="the rule is"):
            fused(o, settings | flags)

    def test_an_unknown_flag(self):
        o, settings = block()
        with pytest.raises(TypeError, match="is_interleaved"):
            fused(o, settings | {"is_interleaved": True})

    def test_an_activation_of_another_width(self):
        o, settings = block()
        with pytest.raises(ValueError, match=r"activation gave \[46, 16\].*\[rows, 8\]"):
            fused(o, settings | {"activation": lambda u: u})

    def test_factors_of_integers(self):
        o, settings = block()
        with pytest.raises(TypeError, match=r"gate_up's a or b is torch.int32"):
            fused(o | {"gate_up_a": o["gate_up_a"].int()}, settings)

    @pytest.mark.parametrize("offsets", [[3, 1, 5, 7], [3, 5, 7, 12], [-1, 2, 3, 4]])
    def test_offsets_that_descend_or_lead_outside(self, offsets):
        with pytest.raises(ValueError, match=r"offsets are \[.*ascend from 0 to at most 10"):
            lora_grouped_linear(torch.zeros(10, 6), torch.tensor(offsets), torch.zeros(4, 5, 6))

    @pytest.mark.parametrize("offsets", [torch.ones(4).bool(), torch.ones(4), torch.ones(3).long()])
    def test_offsets_of_another_kind(self, offsets):
        with pytest.raises(ValueError, match=r"offsets is .* int32 or int64"):
            lora_grouped_linear(torch.zeros(10, 6), offsets, torch.zeros(4, 5, 6))

    def test_dtypes(self):
        o, settings = block()
        with pytest.raises(TypeError, match=r"float32.*float64"):
            fused(o | {"x": o["x"].float()}, settings)
        with pytest.raises(TypeError, match="int32"):
            fused(o | {"topk_index": o["topk_index"].int()}, settings)

    @pytest.mark.parametrize("name", ["gate_up", "down", "down_bias"])
    def test_a_trained_base(self, name):
        o, settings = block(bias=True)
        o[name].requires_grad_()
        with pytest.raises(NotImplementedError, match="freeze"):
            fused(o, settings)

    def test_an_unknown_activation(self):
        o, settings = block(activation="silu")
        with pytest.raises(ValueError, match=r"'swish'.*silu"):
            fused(o, settings | {"activation": "swish"})

    def test_a_backend_that_cannot_run_here(self):
        o, settings = block()
        with pytest.raises(BackendUnavailable, match="backend='cuda'"):
            fused(o, settings, "cuda")


class TestModule:
    @pytest.mark.parametrize("shared_outer", [False, True])
    @pytest.mark.parametrize("has_gate", [False, True])
    def test_it_is_the_function_of_its_parameters(self, has_gate, shared_outer):
        settings = {"alpha": 6.0, "has_gate": has_gate, "shared_outer": shared_outer, "dtype": torch.float64}
        layer = LoRAExperts(5, 12, 8, 3, **settings)
        o, _ = block()
        x, index, weight = (o[name] for name in ("x", "topk_index", "topk_weight"))
        state = {name: torch.randn_like(t) / 3 for name, t in layer.state_dict().items()}
        layer.load_state_dict(state)
        short = {
            "gate_up": "gate_up_proj", "down": "down_proj", "gate_up_a": "gate_up_lora_A",
            "gate_up_b": "gate_up_lora_B", "down_a": "down_lora_A", "down_b": "down_lora_B",
        }  # fmt: skip
        expected = plain(o | {name: state[key] for name, key in short.items()}, 2.0, 2.0, "silu", has_gate, False, True)
        torch.testing.assert_close(layer(x, index, weight), expected)
        y = layer(x.view(1, 23, 12), index, weight)
        assert y.shape == (1, 23, 12)
        y.sum().backward()
        trained = {name for name, p in layer.named_parameters() if p.grad is not None}
        assert trained == {name for name in state if "lora" in name}

    def test_it_starts_as_its_base(self):
        layer = LoRAExperts(5, 12, 8, 3, dtype=torch.bfloat16)
        assert layer.down_lora_A.dtype is torch.float32
        o, _ = block(dtype=torch.bfloat16, adapters=())
        given = [o["x"], o["topk_index"], o["topk_weight"]]
        base = lora_experts(*given, layer.gate_up_proj, layer.down_proj)
        assert torch.equal(layer(*given), base)
        assert "num_experts=5" in repr(layer)

    @pytest.mark.parametrize(("change", "message"), [({"r": 0}, "r=0"), ({"activation": "swish"}, "'swish'")])
    def test_refusals(self, change, message):
        with pytest.raises(ValueError, match=message):
            LoRAExperts(**{"num_experts": 2, "hidden_size": 4, "intermediate_size": 4, "r": 2} | change)
