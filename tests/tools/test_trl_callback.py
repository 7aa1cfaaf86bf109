"""`LorafuseCallback` in TRL's trainers with a `peft_config`: the losses are those of the run without it."""

import pytest
import torch
import transformers
from test_advise_data import CHAT, PAIR, TEMPLATE, byte_tokenizer
from tiny_models import counting_fused, lora_config, train_away_from_zero

from lorafuse.integrations.callback import LorafuseCallback

STEPS = 2
pytestmark = [pytest.mark.no_poison, pytest.mark.filterwarnings("ignore")]


def model_of(tokenizer):
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.LlamaForCausalLM(config)


def logged(kind, callbacks, folder):
    """The losses that a trainer of TRL logs, and it."""
    trl = pytest.importorskip("trl", reason="TRL is installed by make test-trl")
    datasets = pytest.importorskip("datasets", reason="datasets is installed by make test-trl")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = {
        "SFT": [{"messages": CHAT}] * 8,
        "DPO": [{"prompt": "great film", **PAIR}] * 8,
        "GRPO": [{"prompt": "great film"}] * 8,
    }[kind]
    more = {"GRPO": {"num_generations": 2, "max_completion_length": 6}}.get(kind, {})
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True, seed=3, gradient_checkpointing=False,
        bf16=False, **more,
    )  # fmt: skip
    rewards = {"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]} if kind == "GRPO" else {}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model_of(tokenizer), args=arguments, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer, peft_config=lora_config(), callbacks=callbacks, **rewards,
    )  # fmt: skip
    torch.manual_seed(6)
    train_away_from_zero(trainer.model)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_as_without_it(kind, tmp_path):
    expected, _ = logged(kind, [], tmp_path)
    texts = []
    callback = LorafuseCallback(log=texts.append)
    with counting_fused() as calls:
        losses, trainer = logged(kind, [callback], tmp_path)
    assert losses == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len(losses) == STEPS
    assert calls.call_count >= 14 * STEPS
    assert callback.training.status.fused == 14
    assert "14 of 14 adapted layers ran fused" in texts[1]
    assert trainer.model.training
