"""Storage of libraries that is broken, cut short or elsewhere: `lorafuse.patch` names the reason and the fix, and the
operators raise it; nothing is decoded of it.
"""

import warnings

import peft
import pytest
import torch
from quantized_models import adapted, quantize
from torch import nn

import lorafuse
from lorafuse import formats

bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::DeprecationWarning")
N, K = 24, 128


def layer(how):
    """A quantized `nn.Linear [24, 128]`."""
    base = quantize(nn.Sequential(nn.Linear(K, N)), how)[0]
    assert formats.adopt(base) is not None
    return base


def state(**changes):
    """quant_state with other values; each is given the one that it had."""

    def change(base):
        for name, value in changes.items():
            outer, _, inner = name.rpartition("__")
            held = getattr(base.weight.quant_state, outer) if outer else base.weight.quant_state
            setattr(held, inner, value(getattr(held, inner)) if callable(value) else value)

    return change


def of(owner="weight", **changes):
    """The same of the attributes of a weight, or of what else of the layer is named."""

    def change(base):
        for name, value in changes.items():
            held = getattr(base, owner)
            setattr(held, name, value(getattr(held, name)) if callable(value) else value)

    return change


def bytes_of(function):
    def change(base):
        base.weight.data = function(base.weight.data)

    return change


def without_state(base):
    base.weight.quant_state = base.quant_state = None


def without(path):
    """The last of some attributes is not there."""

    def change(base):
        *owners, name = path.split(".")
        held = base
        for owner in owners:
            held = getattr(held, owner)
        delattr(held, name)

    return change


def with_dict(base):
    base.weight.quant_state = base.quant_state = {"absmax": torch.ones(48)}


def strided(t):
    return torch.stack([t, t], -1)[..., 0]


ANEW = "quantize the weight anew"
# how a layer is quantized, what is broken, what is said of it
CASES = {
    "half initialized: no absmax": ("nf4 plain", state(absmax=None), rf"absmax None; .*float32 \[48\].*{ANEW}"),
    "half initialized: no table": ("nf4 plain", state(code=None), rf"code None; .*float32 \[16\].*{ANEW}"),
    "half initialized: no shape": ("nf4 plain", state(shape=None), r"shape \[\]; bitsandbytes decodes a matrix"),
    "half initialized: no dtype": ("nf4", state(dtype=None), "dtype None; bitsandbytes decodes bfloat16, "),
    "half initialized: no offset": ("nf4", state(offset=None), r"offset None; .*float32 \[1\] of nested blocks"),
    "half initialized: no state": ("nf4", without_state, "is not quantized yet: move the model"),
    "half initialized: no such field": ("nf4", without("weight.quant_state.absmax"), rf"missing .*absmax.*{ANEW}"),
    "half initialized: no nested field": ("nf4", without("weight.quant_state.state2.absmax"), "missing or not"),
    "a state that is a dict": ("nf4", with_dict, "a Params4bit has fields that are missing or not what"),
    "a list of scales": ("nf4 plain", state(absmax=torch.Tensor.tolist), "not what its library stores .*'list'"),
    "an offset that is a float": ("nf4", state(offset=float), "not what its library stores .*'float'"),
    "a table of rows": ("nf4 plain", state(code=lambda t: t.view(4, 4)), r"code torch.float32 \[4, 4\]; it is"),
    "scales of rows": ("nf4 plain", state(absmax=lambda t: t.view(24, 2)), r"absmax torch.float32 \[24, 2\]; it is"),
    "a block that is a float": ("nf4", state(blocksize=64.0), r"blocksize 64\.0; bitsandbytes decodes one of 32, "),
    "nested statistics lost": ("nf4", state(state2=None), r"absmax torch.uint8 \[48\]; it is torch.float32"),
    "absmax decoded, not nested": ("fp4", state(absmax=torch.Tensor.float), r"torch.float32 .*; it is torch.uint8"),
    "absmax in bf16": ("nf4 plain", state(absmax=torch.Tensor.bfloat16), "absmax torch.bfloat16"),
    "absmax short": ("nf4 plain", state(absmax=lambda t: t[:-1]), r"absmax torch.float32 \[47\]; it is .*\[48\]"),
    "absmax of one number": ("nf4 plain", state(absmax=lambda t: t[:1]), r"absmax torch.float32 \[1\]; it is .*\[48\]"),
    "another block than absmax has": ("nf4 plain", state(blocksize=128), r"absmax .*\[48\]; it is .*\[24\]"),
    "a short table": ("nf4 plain", state(code=lambda t: t[:8]), r"code torch.float32 \[8\]"),
    "a short nested table": ("nf4", state(state2__code=lambda t: t[:16]), r"state2.code torch.float32 \[16\]"),
    "nested absmax short": ("nf4", state(state2__absmax=lambda t: t[:0]), r"state2.absmax torch.float32 \[0\]"),
    "an unknown type": ("nf4", state(quant_type="nf5"), "quant_type 'nf5'; bitsandbytes decodes one of nf4, fp4"),
    "a block that no kernel has": ("nf4", state(blocksize=48), "blocksize 48; bitsandbytes decodes one of 32, "),
    "transposed": ("nf4", state(shape=lambda s: s[::-1]), "as nn.Linear stores it"),
    "repacked": ("nf4", state(packing_format_for_cpu=True), "was repacked by bitsandbytes .* load the model anew"),
    "a shard": ("nf4", bytes_of(lambda t: t[: len(t) // 2]), "holds 768 bytes .* gather a shard"),
    "strided bytes": ("nf4", bytes_of(strided), r"strides \[2, 2\]; .* make a view contiguous"),
    "int8: not quantized": ("int8", of(CB=None), "is not quantized yet: build its layer"),
    "int8: not quantized, half": ("int8", of(SCB=None), "not quantized yet: build its .* SCB included.* it has no SCB"),
    "int8: CB lost": ("int8", without("weight.CB"), "is not quantized yet: .* it has no CB"),
    "int8: scales lost": ("int8", without("weight.SCB"), "is not quantized yet: .* it has no SCB"),
    "int8: a shard": ("int8", of(CB=lambda t: t[:12]), r"CB torch.int8 \[12, 128\] .*they are int8 \[24, 128\]"),
    "int8: flat": ("int8", of(CB=torch.Tensor.flatten), r"CB torch.int8 \[3072\]"),
    "int8: repacked in tiles": ("int8", of(CB=lambda t: t.view(3, 8, 4, 32).transpose(1, 2)), r"int8 \[3, 4, 8, 32\]"),
    "int8: unsigned": ("int8", of(CB=torch.Tensor.byte), "CB torch.uint8"),
    "int8: a list of scales": ("int8", of(SCB=torch.Tensor.tolist), "not what its library stores .*'list'"),
    "int8: scales of columns": ("int8", of(SCB=lambda t: t.new_ones(K)), r"SCB torch.float32 \[128\]"),
    "int8: scales as torchao has them": ("int8", of(SCB=lambda t: t[:, None]), r"SCB torch.float32 \[24, 1\]"),
    "int8: scales short": ("int8", of(SCB=lambda t: t[:-1]), rf"SCB torch.float32 \[23\]; .*fp32 \[24\]: {ANEW}"),
    "int8: one scale": ("int8", of(SCB=lambda t: t[:1]), r"SCB torch.float32 \[1\]"),
    "int8: scales of integers": ("int8", of(SCB=torch.Tensor.char), "SCB torch.int8"),
    "int8: scales in bf16": ("int8", of(SCB=torch.Tensor.bfloat16), "SCB torch.bfloat16"),
    "int8: transposed": ("int8", of(CB=torch.Tensor.t), r"CB torch.int8 \[128, 24\]"),
    "int8: floats": ("int8", of(CB=torch.Tensor.float), "CB torch.float32"),
    "torchao int8: one scale": ("torchao int8", of(scale=lambda t: t[:1]), rf"torch.float32 \[1, 1\].*{ANEW}"),
    "torchao int8: scales of integers": ("torchao int8", of(scale=torch.Tensor.int), r"torch.int32 \[24, 1\]"),
    "torchao int8: no scales": ("torchao int8", of(scale=None), f"missing .*'NoneType'.*{ANEW}"),
    "torchao int8: no such field": ("torchao int8", without("weight.qdata"), "missing or not .*qdata"),
    "torchao int8: transposed": ("torchao int8", of(qdata=torch.Tensor.t), r"torch.int8 \[128, 24\]"),
    "torchao int8: floats": ("torchao int8", of(qdata=torch.Tensor.float), r"torch.float32 \[24, 128\]"),
    "torchao intx: a scale of rows": ("torchao int4", of(scale=lambda t: t[:, :1]), r"in blocks \[1, 32\] .*\[24, 1\]"),
    "torchao intx: a scale of columns": ("torchao int4", of(scale=lambda t: t[:1]), r"\[1, 4\]"),
    "torchao intx: no scales": ("torchao int4", of(scale=None), "missing or not .*'NoneType'"),
    "torchao intx: no blocks": ("torchao int4", of(block_size=None), "missing or not .*'NoneType'"),
    "torchao intx: blocks of nothing": ("torchao int4", of(block_size=(0, 32)), "missing or not .*ZeroDivisionError"),
    "torchao intx: zero points short": ("torchao int4", of(zero_point=lambda t: t[:1]), r"torch.int8 \[1, 4\]"),
    "torchao intx: blocks that do not divide": ("torchao int4", of(block_size=(1, 48)), r"in blocks \[1, 48\]"),
    "torchao fp8: scales short": ("torchao fp8", of(scale=lambda t: t[:-1]), r"scale torch.float32 \[23, 1\]; blocks"),
    "torchao fp8: scales of integers": ("torchao fp8", of(scale=torch.Tensor.int), "scale torch.int32"),
    "torchao fp8: no scales": ("torchao fp8", of(scale=None), "missing or not .*'NoneType'"),
    "torchao fp8: blocks of text": ("torchao fp8", of(block_size=("1", "128")), r"blocks \('1', '128'\); .*at least 1"),
    "torchao fp8: blocks of nothing": ("torchao fp8", of(block_size=(0, 128)), r"blocks \(0, 128\); .*at least 1"),
    "torchao fp8: 16 bits": ("torchao fp8", of(qdata=torch.Tensor.half), r"Float8Tensor torch.float16"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_with_the_reason_and_the_fix(case):
    how, change, message = CASES[case]
    base = layer(how)
    change(base)
    with pytest.raises(ValueError, match=message) as refusal:
        formats.adopt(base)
    model = nn.Sequential(base)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = "f4" in how, how == "int8"
    model = adapted(model, target_modules=["0"])
    with pytest.warns(UserWarning, match="patched nothing"):
        report = lorafuse.patch(model)
    assert report.skipped[0].reason == f"its base cannot be adopted: {refusal.value}"


def fp8_linear(**changes):
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    made = module.FP8Linear(K, N, (32, 32)).requires_grad_(False)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


class Packed(nn.Module):
    """Tensors by the names that gpt-oss's checkpoints and compressed-tensors give them."""

    def __init__(self, **tensors):
        super().__init__()
        for name, t in tensors.items():
            setattr(self, name, nn.Parameter(t, requires_grad=False))


def nf4_of_torchao(**changes):
    module = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    made = module.to_nf4(torch.randn(128, 128))
    for name, value in changes.items():
        setattr(made, name, value(getattr(made, name)))
    return made


BYTES = torch.zeros(8, 2, 16, dtype=torch.uint8)
# of what PEFT does not adapt: the storage, what is said of it
INCOMPLETE = {
    "fp8: no scale": (lambda: fp8_linear(weight_scale_inv=None), "a Parameter has fields that are missing"),
    "fp8: one size of a block": (lambda: fp8_linear(block_size=(32,)), r"FP8Linear \[24, 128\] has blocks \(32,\)"),
    "mxfp4: no scales": (lambda: Packed(weight_blocks=BYTES), "a Packed .*weight_scales.*checkpoint again"),
    "nvfp4: no scales": (
        lambda: Packed(weight_packed=BYTES[..., 0], weight_global_scale=torch.ones(1)), "a Packed .*weight_scale"
    ),
    "torchao nf4: no scalers": (lambda: nf4_of_torchao(quantized_scalers=lambda t: None), "a NF4Tensor has"),
    "torchao nf4: floats": (lambda: nf4_of_torchao(quantized_scalers=torch.Tensor.float), "uint8, torch.float32, "),
    "torchao nf4: other dtypes": (lambda: nf4_of_torchao(nf4=torch.Tensor.bfloat16), "bfloat16; they are uint8, int8"),
}  # fmt: skip


@pytest.mark.parametrize("case", INCOMPLETE)
def test_what_is_incomplete_is_refused(case):
    make, message = INCOMPLETE[case]
    with pytest.raises(ValueError, match=message):
        formats.adopt(make())


def in_state(base):
    """As the first forward leaves a layer."""
    base.init_8bit_state()
    return base


STATES = {
    "CB lost": (of("state", CB=None), "is not quantized yet: .* it has no CB"),
    "SCB lost": (of("state", SCB=None), "is not quantized yet: .* it has no SCB"),
    "scales short": (of("state", SCB=lambda t: t[1:]), r"SCB torch.float32 \[23\]"),
    "transposed": (of("state", CB=torch.Tensor.t), r"CB torch.int8 \[128, 24\]"),
    "trained, and used": (of("state", has_fp16_weights=True), "is not quantized yet: .* it has has_fp16_weights=True"),
}


@pytest.mark.parametrize("case", STATES)
def test_the_state_of_an_int8_layer(case):
    """It holds the weight from the first forward on."""
    change, message = STATES[case]
    base = in_state(layer("int8"))
    assert base.weight.CB is None
    assert formats.adopt(base).data is base.state.CB
    model = nn.Sequential(base)
    model.is_loaded_in_8bit = True
    model = adapted(model, target_modules=["0"])
    change(base)
    with pytest.raises(ValueError, match=message) as refusal:
        formats.adopt(base)
    with pytest.warns(UserWarning, match="patched nothing"):
        report = lorafuse.patch(model)
    reasons = f"its base cannot be adopted: {refusal.value}", "its base is a Linear8bitLt with has_fp16_weights=True"
    assert report.skipped[0].reason.startswith(reasons)


def test_an_int8_layer_without_its_state_is_left_to_peft():
    model = adapted(quantize(nn.Sequential(nn.Linear(K, N)), "int8"), target_modules=["0"])
    base = in_state(model.base_model.model[0].base_layer)
    del base.state
    with pytest.warns(UserWarning, match="patched nothing"):
        report = lorafuse.patch(model)
    assert "is not quantized yet" in report.skipped[0].reason


def test_embeddings_are_held_by_their_own_sizes():
    layer = bnb.nn.Embedding8bit(10, 64)
    layer.weight = bnb.nn.Int8Params(torch.randn(10, 64), has_fp16_weights=False, requires_grad=False)
    assert formats.adopt(layer.to("cpu")).sizes == (10, 64)


ELSEWHERE = {
    "absmax": ("nf4 plain", state(absmax=lambda t: t.to("meta")), "statistics"),
    "nested absmax": ("nf4", state(state2__absmax=lambda t: t.to("meta")), "statistics"),
    "bytes": ("int8", of(CB=lambda t: t.to("meta")), "data"),
    "scales": ("int8", of(SCB=lambda t: t.to("meta")), "statistics"),
    "torchao's scales": ("torchao fp8", of(scale=lambda t: t.to("meta")), "statistics"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_lies_on_another_device_is_named_by_the_call(case):
    """quant_state left behind, or a weight that was offloaded without its scales."""
    how, change, what = ELSEWHERE[case]
    base = layer(how)
    change(base)
    model = nn.Sequential(base)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = "f4" in how, how == "int8"
    model = adapted(model, target_modules=["0"])
    lorafuse.patch(model, strict=True)
    with pytest.raises(
        ValueError, match=rf"x on cpu and the {what} of a .* weight on meta; .* move them with \.to\(\)"
    ):
        model(torch.randn(2, K))


def test_what_accelerate_offloads_is_left_to_its_hooks():
    accelerate = pytest.importorskip("accelerate")
    model = adapted(quantize(nn.Sequential(nn.Linear(K, N)), "nf4"), target_modules=["0"])
    accelerate.hooks.add_hook_to_module(model.base_model.model[0].base_layer, accelerate.hooks.ModelHook())
    with pytest.warns(UserWarning, match="patched nothing"):
        report = lorafuse.patch(model)
    assert report.skipped[0].reason == "its base layer has hooks or a replaced forward"


@pytest.mark.parametrize("how", ["nf4 plain", "int8", "torchao fp8"])
def test_scales_that_are_not_finite_are_noted(how):
    """They are the library's values, which a patched layer computes with as the library does."""
    model = adapted(quantize(nn.Sequential(nn.Linear(K, N)), how), target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorafuse.patch(model)
    formats.adopt(model.base_model.model[0].base_layer).statistics[0].view(-1)[0] = float("nan")
    with pytest.warns(UserWarning, match=r"1 quantized weights have scales that are NaN .* base_model.model.0: load"):
        report = lorafuse.patch(model)
    assert len(report.patched) == 1
    assert peft.tuners.lora.LoraLayer in type(model.base_model.model[0]).__mro__
