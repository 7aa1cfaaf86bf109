"""What PEFT does to a model may happen before `patch` or after it (T1): fused or not, the results are PEFT's."""

import types
import warnings

import peft.utils.hotswap
import pytest
import torch
from tiny_models import (
    adapted_twice,
    assert_close,
    counting_fused,
    inputs_of,
    lora_config,
    patched_copy,
    run,
    train_away_from_zero,
)
from torch import nn

import lorafuse
from lorafuse.integrations import hf_common

# What is done to a model whose adapters are "default" (14 layers, active) and "other" (4 of them): the number of layers
# that run fused afterwards, and why the others do not, if anybody needs to be told.
STATES = {}


def state(fused, reason=None):
    def register(function):
        STATES[function.__name__] = function, fused, reason
        return function

    return register


def layer_of(model):
    """The layer that a state alters: one with both adapters."""
    return model.base_model.model.model.layers[1].mlp.down_proj


@state(14)
def nothing(model):
    pass


@state(4)
def set_adapter(model):
    model.set_adapter("other")


@state(14)
def set_adapter_to_both(model):
    model.base_model.set_adapter(["default", "other"])


@state(4)
def delete_adapter(model):
    model.delete_adapter("default")
    model.set_adapter("other")


@state(14)
def delete_the_other_adapter(model):
    model.delete_adapter("other")


@state(14)
def add_adapter_and_switch(model):
    torch.manual_seed(21)
    model.add_adapter("third", lora_config(r=2, use_rslora=True))
    train_away_from_zero(model.eval(), "third").set_adapter("third")


@state(14)
def add_weighted_adapter_and_switch(model):
    model.set_adapter("default")
    torch.manual_seed(21)
    model.add_adapter("third", lora_config(r=4))
    train_away_from_zero(model.eval(), "third")
    model.base_model.add_weighted_adapter(["default", "third"], [0.5, 2.0], "mix", combination_type="linear")
    model.base_model.set_adapter("mix")


@state(14)
def rename_nothing_but_load_a_state_dict(model):
    weights = {name: tensor * 0.5 for name, tensor in model.state_dict().items() if "lora_" in name}
    model.load_state_dict(weights, strict=False)


@state(14)
def set_scale(model):
    layer_of(model).set_scale("default", 3.0)


@state(14)
def scale_layer(model):
    layer_of(model).scale_layer(0.25)


@state(14)
def scale_and_unscale(model):
    layer_of(model).scale_layer(0.25)
    layer_of(model).unscale_layer()


@state(14)
def scales_as_tensors(model):
    peft.utils.hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    assert isinstance(layer_of(model).scaling["default"], torch.Tensor)
    # this layer's is a float again, the others' are not
    layer_of(model).set_scale("default", 3.0)


@state(14)
def merge_and_unmerge(model):
    model.merge_adapter()
    model.unmerge_adapter()


@state(14)
def freeze_a(model):
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


@state(14)
def replace_a_parameter(model):
    layer_of(model).lora_A["default"].weight = nn.Parameter(torch.ones(4, 40) / 7)


@state(14)
def train_the_base_bias(model):
    layer_of(model).base_layer.bias.requires_grad_(True)


@state(14)
def convert_to_double(model):
    model.double()


@state(13, "its adapter is a variant of LoRA (Velora)")
def add_a_velora_adapter_and_switch(model):
    model.delete_adapter("default")
    torch.manual_seed(21)
    model.add_adapter("default", lora_config(exclude_modules=r".*1\.mlp\.down_proj"))
    model.delete_adapter("other")
    velora = peft.tuners.lora.config.VeloraConfig(num_groups=4)
    model.add_adapter("other", lora_config(target_modules=r".*1\.mlp\.down_proj", velora_config=velora))
    train_away_from_zero(model.eval(), "lora_A")
    train_away_from_zero(model.eval(), "lora_B").base_model.set_adapter(["default", "other"])


@state(13, "its base layer has hooks or a replaced forward")
def hook_on_the_base(model):
    layer_of(model).base_layer.register_forward_hook(lambda module, args, y: y * 1.5)


@state(13, "its base layer has hooks or a replaced forward")
def hook_before_the_base(model):
    layer_of(model).base_layer.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


@state(13, "its base layer has hooks or a replaced forward")
def backward_hook_on_the_base(model):
    layer_of(model).base_layer.register_full_backward_hook(lambda module, dx, dy: (dx[0] * 1.5,))


@state(13, "its base layer has hooks or a replaced forward")
def backward_pre_hook_on_the_base(model):
    layer_of(model).base_layer.register_full_backward_pre_hook(lambda module, dy: (dy[0] * 1.5,))


@state(13, "its base layer has hooks or a replaced forward")
def replaced_forward_of_the_base(model):
    base = layer_of(model).base_layer
    base.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x) * 1.5, base)


@state(13, "not a plain nn.Linear without hooks")
def hook_on_lora_a(model):
    layer_of(model).lora_A["default"].register_forward_hook(lambda module, args, y: y * 1.5)


@state(13, "not a plain nn.Linear without hooks")
def hook_on_lora_b(model):
    layer_of(model).lora_B["default"].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


@state(13, "its dropout has hooks or a replaced forward")
def hook_on_the_dropout(model):
    layer_of(model).lora_dropout["default"].register_forward_hook(lambda module, args, y: y * 1.5)


@state(13, "not nn.Dropout")
def dropout_of_another_type(model):
    layer_of(model).lora_dropout["default"] = nn.Tanh()


@state(13, "its base weight is trainable")
def train_the_base(model):
    layer_of(model).base_layer.weight.requires_grad_(True)


@state(13, "its base weight is parametrized (_WeightNorm), not an ordinary parameter")
def parametrized_base_weight(model):
    nn.utils.parametrizations.weight_norm(layer_of(model).base_layer)
    layer_of(model).base_layer.requires_grad_(False)


@state(13, "its base bias is parametrized (Tanh), not an ordinary parameter")
def parametrized_base_bias(model):
    nn.utils.parametrize.register_parametrization(layer_of(model).base_layer, "bias", nn.Tanh())
    layer_of(model).base_layer.requires_grad_(False)


@state(13, "not a plain nn.Linear without hooks")
def parametrized_lora_a(model):
    nn.utils.parametrize.register_parametrization(layer_of(model).lora_A["default"], "weight", nn.Tanh())


@state(13, "its lora_A has a bias")
def bias_of_a(model):
    layer_of(model).lora_A["default"].bias = nn.Parameter(torch.ones(4))


class TwiceLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@state(13, "its base is a TwiceLinear, not an nn.Linear")
def base_of_another_class(model):
    layer_of(model).base_layer.__class__ = TwiceLinear


@state(13)
def disable_one_layer(model):
    layer_of(model).enable_adapters(False)


@state(13)
def merge_one_layer(model):
    layer_of(model).merge()
    for name, parameter in model.named_parameters():
        if "1.mlp.down_proj.lora_" in name:
            parameter.requires_grad_(False)


# A merged or disabled layer has no adapter gradients on either side.
WITHOUT_GRADIENTS = {"disable_one_layer": "1.mlp.down_proj.lora_"}


@pytest.fixture(autouse=True)
def _quiet():
    hf_common.warn_once.cache_clear()
    with warnings.catch_warnings():
        # `other` is a second adapter with weights of its own, which PEFT mentions when it is deleted or merged
        warnings.filterwarnings("ignore", module="peft")
        yield


def results_of(name, model):
    inputs = inputs_of(model)
    results = run(model, inputs)
    prefix = WITHOUT_GRADIENTS.get(name)
    return {n: t for n, t in results.items() if not (prefix and prefix in n)}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", STATES)
def test_state(name, order):
    change, fused, reason = STATES[name]
    stock = adapted_twice("llama with biases")
    # hooks and replaced methods do not survive a copy as they should, so each model is changed by itself
    patched = adapted_twice("llama with biases")
    change(stock)
    if order == "before":
        change(patched)
        report = lorafuse.patch(patched)
        assert [reason in skipped.reason for skipped in report.skipped] == [True] * (reason is not None)
        assert all(skipped.name.endswith("layers.1.mlp.down_proj") for skipped in report.skipped)
    else:
        report = lorafuse.patch(patched, strict=True)
        assert len(report.patched) == 14
        change(patched)
    expected = results_of(name, stock)
    with warnings.catch_warnings(record=True) as caught, counting_fused() as calls:
        warnings.simplefilter("always")
        got = results_of(name, patched)
    assert_close(got, expected)
    assert calls.call_count == fused
    text = [str(w.message) for w in caught if "runs as PEFT ships it" in str(w.message)]
    assert len(text) == (order == "after" and reason is not None)
    assert all(reason in message for message in text)
    if order == "after" and reason is not None:
        # patching again says what every forward finds
        assert [reason in skipped.reason for skipped in lorafuse.patch(patched).skipped] == [True]


def test_the_states_differ():
    """A state that changes nothing would test nothing."""
    alike = {"delete_the_other_adapter", "scale_and_unscale", "merge_and_unmerge", "freeze_a", "train_the_base"}
    alike |= {"train_the_base_bias", "convert_to_double", "merge_one_layer", "parametrized_base_weight"}
    alike |= {"backward_hook_on_the_base", "backward_pre_hook_on_the_base"}
    with torch.no_grad():
        plain = adapted_twice("llama with biases")
        plain = plain(**inputs_of(plain)).logits.double()
        for name in STATES.keys() - alike - {"nothing"}:
            model = adapted_twice("llama with biases")
            STATES[name][0](model)
            difference = model(**inputs_of(model)).logits.double() - plain
            assert difference.norm() > 1e-3 * plain.norm(), name


def test_a_hook_that_is_removed_lets_the_layer_run_fused_again():
    stock = adapted_twice()
    patched, _ = patched_copy(stock, strict=True)
    handle = layer_of(patched).base_layer.register_forward_hook(lambda module, args, y: None)
    with pytest.warns(UserWarning, match="hooks"), counting_fused() as calls:
        assert_close(run(patched), run(stock))
    assert calls.call_count == 13
    handle.remove()
    with counting_fused() as calls:
        assert_close(run(patched), run(stock))
    assert calls.call_count == 14


def test_the_warning_comes_once():
    patched, _ = patched_copy(adapted_twice(), strict=True)
    for layer in patched.base_model.model.model.layers:
        layer.mlp.up_proj.base_layer.register_forward_hook(lambda module, args, y: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(patched)
        run(patched)
    assert len([w for w in caught if "runs as PEFT ships it" in str(w.message)]) == 1


def test_hooks_on_the_layer_itself_run():
    """They surround the forward that `patch` replaces, so the layer stays fused."""
    stock, patched = adapted_twice(), adapted_twice()
    lorafuse.patch(patched, strict=True)
    for model in (stock, patched):
        layer_of(model).register_forward_hook(lambda module, args, y: y * 1.5)
        layer_of(model).register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
        layer_of(model).register_full_backward_hook(lambda module, dx, dy: (dx[0] * 1.5,))
    with counting_fused() as calls:
        assert_close(run(patched), run(stock))
    assert calls.call_count == 14


def wrap_forward(layer):
    """As accelerate's hooks do: the class's forward is kept and called from an attribute of the object."""
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 1.5


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_wrapped_forward(order):
    stock, patched = adapted_twice(), adapted_twice()
    wrap_forward(layer_of(stock))
    if order == "before":
        wrap_forward(layer_of(patched))
        report = lorafuse.patch(patched)
        assert [skipped.reason for skipped in report.skipped] == [
            "its forward was replaced before lorafuse.patch: patch before that, where the model allows it"
        ]
    else:
        lorafuse.patch(patched, strict=True)
        wrap_forward(layer_of(patched))
    with counting_fused() as calls:
        assert_close(run(patched), run(stock))
    assert calls.call_count == (13 if order == "before" else 14)
