"""`LoRALinear` (T1): the operator as a module, its names and storage, merging, and PEFT's adapter files."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from lorafuse.functional import lora_linear
from lorafuse.nn import LoRALinear
from lorafuse.testing.numerics import relative_l2, rounding, tolerance


def trained(layer):
    """The layer with a B that is not zero, as after training."""
    with torch.no_grad():
        layer.lora_B.weight.normal_(std=1 / math.sqrt(layer.r))
    return layer


def by_function(layer, x, **more):
    a, b = layer.lora_A.weight, layer.lora_B.weight
    return lora_linear(x, layer.weight, a, b, scale=layer.scale, bias=layer.bias, **more)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_operator(bias, dtype):
    layer = trained(LoRALinear(33, 20, 4, alpha=10, bias=bias, dtype=dtype))
    x = torch.randn(2, 5, 33, dtype=dtype, requires_grad=True)
    y, expected = layer(x), by_function(layer, x)
    assert torch.equal(y, expected)
    assert not torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))
    y.sum().backward()
    assert x.grad.any()
    assert layer.lora_A.weight.grad.any()
    assert layer.lora_B.weight.grad.any()
    assert layer.weight.grad is None


def test_starts_as_its_base():
    layer = LoRALinear(33, 20, 4)
    x = torch.randn(5, 33)
    assert not layer.lora_B.weight.any()
    bound = 1 / math.sqrt(33)
    assert 0.9 * bound < layer.lora_A.weight.abs().max() <= bound
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 1.0), ({"alpha": 32}, 8.0), ({"alpha": 32, "use_rslora": True}, 16.0), ({"use_rslora": True}, 2.0)],
)
def test_scale(settings, scale):
    assert LoRALinear(8, 8, 4, **settings).scale == scale


class TestFromLinear:
    @pytest.mark.parametrize("bias", [True, False])
    def test_shares_and_freezes(self, bias):
        linear = nn.Linear(33, 20, bias=bias)
        layer = LoRALinear.from_linear(linear, 4, alpha=8, dropout=0.25)
        assert layer.weight is linear.weight
        assert layer.bias is linear.bias
        assert not any(p.requires_grad for p in linear.parameters())
        trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
        assert trainable == {"lora_A.weight", "lora_B.weight"}
        assert (layer.r, layer.scale, layer.dropout) == (4, 2.0, 0.25)
        x = torch.randn(3, 33)
        assert torch.equal(layer.eval()(x), linear(x))

    def test_adapters_are_initialized(self):
        layer = LoRALinear.from_linear(nn.Linear(33, 20), 4)
        assert layer.lora_A.weight.any()
        assert layer.lora_A.weight.isfinite().all()
        assert not layer.lora_B.weight.any()

    def test_follows_device_and_dtype(self):
        half = LoRALinear.from_linear(nn.Linear(8, 6, dtype=torch.bfloat16), 2)
        assert half.weight.dtype is torch.bfloat16
        assert half.lora_A.weight.dtype is half.lora_B.weight.dtype is torch.float32
        same = LoRALinear.from_linear(nn.Linear(8, 6, dtype=torch.float16), 2, adapter_dtype=torch.float16)
        assert same.lora_A.weight.dtype is same.lora_B.weight.dtype is torch.float16
        assert LoRALinear.from_linear(nn.Linear(8, 6, device="meta"), 2).lora_A.weight.is_meta

    def test_takes_linear_layers_only(self):
        with pytest.raises(TypeError, match="Conv1d.*nn.Linear"):
            LoRALinear.from_linear(nn.Conv1d(8, 8, 1), 2)

    def test_refuses_a_linear_that_computes_otherwise(self):
        class Packed(nn.Linear):
            def forward(self, x):
                return super().forward(x) * 2

        with pytest.raises(TypeError, match="Packed.*nn.Linear's forward"):
            LoRALinear.from_linear(Packed(8, 8), 2)

    def test_refuses_a_quantized_weight(self):
        quantization = pytest.importorskip("torchao.quantization")
        layer = nn.Sequential(nn.Linear(64, 8))
        quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
        with pytest.raises(TypeError, match="over Int8Tensor; adapt quantized layers with PEFT and lorafuse.patch"):
            LoRALinear.from_linear(layer[0], 2)

    @pytest.mark.parametrize("training", [True, False])
    def test_keeps_the_mode(self, training):
        assert LoRALinear.from_linear(nn.Linear(8, 6).train(training), 2).training == training


@pytest.mark.parametrize("r", [0, -3])
def test_a_wrong_rank_is_said(r):
    with pytest.raises(ValueError, match=f"r={r} .*at least 1"):
        LoRALinear(8, 8, r)


@pytest.mark.parametrize("dropout", [-0.1, 1.5, math.nan])
def test_a_wrong_dropout_is_said(dropout):
    with pytest.raises(ValueError, match=f"dropout={dropout} .*between 0 and 1"):
        LoRALinear(8, 8, 2, dropout=dropout)


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_round_trip(self, dtype):
        layer = trained(LoRALinear(64, 48, 4, alpha=6, dtype=dtype))
        before = layer.weight.clone()
        layer.merge()
        merged = layer.weight.clone()
        assert layer.merged
        assert not torch.equal(merged, before)
        layer.unmerge()
        assert not layer.merged
        # one rounding by each of the two; fp32 sums round once more on the way
        bound = rounding(dtype) * 2 * (merged.double().abs() + before.double().abs()) + 2e-7
        assert ((layer.weight.double() - before.double()).abs() <= bound).all()

    def test_forward_agrees(self):
        layer = trained(LoRALinear(64, 48, 4, alpha=6)).eval()
        x = torch.randn(9, 64)
        apart = layer(x)
        layer.merge()
        assert relative_l2(layer(x), apart) < tolerance(torch.float32)
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        layer.unmerge()
        assert relative_l2(layer(x), apart) < tolerance(torch.float32)

    def test_twice_is_once(self):
        layer = trained(LoRALinear(16, 12, 4))
        layer.unmerge()
        before = layer.weight.clone()
        layer.merge()
        once = layer.weight.clone()
        layer.merge()
        assert torch.equal(layer.weight, once)
        assert not torch.equal(once, before)

    def test_keeps_the_parameter(self):
        layer = trained(LoRALinear(16, 12, 4))
        weight = layer.weight
        layer.merge()
        assert layer.weight is weight
        assert not weight.requires_grad


class TestDropout:
    def layer(self):
        return trained(LoRALinear(64, 48, 4, dropout=0.5))

    def test_training_drops(self):
        layer, x = self.layer().train(), torch.randn(9, 64)
        assert not torch.equal(layer(x), layer(x))
        torch.manual_seed(5)
        y = layer(x)
        torch.manual_seed(5)
        assert torch.equal(layer(x), y)
        torch.manual_seed(5)
        assert torch.equal(by_function(layer, x, dropout_p=0.5), y)

    def test_evaluation_does_not(self):
        layer, x = self.layer().eval(), torch.randn(9, 64)
        assert torch.equal(layer(x), layer(x))
        assert torch.equal(layer(x), by_function(layer, x))


def test_extra_repr():
    layer = LoRALinear(33, 20, 4, alpha=10, dropout=0.1, bias=False)
    text = "in_features=33, out_features=20, bias=False, r=4, scale=2.5, dropout=0.1"
    assert layer.extra_repr() == text
    layer.merge()
    assert layer.extra_repr() == text + ", merged"
    assert text in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_meta(dtype):
    layer = LoRALinear(33, 20, 4, dropout=0.5, device="meta", dtype=dtype)
    assert all(p.is_meta for p in layer.parameters())
    y = layer(torch.empty(2, 5, 33, device="meta", dtype=dtype))
    assert y.is_meta
    assert y.shape == (2, 5, 20)
    assert y.dtype is dtype


def _by_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), _by_torch_save])
def test_copies_are_equal_and_apart(duplicate):
    layer = trained(LoRALinear(33, 20, 4, alpha=10, dropout=0.5)).eval()
    x = torch.randn(5, 33)
    twin = duplicate(layer)
    assert torch.equal(twin(x), layer(x))
    assert repr(twin) == repr(layer)
    trained(twin)
    assert not torch.equal(twin(x), layer(x))


def test_moves_as_modules_do():
    layer = trained(LoRALinear(33, 20, 4)).double()
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert layer(torch.randn(2, 33, dtype=torch.float64)).dtype is torch.float64


class TestStateDict:
    def test_names(self):
        names = {"weight", "bias", "lora_A.weight", "lora_B.weight"}
        assert set(LoRALinear(8, 6, 2).state_dict()) == names
        assert set(LoRALinear(8, 6, 2, bias=False).state_dict()) == names - {"bias"}

    def test_a_base_checkpoint_loads_by_name(self):
        linear, layer = nn.Linear(8, 6), LoRALinear(8, 6, 2)
        missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
        assert set(missing) == {"lora_A.weight", "lora_B.weight"}
        assert unexpected == []
        x = torch.randn(3, 8)
        assert torch.equal(layer(x), linear(x))

    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_an_adapter_file_of_peft_loads_by_name(self, tmp_path, use_rslora):
        peft = pytest.importorskip("peft")
        safetensors = pytest.importorskip("safetensors.torch")
        linear = nn.Linear(33, 20)
        config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["fc"], use_rslora=use_rslora)
        model = peft.get_peft_model(nn.ModuleDict({"fc": copy.deepcopy(linear)}), config)
        module = model.base_model.model["fc"]
        nn.init.normal_(module.lora_B["default"].weight)
        model.save_pretrained(tmp_path)

        prefix = "base_model.model.fc."
        adapter = safetensors.load_file(tmp_path / "adapter_model.safetensors")
        adapter = {name.removeprefix(prefix): tensor for name, tensor in adapter.items()}
        saved = peft.LoraConfig.from_pretrained(tmp_path)
        settings = {"r": saved.r, "alpha": saved.lora_alpha, "use_rslora": saved.use_rslora}
        layer = LoRALinear.from_linear(linear, **settings)
        missing, unexpected = layer.load_state_dict(adapter, strict=False)
        assert set(missing) == {"weight", "bias"}
        assert unexpected == []
        x = torch.randn(7, 33)
        assert relative_l2(layer(x), module(x)) < tolerance(torch.float32)
        assert relative_l2(layer(x), linear(x)) > 0.1
