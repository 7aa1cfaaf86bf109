"""What torch's transforms do with experts and grouped layers (T1): torch.func, forward mode, jit.trace, nested rows."""

import io

import pytest
import torch
from experts_reference import block, fused, plain
from test_experts_autograd import SMALL, formula, grouped, grouped_operands, squared

from lorafuse.nn import LoRAExperts


def transforms(run):
    """What torch computes of `run(x, a)`, by name."""
    loss = lambda x, a: run(x, a).square().sum()  # noqa: E731
    return {
        "grad": lambda x, a: torch.func.grad(loss, argnums=(0, 1))(x, a),
        "grad of grad": lambda x, a: torch.func.grad(lambda x: torch.func.grad(loss)(x, a).square().sum())(x),
        "jvp": lambda x, a: torch.func.jvp(run, (x, a), (x.cos(), a.cos())),
        "vjp": lambda x, a: torch.func.vjp(run, x, a)[1](torch.ones(SMALL["T"], 8, dtype=x.dtype)),
        "jacfwd": lambda x, a: torch.func.jacfwd(run)(x, a),
        "jacrev": lambda x, a: torch.func.jacrev(run)(x, a),
        "hessian": lambda x, a: torch.func.hessian(loss)(x, a),
        "vmap": lambda x, a: torch.func.vmap(run, (0, None))(torch.stack([x, x.cos()]), a),
        "vmap of grad": lambda x, a: torch.func.vmap(torch.func.grad(loss), (None, 0))(x, torch.stack([a, a.cos()])),
        "vmap without grad": lambda x, a: torch.no_grad()(torch.func.vmap(run, (0, None)))(torch.stack([x, x]), a),
        "forward mode": lambda x, a: forward_mode(run, x, a),
    }


def forward_mode(run, x, a):
    with torch.autograd.forward_ad.dual_level():
        out = run(torch.autograd.forward_ad.make_dual(x, x.cos()), a)
        return tuple(torch.autograd.forward_ad.unpack_dual(out))


@pytest.mark.parametrize("name", transforms(None))
@pytest.mark.parametrize("activation", ["silu", squared])
def test_transforms_of_experts(name, activation):
    """No backend is reached under a transform."""
    o, settings = block(**SMALL, activation=activation, bias=True)

    def run(x, a):
        return fused(o | {"x": x, "gate_up_a": a}, settings, "triton")

    def expected(x, a):
        return plain(o | {"x": x, "gate_up_a": a}, **settings)

    given = o["x"], o["gate_up_a"]
    torch.testing.assert_close(transforms(run)[name](*given), transforms(expected)[name](*given))


@pytest.mark.parametrize("name", transforms(None))
def test_transforms_of_grouped(name):
    x, ends, w, a, b, bias = grouped_operands()
    actual = transforms(lambda x, a: grouped("triton", x, ends, w, a, b, bias))[name](x, a)
    torch.testing.assert_close(actual, transforms(lambda x, a: formula(x, ends, w, a, b, bias))[name](x, a))


class TestTransformsThatCannot:
    @pytest.mark.parametrize("backend", ["eager", "triton"])
    def test_vmap_over_the_routing(self, backend):
        o, settings = block(**SMALL)
        index = torch.stack([o["topk_index"]] * 2)
        with pytest.raises(NotImplementedError, match=r"lorafuse's lora_experts.*topk_index.*in_dims=None"):
            torch.func.vmap(lambda index: fused(o | {"topk_index": index}, settings, backend))(index)
        x, ends, *rest = grouped_operands()
        with pytest.raises(NotImplementedError, match=r"lorafuse's lora_grouped_linear.*offsets"):
            torch.func.vmap(lambda ends: grouped(backend, x, ends, *rest))(torch.stack([ends, ends]))

    def test_vmap_over_the_routing_inside_grad(self):
        o, settings = block(**SMALL)
        index = torch.stack([o["topk_index"]] * 2)
        loss = lambda x, index: fused(o | {"x": x, "topk_index": index}, settings).sum()  # noqa: E731
        with pytest.raises(NotImplementedError, match="topk_index"):
            torch.func.vmap(torch.func.grad(loss), (None, 0))(o["x"], index)
        with pytest.raises(NotImplementedError, match="topk_index"):
            torch.func.grad(lambda x: torch.func.vmap(loss, (None, 0))(x, index).sum())(o["x"])

    def test_nested_rows(self):
        o, settings = block(**SMALL)
        nested = torch.nested.nested_tensor([o["x"], o["x"][:2]], layout=torch.jagged)
        with pytest.raises(NotImplementedError, match=r"lorafuse's lora_experts.*nested.*\.values\(\)"):
            fused(o | {"x": nested}, settings)
        x, *rest = grouped_operands()
        with pytest.raises(NotImplementedError, match=r"lorafuse's lora_grouped_linear.*nested"):
            grouped("eager", torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged), *rest)
        with pytest.raises(NotImplementedError, match=r"lorafuse's lora_experts.*nested"):
            LoRAExperts(3, 8, 4, 2, dtype=torch.float64)(nested, o["topk_index"], o["topk_weight"])


@pytest.mark.parametrize("activation", ["silu", squared])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_file_serves_other_routings(activation, tmp_path):
    o, settings = block(**SMALL, activation=activation)
    other, _ = block(**SMALL | {"T": 7})

    def run(x, index, weight):
        return fused(o | {"x": x, "topk_index": index, "topk_weight": weight}, settings)

    names = "x", "topk_index", "topk_weight"
    traced = torch.jit.trace(run, [o[name] for name in names])
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    given = [other[name] for name in names]
    torch.testing.assert_close(torch.jit.load(file)(*given), run(*given))
    assert "lorafuse::" not in str(traced.graph)
    x, ends, *rest = grouped_operands()
    traced = torch.jit.trace(lambda x, ends: grouped("eager", x, ends, *rest), (x, ends))
    given = x[:4], torch.tensor([0, 3, 3])
    torch.testing.assert_close(traced(*given), grouped("eager", *given, *rest))
