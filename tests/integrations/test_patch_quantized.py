"""Patched layers over quantized bases (T1): what PEFT gives on the same base, in the dtypes in which it computes."""

import copy
from unittest import mock

import peft
import pytest
import tiny_families
import torch
from quantized_models import FORMATS, adapted, exact, family, quantize
from torch import nn

import lorafuse
from lorafuse.backends import aten_wide
from lorafuse.integrations import hf_quantized
from lorafuse.testing.numerics import assert_three_way, relative_l2, tolerance

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::RuntimeWarning:peft", "ignore::DeprecationWarning"
)

# decoders and how many linear layers of each are adapted: of the common layout, with norms in attention, other
# norms, one projection for gate and up, and with biases and no gate
FAMILIES = {"llama": 14, "qwen3": 14, "gemma3": 14, "phi3": 8, "opt": 12, "gpt_neox": 8}


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(128, 192), nn.Linear(192, 128, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.up(x)))


def mlp(how="nf4", dtype=torch.float32, compute_dtype=None, **settings):
    return adapted(quantize(Mlp().to(dtype), how, compute_dtype), target_modules=["up", "down"], **settings)


def patched_copy(stock):
    patched = copy.deepcopy(stock)
    return patched, lorafuse.patch(patched, strict=True)


def counting():
    return mock.patch.object(hf_quantized, "run_linear", wraps=hf_quantized.run_linear)


def step(model, x, autocast=False):
    """The result and every gradient by its name, of x and a fixed loss."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad} | gradients


def assert_equal_to_peft(actual, expected):
    assert actual.keys() == expected.keys()
    assert {k: t.dtype for k, t in actual.items()} == {k: t.dtype for k, t in expected.items()}
    assert all(t.any() for t in expected.values())
    errors = {name: relative_l2(actual[name], tensor) for name, tensor in expected.items()}
    assert {name: error for name, error in errors.items() if error > tolerance(torch.float32)} == {}


def total_error(actual, reference):
    return sum(relative_l2(actual[name], tensor) for name, tensor in reference.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name):
    stock = family(name)
    patched, report = patched_copy(stock)
    assert set(report.bases.values()) == {FORMATS["nf4"]}
    assert len(report.patched) == len(report.bases) == FAMILIES[name]
    assert f"  patched  {FAMILIES[name]:5d}  linear     eager over NF4, block 64, nested" in str(report).splitlines()
    expected = tiny_families.step(stock)
    with counting() as calls:
        actual = tiny_families.step(patched)
    assert calls.call_count == FAMILIES[name]
    assert_equal_to_peft(actual, expected)


@pytest.mark.parametrize(
    ("how", "settings"),
    # PEFT has no lora_bias over torchao
    [(how, {}) for how in FORMATS] + [("nf4", {"lora_bias": True}), ("int8", {"lora_bias": True, "use_rslora": True})],
)
def test_a_format_in_fp32(how, settings):
    stock = mlp(how, **settings)
    patched, report = patched_copy(stock)
    assert report.bases["base_model.model.up"] == FORMATS[how]
    x = torch.randn(3, 7, 128)
    with counting() as calls:
        actual = step(patched, x)
    assert calls.call_count == 2
    assert_equal_to_peft(actual, step(stock, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nf4_of_torchao(dtype):
    """PEFT's plain layer over an `nn.Linear`, which holds an `NF4Tensor` of at least 16384 elements."""
    tensors = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    layers = nn.Linear(128, 256), nn.Linear(256, 128, bias=False)
    for layer in layers:
        weight = tensors.to_nf4(layer.weight.data.to(dtype))
        layer.to(dtype).weight = nn.Parameter(weight, requires_grad=False)
    stock = adapted(nn.Sequential(layers[0], nn.SiLU(), layers[1]), target_modules=["0", "2"])
    patched, report = patched_copy(stock)
    assert set(report.bases.values()) == {"NF4 TORCHAO, block 64, nested"}
    x = torch.randn(3, 7, 128, dtype=dtype)
    with counting() as calls:
        actual = step(patched, x)
    assert calls.call_count == 2
    expected = step(stock, x)
    if dtype is torch.float32:
        assert_equal_to_peft(actual, expected)
    else:
        reference = step(exact(stock), x.double())
        assert total_error(actual, reference) <= total_error(expected, reference)


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)],
    ids=["bf16", "bf16 under autocast", "fp32 under autocast"],
)
def test_a_format_in_bf16(how, dtype, autocast):
    stock = mlp(how, dtype, torch.bfloat16)
    patched, _ = patched_copy(stock)
    x = torch.randn(3, 7, 128).to(dtype)
    reference = step(exact(stock), x.double())
    actual, expected = step(patched, x, autocast), step(stock, x, autocast)
    assert {k: t.dtype for k, t in actual.items()} == {k: t.dtype for k, t in expected.items()}
    for name, tensor in actual.items():
        assert_three_way(name, tensor, expected[name], reference[name])
    # elsewhere PEFT adds in fp32
    if dtype is torch.bfloat16:
        assert total_error(actual, reference) <= total_error(expected, reference)


@pytest.mark.parametrize("has_products", [False, True], ids=["fp32 products", "bf16 products"])
@pytest.mark.parametrize("factor", [0.1, 1, 10])
def test_bf16_on_a_cpu_is_no_further_from_the_truth_than_peft(factor, has_products, monkeypatch):
    """Whether the CPU multiplies bf16 or not, with a low-rank path below the base and above it."""
    monkeypatch.setattr(aten_wide, "has_products", lambda dtype: has_products)
    stock = mlp("nf4", torch.bfloat16, torch.bfloat16)
    for name, p in stock.named_parameters():
        if "lora_B" in name:
            p.data.mul_(factor)
    patched, _ = patched_copy(stock)
    x = torch.randn(64, 128).to(torch.bfloat16)
    reference = step(exact(stock), x.double())
    actual, expected = step(patched, x), step(stock, x)
    assert total_error(actual, reference) <= total_error(expected, reference)
    for name in ("y", "dx"):
        assert relative_l2(actual[name], reference[name]) <= 1.01 * relative_l2(expected[name], reference[name])


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compute_dtypes(compute_dtype, autocast, dtype):
    """A Linear4bit computes in its own dtype, or that of the first x, whatever x and autocast are."""
    stock = mlp("nf4", dtype, compute_dtype)
    patched, _ = patched_copy(stock)
    x = torch.randn(3, 7, 128).to(dtype)
    reference = step(exact(stock), x.double())
    actual, expected = step(patched, x, autocast), step(stock, x, autocast)
    assert {k: t.dtype for k, t in actual.items()} == {k: t.dtype for k, t in expected.items()}
    layers = [model.base_model.model.up.base_layer for model in (patched, stock)]
    assert layers[0].compute_dtype is layers[1].compute_dtype is (compute_dtype or dtype)
    half = dtype in (torch.bfloat16, compute_dtype) or compute_dtype in (torch.bfloat16, torch.float16) or autocast
    for name, tensor in actual.items():
        if half:
            assert_three_way(name, tensor.to(torch.bfloat16), expected[name].to(torch.bfloat16), reference[name])
        else:
            assert relative_l2(tensor, expected[name]) <= tolerance(torch.float32), name


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_wider_x_is_not_rounded_where_a_cpu_multiplies_in_fp32(dtype, autocast, compute_dtype, monkeypatch):
    """`prepare_model_for_kbit_training` leaves x in fp32, and PEFT's low-rank path with it."""
    monkeypatch.setattr(hf_quantized, "HAS_PRODUCTS", {torch.bfloat16: False, torch.float16: False})
    stock = mlp("nf4", torch.float32, compute_dtype)
    patched, _ = patched_copy(stock)
    x = torch.randn(3, 7, 128).to(dtype)
    reference = step(exact(stock), x.double())
    with counting() as calls:
        actual = step(patched, x, autocast)
    expected = step(stock, x, autocast)
    assert [call.args[0].dtype for call in calls.call_args_list] == 2 * [
        dtype if dtype is compute_dtype else torch.float32
    ]
    assert {k: t.dtype for k, t in actual.items()} == {k: t.dtype for k, t in expected.items()}
    assert total_error(actual, reference) <= total_error(expected, reference)


def fp8(block_size=(32, 64), dtype=torch.float32, **settings):
    """Adapters over transformers' FP8Linear, whose own forward needs a GPU, and over what its weights decode to."""
    torch.manual_seed(0)
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    dense, base = Mlp().to(dtype), Mlp()
    for name, layer in list(dense.named_children()):
        quantized = module.FP8Linear(layer.in_features, layer.out_features, block_size, has_bias=layer.bias is not None)
        quantized.weight.data = layer.weight.data.mul(16).to(torch.float8_e4m3fn)
        quantized.weight_scale_inv.data = torch.rand(quantized.weight_scale_inv.shape) / 16
        if layer.bias is not None:
            quantized.bias = layer.bias
        scale = quantized.weight_scale_inv
        layer.weight.data = module._dequantize_fp8_weight(quantized.weight.data, scale.data, block_size, dtype)
        setattr(base, name, quantized.requires_grad_(False))
    models = [adapted(model, target_modules=["up", "down"], **settings) for model in (base, dense)]
    # PEFT rounds the adapters of such a base to its dtype once
    models[1].load_state_dict({k: t for k, t in models[0].state_dict().items() if "lora_" in k}, strict=False)
    return models


@pytest.mark.parametrize("block_size", [(32, 64), None], ids=["blocks", "one scale"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fp8_of_transformers(block_size, dtype):
    """y is that of the decoded weight, in x's dtype: FP8Linear itself quantizes x too."""
    model, dense = fp8(block_size, dtype)
    report = lorafuse.patch(model, strict=True)
    assert report.bases["base_model.model.up"] == ("FP8, block 32x64" if block_size else "FP8, block 192x128")
    assert lorafuse.patch(dense, strict=True).bases == {}
    x = torch.randn(3, 7, 128).to(dtype)
    with counting() as calls:
        actual = step(model, x)
    assert calls.call_count == 2
    assert_equal_to_peft(actual, step(dense, x))


def test_fp8_with_a_calibrated_scale_of_x():
    model, _ = fp8()
    for name in ("up", "down"):
        model.base_model.model.get_submodule(name).base_layer.activation_scheme = "static"
    with pytest.warns(UserWarning, match="patched nothing"):
        report = lorafuse.patch(model)
    assert "activation_scheme='static'" in report.skipped[0].reason


@pytest.mark.parametrize("method", ["gptq", "hqq"])
def test_a_format_that_is_not_read(method, monkeypatch):
    model = mlp()
    for name in ("up", "down"):
        layer = model.base_model.model.get_submodule(name)
        bases, module = (nn.Module, peft.tuners.lora.LoraLayer), f"peft.tuners.lora.{method}"
        layer.__class__ = type("QuantLinear", bases, {"__module__": module})
    with pytest.warns(UserWarning, match="patched nothing"):
        report = lorafuse.patch(model)
    assert f"its base is quantized by {method.upper()}, which lorafuse does not read" in report.skipped[0].reason


@pytest.mark.parametrize(
    ("rows", "on_gpu", "grad", "how", "expected"),
    [
        (1, True, False, "nf4", True),
        (16, True, False, "fp4", True),
        (17, True, False, "nf4", False),
        (1, False, False, "nf4", False),
        (1, True, True, "nf4", False),
        (1, True, False, "int8", False),
    ],
)
def test_few_rows_on_a_gpu_are_left_to_the_librarys_kernel(rows, on_gpu, grad, how, expected):
    base = mlp(how).base_model.model.up.base_layer
    assert hf_quantized.is_quantized(type(base))
    x = mock.Mock(is_cuda=on_gpu, shape=(rows, 128), numel=lambda: rows * 128)
    with torch.set_grad_enabled(grad):
        assert hf_quantized.multiplies_packed(base, x) is expected


def test_a_layer_left_to_the_librarys_kernel_gives_what_peft_gives():
    stock = mlp()
    patched, _ = patched_copy(stock)
    x = torch.randn(3, 128)
    with mock.patch("lorafuse.integrations.hf_peft.multiplies_packed", return_value=True), counting() as calls:
        assert torch.equal(patched(x), stock(x))
    assert not calls.called
