"""torchao's weight-only tensors: decoded bit for bit as torchao does, held by reference, and refused with a fix."""

import pytest
import torch

from lorafuse import formats

ao = pytest.importorskip("torchao.quantization")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def adversarial(sizes, dtype):
    w = torch.randn(sizes, dtype=dtype)
    w[0] = 0
    w[1] = torch.finfo(dtype).smallest_normal
    w[2, 5] = torch.finfo(dtype).max / 4
    w[3] = w[3].abs()
    return w


by_values = pytest.mark.parametrize("make", [torch.randn, adversarial], ids=["random", "adversarial"])


def quantized(config, w):
    linear = torch.nn.Linear(*reversed(w.shape), bias=False, dtype=w.dtype)
    linear.weight = torch.nn.Parameter(w, requires_grad=False)
    ao.quantize_(linear, config)
    return linear


def assert_exact(storage, weight, *held):
    w = formats.adopt(storage)
    assert w.stored == tuple(weight.shape)
    decoded = w.decoded(weight.dtype).data
    # torchao's scale of a row of zeros in FP8 is 0, its data NaN
    assert decoded.nan_to_num().abs().max() > 0
    torch.testing.assert_close(decoded, weight.dequantize(), rtol=0, atol=0, equal_nan=True)
    assert [t.data_ptr() for t in (w.data, *w.statistics)] == [t.data_ptr() for t in held]
    return w


@by_values
@by_dtype
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, None], ids=["blocks", "rows"])
@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
def test_intx(make, dtype, bits, group, mapping):
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    config = ao.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group) if group else PerAxis(0),
        mapping_type=MappingType[mapping],
    )
    linear = quantized(config, make((24, 96), dtype=dtype))
    weight = linear.weight
    w = assert_exact(linear, weight, weight.qdata, weight.scale, weight.zero_point)
    assert w.format == f"intx:block=1x{group or 96};dtype={str(dtype).removeprefix('torch.')}"


@by_values
@by_dtype
@pytest.mark.parametrize("kind", ["per tensor", "zero points"])
def test_int8_that_is_not_by_rows(make, dtype, kind):
    linear = quantized(ao.Int8WeightOnlyConfig(), make((24, 96), dtype=dtype))
    weight = linear.weight
    if kind == "zero points":
        weight.zero_point = torch.randint(-128, 128, weight.zero_point.shape, dtype=torch.int8)
    else:
        weight.scale, weight.zero_point = weight.scale[3:4], weight.zero_point[3:4]
        weight.block_size = [24, 96]
    w = assert_exact(linear, weight, weight.qdata, weight.scale, weight.zero_point)
    assert w.format_name == "intx"


@by_values
@by_dtype
@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8(make, dtype, fp8):
    linear = quantized(ao.Float8WeightOnlyConfig(weight_dtype=fp8), make((24, 96), dtype=dtype))
    w = assert_exact(linear, linear.weight, linear.weight.qdata, linear.weight.scale)
    assert w.format == "fp8:block=1x96"


@by_dtype
@pytest.mark.parametrize("block", [(24, 96), (8, 32), (1, 24)], ids=str)
def test_float8_blocks(dtype, block):
    from torchao.quantization import Float8Tensor

    w = torch.randn(24, 96, dtype=dtype)
    scale = torch.rand(24 // block[0], 96 // block[1]) * 0.01
    weight = Float8Tensor(w.to(torch.float8_e4m3fn), scale, block_size=list(block), dtype=dtype)
    assert_exact(weight, weight, weight.qdata, scale)


@pytest.mark.parametrize("config", ["int8", "fp8", "intx"])
def test_stacks(config):
    """Experts as torchao quantizes them, `[E, N, K]`."""
    from torchao.quantization.granularity import PerRow

    w = torch.randn(3, 24, 96)
    if config == "int8":
        weight = ao.Int8Tensor.from_hp(w, PerRow())
    elif config == "fp8":
        weight = ao.Float8Tensor.from_hp(w, granularity=PerRow())
    else:
        weight = ao.IntxUnpackedToInt8Tensor.from_hp(w, (1, 1, 32), torch.int4)
    experts = torch.nn.Module()
    experts.up = torch.nn.Parameter(weight, requires_grad=False)
    adopted = formats.adopt(experts, "up")
    assert adopted.stored == (3, 24, 96)
    assert torch.equal(adopted.decoded(torch.float32).data, weight.dequantize())
    part = adopted.select(1, 3)
    assert part.data.data_ptr() == weight.qdata[1].data_ptr()
    assert torch.equal(part.decoded(torch.float32).data, weight.dequantize()[1:])


def test_blocks_of_several_matrices():
    weight = ao.IntxUnpackedToInt8Tensor.from_hp(torch.randn(4, 24, 96), (2, 8, 32), torch.int4)
    w = formats.adopt(weight)
    assert torch.equal(w.decoded(torch.float32).data, weight.dequantize())
    with pytest.raises(ValueError, match="has blocks 2x8x32 of several matrices"):
        w.select(1, 3)


class TestNF4:
    @by_values
    @by_dtype
    @pytest.mark.parametrize(("block", "outer"), [(64, 256), (32, 128)])
    def test_exact(self, make, dtype, block, outer):
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

        weight = to_nf4(make((256, 128), dtype=dtype), block, outer)
        w = formats.adopt(weight)
        assert w.stored == (256, 128)
        expected = weight.get_original_weight()
        assert expected.isfinite().any()
        torch.testing.assert_close(w.decoded(dtype).data, expected, rtol=0, atol=0, equal_nan=True)
        held = weight.quantized_data, weight.quantized_scalers, weight.quantization_factor, weight.scaler_mean
        assert [t.data_ptr() for t in (w.data, *w.statistics)] == [t.data_ptr() for t in (*held, weight.nf4)]

    def test_another_dtype_is_rounded_last(self):
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

        weight = to_nf4(torch.randn(256, 64, dtype=torch.bfloat16))
        expected = weight.get_original_weight().float()
        assert torch.equal(formats.adopt(weight).decoded(torch.float32).data, expected)

    def test_refused(self):
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

        weight = to_nf4(torch.randn(256, 128))
        with pytest.raises(ValueError, match=r"NF4Tensor \[256, 128\] with strides \[1, 128\] .* is no whole matrix"):
            formats.adopt(weight.t())
        with pytest.raises(ValueError, match="of a stack"):
            formats.adopt(weight).select(0, 1)


class TestRefused:
    def check(self, storage, message):
        with pytest.raises(ValueError, match=message):
            formats.adopt(storage)

    def test_quantized_activations(self):
        from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs

        w = torch.randn(24, 96, dtype=torch.bfloat16)
        linear = quantized(ao.Int8DynamicActivationInt8WeightConfig(), w.clone())
        self.check(linear, r"Int8Tensor \[24, 96\] has act_quant_kwargs, .*no gradient: quantize with Int8WeightOnly")
        self.check(linear.weight, "no gradient")
        config = ao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=ao.granularity.PerGroup(32)
        )
        self.check(quantized(config, w.clone()), "has activation_quantization, with which torchao has no gradient")
        kwargs = QuantizeTensorToFloat8Kwargs()
        fp8 = ao.Float8Tensor(w.to(torch.float8_e4m3fn), torch.ones(24, 1), [1, 96], act_quant_kwargs=kwargs)
        self.check(fp8, "has act_quant_kwargs, .* quantize with Float8WeightOnlyConfig")

    def test_int4(self):
        """Its quantizers run on a GPU alone."""
        packed, scale = torch.zeros(24, 48, dtype=torch.uint8), torch.ones(3, 24)
        weight = ao.Int4Tensor(packed, scale, scale, [1, 32], torch.Size((24, 96)))
        self.check(weight, r"Int4Tensor \[24, 96\] cannot be adopted: int4 has no gradient there; quantize with Int8")

    def test_activations_in_low_precision(self):
        mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
        weight = mx.MXTensor.to_mx(torch.randn(32, 64), torch.float8_e4m3fn, 32)
        self.check(weight, r"MXTensor \[32, 64\] cannot be adopted: its products quantize activations too")

    def test_a_class_that_nobody_knows(self):
        """What a later version adds is refused by its base class."""
        from torchao.utils import TorchAOBaseTensor

        class Tensor(TorchAOBaseTensor):
            tensor_data_names = ("qdata",)

            def __new__(cls, qdata):
                return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=torch.float32)

        self.check(
            Tensor(torch.zeros(2, 3)), r"torchao's Tensor \[2, 3\] is not a format lorafuse reads; quantize with"
        )
