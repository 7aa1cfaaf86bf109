"""The advisor for models with experts: PEFT adapts what its snippet says, at those ranks; the floor of a step."""

import re

import moe_models
import peft
import pytest
import torch
import transformers
from advised import configured

import lorafuse
from lorafuse import advise
from lorafuse.plan import find


def adapted_ranks(model, advice):
    """Adapt the model by the snippet: the rank of each adapter by the name of the layer or parameter that it adapts."""
    actual = {}
    config, _ = configured(advice.snippet)
    for name, module in peft.get_peft_model(model, config).base_model.model.named_modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            plain = re.sub(r"\.base_layer\b", "", name)
            parameter = getattr(module, "parameter_name", "weight")
            own = plain if parameter == "weight" else f"{plain}.{parameter}"
            assert own not in actual
            actual[own] = module.r["default"]
    return actual


@pytest.mark.parametrize("family", moe_models.FAMILIES)
def test_of_experts_the_snippet_adapts_what_is_advised(family):
    model = moe_models.base(family)
    advice = advise.plan_adapter(model, tokens=1000, rank=4)
    advised = {x.name: 2 if x.kind == "experts" else 4 for x in advice.shapes.adapted}
    assert adapted_ranks(model, advice) == advised
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == advice.trainable
    ids = moe_models.token_ids()
    assert lorafuse.patch(model).skipped == []
    model(input_ids=ids, labels=ids).loss.backward()
    assert [n for n, p in model.named_parameters() if "lora_B" in n and not p.grad.any()] == []


@pytest.mark.parametrize("family", ["qwen2_moe", "glm4_moe"])
def test_a_probes_ranks_reach_shared_experts_and_stacks_keep_theirs(family):
    model, ids = moe_models.base(family), moe_models.token_ids()
    probe = advise.probe_ranks(model, [{"input_ids": ids, "labels": ids}], 4, keep_scale=True)
    patterns = {"rank_pattern": probe.rank_pattern, "alpha_pattern": probe.alpha_pattern}
    advice = advise.plan_adapter(model, tokens=1000, rank=4, **patterns)
    assert probe.energy.keys() == {x.name for x in advice.shapes.adapted if not x.parameter}
    assert "it does not see stacks of experts, which keep theirs" in str(advice)
    advised = {
        x.name: 2 if x.parameter else probe.rank_pattern.get(re.escape(x.name), 4) for x in advice.shapes.adapted
    }
    assert {advised[name] for name in advised if "shared_expert" in name} - {4}
    assert adapted_ranks(model, advice) == advised
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and "shared_expert" in name:
            assert module.scaling["default"] == pytest.approx(8, rel=0.15)


class ListedExperts(torch.nn.Module):
    """Two of four experts for every token; each is a module of its own, in a list."""

    def __init__(self):
        super().__init__()
        self.top_k = 2
        self.q_proj = torch.nn.Linear(16, 16)
        self.router = torch.nn.Linear(16, 4)
        layers = {"w1": (16, 24), "w2": (24, 16), "w3": (16, 24)}
        self.experts = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: torch.nn.Linear(*sizes) for name, sizes in layers.items()}) for _ in range(4)
        )


@pytest.mark.parametrize("probed", [False, True])
def test_a_list_of_experts_gets_its_ranks(probed):
    model = ListedExperts()
    pattern = {r"experts\.1\.w2": 3, "q_proj": 6} if probed else {}
    advice = advise.plan_adapter(model, tokens=1000, rank=4, rank_pattern=pattern)
    assert (advice.shapes.experts, advice.shapes.active_experts, advice.expert_rank) == (4, 2, 2)
    assert "stacks" not in str(advice)
    experts = {f"experts.{e}.{name}": 2 for e in range(4) for name in ("w1", "w2", "w3")}
    own = {"experts.1.w2": 3, "q_proj": 6} if probed else {}
    assert adapted_ranks(model, advice) == {"q_proj": 4} | experts | own


@pytest.mark.parametrize("gpu", ["A100", "H200"])
def test_the_floor_of_experts_is_the_fastest_frozen(gpu):
    """lorafuse's own kernels where torch multiplies one expert after the other: no adapter is faster than none."""
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(num_hidden_layers=1))
    result = advise.micro_step_seconds(advise.shapes_of(model), 64, 8192, 2048, find(gpu))
    assert result["frozen"] < result["lorafuse"]
