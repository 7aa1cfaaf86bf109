"""A patched model lives as any PEFT model does (T1): disabled, merged, copied, saved, loaded, unloaded."""

import copy
import io
import pickle

import peft
import pytest
import torch
from tiny_models import (
    adapted,
    adapted_twice,
    assert_close,
    assert_same_model,
    counting_fused,
    inputs_of,
    lora_config,
    patched_copy,
    run,
    tiny,
    train_away_from_zero,
)

import lorafuse
from lorafuse.integrations import hf_peft
from lorafuse.testing.numerics import relative_l2, tolerance


class TestInsideABlock:
    """States that last for a block of code."""

    def models(self):
        stock = adapted_twice()
        return stock, patched_copy(stock, strict=True)[0]

    def test_disable_adapter(self):
        stock, patched = self.models()
        inputs = inputs_of(stock)
        with patched.disable_adapter(), counting_fused() as calls, torch.no_grad():
            y = patched(**inputs).logits
        assert calls.call_count == 0
        with stock.disable_adapter(), torch.no_grad():
            assert torch.equal(y, stock(**inputs).logits)
        with counting_fused() as calls:
            assert_close(run(patched), run(stock))
        assert calls.call_count == 14

    def test_merge_adapter(self):
        stock, patched = self.models()
        apart = run(stock)["logits"]
        for model in (stock, patched):
            model.merge_adapter()
        with torch.no_grad(), counting_fused() as calls:
            y, expected = (model(**inputs_of(model)).logits for model in (patched, stock))
        assert calls.call_count == 0
        assert torch.equal(y, expected)
        assert_close({"y": y}, {"y": apart})
        # disabling a merged adapter unmerges it, and it stays so
        with patched.disable_adapter(), stock.disable_adapter(), torch.no_grad():
            assert torch.equal(patched(**inputs_of(patched)).logits, stock(**inputs_of(stock)).logits)
        assert_close(run(patched), run(stock))

    @pytest.mark.parametrize("train", [False, True])
    def test_mixed_batches(self, train):
        stock, patched = self.models()
        names = ["default", "__base__", "other", "default"]
        inputs = inputs_of(stock, batch=4)
        if train:
            with pytest.raises(ValueError, match="training mode"):
                stock.train()(**inputs, adapter_names=names)
            stock.eval()
        with torch.no_grad(), counting_fused() as calls:
            y, expected = (model(**inputs, adapter_names=names).logits for model in (patched.train(train), stock))
            # of the operator of one adapter
            assert calls.call_count == 0
            assert_close({"y": y}, {"y": expected})
            # each row is what its adapter gives alone
            patched.set_adapter("other")
            alone = patched(**inputs).logits
        assert_close({"y": y[2]}, {"y": alone[2]})

    def test_rescale_adapter_scale(self):
        stock, patched = self.models()
        with peft.helpers.rescale_adapter_scale(patched, 0.5), peft.helpers.rescale_adapter_scale(stock, 0.5):
            scaled = run(patched)
            assert_close(scaled, run(stock))
        assert (scaled["logits"] - run(patched)["logits"]).norm() > 0.01 * scaled["logits"].norm()


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_torch_save])
def test_copies_are_patched_and_apart(duplicate):
    stock = adapted_twice()
    patched, _ = patched_copy(stock)
    twin = duplicate(patched)
    with counting_fused() as calls:
        assert_same_model(twin, stock)
    assert calls.call_count == 14
    train_away_from_zero(twin, "default")
    assert_same_model(patched, stock)
    assert lorafuse.unpatch(twin) == 14
    assert len(lorafuse.patch(patched).patched) == 14
    assert isinstance(patched.base_model.model.model.layers[0].mlp.up_proj, hf_peft.FusedLinear)


class TestFiles:
    def test_a_saved_adapter_loads_into_peft(self, tmp_path):
        patched, _ = patched_copy(adapted_twice())
        patched.save_pretrained(tmp_path)
        stock = peft.PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True).eval()
        stock.load_adapter(tmp_path / "other", "other", is_trainable=True)
        for name in ("default", "other"):
            for model in (stock, patched):
                model.set_adapter(name)
            assert_same_model(patched, stock)
        assert "lorafuse" not in (tmp_path / "adapter_config.json").read_text().lower()

    def test_load_adapter_into_a_patched_model(self, tmp_path):
        donor = adapted(r=5)
        train_away_from_zero(donor).save_pretrained(tmp_path)
        stock = adapted()
        patched, _ = patched_copy(stock)
        for model in (stock, patched):
            model.load_adapter(tmp_path, "loaded", is_trainable=True)
            model.set_adapter("loaded")
        with counting_fused() as calls:
            assert_same_model(patched.eval(), stock.eval())
        assert calls.call_count == 14
        assert relative_l2(run(patched)["logits"], run(donor.eval())["logits"]) <= tolerance(torch.float32)

    @pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
    def test_leaving_peft(self, method):
        stock = adapted()
        patched, _ = patched_copy(stock)
        apart = run(stock)["logits"]
        plain, expected = getattr(patched, method)(), getattr(stock, method)()
        assert not any("lora" in type(module).__module__ for module in plain.modules())
        with torch.no_grad():
            y = plain(**inputs_of(plain)).logits
            assert torch.equal(y, expected(**inputs_of(expected)).logits)
        assert (relative_l2(y, apart) <= tolerance(torch.float32)) == (method == "merge_and_unload")

    def test_counts_of_parameters(self, capsys):
        stock = adapted()
        patched, _ = patched_copy(stock)
        stock.print_trainable_parameters()
        expected = capsys.readouterr().out
        patched.print_trainable_parameters()
        assert capsys.readouterr().out == expected
        assert "trainable params: 3,520" in expected
        assert patched.get_model_status() == stock.get_model_status()


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_is_saved_while_adapters_are_off(groups, grad):
    """A reference policy's log-probabilities: what the frozen model computes, and no more kept than it keeps."""
    frozen = tiny().requires_grad_(False)
    patched = train_away_from_zero(peft.get_peft_model(tiny(), lora_config()), "lora_B").eval()
    lorafuse.patch(patched, groups=groups)
    saved, ids = [], torch.randint(64, (2, 7))

    def run(model):
        saved.clear()
        with (
            torch.set_grad_enabled(grad),
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda t: t),
        ):
            return model(ids).logits, len(saved)

    with patched.disable_adapter():
        actual, count = run(patched)
    expected, least = run(frozen)
    assert torch.equal(actual, expected)
    assert count == least == 0
