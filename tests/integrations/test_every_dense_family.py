"""Dense families of transformers of every kind, all their linear layers adapted, patched (T1): what PEFT gives."""

import copy
from unittest import mock

import peft
import pytest
import tiny_families
import torch
from tiny_models import counting_groups, counting_mlps

import lorafuse
from lorafuse.integrations import hf_peft
from lorafuse.testing.numerics import relative_l2, tolerance

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::RuntimeWarning:peft", "ignore:lorafuse.patch patched nothing:UserWarning"
)

# model class by family
DECODERS = {
    "bloom": "BloomForCausalLM",
    "cohere": "CohereForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "falcon": "FalconForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "granite": "GraniteForCausalLM",
    "helium": "HeliumForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "opt": "OPTForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}
ENCODERS = {
    "albert": "AlbertForTokenClassification",
    "bert": "BertForTokenClassification",
    "deberta_v2": "DebertaV2ForTokenClassification",
    "distilbert": "DistilBertForTokenClassification",
    "electra": "ElectraForTokenClassification",
    "modernbert": "ModernBertForTokenClassification",
    "roberta": "RobertaForTokenClassification",
}
ENCODER_DECODERS = {
    "bart": "BartForConditionalGeneration",
    "blenderbot": "BlenderbotForConditionalGeneration",
    "m2m_100": "M2M100ForConditionalGeneration",
    "marian": "MarianMTModel",
    "mt5": "MT5ForConditionalGeneration",
    "pegasus": "PegasusForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
}
VISION = {
    "beit": "BeitModel",
    "clip": "CLIPVisionModel",
    "deit": "DeiTModel",
    "dinov2": "Dinov2Model",
    "siglip": "SiglipVisionModel",
    "swin": "SwinModel",
    "vit": "ViTModel",
}
AUDIO = {
    "audio_spectrogram_transformer": "ASTModel",
    "hubert": "HubertModel",
    "wav2vec2": "Wav2Vec2Model",
    "wavlm": "WavLMModel",
    "whisper": "WhisperForConditionalGeneration",
}
# layers of these families are left to PEFT, with this reason
LEFT = {"falcon": "its base is a FalconLinear, not an nn.Linear"}
# attention of these families hands weights to torch's function and calls no layer: in PEFT too, adapters do nothing
NOT_CALLED = {"siglip", "wavlm"}
# of families with experts the attention alone: tests/integrations/test_every_experts_family.py has the rest
ATTENTION = {"deepseek_v3", "qwen3_next"}
FAMILIES = DECODERS | ENCODERS | ENCODER_DECODERS | VISION | AUDIO


def adapted(family):
    (model_class,) = [one for one in set(tiny_families.model_classes(family)) if one.__name__ == FAMILIES[family]]
    targets = r".*\.(self_attn|linear_attn)\.\w*proj\w*" if family in ATTENTION else "all-linear"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(tiny_families.tiny_model(model_class), config).eval()
    if model.get_base_model().main_input_name == "input_ids":
        model.get_input_embeddings().weight.requires_grad_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family):
    stock = adapted(family)
    patched = copy.deepcopy(stock)
    report = lorafuse.patch(patched)
    expected = tiny_families.step(stock)
    with mock.patch.object(hf_peft, "run_linear", wraps=hf_peft.run_linear) as fused:
        actual = tiny_families.step(patched)
    assert actual.keys() == expected.keys()
    trained = [name for name in expected if "lora_" in name]
    assert all(expected[name].any() for name in trained)
    if family in LEFT:
        assert {skipped.reason for skipped in report.skipped} == {LEFT[family]}
    else:
        assert fused.call_count >= len(trained) / 2 > 0
    if family not in LEFT.keys() | NOT_CALLED:
        assert report.skipped == []
        assert len(report.patched) == len(trained) / 2
    errors = {name: relative_l2(actual[name], tensor) for name, tensor in expected.items()}
    assert {name: error for name, error in errors.items() if error > tolerance(torch.float32)} == {}


# one layer computes q, k and v, and one gate and up where there is a gate
NO_SIBLINGS = {"bloom", "gpt_neox", "modernbert", "phi3"}
GATED = {"cohere", "gemma", "gemma2", "gemma3", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3"}
GATED |= {"ernie4_5", "exaone4", "helium", "olmo", "stablelm"}
# parents that look gated and are no operator
ONE_LAYER = "gate and up are one layer (gate_up_proj)"
WITHOUT = {"phi3": ONE_LAYER, "glm": ONE_LAYER, "glm4": ONE_LAYER, "mt5": "between its layers lies more than"}
# in training its y goes through dropout
WITHOUT |= {"seed_oss": "its forward is not down(act(gate(x))"}


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - LEFT.keys() - NOT_CALLED))
def test_siblings_of_a_family(family):
    stock = adapted(family)
    expected = tiny_families.step(stock)
    report = lorafuse.patch(stock, groups=True)
    assert report.patched
    assert any(group.kind == "gated_mlp" for group in report.groups) == (family in GATED)
    reasons = {one.reason for one in report.apart}
    assert all(family in WITHOUT and reason.startswith(WITHOUT[family]) for reason in reasons)
    assert bool(reasons) == (family in WITHOUT)
    # orders that no name tells are learned in the first
    for _ in range(2):
        with counting_groups() as calls, counting_mlps() as mlps:
            actual = tiny_families.step(stock)
        errors = {name: relative_l2(actual[name], tensor) for name, tensor in expected.items()}
        assert actual.keys() == expected.keys()
        assert {name: error for name, error in errors.items() if error > tolerance(torch.float32)} == {}
    assert (calls.call_count == 0) == (family in NO_SIBLINGS)
    assert mlps.call_count == sum(group.kind == "gated_mlp" for group in report.groups)
