"""The advisor (T1): the published figures come out exactly, counts are PEFT's, the snippet runs, bad input is clear."""

import json
import math
import re
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
import warm_python
from advised import configured
from tiny_models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers

from lorafuse import advise, cli
from lorafuse.advise import capacity, data, schedule
from lorafuse.advise.sources import FINDINGS, SURE

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
QWEN_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
}


def written(folder, settings):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return written(tmp_path_factory.mktemp("models") / "Llama-3.1-8B", LLAMA)


@pytest.fixture(scope="module")
def llama_shapes(llama):
    return advise.shapes_of(llama)


def tiny_moe():
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "moe_intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **more))


def test_counts_of_llama_are_the_published_ones(llama_shapes):
    assert advise.per_rank(llama_shapes) == {"mlp": 1_769_472, "attention": 851_968, "unembedding": 132_352}
    assert advise.trainable(llama_shapes, 1, unembedding=True) == 2_753_792
    assert advise.trainable(llama_shapes, 256, unembedding=True) == 704_970_752
    assert advise.trainable(llama_shapes, 16) == 16 * (1_769_472 + 851_968)


def test_learning_rates_are_the_published_ones():
    assert f"{advise.learning_rate(4096, 'llama').lora:.3e}" == "2.856e-04"
    assert f"{advise.learning_rate(4096, 'qwen3').lora:.3e}" == "4.730e-04"
    assert f"{advise.learning_rate(5120, 'qwen3').lora:.3e}" == "4.649e-04"
    assert f"{advise.learning_rate(8192, 'llama').lora:.3e}" == "1.662e-04"


def test_short_runs_take_fifteen_times_and_others_ten():
    short, long = (advise.learning_rate(4096, "llama", steps) for steps in (99, 100))
    assert (short.multiple, long.multiple) == (15, 10)
    assert short.lora == pytest.approx(15 * short.full)
    assert long.full == advise.full_learning_rate(4096, 0.781)


@pytest.mark.parametrize(("family", "hidden"), [("llama", 576), ("qwen2", 896), ("llama4", 5120), ("mistral", 4096)])
def test_what_the_formula_was_not_fitted_on_is_an_assumption(family, hidden):
    assert not advise.learning_rate(hidden, family).published
    assert advise.learning_rate(2048, "llama").published


@pytest.mark.parametrize(("hidden", "exponent"), [(4096, 0.781), (576, 0.0775)])
def test_an_unknown_family_takes_the_lower_rate_and_says_so(hidden, exponent):
    rate = advise.learning_rate(hidden, "gemma3")
    assert rate.exponent == exponent
    assert not rate.published
    assert rate.lora == min(advise.learning_rate(hidden, family).lora for family in ("llama", "qwen3"))


@pytest.mark.parametrize(("rank", "ratio"), [(16, 0.6745), (64, 0.6979), (256, 0.7917)])
def test_flops_ratio_is_the_published_one(rank, ratio):
    assert round(advise.square_flops_ratio(4096, rank), 4) == ratio
    layer = advise.Linear("q_proj", "attention", 4096, 4096)
    shapes = advise.ModelShapes("square", "", 4096, 0, 1, layer.weights, (layer,))
    assert advise.flops_ratio(shapes, rank) == pytest.approx(advise.square_flops_ratio(4096, rank), rel=1e-12)


def test_experts_share_the_total_rank(tmp_path):
    shapes = advise.shapes_of(written(tmp_path, QWEN_MOE))
    assert (shapes.experts, shapes.active_experts) == (128, 8)
    assert shapes.parameters == 30_532_122_624
    assert advise.per_rank(shapes)["experts"] == 48 * 128 * (1536 + 2048 + 2048 + 768)
    assert [advise.expert_rank(rank, 8) for rank in (1, 8, 9, 32, 64)] == [1, 1, 2, 4, 8]
    attention = advise.per_rank(shapes)["attention"]
    assert advise.trainable(shapes, 32) == 32 * attention + 4 * advise.per_rank(shapes)["experts"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "moe"])
def test_the_snippet_runs_and_trains_as_many_parameters_as_said(family):
    model = tiny_moe() if family == "moe" else tiny(family)
    advice = advise.plan_adapter(model, tokens=1000, rank=4)
    config, args = configured(advice.snippet)
    assert args.gradient_accumulation_steps * args.per_device_train_batch_size == advice.request.batch
    assert args.learning_rate == pytest.approx(advice.learning_rate.lora, rel=1e-3)
    adapted = peft.get_peft_model(model, config)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == advice.trainable
    # an adapted model has the shapes of its base
    again = advise.shapes_of(adapted)
    assert {(x.name, x.kind) for x in again.linears} == {(x.name, x.kind) for x in advice.shapes.linears}
    assert again.parameters == advice.shapes.parameters


def test_the_smallest_comfortable_rank_is_the_smallest(llama_shapes):
    for tokens in (1, 10**6, 10**7, 10**8):
        rank = advise.rank_for(llama_shapes, advise.data_bits(tokens=tokens), "sft")
        assert advise.trainable(llama_shapes, rank.comfortable) >= tokens
        assert rank.comfortable == 1 or advise.trainable(llama_shapes, rank.comfortable - 1) < tokens
        assert rank.advised >= max(rank.comfortable, 8)
        assert rank.verdict == "lora"


def test_more_data_than_the_adapter_holds_is_full_fine_tuning(llama_shapes):
    most = advise.trainable(llama_shapes, 512)
    assert advise.rank_for(llama_shapes, most, "sft").verdict == "lora"
    assert advise.rank_for(llama_shapes, most + 1, "sft").verdict == "tight"
    assert advise.rank_for(llama_shapes, 2 * most + 1, "sft").verdict == "full"


def test_reinforcement_learning_needs_little(llama_shapes):
    # MATH: 10,000 problems with 32 episodes each
    rank = advise.rank_for(llama_shapes, advise.data_bits(episodes=320_000), "rl")
    assert (rank.comfortable, rank.advised) == (1, 1)


def test_a_measured_loss_says_what_the_data_teaches(llama, llama_shapes):
    assert advise.data_bits(tokens=1000, loss=math.log(2)) == pytest.approx(1000)
    assert advise.data_bits(tokens=1000, loss=2.0) == pytest.approx(2000 / math.log(2))
    plain, lossy = (advise.plan_adapter(llama, tokens=4 * 10**7, loss=loss) for loss in (None, 4 * math.log(2)))
    assert lossy.ranks.comfortable == pytest.approx(4 * plain.ranks.comfortable, abs=4)
    assert "2.77259 nats each" in str(lossy)
    with pytest.raises(ValueError, match=r"--loss 0\.0: it must be above 0"):
        advise.plan_adapter(llama, tokens=1000, loss=0.0)
    with pytest.raises(ValueError, match="--loss 1: it measures supervised tokens"):
        advise.plan_adapter(llama, episodes=1000, loss=1)


def test_no_rank_is_advised_that_costs_more_than_full_fine_tuning():
    shapes = advise.shapes_of(tiny("llama"))
    highest = capacity.highest_rank(shapes)
    assert advise.flops_ratio(shapes, highest) <= 1 < advise.flops_ratio(shapes, highest + 1)


def test_accumulation_keeps_the_batch():
    assert advise.accumulation(512, 4, 8) == 16
    assert advise.accumulation(10, 4) == 2
    with pytest.raises(
        ValueError, match="--micro-batch 4 on 3 devices is 12 sequences a step, more than the batch of 10"
    ):
        advise.accumulation(10, 4, 3)
    assert schedule.optimizer_steps(65, 32, 2) == 6


def test_a_batch_above_the_ceiling_is_kept_and_said(llama):
    advice = advise.plan_adapter(llama, tokens=10**9, batch=2048)
    assert advice.request.batch == 2048
    (line,) = [line for line in advice.lines if line.name == "large batch"]
    assert (line.sure, line.source) == ("secondary digest", "NOTE")
    assert named(advise.plan_adapter(llama, tokens=10**9, batch=512), "large batch") == []


def named(advice, name):
    return [line.value for line in advice.lines if line.name == name]


def test_a_short_run_is_said_with_the_batch_that_makes_it_longer(llama):
    one = advise.plan_adapter(llama, tokens=50_000)
    assert one.steps == 1
    assert named(one, "few steps") == [
        "an epoch is one step, without gradient noise; --batch 1 --micro-batch 1 makes 25"
    ]
    assert advise.plan_adapter(llama, tokens=50_000, batch=1, micro_batch=1).steps == 25
    few = advise.plan_adapter(llama, tokens=10**6)
    assert (few.steps, named(few, "few steps")) == (16, ["--batch 5 makes 98"])
    assert advise.plan_adapter(llama, tokens=10**6, batch=5, micro_batch=1).steps == 98
    assert named(advise.plan_adapter(llama, tokens=10**7), "few steps") == []
    # nothing is advised that makes no more steps, or that the command refuses
    never = ["an epoch is one step, without gradient noise; more epochs or more data make more"]
    assert named(advise.plan_adapter(llama, tokens=1), "few steps") == never
    assert named(advise.plan_adapter(llama, episodes=20_000, rollouts=8), "few steps") == ["--batch 200 makes 100"]
    assert advise.plan_adapter(llama, episodes=20_000, rollouts=8, batch=200).steps == 100
    several = advise.plan_adapter(llama, tokens=50_000, devices=8)
    assert named(several, "few steps")[0].endswith("; --batch 8 --micro-batch 1 makes 4")
    assert advise.plan_adapter(llama, tokens=50_000, devices=8, batch=8, micro_batch=1).steps == 4


@pytest.mark.parametrize(("steps", "lines"), [(49, 0), (50, 1), (99, 1), (100, 1), (199, 1), (200, 0)])
def test_the_border_between_two_learning_rates_is_said(steps, lines, llama):
    advice = advise.plan_adapter(llama, tokens=2048 * 32 * steps)
    assert advice.steps == steps
    assert advice.learning_rate.multiple == (15 if steps < 100 else 10)
    assert len(named(advice, "multiple of the learning rate")) == lines


@pytest.fixture
def tokenizer():
    words = ["[UNK]", "<u>", "<a>", "<e>", "how", "many", "four", "three"]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


PLAIN = (
    "{% for m in messages %}{{ '<u> ' if m.role == 'user' else '<a> ' }}{{ m.content }}{{ ' <e> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a> ' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<u> ' + m.content + ' <e> ' }}{% else %}{{ '<a> ' }}"
    "{% generation %}{{ m.content }}{{ ' <e>' }}{% endgeneration %}{{ ' ' }}{% endif %}{% endfor %}"
)
TURNS = [
    {"role": "user", "content": "how many"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "how"},
    {"role": "assistant", "content": "three three"},
]


def jsonl(folder, *records):
    path = folder / "data.jsonl"
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
    return path


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_of_a_chat_the_answers_are_counted(template, tokenizer, tmp_path):
    tokenizer.chat_template = template
    path = jsonl(tmp_path, {"messages": TURNS})
    # four <e>, three three <e>
    assert advise.count_file(path, tokenizer) == advise.Count(1, 14, 5, 14)
    (row,) = data.read_rows(path, tokenizer)
    kept = [i for i, on in zip(row.ids, row.supervised, strict=True) if on]
    assert tokenizer.decode(kept).split() == ["four", "<e>", "three", "three", "<e>"]


def test_of_a_pair_the_completion_is_counted_and_of_a_text_everything(tokenizer, tmp_path):
    path = jsonl(tmp_path, {"prompt": "how many ", "completion": "four three"}, {"text": "how many four"})
    assert advise.count_file(path, tokenizer) == advise.Count(2, 7, 5, 4)


def test_bad_lines_are_numbered(tokenizer, tmp_path):
    bad = ["{", "[1]", {"question": "x"}, {"messages": TURNS}, {"text": 3}, "7"]
    path = jsonl(tmp_path, {"text": "how"}, "", *bad)
    with pytest.raises(ValueError, match="A record must be") as actual:
        advise.count_file(path, tokenizer)
    message = str(actual.value)
    for part in ("line 3: no JSON", "line 4: a list", "line 5: it holds 'question'", "line 7: it holds 'text'"):
        assert part in message
    assert "line 6: messages, but the tokenizer has no chat template" in message
    assert "and 1 more" in message
    with pytest.raises(ValueError, match="it is empty"):
        advise.count_file(jsonl(tmp_path), tokenizer)


def test_every_line_says_how_sure_it_is_and_from_where(llama, capsys):
    assert cli.main(["advise", "--model", str(llama), "--tokens", "10M", "--gpu", "H200"]) == 0
    out = capsys.readouterr().out
    advice = advise.plan_adapter(llama, tokens=10**7, gpu="H200")
    assert out.strip() == str(advice)
    for line in advice.lines:
        assert line.sure in SURE
        assert all(key.strip() in FINDINGS for key in line.source.split(","))
        assert f"{line.value}  [{line.sure}; {line.source}]" in out
        # a modelled number says so on its own line
        assert line.sure != "model" or "(model)" in line.value
    assert cli.main(["advise", "--model", str(llama), "--tokens", "10M", "--gpu", "H200", "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    assert actual == json.loads(json.dumps(advice.as_dict()))
    assert actual["learning_rate"]["lora"] == pytest.approx(2.856e-4, rel=1e-3)


def test_the_documentation_quotes_the_page(llama):
    section = (Path(__file__).parents[2] / "docs/advise.md").read_text()
    quoted = re.findall(r"^  .*\]$", section, re.MULTILINE)
    lines = str(advise.plan_adapter(llama, tokens=10**7, gpu="H200")).splitlines()
    assert len(quoted) > 4
    assert [line for line in quoted if line not in lines] == [], "\n".join(lines)


def test_too_much_data_says_full_fine_tuning(llama, capsys):
    assert cli.main(["advise", "--model", str(llama), "--tokens", "5G"]) == 0
    message = "use full fine-tuning: LoRA at rank 512 learns less efficiently, and QLoRA holds no more"
    assert message in capsys.readouterr().out


def test_a_probe_from_the_command_line_ends_in_the_snippet(tokenizer, tmp_path, capsys):
    model = tiny()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = jsonl(tmp_path, *({"prompt": "how many ", "completion": "four three"} for _ in range(3)))
    argv = ["advise", "--model", str(tmp_path), "--data", str(path), "--probe", "2", "--rank", "4", "--json"]
    assert cli.main(argv) == 0
    actual = json.loads(capsys.readouterr().out)
    config, _ = configured(actual["snippet"])
    assert config.rank_pattern == actual["rank_pattern"] != {}
    assert actual["request"]["tokens"] == 6
    adapted = peft.get_peft_model(model, config)
    ranks = {m.r["default"] for m in adapted.modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert len(ranks) > 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tokens", "0"], "--tokens 0: it must be at least 1"),
        (["--tokens", "5", "--goal", "rl"], "--goal rl counts its data by --episodes N"),
        (["--episodes", "5", "--goal", "sft"], "--goal sft counts its data by --tokens N"),
        (["--tokens", "5", "--rank", "1025"], "min(N, K) = 1024"),
        (["--tokens", "5", "--rank", "0"], "--rank 0: it must be at least 1"),
        (["--tokens", "5", "--gpu", "H20"], "did you mean H200"),
        (["--tokens", "5", "--batch", "2"], "--micro-batch 4 on 1 devices"),
        (["--tokens", "5", "--loss", "nan"], "--loss nan: it must be above 0"),
        (["--episodes", "500", "--batch", "8"], "--batch 8: it must be a multiple of --rollouts 16"),
        (["--tokens", "5", "--epochs", "0"], "--epochs 0.0: it must be above 0"),
        (["--data", "absent.jsonl"], "no tokenizer there"),
        (["--tokens", "5", "--probe", "2"], "--probe needs --data FILE"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, message, llama, capsys):
    assert cli.main(["advise", "--model", str(llama), *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "must be a JSON object"), ("{}", "with a model_type"), ('{"model_type": "novel"}', "does not know")],
)
def test_a_bad_configuration_is_refused(text, message, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"no config\.json there"):
        advise.shapes_of(tmp_path / "absent")
    (tmp_path / "config.json").write_text(text)
    assert cli.main(["advise", "--model", str(tmp_path), "--tokens", "5"]) == 2
    assert message in capsys.readouterr().err


def test_a_plain_module_is_counted_from_its_layers():
    model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.ReLU(), torch.nn.Linear(20, 12))
    shapes = advise.shapes_of(model)
    assert advise.per_rank(shapes) == {"other": 64}
    assert shapes.parameters == 12 * 20 * 2 + 32
    with pytest.raises(ValueError, match="no linear layer"):
        advise.shapes_of(torch.nn.ReLU())


def test_import_is_lean():
    code = "import lorafuse.advise, sys; print([n for n in ('transformers', 'peft') if n in sys.modules])"
    done = warm_python.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "[]"
