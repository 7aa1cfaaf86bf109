"""`experts_implementation="lorafuse"` (T1): frozen, adapted and trained experts give what transformers gives."""

import copy
from unittest import mock

import moe_models
import peft
import pytest
import torch
import transformers
from moe_models import FAMILIES, adapted, base, token_ids
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lorafuse.errors import MissingDependency
from lorafuse.integrations import hf_transformers, register_experts
from lorafuse.testing.numerics import relative_l2, tolerance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture(autouse=True)
def _registered():
    register_experts()
    yield
    ALL_EXPERTS_FUNCTIONS._global_mapping.pop("lorafuse", None)


def step(model, implementation):
    inner = model.base_model.model if isinstance(model, peft.PeftModel) else model
    inner.set_experts_implementation(implementation)
    model.get_input_embeddings().weight.requires_grad_()
    model.zero_grad()
    with mock.patch.object(hf_transformers, "lora_experts", wraps=hf_transformers.lora_experts) as calls:
        logits = model(input_ids=token_ids()).logits
    logits.backward(torch.ones_like(logits))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}, calls.call_count


def check(model, fused):
    expected, none = step(copy.deepcopy(model), "eager" if fused else "grouped_mm")
    actual, calls = step(model, "lorafuse")
    assert none == 0
    assert bool(calls) is fused
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_l2(actual[name], tensor) <= tolerance(torch.float32), name


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_experts(name):
    check(base(name).requires_grad_(False), fused=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_adapted_experts_without_patching(name):
    check(adapted(name), fused=True)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_trained_experts_run_as_transformers_own(name):
    check(base(name), fused=False)


def test_several_active_adapters_run_as_transformers_own():
    model = adapted("qwen3_moe")
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "other"])
    check(model, fused=False)


def test_nothing_is_registered_by_import():
    ALL_EXPERTS_FUNCTIONS._global_mapping.pop("lorafuse")
    with pytest.raises((KeyError, ValueError)):
        step(base("qwen3_moe"), "lorafuse")


def test_a_transformers_that_is_too_old(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.6.1")
    with pytest.raises(MissingDependency, match=r"transformers >= 5\.7, found 5\.6\.1"):
        register_experts()


def test_from_the_start():
    model = base("mixtral")
    built = type(model)._from_config(model.config, experts_implementation="lorafuse")
    assert built.config._experts_implementation == "lorafuse"
    assert built.config.vocab_size == moe_models.VOCABULARY
