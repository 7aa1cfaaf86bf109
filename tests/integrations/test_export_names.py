"""Exported adapters by vLLM's and SGLang's own checks of names and shapes, and in stock PEFT (T1)."""

import json

import moe_models
import peft
import pytest
import server_rules
import torch
from safetensors.torch import load_file, save_file
from tiny_models import lora_config, tiny, train_away_from_zero
from torch import nn

from lorafuse import export
from lorafuse.integrations import adapt_experts
from lorafuse.testing.numerics import relative_l2, tolerance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")

EXPERTS = "model.layers.0.mlp.experts"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def dense(**settings):
    return train_away_from_zero(peft.get_peft_model(tiny(), lora_config(**settings)), "lora_B").eval()


def deltas(model):
    """What PEFT adds to each weight, by the name of the layer."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in module.lora_A
    }


def close(actual, expected):
    return relative_l2(actual, expected) <= tolerance(torch.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 6, "up_proj": 2}, "alpha_pattern": {"v_proj": 10}},
        # what SGLang stacks, in part
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["k_proj", "up_proj"]},
        {"target_modules": ["v_proj", "o_proj", "gate_proj"]},
    ],
    ids=["ranks", "q", "k", "v"],
)
def test_a_dense_adapter(settings, tmp_path):
    model = dense(**settings)
    expected = deltas(model)
    export.to_vllm(model, tmp_path / "vllm")
    held = server_rules.vllm(tmp_path / "vllm")
    assert held.keys() == expected.keys()
    assert all(close(b @ a, expected[name]) for name, (a, b) in held.items())
    export.to_sglang(model, tmp_path / "sglang")
    stacks = {"qkv_proj": ("self_attn", ["q_proj", "k_proj", "v_proj"]), "gate_up_proj": ("mlp", PROJECTIONS[:2])}
    seen = set()
    for layer, modules in server_rules.sglang(tmp_path / "sglang").items():
        for (module, _), (a, b) in modules.items():
            place, parts = stacks.get(module, ("self_attn" if module == "o_proj" else "mlp", [module]))
            names = [f"model.layers.{layer}.{place}.{part}" for part in parts]
            rows = [model.get_submodule(f"base_model.model.{name}").out_features for name in names]
            for name, own_a, own_b in zip(names, a.chunk(len(parts)), b.split(rows), strict=True):
                delta = own_b @ own_a
                assert close(delta, expected[name]) if name in expected else not delta.any()
                seen.add(name)
    assert seen >= expected.keys()


@pytest.mark.parametrize("form", ["per expert", "shared outer"])
def test_experts(form, tmp_path):
    """The deltas of each expert, as both servers hold them."""
    model = moe_models.base("qwen3_moe")
    adapt_experts(model, 4, shared_outer=form == "shared outer")
    train_away_from_zero(model, "lora_")
    block = model.get_submodule(EXPERTS)
    a_in, b_in, a_out, b_out = (getattr(block, f"{p}_lora_{f}") for p in ("gate_up", "down") for f in "AB")
    gate_up, down = (block.scale * b @ a for a, b in ((a_in, b_in), (a_out, b_out)))
    expected = {
        (e, name): t[e]
        for name, t in zip(PROJECTIONS, (*gate_up.chunk(2, 1), down), strict=True)
        for e in range(len(t))
    }
    E = block.num_experts
    export.to_vllm(model, tmp_path / "vllm")
    held = server_rules.vllm(tmp_path / "vllm", E)
    for (e, name), delta in expected.items():
        a, b = held[f"{EXPERTS}.{e}.{name}"]
        assert close(b @ a, delta)
    for shared in (False, True) if form == "shared outer" else (False,):
        export.to_sglang(model, tmp_path / "sglang", shared_outer=shared)
        of = server_rules.sglang(tmp_path / "sglang", shared)[0]
        for e in range(E):
            pairs = [of[f"{module}_moe", None if shared else e] for module in ("gate_up_proj", "down_proj")]
            if shared:
                pairs = [tuple(t[e if t.shape[0] > 1 else 0] for t in pair) for pair in pairs]
            (a, b), (down_a, down_b) = pairs
            products = [*(bb @ aa for aa, bb in zip(a.chunk(2), b.chunk(2), strict=True)), down_b @ down_a]
            assert all(close(t, expected[e, name]) for t, name in zip(products, PROJECTIONS, strict=True))


@pytest.mark.parametrize(("family", "projections"), [("qwen3_moe", PROJECTIONS), ("mixtral", ("w1", "w3", "w2"))])
def test_experts_load_in_stock_peft(family, projections, tmp_path):
    """PEFT makes adapters of transformers' stacks of what was written expert by expert."""
    model, ids = moe_models.adapted(family).eval(), moe_models.token_ids()
    export.to_vllm(model, tmp_path, projections=projections)
    loaded = peft.PeftModel.from_pretrained(moe_models.base(family), tmp_path).eval()
    with torch.no_grad():
        assert close(loaded(ids).logits, model(ids).logits)
        assert not close(loaded(ids).logits, moe_models.base(family).eval()(ids).logits)


def test_the_embedding_and_the_head(tmp_path):
    """With other ranks and alphas than the layers; stock PEFT reads the same."""
    settings = {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "rank_pattern": {"embed_tokens": 2},
                "alpha_pattern": {"lm_head": 10}}  # fmt: skip
    model = peft.get_peft_model(tiny(), lora_config(**settings))
    train_away_from_zero(model, "lora_").eval()
    layers = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    expected = [layer.get_delta_weight("default").detach() for layer in layers]
    export.to_vllm(model, tmp_path / "vllm")
    held = server_rules.vllm(tmp_path / "vllm")
    a, b = held["model.embed_tokens"]
    assert close((b @ a).t(), expected[0])
    a, b = held["lm_head"]
    assert close(b @ a, expected[1])
    export.to_sglang(model, tmp_path / "sglang")
    of = server_rules.sglang(tmp_path / "sglang")[None]
    assert all(t.shape[i] == 4 for pair in of.values() for i, t in enumerate(pair))
    (a, b), (head_a, head_b) = of["embed_tokens", None], of["lm_head", None]
    assert close((b @ a).t(), expected[0])
    assert close(head_b @ head_a, expected[1])
    ids = torch.randint(64, (2, 7))
    with torch.no_grad():
        for server in ("vllm", "sglang"):
            loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path / server).eval()
            assert close(loaded(ids).logits, model(ids).logits)
    # a class that lists neither
    with pytest.raises(ValueError, match="unexpected module"):
        server_rules.vllm(tmp_path / "vllm", heads=())
    with pytest.raises(ValueError, match="the model has 65"):
        server_rules.vllm(tmp_path / "vllm", vocabulary=65)


def test_an_embedding_of_another_name():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    assert {name.rpartition(".")[2] for name in export.to_vllm(model)} == {"lora_embedding_A", "lora_embedding_B"}
    with pytest.raises(ValueError, match="would drop that of 0"):
        export.to_sglang(model)


def test_what_sglang_would_drop():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(r=2, target_modules=["0"]))
    assert export.to_vllm(model)
    with pytest.raises(ValueError, match="SGLang reads adapters of layers.N alone, and would drop that of 0"):
        export.to_sglang(model)


class TestTheRulesRefuse:
    """The checkers themselves: what the servers refuse fails here."""

    def changed(self, folder, change=lambda name, t: {name: t}, **settings):
        export.to_sglang(dense(target_modules=["q_proj", "up_proj"]), folder)
        file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
        tensors = {}
        for name, t in load_file(file).items():
            tensors |= {key: value.contiguous() for key, value in change(name, t).items()}
        save_file(tensors, file)
        config.write_text(json.dumps(json.loads(config.read_text()) | settings))
        return folder

    @pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
    def test_configurations(self, settings, tmp_path):
        folder = self.changed(tmp_path, **settings)
        for load in (server_rules.vllm, server_rules.sglang):
            with pytest.raises(AssertionError, match="support"):
                load(folder)

    def test_names_of_vllm(self, tmp_path):
        # packed in the server, whatever the checkpoint calls it: the name of the pack is not expected
        folder = self.changed(tmp_path, lambda name, t: {name.replace("up_proj", "gate_up_proj"): t})
        with pytest.raises(ValueError, match="unexpected module"):
            server_rules.vllm(folder)
        # but for models whose checkpoint is packed itself (Phi-3)
        only_up = self.changed(
            tmp_path, lambda n, t: {n.replace("up_proj", "gate_up_proj"): t} if "up_proj" in n else {}
        )
        assert server_rules.vllm(only_up, packed={"gate_up_proj": ["gate_up_proj"]})
        with pytest.raises(ValueError, match="unsupported LoRA weight"):
            server_rules.vllm(self.changed(tmp_path, lambda n, t: {n.replace("lora_A", "lora_magnitude_vector"): t}))

    def test_shapes_and_names_of_sglang(self, tmp_path):
        with pytest.raises(KeyError, match="v_proj"):
            server_rules.sglang(self.changed(tmp_path, lambda name, t: {} if "v_proj" in name else {name: t}))
        with pytest.raises(ValueError, match="matches no target module"):
            server_rules.sglang(self.changed(tmp_path, lambda name, t: {} if "gate_proj" in name else {name: t}))
        with pytest.raises(AssertionError, match="buffer of rank"):
            server_rules.sglang(self.changed(tmp_path, lambda n, t: {n: t[:-1] if "lora_A" in n else t[:, :-1]}))
        with pytest.raises(ValueError, match="lies in no layer"):
            server_rules.sglang(self.changed(tmp_path, lambda name, t: {name.replace("layers.", "h."): t}))
        # the head of an adapter whose configuration does not name it
        head = "base_model.model.lm_head.lora_A.weight"
        with pytest.raises(ValueError, match="lies in no layer"):
            server_rules.sglang(self.changed(tmp_path, lambda name, t: {name: t, head: torch.zeros(4, 8)}))
