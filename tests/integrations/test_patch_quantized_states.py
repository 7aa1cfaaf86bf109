"""Patched layers over quantized bases through their life (T1): adapters come and go, and storage moves."""

import copy
import io
import pickle

import peft
import pytest
import torch
from quantized_models import FORMATS, adapted, exact, quantize
from test_patch_quantized import Mlp, assert_equal_to_peft, counting, mlp, patched_copy, step
from torch import nn

import lorafuse
from lorafuse.testing.numerics import relative_l2, tolerance

bnb = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::RuntimeWarning:peft", "ignore::DeprecationWarning"
)


def x_of(rows=21, dtype=torch.float32):
    return torch.randn(rows, 128, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_adapters_come_and_go(how):
    stock = mlp(how)
    patched, _ = patched_copy(stock)
    second = peft.LoraConfig(r=3, lora_alpha=9, target_modules=["up", "down"], init_lora_weights=False)
    for model in (stock, patched):
        torch.manual_seed(5)
        model.add_adapter("second", second)
        model.set_adapter("second")
    lorafuse.patch(patched, strict=True)
    assert_equal_to_peft(step(patched, x_of()), step(stock, x_of()))
    for model in (stock, patched):
        model.base_model.set_adapter(["default", "second"])
    with counting() as calls:
        both = step(patched, x_of())
    assert calls.call_count == 2
    assert_equal_to_peft(both, step(stock, x_of()))
    with counting() as calls, patched.disable_adapter(), stock.disable_adapter():
        assert torch.equal(patched(x_of()), stock(x_of()))
    assert calls.call_count == 0
    for model in (stock, patched):
        model.set_adapter("default")
        model.delete_adapter("second")
    assert_equal_to_peft(step(patched, x_of()), step(stock, x_of()))


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_merging_is_pefts(how):
    """The weight is quantized anew at each merge, in place or as a new parameter: the next forward reads that."""
    stock = mlp(how)
    patched, _ = patched_copy(stock)
    for model in (stock, patched):
        model.merge_adapter()
    assert torch.equal(patched(x_of()), stock(x_of()))
    for model in (stock, patched):
        model.unmerge_adapter()
    with counting() as calls:
        actual = step(patched, x_of())
    assert calls.call_count == 2
    assert_equal_to_peft(actual, step(stock, x_of()))


@pytest.mark.parametrize("how", FORMATS)
def test_unpatched_it_is_what_it_was(how):
    model = mlp(how)
    classes = [type(m) for m in model.modules()]
    states = [m.__dict__.keys() for m in model.modules()]
    expected = step(model, x_of())
    lorafuse.patch(model, strict=True)
    assert {type(m).__module__.partition(".")[0] for m in model.modules() if hasattr(m, "lora_A")} == {"lorafuse"}
    step(model, x_of())
    assert lorafuse.unpatch(model) == 2
    assert [type(m) for m in model.modules()] == classes
    assert [m.__dict__.keys() for m in model.modules()] == states
    actual = step(model, x_of())
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_copies_and_files(how, tmp_path):
    patched, _ = patched_copy(mlp(how))
    expected = step(patched, x_of())
    with counting() as calls:
        again = step(copy.deepcopy(patched), x_of())
        # bitsandbytes' own parameters keep their layer, which plain pickle takes in
        file = io.BytesIO()
        torch.save(patched, file)
        file.seek(0)
        loaded = step(torch.load(file, weights_only=False), x_of())
    assert calls.call_count == 4
    assert pickle.loads(pickle.dumps(type(patched.base_model.model.up))) is type(patched.base_model.model.up)
    for result in (again, loaded):
        assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())
    patched.save_pretrained(tmp_path)
    stock = peft.PeftModel.from_pretrained(quantize(Mlp(), how), tmp_path, is_trainable=True)
    other = {n: p.detach() for n, p in stock.named_parameters() if "lora_" in n}
    assert other
    assert all(torch.equal(p, other[n]) for n, p in patched.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_storage_that_is_replaced(how):
    """Loading another checkpoint and a cast of the module are seen by the next forward."""
    stock = mlp(how)
    patched, _ = patched_copy(stock)
    step(patched, x_of())
    torch.manual_seed(9)
    other = quantize(Mlp(), how)
    for model in (stock, patched):
        for name in ("up", "down"):
            base, new = model.base_model.model.get_submodule(name).base_layer, getattr(other, name)
            base.weight, base.bias = copy.deepcopy(new.weight), new.bias
            if how == "int8":
                base.state.CB = base.state.SCB = None
            else:
                base.quant_state = base.weight.quant_state
        model.to(torch.bfloat16).to("cpu")
    x = x_of(dtype=torch.bfloat16)
    actual, expected = step(patched, x), step(stock, x)
    reference = step(exact(stock), x.double())
    for name, tensor in reference.items():
        assert relative_l2(expected[name], tensor) <= tolerance(torch.bfloat16), name
        assert relative_l2(actual[name], tensor) <= tolerance(torch.bfloat16), name


def test_a_quant_state_that_the_parameter_lost():
    """FSDP puts a plain parameter of the same bytes there; the layer keeps the state."""
    stock = mlp()
    patched, _ = patched_copy(stock)
    for name in ("up", "down"):
        base = patched.base_model.model.get_submodule(name).base_layer
        base.weight = nn.Parameter(base.weight.data, requires_grad=False)
    with counting() as calls:
        actual = step(patched, x_of())
    assert calls.call_count == 2
    assert_equal_to_peft(actual, step(stock, x_of()))


class TestLeftToPeft:
    def reason(self, model):
        with pytest.warns(UserWarning, match="patched nothing"):
            report = lorafuse.patch(model)
        assert report.patched == []
        assert len(report.skipped) == 2
        return report.skipped[0].reason

    def test_not_quantized_yet(self):
        base = Mlp()
        base.up, base.down = bnb.nn.Linear4bit(128, 192), bnb.nn.Linear4bit(192, 128, bias=False)
        base.is_loaded_in_4bit = True
        reason = self.reason(adapted(base, target_modules=["up", "down"]))
        assert "is not quantized yet: move the model to its device first" in reason

    def test_weights_that_are_trained_in_int8(self):
        base = Mlp()
        base.up, base.down = (bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=True) for sizes in ((128, 192), (192, 128)))
        base.is_loaded_in_8bit = True
        assert "has_fp16_weights=True" in self.reason(adapted(base, target_modules=["up", "down"]))

    def test_a_forward_of_its_own(self, monkeypatch):
        stock = mlp()
        expected = step(stock, x_of())
        own = bnb.nn.Linear4bit.forward
        monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: own(self, x) * 2)
        assert self.reason(stock) == "its base is a Linear4bit, not an nn.Linear"
        monkeypatch.undo()
        patched, _ = patched_copy(stock)
        monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: own(self, x) * 1)
        with pytest.warns(UserWarning, match="runs as PEFT ships it: its base is a Linear4bit"), counting() as calls:
            actual = step(patched, x_of())
        assert calls.call_count == 0
        assert_equal_to_peft(actual, expected)

    def test_a_variant(self):
        model = mlp()
        for layer in (model.base_model.model.up, model.base_model.model.down):
            layer.lora_variant["default"] = peft.tuners.lora.variants.QALoraLinearVariant()
        assert "variant of LoRA (QALora)" in self.reason(model)

    def test_weights_repacked_for_inference(self):
        """CPUs with AVX512-BF16: a forward in eval mode without gradients repacks the weight, in PEFT's path alone."""
        stock = mlp(compute_dtype=torch.bfloat16)
        patched, _ = patched_copy(stock)
        base = patched.base_model.model.up.base_layer
        with torch.no_grad():
            before = patched.eval()(x_of())
            assert not getattr(base.weight.quant_state, "packing_format_for_cpu", False)
            # what that forward of bitsandbytes does
            base.weight.data, state = bnb.functional._convert_weight_packed_for_cpu(
                base.weight.data, base.weight.quant_state
            )
            base.weight.quant_state = base.quant_state = state
        if not base.support_avx512bf16_for_cpu:
            assert "was repacked by bitsandbytes" in str(lorafuse.patch(patched))
            return
        with torch.no_grad(), pytest.warns(UserWarning, match="was repacked by bitsandbytes for inference"):
            after = patched(x_of())
        assert relative_l2(after, before) <= tolerance(torch.bfloat16)
        assert "was repacked" in str(lorafuse.patch(patched))
