"""Operands of experts and grouped layers at the edge (T1, T2): devices, meta, no sizes, no numbers, no tensors."""

import numpy as np
import pytest
import torch
from experts_reference import block, differentiated, fused, plain

from lorafuse.functional import lora_experts, lora_grouped_linear
from lorafuse.nn import LoRAExperts

pytest_plugins = "backend_fixtures"
SMALL = {"T": 5, "E": 3, "k": 2, "H": 8, "I": 4, "R": 2, "bias": True}
GROUPED = {
    "x": torch.zeros(5, 8), "offsets": torch.tensor([2, 2, 4]), "weight": torch.zeros(3, 4, 8),
    "a": torch.zeros(3, 2, 8), "b": torch.zeros(3, 4, 2), "bias": torch.zeros(3, 4),
}  # fmt: skip
NAMES = tuple(block(**SMALL)[0])


@pytest.fixture(params=["eager", "grouped_mm", "triton"])
def backend(request):
    if request.param != "grouped_mm":
        return request.param
    request.getfixturevalue("by_grouped_mm")
    return "eager"


class TestDevices:
    @pytest.mark.parametrize("name", NAMES)
    def test_of_experts(self, name):
        o, settings = block(**SMALL)
        with pytest.raises(
            ValueError, match=r"lora_experts got x on (cpu|meta) and \w+ on (cpu|meta); all tensors must"
        ):
            fused(o | {name: o[name].to("meta")}, settings)

    @pytest.mark.parametrize("name", GROUPED)
    def test_of_grouped(self, name):
        with pytest.raises(ValueError, match=r"lora_grouped_linear got x on (cpu|meta) and \w+ on (cpu|meta)"):
            lora_grouped_linear(**GROUPED | {name: GROUPED[name].to("meta")})

    @pytest.mark.parametrize("activation", ["silu", torch.tanh])
    def test_all_on_meta(self, activation):
        gate = not callable(activation)
        o, settings = block(**SMALL, gate=gate, activation=activation)
        actual = differentiated(fused, {name: t.to("meta") for name, t in o.items()}, settings)
        for name, t in actual.items():
            like = o["x"] if name == "out" else o[name]
            assert (t.device.type, t.shape, t.dtype) == ("meta", like.shape, like.dtype), name
        given = {name: t.to("meta") for name, t in GROUPED.items()}
        given["a"].requires_grad_()
        y = lora_grouped_linear(**given)
        y.sum().backward()
        assert (y.device.type, y.shape, given["a"].grad.shape) == ("meta", (5, 4), (3, 2, 8))
        layer = LoRAExperts(3, 8, 4, 2, device="meta")
        assert layer(torch.zeros(2, 3, 8, device="meta"), *(o[n][:1].expand(6, 2).to("meta") for n in (
            "topk_index", "topk_weight"
        ))).shape == (2, 3, 8)  # fmt: skip


@pytest.mark.parametrize("size", [{"H": 0}, {"I": 0}, {"H": 0, "I": 0}, {"T": 0}, {"T": 0, "H": 0}])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("adapters", [("gate_up", "down"), ()])
def test_sizes_of_nothing(size, transposed, adapters, backend):
    sizes = {"T": 5, "E": 3, "k": 2, "H": 8, "I": 4, "R": 2} | size
    o, settings = _block(**sizes, transposed=transposed, adapters=adapters)
    actual = differentiated(lambda o, s: fused(o, s, backend), o, settings)
    for name, t in differentiated(lambda o, s: plain(o, **s), o, settings).items():
        torch.testing.assert_close(actual[name], t, msg=lambda m, name=name: f"{name}: {m}")


def _block(T, E, k, H, I, R, transposed, adapters):  # noqa: E741
    """As `block`, which divides by sizes."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (T, H), "gate_up": (E, 2 * I, H), "down": (E, H, I), "gate_up_bias": (E, 2 * I), "down_bias": (E, H)}
    for name, (n, fan) in {"gate_up": (2 * I, H), "down": (H, I)}.items():
        if name in adapters:
            shapes |= {f"{name}_a": (E, R, fan), f"{name}_b": (E, n, R)}
    o = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if transposed:
        o |= {name: o[name].mT.contiguous() for name in ("gate_up", "down")}
    o |= {"topk_index": torch.randint(E, (T, k), generator=generator), "topk_weight": torch.rand(T, k) + 0.1}
    flags = {"activation": "silu", "has_gate": True, "is_transposed": transposed, "is_concatenated": True}
    return o, {"gate_up_scale": 1.7, "down_scale": 0.6, **flags}


@pytest.mark.parametrize("size", [{"K": 0}, {"N": 0}, {"S": 0}, {"K": 0, "N": 0}])
@pytest.mark.parametrize("with_bias", [True, False])
def test_grouped_sizes_of_nothing(size, with_bias, backend):
    S, K, N, E, R = ({"S": 5, "K": 8, "N": 4, "E": 3, "R": 2} | size).values()
    x, w, a, b, bias = (torch.randn(s) for s in ((S, K), (E, N, K), (E, R, K), (E, N, R), (E, N)))
    ends = torch.tensor([2, 2, 4]).clamp(max=S)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    y = lora_grouped_linear(x, ends, w, a, b, bias=bias if with_bias else None, backend=backend)
    expected, first = x.new_zeros(S, N), 0
    for e, last in enumerate(ends.tolist()):
        rows = x[first:last]
        expected[first:last] = torch.nn.functional.linear(rows, w[e], bias[e] if with_bias else None)
        expected[first:last] += (rows @ a[e].t()) @ b[e].t()
        first = last
    torch.testing.assert_close(y, expected)
    for one, other in zip(torch.autograd.grad(y.sum(), leaves), leaves, strict=True):
        assert one.shape == other.shape
        assert torch.isfinite(one).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ["silu", lambda u: u.chunk(2, 1)[0].log()])
def test_the_weight_of_a_sentinel_may_be_anything(value, activation, backend):
    """What the activation makes of rows that are never computed adds nothing either."""
    index = torch.tensor([[0, 3], [3, 3], [1, 9], [0, 0], [2, 0]])
    o, settings = block(**SMALL, index=index, dtype=torch.float32, activation=activation)
    o["gate_up_bias"] += 40.0
    sentinel = index >= 3
    expected = differentiated(lambda o, s: fused(o, s, backend), o, settings)
    o["topk_weight"] = o["topk_weight"].masked_fill(sentinel, value)
    for name, t in differentiated(lambda o, s: fused(o, s, backend), o, settings).items():
        assert torch.isfinite(t).all(), name
        assert torch.equal(t, expected[name]), name
    assert not expected["topk_weight"][sentinel].any()


def test_the_weight_of_a_sentinel_in_a_second_derivative():
    index = torch.tensor([[0, 3], [3, 3], [1, 9], [0, 0], [2, 0]])
    o, settings = block(**SMALL, index=index)
    o["topk_weight"] = o["topk_weight"].masked_fill(index >= 3, float("nan")).requires_grad_()
    x = o["x"].requires_grad_()
    (grad,) = torch.autograd.grad(fused(o, settings).sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(o["topk_weight"].grad).all()
    assert not o["topk_weight"].grad[index >= 3].any()


class TestRefusals:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("value", [[[1.0, 2.0]], np.ones((3, 8, 8)), 3.0])
    def test_what_is_no_tensor(self, name, value):
        o, settings = block(**SMALL)
        with pytest.raises(
            TypeError, match=rf"lorafuse's lora_experts got a \w+ for {name}; it must be a torch.Tensor"
        ):
            fused({**o, name: value}, settings)

    @pytest.mark.parametrize("name", ["x", "topk_index", "topk_weight", "gate_up", "down"])
    def test_none(self, name):
        o, settings = block(**SMALL)
        with pytest.raises(TypeError, match=f"lora_experts got a NoneType for {name}"):
            fused({**o, name: None}, settings)

    @pytest.mark.parametrize("name", GROUPED)
    @pytest.mark.parametrize("value", [[1.0], np.ones(3)])
    def test_what_is_no_tensor_for_grouped(self, name, value):
        with pytest.raises(TypeError, match=rf"lora_grouped_linear got a \w+ for {name}; it must be a torch.Tensor"):
            lora_grouped_linear(**GROUPED | {name: value})

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_x_of_a_kind_without_gradients(self, dtype, autocast):
        o, settings = block(**SMALL, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with pytest.raises(TypeError, match=rf"x is {dtype}.*floating"):
                fused(o | {"x": o["x"].to(dtype)}, settings)
            with pytest.raises(TypeError, match=rf"x is {dtype}.*floating"):
                lora_grouped_linear(**GROUPED | {"x": GROUPED["x"].to(dtype)})

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_a_scale_that_is_not_finite(self, value):
        o, settings = block(**SMALL)
        for name in ("gate_up_scale", "down_scale"):
            with pytest.raises(ValueError, match=rf"{name}={value} is not finite"):
                fused(o, settings | {name: value})
        with pytest.raises(ValueError, match=rf"scale={value} is not finite"):
            lora_grouped_linear(**GROUPED, scale=value)
        with pytest.raises(ValueError, match=rf"alpha={value} is not finite"):
            LoRAExperts(3, 8, 4, 2, alpha=value)

    @pytest.mark.parametrize("value", [None, "2", torch.ones(())])
    def test_a_scale_that_is_no_number(self, value):
        with pytest.raises(TypeError, match=r"scale is a \w+; it must be a number"):
            lora_grouped_linear(**GROUPED, scale=value)

    @pytest.mark.parametrize("value", [None, 3])
    def test_an_activation_that_is_none(self, value):
        o, settings = block(**SMALL)
        with pytest.raises(TypeError, match=r"activation is a \w+; it must be a name or a function"):
            fused(o, settings | {"activation": value})

    @pytest.mark.parametrize("name", ["num_experts", "hidden_size", "intermediate_size"])
    @pytest.mark.parametrize("value", [0, -1])
    def test_sizes_of_the_module(self, name, value):
        sizes = {"num_experts": 3, "hidden_size": 8, "intermediate_size": 4}
        with pytest.raises(ValueError, match=f"{name}={value} is not a size"):
            LoRAExperts(**sizes | {name: value}, r=2)


def test_a_negative_index_says_the_rule():
    o, settings = block(**SMALL)
    o["topk_index"][0, 0] = -2
    with pytest.raises(ValueError, match=r"topk_index holds -2; it must be an expert, 0 to 2, or a sentinel"):
        fused(o, settings, "eager")
    assert "device-side assertion" in lora_experts.__doc__
