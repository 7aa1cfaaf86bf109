"""PEFT's `target_parameters` on the weight of an `nn.Linear`, patched (T1): as PEFT ships it, in every state."""

import copy
import pickle
from unittest import mock

import moe_models
import peft
import pytest
import torch
from tiny_models import reason_to_patch_nothing
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorafuse
from lorafuse.advise.snippet import weights_of_linears
from lorafuse.integrations import hf_common, hf_peft
from lorafuse.testing.numerics import relative_l2, tolerance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")

# three names of DeepSeek's dense MLP and shared experts, which PEFT takes for those of experts
NAMES = ["down_proj", "gate_proj", "up_proj"]


class Mlp(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.first, self.second = nn.Linear(20, 24, bias), nn.Linear(24, 12, bias)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(base=Mlp, R=4, dtype=torch.float32, **more):
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=R, lora_alpha=2 * R, target_modules=[], init_lora_weights=False,
        target_parameters=["first.weight", "second.weight"], **more,
    )  # fmt: skip
    return peft.get_peft_model(base().to(dtype), config).train()


def given(*size, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def step(model, x=None):
    """The output and the gradients of x and of every trained parameter."""
    x = given(5, 20) if x is None else x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
    return {"y": y.detach(), "dx": x.grad} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def fused_calls(run):
    """What `run()` returns, and how many layers ran fused in it."""
    with mock.patch.object(hf_peft, "run_linear", wraps=hf_peft.run_linear) as calls:
        return run(), calls.call_count


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype is tensor.dtype
        assert relative_l2(actual[name], tensor) <= tolerance(tensor.dtype), name
        assert actual[name].any(), name


def check(model, fused=2, **more):
    """The model as PEFT ships it against a patched copy of it; returns the copy."""
    patched = copy.deepcopy(model)
    lorafuse.patch(patched, strict=True)
    actual, calls = fused_calls(lambda: step(patched, **more))
    assert calls == fused
    assert_same(actual, step(model, **more))
    return patched


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(20,), (0, 20), (1, 20), (2, 3, 20), (2, 3, 1, 20), (2, 1, 3, 2, 20)])
def test_every_shape(size, bias):
    model = adapted(lambda: Mlp(bias))
    if 0 in size:
        lorafuse.patch(model, strict=True)
        assert step(model, given(*size))["dx"].shape == size
    else:
        check(model, x=given(*size))


@pytest.mark.parametrize("R", [1, 3, 8, 16])
def test_every_rank(R):
    check(adapted(R=R, use_rslora=R == 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_farther_from_the_truth_than_peft(dtype):
    """PEFT rounds W + BA to the base's dtype, and BA before; here x·Aᵀ and dy·B, of the rank's size, are rounded."""
    model, x = adapted(dtype=dtype), given(64, 20, dtype=dtype)
    patched, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    lorafuse.patch(patched, strict=True)
    truth, ours, shipped = step(exact, x.double()), step(patched, x), step(model, x)
    assert ours.keys() == shipped.keys() == truth.keys()
    for name, tensor in truth.items():
        error, bound = relative_l2(ours[name], tensor), relative_l2(shipped[name], tensor)
        assert error <= (2 * bound if "lora_" in name else bound), name


def test_the_report_and_unpatch():
    model = adapted()
    before = repr(model), list(model.state_dict())
    report = lorafuse.patch(model)
    assert [(p.name, p.kind) for p in report.patched] == [
        ("base_model.model.first", "linear"), ("base_model.model.second", "linear"),
    ]  # fmt: skip
    assert (repr(model), list(model.state_dict())) == before
    assert {type(m) for m in model.modules() if isinstance(m, peft.tuners.lora.ParamWrapper)} == {hf_peft.FusedWeight}
    assert lorafuse.unpatch(model) == 2
    assert {type(m) for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)} == {
        peft.tuners.lora.ParamWrapper
    }
    assert fused_calls(lambda: step(model))[1] == 0


def test_disabled_merged_and_unloaded():
    model = adapted()
    patched, x = check(model), given(5, 20)
    with model.disable_adapter(), patched.disable_adapter():
        actual, calls = fused_calls(lambda: patched(x))
        assert torch.equal(actual, model(x))
        assert calls == 0
    expected = model(x)
    patched.merge_adapter()
    actual, calls = fused_calls(lambda: patched(x))
    assert (calls, relative_l2(actual, expected) <= tolerance(torch.float32)) == (0, True)
    patched.unmerge_adapter()
    actual, calls = fused_calls(lambda: patched(x))
    assert (calls, relative_l2(actual, expected) <= tolerance(torch.float32)) == (2, True)
    assert relative_l2(patched.merge_and_unload()(x), expected) <= tolerance(torch.float32)


def test_several_adapters():
    model = adapted()
    config = copy.deepcopy(model.peft_config["default"])
    config.r, config.lora_alpha, config.use_rslora = 3, 5, True
    model.add_adapter("other", config)
    for names in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(names)
        check(model)


def test_checkpointed_compiled_and_pickled():
    model = adapted()
    expected = step(model)
    patched = check(model)
    torch._dynamo.reset()
    for one in (
        lambda x: checkpoint(patched, x, use_reentrant=False),
        torch.compile(patched, backend="aot_eager", fullgraph=True),
    ):
        x = given(5, 20)
        patched.zero_grad()
        y = one(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
        actual = {n: p.grad for n, p in patched.named_parameters() if p.grad is not None}
        assert_same({"y": y.detach(), "dx": x.grad, **actual}, expected)
    assert_same(step(pickle.loads(pickle.dumps(patched))), expected)


def test_autocast():
    model = adapted()
    patched, x = check(model), given(5, 20)
    with torch.autocast("cpu", torch.bfloat16):
        actual, calls = fused_calls(lambda: patched(x))
        expected = model(x)
    assert (calls, actual.dtype) == (2, expected.dtype)
    assert relative_l2(actual, expected) <= tolerance(torch.bfloat16)


class TestLeftToPeft:
    reason = staticmethod(reason_to_patch_nothing)

    def test_a_trained_weight(self):
        model = adapted()
        model.requires_grad_(True)
        assert "its base weight is trainable" in self.reason(model)

    def test_hooks_on_the_base(self):
        model = adapted()
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.ParamWrapper):
                module.base_layer.register_forward_hook(lambda *args: None)
        assert "its base layer has hooks" in self.reason(model)

    def test_a_linear_layer_with_a_forward_of_its_own(self):
        class Twice(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        def base():
            model = Mlp()
            model.first, model.second = Twice(20, 24), Twice(24, 12)
            return model

        assert "its base is a Twice, not an nn.Linear" in self.reason(adapted(base))

    def test_a_parameter_beside_the_weight(self):
        class Base(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(20, 12)
                self.first.extra = nn.Parameter(torch.randn(6, 4))

            def forward(self, x):
                return self.first(x)

        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["first.extra"])
        model = peft.get_peft_model(Base(), config)
        assert "it adapts extra of an nn.Linear, not its weight" in self.reason(model)

    @pytest.mark.parametrize(
        ("owner", "name"), [(peft.tuners.lora.ParamWrapper, "forward"), (nn.Linear, "forward"), (nn.Module, "__call__")]
    )
    def test_what_would_be_missed(self, owner, name, monkeypatch):
        model = adapted()
        expected = step(model)
        lorafuse.patch(model, strict=True)
        plain = getattr(owner, name)
        hf_common.warn_once.cache_clear()
        monkeypatch.setattr(owner, name, lambda self, *args, **kwargs: plain(self, *args, **kwargs))
        with pytest.warns(UserWarning, match="runs as PEFT ships it: .*replaced"):
            actual, calls = fused_calls(lambda: step(model))
        assert calls == 0
        assert_same(actual, expected)

    def test_registration_hooks_see_pefts_parametrization(self):
        model, seen = adapted(), []
        lorafuse.patch(model, strict=True)
        handle = nn.modules.module.register_module_module_registration_hook(lambda *args: seen.append(args[1]))
        try:
            with pytest.warns(UserWarning, match="global registration hooks are registered"):
                step(model)
        finally:
            handle.remove()
        assert "parametrizations" in seen


def test_no_layer_of_deepseek_is_left_to_peft():
    """PEFT rewrites a list with these names to `target_parameters`: `weights_of_linears` names them."""
    base = moe_models.base("deepseek_v3")
    stacks = [f"experts.{name}" for name in ("gate_up_proj", "down_proj")]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["o_proj"], init_lora_weights=False,
        target_parameters=[*stacks, *(f"{name}.weight" for name in NAMES)],
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    assert weights_of_linears(lorafuse.advise.shapes_of(moe_models.base("deepseek_v3"))) == set(NAMES)
    patched, ids = copy.deepcopy(model), moe_models.token_ids()
    report = lorafuse.patch(patched, strict=True)
    weights = [m for m in patched.modules() if isinstance(m, hf_peft.FusedWeight)]
    assert len(weights) == 6
    assert {p.kind for p in report.patched} == {"linear", "experts"}
    (reason,) = {one.reason for one in report.apart}
    assert reason.startswith("gate_proj is adapted by its weight (target_parameters)")
    actual = []
    for one in (model, patched):
        one(input_ids=ids, labels=ids).loss.backward()
        actual.append({n: p.grad for n, p in one.named_parameters() if p.grad is not None})
    assert_same(actual[1], actual[0])
