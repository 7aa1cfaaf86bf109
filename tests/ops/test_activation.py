"""Activations of experts (T1): forward and gradient against autograd, at a clamp's limits too; gpt-oss's by name."""

import pytest
import torch
from experts_reference import REFERENCE, REFERENCE_GATES, block, check, differentiated, fused
from moe_models import base
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from lorafuse.activation import ACTIVATIONS, GATES, GateLayout, lookup
from lorafuse.integrations.hf_transformers import block_operands, first_projection


def joined(gate, up, interleaved):
    return torch.stack((gate, up), 2).flatten(1) if interleaved else torch.cat((gate, up), 1)


def compare(activation, expected, u):
    dh = torch.randn(u.shape[0], expected(u).shape[1], dtype=u.dtype, generator=torch.Generator().manual_seed(2))
    leaf = u.clone().requires_grad_()
    h = expected(leaf)
    torch.testing.assert_close(activation.forward(u), h.detach())
    torch.testing.assert_close(activation.backward(u, dh), torch.autograd.grad(h, leaf, dh)[0])


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("name", [*ACTIVATIONS, *GATES])
def test_gated(name, interleaved):
    u = 6 * torch.randn(9, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def expected(u):
        gate, up = (u[:, ::2], u[:, 1::2]) if interleaved else u.chunk(2, 1)
        return REFERENCE_GATES[name](gate, up) if name in GATES else REFERENCE[name](gate) * up

    compare(lookup(name, GateLayout.of(True, not interleaved)), expected, u)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_without_a_gate(name):
    u = 6 * torch.randn(9, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    compare(lookup(name, GateLayout.NONE), REFERENCE[name], u)


@pytest.mark.parametrize("interleaved", [True, False])
def test_at_the_limits_of_the_clamp(interleaved):
    values = torch.tensor([-7.5, -7.0, -6.5, 0.0, 6.5, 7.0, 7.5], dtype=torch.float64)
    gate, up = (part.reshape(7, 7) for part in torch.cartesian_prod(values, values).unbind(1))
    u = joined(gate, up, interleaved)

    def expected(u):
        gate, up = (u[:, ::2], u[:, 1::2]) if interleaved else u.chunk(2, 1)
        return REFERENCE_GATES["clamped_swiglu"](gate, up)

    compare(lookup("clamped_swiglu", GateLayout.of(True, not interleaved)), expected, u)


def test_it_is_what_gpt_oss_computes():
    experts = next(m for m in base("gpt_oss").modules() if isinstance(m, GptOssExperts))
    u = 6 * torch.randn(9, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    compare(lookup("clamped_swiglu", GateLayout.INTERLEAVED), experts._apply_gate, u)


@pytest.mark.parametrize("concatenated", [True, False])
@pytest.mark.parametrize("name", GATES)
def test_experts(name, concatenated):
    check(activation=name, concatenated=concatenated, size=6.0)


def test_gradcheck():
    o, settings = block(T=5, E=3, H=4, I=3, R=2, activation="clamped_swiglu", concatenated=False, size=4.0)
    names = [name for name in o if name in ("x", "topk_weight") or name.endswith(("_a", "_b"))]

    def run(*values):
        return fused(o | dict(zip(names, values, strict=True)), settings)

    assert torch.autograd.gradcheck(run, [o[name].requires_grad_() for name in names])


def test_it_is_compiled_as_one_operator():
    o, settings = block(dtype=torch.float32, activation="clamped_swiglu", concatenated=False)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    expected = differentiated(fused, o, settings)
    for name, tensor in differentiated(compiled, o, settings).items():
        assert torch.equal(tensor, expected[name]), name


def test_it_needs_a_gate():
    with pytest.raises(ValueError, match=r"'clamped_swiglu' is a function of gate and up.*has_gate=False.*silu"):
        lookup("clamped_swiglu", GateLayout.NONE)
    o, settings = block(gate=False)
    with pytest.raises(ValueError, match="has_gate=False"):
        fused(o, settings | {"activation": "clamped_swiglu"})


class TestWhichExpertsAreGptOss:
    def experts(self):
        return next(m for m in base("gpt_oss").requires_grad_(False).modules() if isinstance(m, GptOssExperts))

    def activation(self, experts):
        actual = block_operands(experts, {n: getattr(experts, n) for n in (first_projection(experts), "down_proj")})
        return actual["activation"]

    def test_its_own(self):
        experts = self.experts()
        actual = block_operands(experts, {n: getattr(experts, n) for n in ("gate_up_proj", "down_proj")})
        assert actual["activation"] == "clamped_swiglu"
        assert not actual["is_concatenated"]
        assert actual["is_transposed"]

    @pytest.mark.parametrize("constant", ["alpha", "limit"])
    def test_other_constants(self, constant):
        experts = self.experts()
        setattr(experts, constant, 1.5)
        assert self.activation(experts) == experts._apply_gate

    def test_a_subclass_that_gates_otherwise(self):
        class Other(GptOssExperts):
            def _apply_gate(self, gate_up):
                return gate_up[..., ::2]

        experts = self.experts()
        experts.__class__ = Other
        assert self.activation(experts) == experts._apply_gate

    def test_a_subclass_that_gates_as_it_does(self):
        experts = self.experts()
        experts.__class__ = type("Parametrized", (GptOssExperts,), {})
        assert self.activation(experts) == "clamped_swiglu"

    def test_a_method_of_its_own(self):
        experts = self.experts()
        experts._apply_gate = lambda gate_up: gate_up[..., ::2]
        assert self.activation(experts) is experts._apply_gate
