"""`patch` looks and changes nothing (T1): no tensor is computed, names stay PEFT's, and the report tells the truth."""

import copy
import pickle
import sys

import moe_models
import peft
import pytest
import torch
import warm_python
from tiny_models import adapted, adapted_twice, assert_close, lora_config, tiny, token_ids, train_away_from_zero
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import lorafuse
from lorafuse.integrations import hf_experts, hf_peft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning:peft", "ignore::FutureWarning")


class NothingRuns(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} ran")


def several_adapters():
    model = adapted_twice("llama with biases", lora_bias=True)
    model.base_model.set_adapter(["default", "other"])
    return model


def several_experts_adapters():
    model = moe_models.adapted("qwen3_moe")
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize("make", [several_adapters, several_experts_adapters])
def test_nothing_is_computed(make):
    model = make()
    with NothingRuns():
        report = lorafuse.patch(model, strict=True, groups=False)
    assert report.patched


class NothingIsRead(TorchDispatchMode):
    def __init__(self, model):
        super().__init__()
        self.pointers = {parameter.data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(isinstance(t, torch.Tensor) and t.data_ptr() in self.pointers for t in args), f"{func} ran"
        return func(*args, **(kwargs or {}))


def test_an_mlp_is_known_without_its_weights():
    model = several_adapters()
    with NothingIsRead(model):
        report = lorafuse.patch(model)
    assert any(group.kind == "gated_mlp" for group in report.groups)


@pytest.mark.parametrize("base", ["cpu", "meta"])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_adapters_on_meta(base, lora_bias, bias):
    config = peft.LoraConfig(r=2, target_modules=["0"], lora_bias=lora_bias)
    model = nn.Sequential(nn.Linear(8, 6, bias=bias, device=base))
    model = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    assert len(lorafuse.patch(model, strict=True).patched) == 1


def test_experts_on_meta():
    with torch.device("meta"):
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=moe_models.targets("mixtral"))
        model = peft.get_peft_model(moe_models.base("mixtral"), config)
    assert lorafuse.patch(model, strict=True).patched


def test_an_offloaded_base():
    accelerate = pytest.importorskip("accelerate")
    model = adapted()
    accelerate.cpu_offload(model)
    report = lorafuse.patch(model)
    assert len(report.skipped) == 14
    assert {skipped.reason for skipped in report.skipped} == {"its base layer has hooks or a replaced forward"}


def placed(base, folder, where):
    """A model that a `device_map` spreads, its last block `where`; hooks stand on every layer."""
    accelerate = pytest.importorskip("accelerate")
    names = "model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"
    device_map = dict.fromkeys(names, "cpu") | {"model.layers.1": where}
    return accelerate.dispatch_model(base, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_device_map(family, tmp_path):
    """accelerate's hooks on layers that stay in memory move x, and nothing else."""
    if family == "llama":
        base, targets = tiny(), {}
    else:
        base = moe_models.base(family)
        targets = {"target_modules": ["q_proj"], "target_parameters": moe_models.targets(family)}
    stock = peft.get_peft_model(copy.deepcopy(base), lora_config(**targets), autocast_adapter_dtype=False)
    model = peft.get_peft_model(placed(base, tmp_path, "cpu"), lora_config(**targets), autocast_adapter_dtype=False)
    train_away_from_zero(stock)
    model.load_state_dict(stock.state_dict())
    lorafuse.patch(model, strict=True)
    ids = token_ids()
    losses = [one(input_ids=ids, labels=ids).loss for one in (model, stock)]
    for loss in losses:
        loss.backward()
    expected = {name: p.grad for name, p in stock.named_parameters() if p.requires_grad}
    assert_close({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, expected)
    status = lorafuse.status(model)
    assert (status.fused, status.fallbacks) == (len(status.layers), 0)


def test_a_device_map_that_offloads_a_block(tmp_path):
    model = peft.get_peft_model(placed(tiny(), tmp_path, "disk"), lora_config())
    report = lorafuse.patch(model)
    assert all("layers.0." in patched.name for patched in report.patched)
    assert len(report.patched) == len(report.skipped) == 7
    assert {skipped.reason for skipped in report.skipped} == {"its base layer has hooks or a replaced forward"}


@pytest.mark.parametrize("make", [adapted, lambda: moe_models.adapted("qwen3_moe")])
def test_names_are_pefts(make):
    stock = make()
    patched = copy.deepcopy(stock)
    lorafuse.patch(patched, strict=True)
    assert repr(patched) == repr(stock)
    assert patched.get_layer_status() == stock.get_layer_status()
    assert patched.get_model_status() == stock.get_model_status()
    names = [[type(module).__name__ for module in model.modules()] for model in (patched, stock)]
    assert names[0] == names[1]
    twin = pickle.loads(pickle.dumps(patched))
    assert [type(a) for a in twin.modules()] == [type(a) for a in patched.modules()]
    fused = hf_peft.FusedLinear, hf_experts.FusedExperts
    assert any(isinstance(module, fused) for module in twin.modules())


def test_an_adapter_added_to_patched_experts_goes_into_the_same_wrappers():
    """PEFT finds its wrappers by the name of their class."""
    models = moe_models.adapted("qwen3_moe"), moe_models.adapted("qwen3_moe")
    lorafuse.patch(models[1], strict=True)
    for model in models:
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    assert [n for n, _ in models[1].named_parameters()] == [n for n, _ in models[0].named_parameters()]


def one_layer(**settings):
    config = peft.LoraConfig(r=2, target_modules=["0"], **settings)
    return peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)


COMPUTED = {
    "weight_norm": (nn.utils.weight_norm, "is computed before every forward (WeightNorm)"),
    "spectral_norm": (nn.utils.spectral_norm, "is computed before every forward (SpectralNorm)"),
    "prune": (
        lambda base: prune.l1_unstructured(base, "weight", 0.5),
        "is computed before every forward (L1Unstructured)",
    ),
    "parametrize": (nn.utils.parametrizations.spectral_norm, "is parametrized (_SpectralNorm)"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_weights_that_are_computed(name):
    change, reason = COMPUTED[name]
    model = one_layer()
    change(model.base_model.model[0].base_layer)
    model.base_model.model[0].base_layer.requires_grad_(False)
    (skipped,) = lorafuse.patch(model).skipped
    assert skipped.reason == f"its base weight {reason}, not an ordinary parameter"


def test_out_proj_of_multihead_attention():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["out_proj"]))
    report = lorafuse.patch(model)
    assert not report.patched
    assert "reads the weight of its out_proj and never calls it" in report.skipped[0].reason


def test_x_lora():
    model = adapted()
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear))

    class XLoraLinearLayer:
        def forward(self, x):
            return x

    layer.forward = XLoraLinearLayer().forward
    reason = lorafuse.patch(model).skipped[0].reason
    assert reason.endswith("XLoraLinearLayer")
    assert "accelerate" not in reason


def test_registered_experts_without_peft():
    script = """
import sys
sys.modules["peft"] = None
sys.path.insert(0, "tests")
import torch
from torch import nn
import transformers
from lorafuse.integrations import register_experts
register_experts()
config = transformers.MixtralConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
model = transformers.MixtralForCausalLM(config).requires_grad_(False)
class Double(nn.Module):
    def forward(self, w):
        return 2 * w
nn.utils.parametrize.register_parametrization(model.model.layers[0].mlp.experts, "gate_up_proj", Double())
found = []
for implementation in ("eager", "lorafuse"):
    model.set_experts_implementation(implementation)
    found.append(model(input_ids=torch.arange(3, 9)[None]).logits)
assert torch.allclose(*found, atol=1e-5)
"""
    warm_python.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=300)
