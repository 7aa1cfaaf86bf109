"""A merge that is undone bit for bit (T1), where PEFT's own unmerge drifts."""

import copy

import pytest
import torch
from quantized_models import adapted
from test_patch_quantized import Mlp, mlp, step
from torch import nn

import lorafuse
from lorafuse.integrations import merge_exact

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::RuntimeWarning:peft", "ignore::DeprecationWarning"
)


def made(how, **settings):
    torch.manual_seed(0)
    if how != "dense":
        return mlp(how, **settings)
    return adapted(Mlp().to(torch.bfloat16), target_modules=["up", "down"], **settings)


def x_of(how):
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
    return x.to(torch.bfloat16) if how == "dense" else x


def bases(model):
    return [module.get_base_layer() for module in model.modules() if hasattr(module, "lora_A")]


def stored(model):
    """The parameters of the base layers, and copies of all that a checkpoint would hold of them."""
    parameters = [p for base in bases(model) for p in base.parameters()]
    return parameters, [{k: copy.deepcopy(v) for k, v in base.state_dict().items()} for base in bases(model)]


def same_weights(model, states):
    return [
        all(torch.equal(_plain(v), _plain(state[k])) for k, v in base.state_dict().items() if "weight" in k)
        for base, state in zip(bases(model), states, strict=True)
    ]


def _plain(t):
    return t.dequantize() if "torchao" in type(t).__module__ else t


@pytest.mark.parametrize("is_patched", [False, True], ids=["PEFT", "patched"])
@pytest.mark.parametrize("how", ["dense", "nf4", "fp4", "int8", "torchao int8"])
def test_undone_it_is_what_it_was(how, is_patched):
    model, x = made(how, lora_bias=not how.startswith("torchao")), x_of(how)
    stock = copy.deepcopy(model)
    if is_patched:
        lorafuse.patch(model, strict=True)
    expected, (parameters, states) = step(model, x), stored(model)
    addresses = [p.data_ptr() for p in parameters if "torchao" not in type(p).__module__]
    stock.merge_adapter()
    for _ in range(3):
        with merge_exact(model), torch.no_grad():
            assert torch.equal(model(x), stock(x))
            assert same_weights(model, states) == [False, False]
    again, _ = stored(model)
    assert all(map(lambda p, q: p is q, again, parameters))
    assert [p.data_ptr() for p in again if "torchao" not in type(p).__module__] == addresses
    assert same_weights(model, states) == [True, True]
    assert all(torch.equal(b.bias, s["bias"]) for b, s in zip(bases(model), states, strict=True) if "bias" in s)
    actual = step(model, x)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_a_thousand_cycles():
    model = made("dense")
    stock, (_, states) = copy.deepcopy(model), stored(model)
    for _ in range(1000):
        merge_exact(model).undo()
    assert same_weights(model, states) == [True, True]
    for _ in range(20):
        stock.merge_adapter()
        stock.unmerge_adapter()
    assert same_weights(stock, states) == [False, False]


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_pefts_unmerge_of_a_quantized_base_drifts(how):
    model = made(how)
    _, states = stored(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert same_weights(model, states) == [False, False]


def test_dora_keeps_no_norm_of_the_merge():
    model = made("dense", use_dora=True)
    expected = step(model, x_of("dense"))
    merge_exact(model).undo()
    assert not any(module._caches for module in model.modules() if hasattr(module, "lora_A"))
    actual = step(model, x_of("dense"))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_a_merge_that_fails_leaves_the_model_as_it_was():
    model = made("dense")
    _, states = stored(model)
    down = model.base_model.model.down
    down.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        merge_exact(model, safe_merge=True)
    assert same_weights(model, states) == [True, True]
    assert not any(module.merged_adapters for module in model.modules() if hasattr(module, "lora_A"))


def test_pefts_unmerge_before_it_is_undone():
    model = made("nf4")
    _, states = stored(model)
    merge = merge_exact(model)
    model.unmerge_adapter()
    merge.undo()
    merge.undo()
    assert same_weights(model, states) == [True, True]


class TestRefused:
    def test_no_adapters(self):
        with pytest.raises(ValueError, match="a Mlp; it takes a PeftModel with LoRA layers"):
            merge_exact(Mlp())

    def test_merged_already(self):
        model = made("dense")
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"merged adapters \(default\): unmerge them first"):
            merge_exact(model)

    def test_shards(self):
        class Shard(nn.Parameter):
            pass

        model = made("dense")
        base = model.base_model.model.up.base_layer
        base.weight = Shard(base.weight.data, requires_grad=False)
        with pytest.raises(ValueError, match="a base parameter that is a Shard: gather its shards first"):
            merge_exact(model)

    def test_moved_in_between(self):
        model = made("dense")
        merge = merge_exact(model)
        model.to("meta")
        with pytest.raises(ValueError, match="is on meta, what was kept of it on cpu: move the model back"):
            merge.undo()
