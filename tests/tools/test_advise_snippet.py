"""The advisor's snippet runs as it is under TRL, trains as many steps as said, and leaves no layer unadapted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import transformers
from advised import configured
from test_advise_data import CHAT, PAIR, TEMPLATE, byte_tokenizer

from lorafuse import advise
from lorafuse.advise import snippet

ROOT = Path(__file__).parents[2]
ROWS = {
    "chat.jsonl": [{"messages": CHAT}] * 8,
    "pairs.jsonl": [{"prompt": "great film", **PAIR}] * 8,
    "asked.jsonl": [{"question": "how many", "answer": "four"}] * 4,
    # what the snippet reads where only tokens were counted
    "data.jsonl": [{"messages": CHAT}] * 8,
}
CASES = {
    "sft": {"data": "chat.jsonl", "batch": 4},
    "tokens": {"tokens": 8 * 14, "batch": 2, "micro_batch": 1},
    "pairs": {"data": "pairs.jsonl", "batch": 4},
    "rl": {"data": "asked.jsonl", "goal": "rl", "batch": 8, "rollouts": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snippets")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("eos", "pad", "bos")}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, **special, num_key_value_heads=2, vocab_size=len(tokenizer))
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name, rows in ROWS.items():
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def run(source, folder, *more):
    """Run a snippet as a script of its own, in a folder, with lines after it; what it printed."""
    for package in ("trl", "datasets"):
        pytest.importorskip(package, reason=f"the script needs {package}: pip install --no-deps {package}")
    script = folder / "script.py"
    script.write_text("\n".join([source, *more]))
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("case", CASES)
def test_the_script_trains_as_many_steps_as_said(case, folder, monkeypatch):
    monkeypatch.chdir(folder)
    advice = advise.plan_adapter(Path("model"), length=32, **CASES[case])
    out = run(advice.snippet, folder, "print(trainer.state.global_step, 'steps', trainer.state.max_steps)")
    assert f"{advice.steps} steps {advice.steps}" in out
    assert "14 adapted layers patched, 0 left to PEFT" in out
    trained = peft.PeftConfig.from_pretrained(folder / "adapter")
    assert (trained.r, trained.lora_alpha) == (advice.rank, 32)


def test_the_script_for_qlora_quantizes(folder, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes: pip install --no-deps bitsandbytes")
    monkeypatch.chdir(folder)
    shapes = advise.shapes_of(folder / "model")
    settings = snippet.Settings(
        4, 1e-4, 2, 2, 1, model="model", data="chat.jsonl", length=32, checkpointing=True, quantized=True
    )
    kinds = "print(sorted({type(m).__name__ for m in model.modules() if '4bit' in type(m).__name__}))"
    out = run(snippet.snippet(shapes, settings), folder, kinds, "print(trainer.state.global_step, 'steps')")
    assert "'Linear4bit'" in out
    assert "2 steps" in out


def test_the_towers_of_other_modalities_are_left_out():
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text, num_key_value_heads=2, head_dim=8, vocab_size=64),
        vision_config=transformers.SiglipVisionConfig(**text, image_size=28, patch_size=14),
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    advice = advise.plan_adapter(model, tokens=1000, rank=4)
    towers = {linear.name for linear in advice.shapes.linears if linear.kind == "tower"}
    # two blocks of six, and the pooling head
    assert len(towers) == 2 * 6 + 3
    assert "the 15 linear layers of other modalities: text gives them no gradient" in str(advice)
    assert "AutoModelForImageTextToText" in advice.snippet
    adapted = peft.get_peft_model(model, configured(advice.snippet)[0])
    actual = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert actual == {linear.name for linear in advice.shapes.adapted}
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == advice.trainable
    again = advise.shapes_of(adapted)
    assert {(x.name, x.kind) for x in again.linears} == {(x.name, x.kind) for x in advice.shapes.linears}
