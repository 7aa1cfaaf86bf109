"""functorch, forward mode, traces and nested tensors through patched layers (T1): PEFT's own path and its values."""

import copy
import io

import moe_models
import pytest
import torch
from test_patch_seen import Experts, linear
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import lorafuse
from lorafuse.integrations import register_experts
from lorafuse.testing.numerics import relative_l2, tolerance

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::RuntimeWarning:peft", "ignore::torch.jit.TracerWarning",
    "ignore::UserWarning:torch", "ignore::DeprecationWarning",
)  # fmt: skip


def dual(model, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos()))).tangent


def loss(model):
    return lambda x: model(x).square().sum()


def traced(model, x):
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (x,), check_trace=False), file)
    assert b"lorafuse::" not in file.getvalue()
    file.seek(0)
    return torch.jit.load(file)(x + 1)


def per_sample(model, x):
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    gradient = grad(lambda ps, row: functional_call(model, ps, (row,)).square().sum())
    return torch.cat([g.flatten() for g in vmap(gradient, (None, 0))(trained, x[:, None]).values()])


def nested(layout):
    def run(model, x):
        y = model(torch.nested.nested_tensor([x, x[:2]], layout=layout))
        return torch.cat([part.flatten() for part in y.unbind()])

    return run


EVERY = {
    "grad": lambda model, x: grad(loss(model))(x),
    "jvp": lambda model, x: jvp(model, (x,), (x.cos(),))[1],
    "jacrev": lambda model, x: jacrev(model)(x),
    "jacfwd": lambda model, x: jacfwd(model)(x),
    "hessian": lambda model, x: hessian(loss(model))(x),
    "dual numbers": dual,
}
LINEAR = EVERY | {
    "vmap(grad)": per_sample,
    "vmap": lambda model, x: vmap(model)(x[:, None]),
    "jit.trace": traced,
    "jagged": nested(torch.jagged),
    "strided": nested(torch.strided),
    "export": lambda model, x: torch.export.export(model.base_model.model, (x,)).module()(x + 1),
    "strict export": lambda model, x: torch.export.export(model.base_model.model, (x,), strict=True).module()(x + 1),
}


@pytest.mark.no_poison
@pytest.mark.parametrize("name", LINEAR)
def test_linear(name):
    check(linear(), LINEAR[name], torch.randn(3, 8))


def as_configured(model, implementation):
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = implementation
    return model


def test_experts_in_forward_mode():
    # the implementation of transformers that has every derivative
    check(as_configured(Experts(), "eager"), dual, torch.randn(3, 16))


@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"dual numbers"}))
def test_experts_raise_what_peft_raises(name):
    """PEFT's parametrizations are put in place by operations that functorch refuses."""
    model = as_configured(Experts(), "eager")
    x, messages = torch.randn(3, 16), []
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            EVERY[name](model, x)
        messages.append(str(caught.value))
        lorafuse.patch(model, strict=True)
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", EVERY)
def test_registered_experts(name):
    experts = moe_models.base("qwen3_moe").requires_grad_(False).model.layers[0].mlp.experts
    index, weight = torch.tensor([[0, 1], [2, 3], [1, 0]]), torch.tensor([[0.4, 0.6]] * 3)
    run, x = EVERY[name], torch.randn(3, 16)
    expected = run(lambda x: as_configured(experts, "eager")(x, index, weight), x)
    register_experts()
    try:
        got = run(lambda x: as_configured(experts, "lorafuse")(x, index, weight), x)
    finally:
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop("lorafuse")
    assert expected.any()
    assert relative_l2(got, expected) <= tolerance(torch.float32)


def check(stock, run, x):
    patched = copy.deepcopy(stock)
    lorafuse.patch(patched, strict=True)
    expected, got = run(stock, x), run(patched, x)
    assert expected.any()
    assert relative_l2(got, expected) <= tolerance(torch.float32)


@pytest.mark.no_poison
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_holds_no_operator_of_ours(strict):
    model = linear()
    lorafuse.patch(model)
    program = torch.export.export(nn.Sequential(model.base_model.model), (torch.randn(3, 8),), strict=strict)
    assert "lorafuse" not in str(program.graph)


def test_fx_raises_what_it_raises_for_peft():
    model, messages = linear(), []
    for _ in range(2):
        with pytest.raises(torch.fx.proxy.TraceError) as caught:
            torch.fx.symbolic_trace(model.base_model.model)
        messages.append(str(caught.value))
        lorafuse.patch(model)
    assert messages[0] == messages[1]
