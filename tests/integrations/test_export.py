"""What servers are given (T1): names as their loaders parse them, values that compute the same, one buffer, a check."""

import json

import moe_models
import peft
import pytest
import server_rules
import torch
from safetensors.torch import load_file
from tiny_models import lora_config, tiny, train_away_from_zero
from torch import nn
from transformers import BatchEncoding

import lorafuse
from lorafuse import export
from lorafuse.integrations import adapt_experts
from lorafuse.nn import LoRAExperts, LoRAGatedMLP, LoRALinear, LoRAQKV
from lorafuse.testing.numerics import relative_l2, tolerance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")


def served(base, held):
    """The model with what a server adds merged into its linear layers."""
    with torch.no_grad():
        for name, (a, b) in held.items():
            base.get_submodule(name).weight += b @ a
    return base


@pytest.mark.parametrize("write", [export.to_vllm, export.to_sglang])
def test_a_dense_model(write, tmp_path):
    """Ranks and alphas by layer, of which a server's configuration holds one: B carries what differs."""
    config = lora_config(
        rank_pattern={"q_proj": 6, "up_proj": 2}, alpha_pattern={"v_proj": 10}, target_modules="all-linear"
    )
    model = train_away_from_zero(peft.get_peft_model(tiny(), config), "lora_B").eval()
    lorafuse.patch(model)
    tensors = write(model, tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(written[name], t) for name, t in tensors.items())
    held, ids = server_rules.vllm(tmp_path), torch.randint(64, (2, 7))
    with torch.no_grad():
        assert relative_l2(served(tiny(), held)(ids).logits, model(ids).logits) <= tolerance(torch.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        # whose B carries what alpha / r differs by
        {"rank_pattern": {"q_proj": 6, "up_proj": 2}, "alpha_pattern": {"q_proj": 10}, "use_rslora": True},
        {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"q_proj": 0}},
        {"target_parameters": ["mlp.up_proj.weight"], "target_modules": ["q_proj"]},
    ],
    ids=["plain", "patterns", "nothing at the largest rank", "a parameter"],
)
@pytest.mark.parametrize("write", [export.to_vllm, export.to_sglang])
def test_files_load_in_peft(write, settings, tmp_path):
    model = train_away_from_zero(peft.get_peft_model(tiny(), lora_config(**settings)), "lora_B").eval()
    write(model, tmp_path)
    ids = torch.randint(64, (2, 7))
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
        assert relative_l2(loaded(ids).logits, model(ids).logits) <= tolerance(torch.float32)


def deltas(tensors, experts, E):
    """`(gate_up, down)`, `[E, out, in]`, of what tensors say of a block, expert by expert."""
    of = {name: [] for name in ("gate_proj", "up_proj", "down_proj")}
    for e in range(E):
        for name, every in of.items():
            a, b = (tensors[f"base_model.model.{experts}.{e}.{name}.lora_{letter}.weight"] for letter in "AB")
            every.append(b @ a)
    gate, up, down = (torch.stack(every) for every in of.values())
    return torch.cat((gate, up), 1), down


def test_pefts_experts(tmp_path):
    model = moe_models.adapted("qwen3_moe")
    tensors = export.to_vllm(model, tmp_path)
    experts = "model.layers.0.mlp.experts"
    outer = model.get_submodule(f"base_model.model.{experts}")
    E = outer.num_experts
    server_rules.vllm(tmp_path, E)
    scale = json.loads((tmp_path / "adapter_config.json").read_text())
    wrappers = {outer.parameter_name: outer, outer.base_layer.parameter_name: outer.base_layer}
    for name, delta in zip(("gate_up_proj", "down_proj"), deltas(tensors, experts, E), strict=True):
        expected = wrappers[name].get_delta_weight("default")
        assert relative_l2(delta * scale["lora_alpha"] / scale["r"], expected) <= tolerance(torch.float32)


def test_shared_outer_factors():
    """One tensor for all experts in SGLang's form, expanded in vLLM's: the same deltas."""
    model = moe_models.base("qwen3_moe")
    adapt_experts(model, 4, shared_outer=True)
    train_away_from_zero(model, "lora_")
    experts, block = next((n, m) for n, m in model.named_modules() if hasattr(m, "shared_outer"))
    E, I, H = block.num_experts, block.intermediate_size, block.hidden_size  # noqa: E741
    stacks = export.to_sglang(model, shared_outer=True)
    shapes = {key: list(t.shape) for key, t in stacks.items() if experts in key}
    name = f"base_model.model.{experts}"
    assert shapes == {
        f"{name}.w1.lora_A.weight": [1, 4, H], f"{name}.w1.lora_B.weight": [E, I, 4],
        f"{name}.w3.lora_A.weight": [1, 4, H], f"{name}.w3.lora_B.weight": [E, I, 4],
        f"{name}.w2.lora_A.weight": [E, 4, I], f"{name}.w2.lora_B.weight": [1, H, 4],
    }  # fmt: skip
    gate_up, down = deltas(export.to_vllm(model), experts, E)
    of = {w: stacks[f"{name}.{w}.lora_B.weight"] @ stacks[f"{name}.{w}.lora_A.weight"] for w in ("w1", "w2", "w3")}
    assert torch.equal(gate_up, torch.cat((of["w1"], of["w3"]), 1))
    assert torch.equal(down, of["w2"])
    assert all(t.count_nonzero() for t in (gate_up, down))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True, "target_modules": ["q_proj"]}, "is a variant of LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "an adapter with a bias"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "which changed the base"),
    ],
)
def test_what_servers_do_not_load(settings, message, tmp_path):
    model = peft.get_peft_model(tiny(), lora_config(**{"target_modules": ["q_proj"]} | settings))
    with pytest.raises(ValueError, match=message):
        export.to_vllm(model, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_nothing_to_export():
    with pytest.raises(ValueError, match="has no adapter"):
        export.to_vllm(nn.Linear(2, 2))
    model = moe_models.adapted("qwen3_moe")
    with pytest.raises(ValueError, match="share no outer factors"):
        export.to_sglang(model, shared_outer=True)


def test_one_buffer():
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 2, 2).double()}
    flat = export.flatten(tensors)
    assert (flat.buffer.is_contiguous(), flat.buffer.dtype) == (True, torch.uint8)
    # another process has the bytes, and the table as JSON
    other = export.Flat(flat.buffer.clone(), json.loads(json.dumps(flat.table)))
    for name, view in other.views().items():
        assert torch.equal(view, tensors[name])
        assert view.dtype is tensors[name].dtype
        assert view.data_ptr() % 16 == other.buffer.data_ptr() % 16
    newer = {name: t + 1 for name, t in tensors.items()}
    flat.update(newer)
    assert all(torch.equal(view, newer[name]) for name, view in flat.views().items())
    half = export.flatten(tensors, dtype=torch.bfloat16)
    assert {view.dtype for view in half.views().values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="other tensors"):
        flat.update({"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="on 0 devices"):
        export.flatten({})


class TestApplied:
    # what tokenizers return, which is no dict
    ids = BatchEncoding({"input_ids": torch.arange(7)[None]})

    def reasons(self, model):
        return {one.name.rpartition(".")[2]: one.reason for one in export.check_applied(model, self.ids)}

    @pytest.mark.parametrize("is_patched", [False, True])
    def test_a_model(self, is_patched):
        model = train_away_from_zero(peft.get_peft_model(tiny(), lora_config()), "lora_B").eval()
        if is_patched:
            lorafuse.patch(model)
        assert self.reasons(model) == {}
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        nn.init.zeros_(layer.lora_B.default.weight)
        assert self.reasons(model) == {"q_proj": "its lora_A or lora_B is zero"}
        # too little for fp32
        layer.lora_B.default.weight.data.fill_(1e-30)
        assert "lost in rounding" in self.reasons(model)["q_proj"]
        with model.disable_adapter():
            assert set(self.reasons(model).values()) == {"its adapters are disabled"}
        model.merge_adapter()
        assert set(self.reasons(model).values()) == {"default is merged into its base"}
        model.unmerge_adapter()
        model.base_model.model.model.layers[0].self_attn.v_proj.set_adapter([])
        assert self.reasons(model)["v_proj"] == "it has no active adapter"
        assert not any(module._forward_hooks for module in model.modules())

    def test_owned_layers(self):
        model = nn.Sequential(LoRALinear(4, 4, 2), LoRALinear(4, 4, 2), nn.ModuleList([LoRALinear(4, 4, 2)]))
        train_away_from_zero(model, "lora_B")
        nn.init.zeros_(model[0].lora_B.weight)
        model.forward = lambda x: model[1](model[0](x))
        actual = {one.name: one.reason for one in export.check_applied(model, torch.randn(3, 4))}
        assert actual == {"0": "its lora_A or lora_B is zero", "2.0": "it was never called"}

    def test_layers_that_a_group_runs(self):
        linears = [nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)]
        model = nn.Sequential(LoRAGatedMLP.from_linears(*linears, 2), LoRAQKV.from_linears(*[nn.Linear(4, 4)] * 3, 2))
        train_away_from_zero(model, "lora_B")
        nn.init.zeros_(model[0].up_proj.lora_B.weight)
        actual = {one.name: one.reason for one in export.check_applied(model, torch.randn(3, 4))}
        assert actual == {"0.up_proj": "its lora_A or lora_B is zero"}

    def test_experts(self):
        experts = LoRAExperts(3, 4, 6, 2)
        model = nn.Module()
        model.experts = experts
        model.forward = lambda x: experts(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
        for expected in (["its lora_A or lora_B is zero"], []):
            assert [one.reason for one in export.check_applied(model, torch.randn(3, 4))] == expected
            nn.init.normal_(experts.down_lora_B)

    def test_no_adapters(self):
        with pytest.raises(ValueError, match="without adapted layers"):
            export.check_applied(nn.Linear(2, 2), torch.ones(2))
