"""`lorafuse.nn` for owners of a model (T1): over transformers' experts, to and from PEFT's files, and to servers."""

import json
import re

import moe_models
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import adapted as adapted_dense
from tiny_models import lora_config, tiny
from torch import nn

from lorafuse.integrations import adapt_experts, check_for_serving, from_experts, load_adapter, save_adapter
from lorafuse.nn import LoRAExperts, LoRALinear
from lorafuse.testing.numerics import relative_l2, tolerance

R, ALPHA = 3, 4.5
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")


def randomize(model):
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def owned(family, linear=()):
    """A model with `lorafuse.nn` in the place of its experts, and of the linear layers whose names end so."""
    model = moe_models.base(family)
    adapt_experts(model, R, alpha=ALPHA)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(tuple(linear)) and linear:
            model.set_submodule(name, LoRALinear.from_linear(module, R, alpha=ALPHA))
    return randomize(model.eval())


def logits(model):
    with torch.no_grad():
        return model(input_ids=moe_models.token_ids()).logits


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_from_experts(family):
    """Plain stacks; transposed, alternating and biased ones; experts without a gate."""
    model = moe_models.base(family).eval()
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith("experts") and hasattr(m, "down_proj"))
    hidden = module.down_proj.shape[2 if module.is_transposed else 1]
    x, generator = torch.randn(9, hidden), torch.Generator().manual_seed(3)
    index = torch.stack([torch.randperm(module.num_experts, generator=generator)[:2] for _ in range(9)])
    weight = torch.rand(9, 2, generator=generator)
    expected = module(x, index, weight)
    layer = from_experts(module, R, alpha=ALPHA)
    assert (layer.gate_up_proj_bias is not None) is module.has_bias
    assert layer.down_proj.data_ptr() == module.down_proj.data_ptr()
    # B is zero
    assert relative_l2(layer(x, index, weight), expected) <= tolerance(torch.float32)
    assert relative_l2(randomize(layer)(x, index, weight), expected) > 0.01
    assert not any(p.requires_grad for n, p in layer.named_parameters() if "lora_" not in n)


def test_from_what_is_no_experts_module():
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="Linear is not an experts module of transformers"):
        from_experts(layer, 2)
    assert layer.weight.requires_grad


class TestFiles:
    @pytest.mark.parametrize(("family", "linear"), [("qwen3_moe", ("q_proj", "v_proj")), ("gpt_oss", ())])
    def test_peft_computes_the_same(self, family, linear, tmp_path):
        model = owned(family, linear)
        expected = logits(model)
        assert relative_l2(logits(moe_models.base(family).eval()), expected) > 0.01
        save_adapter(model, tmp_path, base_model="base")
        loaded = peft.PeftModel.from_pretrained(moe_models.base(family), tmp_path).eval()
        assert relative_l2(logits(loaded), expected) <= tolerance(torch.float32)

    def test_what_peft_wrote_is_read(self, tmp_path):
        config = peft.LoraConfig(
            r=R, lora_alpha=5, target_modules=["q_proj", "v_proj"], target_parameters=moe_models.targets("qwen3_moe"),
            init_lora_weights=False, use_rslora=True, alpha_pattern={"q_proj": 7},
        )  # fmt: skip
        written = peft.get_peft_model(moe_models.base("qwen3_moe"), config, autocast_adapter_dtype=False).eval()
        written.save_pretrained(tmp_path)
        model = owned("qwen3_moe", ("q_proj", "v_proj"))
        load_adapter(model, tmp_path)
        assert relative_l2(logits(model), logits(written)) <= tolerance(torch.float32)

    def test_round_trip_of_several_ranks(self, tmp_path):
        torch.manual_seed(0)
        model = randomize(nn.Sequential(LoRALinear(8, 6, 2, alpha=3), nn.Tanh(), LoRALinear(6, 5, 4, use_rslora=True)))
        save_adapter(model, tmp_path, task_type="FEATURE_EXTRACTION")
        twin = nn.Sequential(LoRALinear(8, 6, 2), nn.Tanh(), LoRALinear(6, 5, 4))
        twin.load_state_dict(model.state_dict())
        for layer in (twin[0], twin[2]):
            nn.init.zeros_(layer.lora_B.weight)
        load_adapter(twin, tmp_path)
        x = torch.randn(3, 8)
        assert relative_l2(twin(x), model(x)) <= tolerance(torch.float32)

    def test_layers_whose_names_end_alike(self, tmp_path):
        """Of different ranks and alphas: PEFT's patterns match at the end of a name."""

        def stack(layer):
            return nn.Sequential(layer(2, 3.0), nn.Sequential(layer(4, 5.0), layer(2, 3.0)))

        torch.manual_seed(0)
        model = randomize(stack(lambda r, alpha: LoRALinear(8, 8, r, alpha=alpha)))
        save_adapter(model, tmp_path, task_type=None)
        base = stack(lambda r, alpha: nn.Linear(8, 8))
        base.load_state_dict({k: t for k, t in model.state_dict().items() if "lora_" not in k})
        loaded, x = peft.PeftModel.from_pretrained(base, tmp_path), torch.randn(3, 8)
        assert relative_l2(loaded(x), model(x)) <= tolerance(torch.float32)
        twin = stack(lambda r, alpha: LoRALinear(8, 8, r))
        twin.load_state_dict({k: torch.zeros_like(t) if "lora_" in k else t for k, t in model.state_dict().items()})
        load_adapter(twin, tmp_path)
        assert relative_l2(twin(x), model(x)) <= tolerance(torch.float32)

    def test_a_merged_layer_takes_no_other_adapter(self, tmp_path):
        model = randomize(nn.Sequential(LoRALinear(8, 6, 2)))
        save_adapter(model, tmp_path)
        model[0].merge()
        with pytest.raises(ValueError, match="0 is merged, and would unmerge the file's adapter"):
            load_adapter(model, tmp_path)

    def test_shared_factors_are_written_for_each_expert(self, tmp_path):
        model = moe_models.base("qwen3_moe").eval()
        adapt_experts(model, R, shared_outer=True)
        expected = logits(randomize(model))
        save_adapter(model, tmp_path)
        loaded = peft.PeftModel.from_pretrained(moe_models.base("qwen3_moe"), tmp_path).eval()
        assert relative_l2(logits(loaded), expected) <= tolerance(torch.float32)
        with pytest.raises(ValueError, match="has shared_outer"):
            load_adapter(model, tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("base_model.model.0.lora_A.weight"), r"has no 0\.lora_A\.weight"),
            (
                lambda t: t.update({"base_model.model.7.lora_A.weight": torch.ones(1)}),
                "no module of the model takes it",
            ),
            (lambda t: t.update({"base_model.model.0.lora_B.weight": torch.ones(6, 9)}), r"is \[6, 9\] in the file"),
        ],
    )
    def test_files_that_do_not_fit_change_nothing(self, change, message, tmp_path):
        model = randomize(nn.Sequential(LoRALinear(8, 6, 2)))
        save_adapter(model, tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        change(tensors)
        save_file({name: t * 2 for name, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    def test_what_the_files_cannot_hold(self, tmp_path):
        with pytest.raises(ValueError, match=r"without lorafuse\.nn\.LoRALinear"):
            save_adapter(nn.Linear(2, 2), tmp_path)
        with pytest.raises(ValueError, match="got a LoRALinear, which has no name: pass the model around it"):
            save_adapter(LoRALinear(2, 2, 1), tmp_path)
        with pytest.raises(ValueError, match="dropouts"):
            save_adapter(nn.Sequential(LoRALinear(2, 2, 1), LoRALinear(2, 2, 1, dropout=0.1)), tmp_path)
        experts = nn.ModuleDict({"a": LoRAExperts(2, 4, 3, 1), "b": LoRAExperts(2, 4, 3, 2)})
        with pytest.raises(ValueError, match="PEFT's files hold one of each for all experts"):
            save_adapter(experts, tmp_path)
        assert not list(tmp_path.iterdir())


class TestServing:
    def test_a_plain_adapter_is_fine(self, tmp_path):
        model = adapted_dense(target_modules=["q_proj", "v_proj"])
        model.save_pretrained(tmp_path)
        for loader in ("vllm", "sglang"):
            assert check_for_serving(tmp_path, loader) == check_for_serving(model, loader) == []

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"use_dora": True}, "vllm has no DoRA"),
            ({"modules_to_save": ["lm_head"]}, r"vllm loads no modules_to_save \(lm_head\)"),
            ({"bias": "lora_only"}, "vllm loads no biases"),
            ({"rank_pattern": {"q_proj": 2}}, "wrongly those with others in rank_pattern or alpha_pattern: q_proj"),
        ],
    )
    def test_what_vllm_refuses_or_misreads(self, settings, sentence, tmp_path):
        peft.get_peft_model(tiny(), lora_config(**settings)).save_pretrained(tmp_path)
        (problem,) = check_for_serving(tmp_path)
        assert re.search(sentence, problem)

    def test_a_missing_key(self, tmp_path):
        peft.get_peft_model(tiny(), lora_config()).save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        config = json.loads(file.read_text())
        del config["lora_alpha"]
        file.write_text(json.dumps(config))
        assert check_for_serving(tmp_path, "sglang") == [
            "sglang needs lora_alpha in adapter_config.json, which has none"
        ]

    def test_experts(self, tmp_path):
        both = moe_models.adapted("qwen3_moe")
        (note,) = check_for_serving(both)
        assert "3-D layout, which vllm does not detect" in note
        assert "3-D layout, whose names sglang matches with no module" in check_for_serving(both, "sglang")[0]
        save_adapter(owned("qwen3_moe"), tmp_path)
        assert check_for_serving(tmp_path) == [note]

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"rank_pattern": {"q_proj": 2}}, "sglang scales every layer by the one lora_alpha / r"),
            ({"target_modules": ["q_proj"]}, "stacks q_proj with v_proj"),
            ({"target_modules": ["v_proj"]}, "stacks v_proj with q_proj"),
            ({"target_modules": ["up_proj"]}, "stacks up_proj with gate_proj"),
        ],
    )
    def test_what_sglang_fails_on(self, settings, sentence):
        (problem,) = check_for_serving(peft.get_peft_model(tiny(), lora_config(**settings)), "sglang")
        assert sentence in problem

    @pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
    def test_one_stack_of_the_experts(self, projection):
        one = moe_models.adapted("qwen3_moe", parameters=[f"experts.{projection}"])
        assert f"only {projection} of the experts is adapted" in check_for_serving(one)[0]

    def test_another_loader(self):
        with pytest.raises(ValueError, match="use one of 'vllm', 'sglang'"):
            check_for_serving("folder", "tgi")
