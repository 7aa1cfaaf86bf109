"""FP8, MXFP4 and NVFP4 as transformers and compressed-tensors hold them: decoded bit for bit, and held by reference."""

import pytest
import torch
from transformers import PretrainedConfig
from transformers.integrations import finegrained_fp8 as hf_fp8
from transformers.integrations import mxfp4 as hf_mxfp4

from lorafuse import formats
from lorafuse.formats import mxfp4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CONFIG = PretrainedConfig(hidden_size=320, moe_intermediate_size=192, num_experts=3, hidden_act="silu")
needs_5_23 = pytest.mark.skipif(
    not hasattr(hf_fp8, "_dequantize_fp8_weight"),
    reason="transformers >= 5.23 decodes FP8 for backward, and has FP4 experts",
)


def fill(module):
    """Random parameters, with every finite value of FP8 and scales of all sizes; frozen."""
    every = torch.arange(256, dtype=torch.uint8)
    every = every[every.view(torch.float8_e4m3fn).float().isfinite()]
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        data = parameter.data.view(-1)
        if "scale" in name:
            values = torch.rand(data.shape).mul_(2.0 ** torch.randint(-9, 3, data.shape))
            data.copy_(values.log2().ceil().exp2() if data.element_size() == 1 else values)
        elif data.element_size() == 1:
            picked = every[torch.randint(len(every), data.shape)]
            picked[: len(every)] = every[: len(picked)]
            data.view(torch.uint8).copy_(picked)
    return module


def fp8_linear(sizes=(200, 328), **settings):
    return fill(hf_fp8.FP8Linear(sizes[1], sizes[0], **settings))


def expected(layer, dtype, name="weight"):
    scale = getattr(layer, f"{name}_scale_inv")
    return hf_fp8._dequantize_fp8_weight(getattr(layer, name), scale, layer.block_size, dtype)


class TestFP8Linear:
    @needs_5_23
    @by_dtype
    @pytest.mark.parametrize("sizes", [(256, 384), (200, 328), (64, 96), (129, 1)], ids=str)
    @pytest.mark.parametrize("block", [(128, 128), (64, 32), None], ids=str)
    @pytest.mark.parametrize("scale", ["float", "ue8m0"])
    def test_exact(self, scale, block, sizes, dtype):
        layer = fp8_linear(sizes, block_size=block, scale_fmt=scale)
        w = formats.adopt(layer)
        assert w.stored == sizes
        assert w.data.data_ptr() == layer.weight.data_ptr()
        assert w.statistics[0].data_ptr() == layer.weight_scale_inv.data_ptr()
        actual = w.decoded(dtype).data
        assert actual.abs().max() > 0
        assert torch.equal(actual, expected(layer, dtype))

    @needs_5_23
    @by_dtype
    def test_rows(self, dtype):
        layer = fp8_linear(block_size=None)
        layer.weight_scale_inv = torch.nn.Parameter(torch.rand(200, 1), requires_grad=False)
        w = formats.adopt(layer)
        assert w.format == "fp8:block=1x328;scale=rounded"
        assert torch.equal(w.decoded(dtype).data, expected(layer, dtype))

    def test_orders_of_rounding_differ(self):
        """A scale that is no bf16 number: one of fp32 rounded once is not transformers' result."""
        w = formats.adopt(fp8_linear(block_size=(128, 128)))
        once = formats.load("fp8").decode(w.data, w.statistics, "block=128x128", torch.bfloat16)
        assert not torch.equal(w.decoded(torch.bfloat16).data, once)

    def test_exponents_as_bytes(self):
        layer = fp8_linear(block_size=(128, 128), scale_fmt="ue8m0")
        actual = formats.adopt(layer).decoded(torch.float32).data
        layer.weight_scale_inv = torch.nn.Parameter(layer.weight_scale_inv.view(torch.uint8), requires_grad=False)
        assert torch.equal(formats.adopt(layer).decoded(torch.float32).data, actual)

    def test_refused_or_left_alone(self):
        layer = fp8_linear(block_size=(128, 128))
        layer.weight_scale_inv = torch.nn.Parameter(torch.rand(2, 2), requires_grad=False)
        message = r"FP8Linear .* \[200, 328\] has a scale torch.float32 \[2, 2\]; blocks 128x128 make it .*\[2, 3"
        with pytest.raises(ValueError, match=message):
            formats.adopt(layer)
        dense = hf_fp8.FP8Linear(32, 16)
        dense.weight = torch.nn.Parameter(torch.randn(16, 32))
        assert formats.adopt(dense) is None
        assert formats.adopt(layer, "bias") is None
        if hasattr(hf_fp8, "FP8GroupedLinear"):
            grouped = fill(hf_fp8.FP8GroupedLinear(128, 256, 2, block_size=(128, 128)))
            with pytest.raises(ValueError, match="multiplies 2 slices of its input"):
                formats.adopt(grouped)


class TestFP8Experts:
    @needs_5_23
    @by_dtype
    @pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
    def test_exact(self, name, dtype):
        experts = fill(hf_fp8.FP8Experts(CONFIG, block_size=(128, 128)))
        w = formats.adopt(experts, name)
        assert w.stored == tuple(getattr(experts, name).shape)
        assert w.data.data_ptr() == getattr(experts, name).data_ptr()
        right = expected(experts, dtype, name)
        assert torch.equal(w.decoded(dtype).data, right)
        assert torch.equal(w.select(1, 3).decoded(dtype).data, right[1:])
        assert formats.adopt(experts) is None

    def test_one_scale_a_half(self):
        """Without blocks gate and up have one scale each."""
        experts = fill(hf_fp8.FP8Experts(CONFIG))
        assert experts.gate_up_proj_scale_inv.shape == (3, 2, 1)
        scale = experts.gate_up_proj_scale_inv.repeat_interleave(192, 1)
        actual = formats.adopt(experts, "gate_up_proj").decoded(torch.float32).data
        assert torch.equal(actual, experts.gate_up_proj.float() * scale)
        actual = formats.adopt(experts, "down_proj").decoded(torch.float32).data
        assert torch.equal(actual, experts.down_proj.float() * experts.down_proj_scale_inv)

    @needs_5_23
    @by_dtype
    @pytest.mark.parametrize("scale", ["float", "ue8m0"])
    def test_of_fp4(self, scale, dtype):
        experts = fill(hf_fp8.FP8Experts(CONFIG, expert_dtype="fp4", scale_fmt=scale))
        assert experts.down_proj.dtype is torch.int8
        w = formats.adopt(experts, "down_proj")
        assert w.stored == (3, 320, 192)
        assert w.data.data_ptr() == experts.down_proj.data_ptr()
        right = hf_fp8.Fp8Dequantize(None)._dequantize_one(experts.down_proj, experts.down_proj_scale_inv, dtype)
        actual = w.decoded(dtype).data
        assert actual.abs().max() > 0
        assert torch.equal(actual, right)


class TestMXFP4:
    @pytest.fixture
    def tensors(self):
        blocks = torch.randint(0, 256, (3, 40, 2, 16), dtype=torch.uint8)
        return blocks, torch.randint(100, 140, (3, 40, 2), dtype=torch.uint8)

    @by_dtype
    def test_exact(self, dtype, tensors):
        """gpt-oss's decoded stack is transposed."""
        w = mxfp4.weight(*tensors)
        assert w.stored == (3, 40, 64)
        assert w.data.data_ptr() == tensors[0].data_ptr()
        assert w.statistics[0].data_ptr() == tensors[1].data_ptr()
        right = hf_mxfp4.convert_moe_packed_tensors(*tensors, dtype=dtype)
        assert torch.equal(w.decoded(dtype).data.mT, right)
        assert torch.equal(w.select(2, 3).t.decoded(dtype).left(), right[2:])

    def test_every_scale(self):
        """Down to subnormal numbers, up to infinity and NaN."""
        blocks, scales = torch.arange(256, dtype=torch.uint8).repeat(16), torch.arange(256, dtype=torch.uint8)
        tensors = blocks.view(1, 16, 16, 16), scales.view(1, 16, 16)
        actual = mxfp4.weight(*tensors).decoded(torch.bfloat16).data.mT
        right = hf_mxfp4.convert_moe_packed_tensors(*tensors)
        torch.testing.assert_close(actual, right, rtol=0, atol=0, equal_nan=True)

    def test_a_module_as_a_checkpoint(self, tensors):
        experts = torch.nn.Module()
        experts.register_buffer("up_blocks", tensors[0])
        experts.register_buffer("up_scales", tensors[1])
        assert formats.adopt(experts, "up").data.data_ptr() == tensors[0].data_ptr()
        assert formats.adopt(experts, "down") is None

    def test_refused(self, tensors):
        blocks, scales = tensors
        for wrong in ((blocks, scales[:2]), (blocks.float(), scales), (blocks, scales.int())):
            with pytest.raises(ValueError, match=r"MXFP4 blocks .* and scales .*; blocks are bytes"):
                mxfp4.weight(*wrong)
        config = PretrainedConfig(num_local_experts=2, hidden_size=64, intermediate_size=32)
        with pytest.raises(ValueError, match=r"holds down_proj in the order of its kernels: load with Mxfp4Config"):
            formats.adopt(hf_mxfp4.Mxfp4GptOssExperts(config), "down_proj")


class TestNVFP4:
    def layer(self):
        layer = torch.nn.Linear(32, 4, bias=False)
        packed = torch.arange(64, dtype=torch.uint8).mul(37).view(4, 16)
        scale = torch.tensor([[0.5, 448.0], [3.25, 0.001953125], [72.0, 15.0], [0.0, 1.125]])
        del layer.weight
        layer.weight_packed = torch.nn.Parameter(packed, requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(scale.to(torch.float8_e4m3fn), requires_grad=False)
        layer.weight_global_scale = torch.nn.Parameter(torch.tensor([1234.5]), requires_grad=False)
        return layer

    def test_as_compressed_tensors_decodes(self):
        """What compressed-tensors 0.20.1 decodes of this layer, as little-endian bf16."""
        layer = self.layer()
        w = formats.adopt(layer)
        assert w.stored == (4, 32)
        assert w.data.data_ptr() == layer.weight_packed.data_ptr()
        assert w.statistics[0].data_ptr() == layer.weight_scale.data_ptr()
        assert bytes(w.decoded(torch.bfloat16).data.view(torch.uint8).flatten().tolist()).hex() == DECODED

    @by_dtype
    def test_by_its_formula(self, dtype):
        w = formats.adopt(self.layer())
        scale, divisor = w.statistics
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nibbles = torch.stack((w.data & 15, w.data >> 4), -1).view(4, 32).long()
        values = torch.where(nibbles < 8, values[nibbles & 7], -values[nibbles & 7])
        right = values * (scale.float() / divisor).repeat_interleave(16, 1)
        assert torch.equal(w.decoded(dtype).data, right.to(dtype))

    def test_transformers(self):
        nvfp4 = pytest.importorskip("transformers.integrations.nvfp4")
        given, layer = self.layer(), nvfp4.NVFP4Linear.__new__(nvfp4.NVFP4Linear)
        # its constructor loads the kernel
        torch.nn.Module.__init__(layer)
        layer.weight = torch.nn.Buffer(torch.empty(4, 32, dtype=torch.bfloat16))
        layer.weight_sf_rowmajor = torch.nn.Buffer(given.weight_scale.view(torch.uint8))
        layer.weight_global_scale = torch.nn.Buffer(given.weight_global_scale)
        with pytest.raises(ValueError, match=r"NVFP4Linear holds torch.bfloat16 \[4, 32\] .*: load its quantized"):
            formats.adopt(layer)
        layer.weight = torch.nn.Buffer(given.weight_packed)
        w = formats.adopt(layer)
        assert w.data.data_ptr() == given.weight_packed.data_ptr()
        assert torch.equal(w.decoded(torch.float32).data, formats.adopt(given).decoded(torch.float32).data)

    def test_other_packings_are_left_alone(self):
        layer = self.layer()
        layer.weight_packed = torch.nn.Parameter(layer.weight_packed.view(torch.int32), requires_grad=False)
        assert formats.adopt(layer) is None


# decoded by compressed_tensors.compressors.nvfp4.base.NVFP4PackedCompressor.decompress
DECODED = (
    "000000009f3ad439d4b9543a1fbbd43a543a54b954b91fbad4ba9fba1f3a00000080ba3e8bbf3a3fba3e0b400b403abe3abf0bbf3a3eba"
    "bfba3f00000bbfba3e0000013c013c813c2dbbadba81bc81bbad3b2dbcadba00002dbc2d3b813b013c00801f379fb654b5d43554b61f37"
    "d4b654b6000054351f36d4369f361fb61f3700006fbd333eefbd6fbd6fbeb3be0000ef3db33defbc333e6fbeb33eb33d6fbd0080c7bc15"
    "bd47bd473cc73b953d953cc7bc153dc73b0080473d47bc95bcc7bc00000080000000000080000000800000000000800080008000800080"
    "000000800080ef3933bbb33a6f3a6f3bb33b0080efba6fbaef3933bb6f3bb3bbb3baef39"
)
