"""`LorafuseCallback` in TRL's trainers: with each of their features the losses are those of the run without it."""

import contextlib

import moe_models
import peft
import pytest
import torch
import transformers
from test_advise_data import CHAT, PAIR, TEMPLATE, byte_tokenizer
from tiny_models import counting_fused, lora_config, train_away_from_zero

import lorafuse
from lorafuse.integrations.callback import LorafuseCallback

STEPS, LAYERS = 2, 14
pytestmark = [pytest.mark.no_poison, pytest.mark.filterwarnings("ignore")]

REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
EXPERTS = {"target_modules": ["q_proj", "v_proj"], "target_parameters": moe_models.targets("qwen3_moe")}
ROWS = {
    "SFT": {"messages": CHAT},
    "text": {"text": "how many = four"},
    "DPO": {"prompt": "great film", **PAIR},
    "KTO": [{"prompt": "great film", "completion": PAIR[key], "label": key == "chosen"} for key in PAIR],
    "Reward": {"chosen": "great film positive", "rejected": "great film negative"},
    "GRPO": {"prompt": "great film"},
    "RLOO": {"prompt": "great film"},
}
# trainer, its settings, those of the adapters, what is given otherwise
FEATURES = {
    "SFT": ("SFT", {}, {}, {}),
    "SFT, a PEFT model": ("SFT", {}, {}, {"is_ready": True}),
    "SFT, patched after the constructor": ("SFT", {}, {}, {"by": "patch"}),
    "SFT, text": ("SFT", {}, {}, {"rows": "text"}),
    "SFT, packing bfd": ("SFT", {"packing": True, "packing_strategy": "bfd", "max_length": 32}, {}, {}),
    "SFT, packing wrapped": (
        "SFT", {"packing": True, "packing_strategy": "wrapped", "max_length": 16}, {}, {"rows": "text"},
    ),
    "SFT, padding_free": ("SFT", {"padding_free": True, "max_length": None}, {}, {}),
    "SFT, neftune": ("SFT", {"neftune_noise_alpha": 5}, {}, {}),
    "SFT, loss_type dft": ("SFT", {"loss_type": "dft"}, {}, {}),
    "SFT, modules_to_save": ("SFT", {}, {"modules_to_save": ["embed_tokens"]}, {}),
    "SFT, checkpointing": ("SFT", CHECKPOINTED, {}, {}),
    "SFT, reentrant checkpointing": ("SFT", REENTRANT, {}, {}),
    "SFT, bf16": ("SFT", {"bf16": True}, {}, {"rel": 2e-3}),
    "SFT, a bf16 model": ("SFT", {}, {}, {"dtype": torch.bfloat16, "rel": 2e-3}),
    # a counter would break the graph, and of equal frames between breaks one is traced
    "SFT, torch_compile": (
        "SFT", {"torch_compile": True, "torch_compile_backend": "aot_eager"}, {}, {"is_compiled": True},
    ),
    "SFT, experts": ("SFT", {}, EXPERTS, {"family": "qwen3_moe"}),
    "SFT, experts, checkpointing": ("SFT", CHECKPOINTED, EXPERTS, {"family": "qwen3_moe"}),
    "SFT, DoRA": ("SFT", {}, {"use_dora": True}, {}),
    "SFT, dropout with PEFT's masks": ("SFT", {}, {"lora_dropout": 0.1}, {"dropout_rng": "torch"}),
    "DPO": ("DPO", {}, {}, {}),
    "DPO, a PEFT model": ("DPO", {}, {}, {"is_ready": True}),
    "DPO, precompute_ref_log_probs": ("DPO", {"precompute_ref_log_probs": True}, {}, {}),
    "DPO, checkpointing": ("DPO", CHECKPOINTED, {}, {}),
    "DPO, padding_free": ("DPO", {"padding_free": True}, {}, {}),
    "GRPO": ("GRPO", {}, {}, {}),
    "GRPO, a PEFT model": ("GRPO", {}, {}, {"is_ready": True}),
    "GRPO, checkpointing": ("GRPO", CHECKPOINTED, {}, {}),
    "GRPO, experts": ("GRPO", {}, EXPERTS, {"family": "qwen3_moe"}),
    "RLOO": ("RLOO", {}, {}, {}),
    "KTO": ("KTO", {}, {}, {}),
    "Reward": ("Reward", {}, {}, {}),
}  # fmt: skip


def base_of(tokenizer, family, dtype, is_classifier):
    torch.manual_seed(5)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    if family == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **experts)).to(dtype)
    kind = transformers.LlamaForSequenceClassification if is_classifier else transformers.LlamaForCausalLM
    return kind(transformers.LlamaConfig(**sizes, **{"num_labels": 1} if is_classifier else {})).to(dtype)


def trainer_of(feature, folder, callbacks):
    """A trainer of TRL before its training, adapters away from zero; feature as those of `FEATURES`."""
    trl = pytest.importorskip("trl", reason="TRL is installed by make test-trl")
    datasets = pytest.importorskip("datasets", reason="datasets is installed by make test-trl")
    kind, settings, adapters, more = feature
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = ROWS[more.get("rows", kind)]
    generated = {"num_generations": 2, "max_completion_length": 6} if kind in ("GRPO", "RLOO") else {}
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True, seed=3,
        **{"gradient_checkpointing": False, "bf16": False} | generated | settings,
    )  # fmt: skip
    model = base_of(tokenizer, more.get("family"), more.get("dtype", torch.float32), kind == "Reward")
    config = lora_config(**adapters, **{"task_type": "SEQ_CLS"} if kind == "Reward" else {})
    given = {"peft_config": config}
    if more.get("is_ready"):
        given, model = {}, peft.get_peft_model(model, config)
    if kind in ("GRPO", "RLOO"):
        given["reward_funcs"] = lambda completions, **_: [float(len(c)) for c in completions]
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model, args=arguments, processing_class=tokenizer, callbacks=callbacks, **given,
        train_dataset=datasets.Dataset.from_list(rows * 4 if isinstance(rows, list) else [rows] * 8),
    )  # fmt: skip
    torch.manual_seed(6)
    train_away_from_zero(trainer.model)
    return trainer


def trained(trainer):
    """Losses of each step, and the trained parameters."""
    torch.manual_seed(7)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], {
        name: p.detach().float() for name, p in trainer.model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("name", FEATURES)
def test_as_without_it(name, tmp_path):
    feature = FEATURES[name]
    kind, _, _, more = feature
    expected, parameters = trained(trainer_of(feature, tmp_path, []))
    callback = LorafuseCallback(log=None, strict=True, dropout_rng=more.get("dropout_rng", "philox"))
    trainer = trainer_of(feature, tmp_path, [] if more.get("by") else [callback])
    if more.get("by"):
        lorafuse.patch(trainer.model, strict=True)
    with contextlib.nullcontext() if more.get("is_compiled") else counting_fused() as calls:
        losses, actual = trained(trainer)
    rel = more.get("rel", 1e-5)
    assert losses == pytest.approx(expected, rel=rel, abs=1e-6)
    assert len(losses) == STEPS
    assert trainer.model.training
    # RL's losses are nearly zero: what was trained says more
    assert actual.keys() == parameters.keys()
    # AdamW's first steps have the size of the learning rate, whatever the rounding of a small gradient is
    if rel == 1e-5:
        assert all(torch.allclose(actual[key], parameters[key], rtol=0, atol=1e-4) for key in parameters)
    ran = lorafuse.status(trainer.model)
    assert ran.fused == len(ran.layers) >= 6
    assert ran.fallbacks == 0 or kind in ("DPO", "GRPO", "RLOO", "KTO")
    linear = sum(row.kind == "linear" for row in ran.layers)
    # DoRA has an operator of its own
    assert calls is None or calls.call_count >= (0 if "DoRA" in name else linear * STEPS)


def test_dropout_draws_other_masks(tmp_path):
    """Fused, with losses that are not those of PEFT's masks."""
    feature = ("SFT", {}, {"lora_dropout": 0.1}, {})
    expected, _ = trained(trainer_of(feature, tmp_path, []))
    callback = LorafuseCallback(log=None, strict=True)
    losses, _ = trained(trainer_of(feature, tmp_path, [callback]))
    assert callback.training.status.fused == LAYERS
    assert 1e-5 < max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 0.2
