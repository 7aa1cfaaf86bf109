"""Hooks, modes and functions replaced on classes see the inner modules of a patched layer (T1), as in PEFT."""

import contextlib
import copy
import logging
import sys
import warnings
from unittest import mock

import moe_models
import peft
import pytest
import torch
import transformers
import warm_python
from tiny_models import counting_fused
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

import lorafuse
from lorafuse.integrations import hf_common, hf_experts
from lorafuse.testing.numerics import relative_l2, tolerance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")


class Scaled(torch.Tensor):
    """An x that makes every linear layer it passes another one."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        y = super().__torch_function__(func, types, args, kwargs or {})
        return y * 1.5 if func is nn.functional.linear else y


class Scaling(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return y * 1.5 if func in (nn.functional.linear, torch.baddbmm) else y


def one_and_a_half(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 1.5


def replaced(owner, name):
    return lambda: mock.patch.object(owner, name, one_and_a_half(getattr(owner, name)))


@contextlib.contextmanager
def handle(register, hook, **options):
    registered = register(hook, **options)
    try:
        yield
    finally:
        registered.remove()


def of_inner(kinds, value):
    return lambda module, *args: value(*args) if type(module) in kinds else None


INNER = nn.Linear, peft.tuners.lora.layer._LoraFactorsProxy
GLOBAL_HOOKS = {
    "forward hook": lambda: handle(
        torch_module.register_module_forward_hook, of_inner(INNER, lambda args, y: y * 1.5), always_call=True
    ),
    "forward pre-hook": lambda: handle(
        torch_module.register_module_forward_pre_hook,
        of_inner(INNER, lambda args: tuple(a * 1.5 for a in args)),
    ),
    "full backward hook": lambda: handle(
        torch_module.register_module_full_backward_hook,
        of_inner((nn.Linear,), lambda dx, dy: tuple(None if g is None else g * 1.5 for g in dx)),
    ),
    "full backward pre-hook": lambda: handle(
        torch_module.register_module_full_backward_pre_hook,
        of_inner((nn.Linear,), lambda dy: tuple(g * 1.5 for g in dy)),
    ),
}
PROCESS = {
    **GLOBAL_HOOKS,
    "mode": Scaling,
    "nn.functional.linear": replaced(nn.functional, "linear"),
}
LINEAR = {
    **PROCESS,
    "nn.Module.__call__": replaced(nn.Module, "__call__"),
    "nn.Module._call_impl": replaced(nn.Module, "_call_impl"),
    "nn.Linear.forward": replaced(nn.Linear, "forward"),
    "nn.Linear.__call__": replaced(nn.Linear, "__call__"),
    "nn.Dropout.forward": replaced(nn.Dropout, "forward"),
    "nn.functional.dropout": replaced(nn.functional, "dropout"),
    "lora.Linear.forward": replaced(peft.tuners.lora.Linear, "forward"),
}
EXPERTS = {
    **{name: state for name, state in PROCESS.items() if "backward" not in name},
    "nn.Module._call_impl": replaced(nn.Module, "_call_impl"),
    "lora.ParamWrapper.forward": replaced(peft.tuners.lora.ParamWrapper, "forward"),
    "ParametrizationList.forward": replaced(nn.utils.parametrize.ParametrizationList, "forward"),
    "the proxy's forward": replaced(peft.tuners.lora.layer._LoraFactorsProxy, "forward"),
    "the activation's forward": replaced(transformers.activations.SiLUActivation, "forward"),
}


@pytest.fixture(autouse=True)
def _again():
    hf_common.warn_once.cache_clear()


def linear(dropout=0.3):
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False, lora_dropout=dropout)
    return peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).eval()


def run_linear(model):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = model(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), dx


class Experts(nn.Module):
    """The outermost wrapper of a model's experts, with its inputs."""

    def __init__(self):
        super().__init__()
        model = moe_models.adapted("qwen3_moe")
        self.inner = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.ParamWrapper))

    def forward(self, x):
        return self.inner(x, torch.tensor([[0, 1], [2, 3], [1, 0]]), torch.tensor([[0.4, 0.6]] * 3))


def run_experts(model):
    x = torch.randn(3, moe_models.HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = model(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), dx


def assert_equal(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert relative_l2(one, other) <= tolerance(torch.float32)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", LINEAR)
def test_linear(name, order):
    check(linear(), run_linear, LINEAR[name], order, counting_fused, differs=True)


def counting_experts():
    return mock.patch.object(hf_experts, "lora_experts", wraps=hf_experts.lora_experts)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name, order):
    # transformers' implementation calls functional.linear or another product, as its configuration is
    check(Experts(), run_experts, EXPERTS[name], order, counting_experts, differs=name != "nn.functional.linear")


def check(stock, run, state, order, counting, differs):
    patched = copy.deepcopy(stock)
    plain = run(stock)
    with state():
        expected = run(stock)
    if differs:
        assert max(relative_l2(a, b) for a, b in zip(expected, plain, strict=True)) > 1e-3, "the state changes nothing"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if order == "before":
            with state():
                lorafuse.patch(patched)
                assert_equal(run(patched), expected)
        else:
            lorafuse.patch(patched, strict=True)
            for _ in range(2):
                with state(), counting() as calls:
                    assert_equal(run(patched), expected)
                assert calls.call_count == 0
            shown = [str(w.message) for w in caught if "runs as PEFT ships it" in str(w.message)]
            assert len(shown) == 1
            assert shown[0].startswith("lorafuse: a patched ")
    # undone: fused again, once it is patched
    lorafuse.patch(patched, strict=True)
    with counting() as calls:
        assert_equal(run(patched), plain)
    assert calls.call_count == 1


def test_a_subclass_of_tensor_sees_the_inner_layers():
    model = linear()
    x = torch.randn(3, 8).as_subclass(Scaled)
    expected = model(x)
    lorafuse.patch(model)
    with pytest.warns(UserWarning, match="Scaled, which overrides torch functions"):
        assert torch.equal(model(x), expected)


def test_a_default_device_is_no_reason():
    model = linear()
    lorafuse.patch(model)
    with torch.device("cpu"), counting_fused() as calls:
        model(torch.randn(3, 8))
    assert calls.call_count == 1


def test_replaced_before_anything_was_imported():
    script = """
import torch
from torch import nn
old = nn.Linear.forward
import functools
nn.Linear.forward = functools.wraps(old)(lambda self, x: old(self, x) * 1.5)
import peft, lorafuse, copy
m = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"], r=2))
stock, x = copy.deepcopy(m), torch.randn(3, 8)
lorafuse.patch(m)
assert torch.equal(m(x), stock(x))
"""
    warm_python.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=300)


def test_warnings_as_errors_end_no_step(caplog):
    """The layer computes what PEFT computes; the reason is in the log instead."""
    model = linear()
    lorafuse.patch(model)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "lorafuse"), Scaling():
        warnings.simplefilter("error")
        for _ in range(3):
            model(torch.randn(3, 8))
    assert caplog.messages == [
        "lorafuse: a patched linear layer runs as PEFT ships it: a TorchFunctionMode is active (Scaling)"
    ]


def test_hooks_that_accelerate_attached_later():
    """Its hooks keep the forward of the moment, and leave the class's own on the module when they go."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = linear()
    expected = run_linear(model)
    layer = model.base_model.model[0]
    lorafuse.patch(model)
    hooks.add_hook_to_module(layer.base_layer, hooks.ModelHook())
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    with pytest.warns(UserWarning, match="its base layer has hooks or a replaced forward"):
        assert_equal(run_linear(model), expected)
    hooks.remove_hook_from_module(layer.base_layer)
    with counting_fused() as calls:
        assert_equal(run_linear(model), expected)
    assert calls.call_count == 1
    lorafuse.unpatch(model)
    assert_equal(run_linear(model), expected)
    assert type(layer) is peft.tuners.lora.Linear
    with pytest.warns(UserWarning, match="accelerate's ModelHook replaced its forward"):
        lorafuse.patch(model)
