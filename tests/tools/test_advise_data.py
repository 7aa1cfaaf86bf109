"""`--data` (T1): every form of record is counted as TRL's collators train it, files are read by their own newlines."""

import copy
import json
import re
import tracemalloc

import peft
import pytest
import transformers
from tiny_models import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lorafuse import advise
from lorafuse.advise import data

# words of a byte-level tokenizer, each merged letter by letter; all else is bytes. "Ġ" is a space
WORDS = ("Ġpositive", "Ġnegative", "positive", "Review", "Ġfilm", "Ġgreat", "how", "Ġmany", "four", "Ġfour", "Ġ=")
END = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ '<|end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def byte_tokenizer():
    """A tokenizer of bytes and a few words, with an end of sequence and without a chat template."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    actual = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token="<|pad|>")
    actual.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"]})
    return actual


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


CHAT = turns("how many", "four", "how", "four four")
SHAREGPT = [{"from": ("human", "gpt")[i % 2], "value": m["content"]} for i, m in enumerate(CHAT)]
PAIR = {"chosen": " positive", "rejected": " negative"}
ASKED = {"instruction": "how many", "input": "", "output": "four"}
PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nhow many\n\n### Input:\n2\n\n"
    "### Response:\n"
)
# of each: a record, what TRL itself takes for it (None for the same), whether the tokenizer has a chat template, and
# tokens and supervised tokens, counted by TRL 1.16's own collators and committed
FORMS = {
    "messages": ({"messages": CHAT}, None, True, 14, 5),
    "messages, a system turn": ({"messages": [{"role": "system", "content": "how"}, *CHAT]}, None, True, 17, 5),
    "sharegpt": ({"conversations": SHAREGPT}, {"messages": CHAT}, True, 14, 5),
    "prompt and completion": ({"prompt": "Review: great film =", "completion": " positive"}, None, False, 7, 2),
    "one token that merges across the border": (
        {"prompt": "Review: great film = ", "completion": "positive"}, None, False, 7, 2,
    ),
    "prompt and completion of messages": ({"prompt": CHAT[:3], "completion": CHAT[3:]}, None, True, 14, 3),
    "alpaca": (ASKED, {"messages": CHAT[:2]}, True, 7, 2),
    "alpaca without a template": (
        ASKED | {"input": "2"}, {"prompt": PROMPT, "completion": "four"}, False, 204, 2,
    ),
    "question and answer": ({"question": "how many", "answer": "four"}, {"messages": CHAT[:2]}, True, 7, 2),
    "question and answer without a template": (
        {"question": "how many", "answer": "four"},
        {"prompt": "Question: how many\nAnswer:", "completion": " four"}, False, 22, 2,
    ),
    "pairs": ({"prompt": "great film", **PAIR}, None, False, 16, 4),
    "pairs without a prompt": (
        {"chosen": turns("how many", "four"), "rejected": turns("how many", "four four")}, None, True, 15, 5,
    ),
    "text": ({"text": "how many = four"}, None, False, 5, 5),
    "text that ends": ({"text": "how many = four" + END}, None, False, 5, 5),
}  # fmt: skip


def jsonl(folder, *records):
    path = folder / "data.jsonl"
    path.write_text("".join(f"{json.dumps(r)}\n" for r in records), encoding="utf-8")
    return path


def with_template(tokenizer, template):
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return own


def by_trl(record, tokenizer, folder):
    """Tokens and supervised tokens of a record as TRL's collator gives them to the model."""
    datasets = pytest.importorskip("datasets", reason="the oracle needs datasets: pip install --no-deps datasets")
    trl = pytest.importorskip("trl", reason="the oracle needs trl: pip install --no-deps trl")
    rows = datasets.Dataset.from_list([record] * 2)
    settings = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "max_length": 512, "bf16": False}
    more = {"processing_class": tokenizer, "train_dataset": rows}
    model = tiny("llama")
    if "chosen" in record:
        config = peft.LoraConfig(target_modules="all-linear")
        trainer = trl.DPOTrainer(model, args=trl.DPOConfig(**settings), peft_config=config, **more)
        batch = trainer.data_collator([trainer.train_dataset[0]])
        return int(batch["attention_mask"].sum()), int(batch["completion_mask"].sum())
    chat = "messages" in record
    trainer = trl.SFTTrainer(model, args=trl.SFTConfig(**settings, assistant_only_loss=chat), **more)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    return int(batch["attention_mask"].sum()), int((batch["labels"] != -100).sum())


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_counted_as_committed(form, tokenizer, tmp_path):
    record, _, chat, tokens, supervised = FORMS[form]
    own = with_template(tokenizer, TEMPLATE if chat else None)
    count = advise.count_file(jsonl(tmp_path, record, record), own)
    assert (count.examples, count.tokens, count.supervised) == (2, 2 * tokens, 2 * supervised)
    assert count.is_paired == ("chosen" in record)
    if chat:
        # of a template that marks nothing, the turns of the assistant are found by rendering
        unmarked = with_template(tokenizer, UNMARKED)
        assert advise.count_file(jsonl(tmp_path, record, record), unmarked) == count


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_counted_as_trl_trains_it(form, tokenizer, tmp_path):
    record, native, chat, tokens, supervised = FORMS[form]
    own = with_template(tokenizer, TEMPLATE if chat else None)
    assert by_trl(native or record, own, tmp_path) == (tokens, supervised)


def test_lines_are_the_files_own(tokenizer, tmp_path):
    texts = ["how\u2028many", "how\u0085many\u000b", "how\x1cmany", "four"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / "data.jsonl"
    for content in ("\n".join(lines), "\r\n".join(lines) + "\r\n", "\n\n" + "\n \n".join(lines) + "\n\n"):
        for mark in ("", "\ufeff"):
            path.write_bytes((mark + content).encode())
            assert [example["text"] for example in data.examples(path, tokenizer)] == texts
    path.write_bytes(b'\n{"text": "how"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="line 3: no JSON"):
        advise.count_file(path, tokenizer)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
def test_an_array_is_read_bit_by_bit(indent, chunk, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", chunk)
    records = [{"text": "how ] many, [four}"}, {"prompt": '"', "completion": "\u2028"}, {"text": "ü"}] * 3
    path = tmp_path / "data.json"
    for mark in ("", "\ufeff \n"):
        path.write_text(mark + json.dumps(records, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
        assert list(data.examples(path, tokenizer)) == records
    path.write_text("[]")
    with pytest.raises(ValueError, match="it is empty"):
        advise.count_file(path, tokenizer)


@pytest.mark.parametrize("chunk", [1, 1 << 16])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "record 1: a int, not an object; record 2: a int"),
        ('[{"text": "a"} 3]', "record 1: it is not followed by a comma"),
        ('[{"text": "a"},]', "record 2: no JSON"),
        ('[{"text": "a"}', "record 1: it is not followed by a comma"),
        ('[{"text": "a"}] {"text": "b"}', "after record 1: more follows the array's end"),
        ("[{", "record 1: no JSON"),
        ("[" * 9999, "brackets are nested too deep"),
    ],
)
def test_a_broken_array_is_refused(content, message, chunk, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", chunk)
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        advise.count_file(path, tokenizer)


def test_a_file_is_read_as_datasets_reads_it(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the oracle needs datasets: pip install --no-deps datasets")
    records = [{"prompt": "how\u2028many", "completion": " four"}, {"prompt": "ü", "completion": "\u0085"}]
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n"
    for name, content in (("lines.jsonl", lines), ("array.json", json.dumps(records, ensure_ascii=False))):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        read = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
        assert list(data.examples(path, tokenizer)) == list(read) == records


def test_plain_text_is_a_document_a_line(tokenizer, tmp_path):
    """As datasets reads it, blank lines and all; each ends as TRL ends a text."""
    path, lines = tmp_path / "data.txt", ["how many", "", '"four"', "how\u2028many\u0085", "[four]"]
    for newline, mark in (("\n", ""), ("\r\n", "\ufeff")):
        path.write_bytes((mark + newline.join(lines)).encode())
        assert list(data.examples(path, tokenizer)) == [{"text": line} for line in lines]
    as_records = advise.count_file(jsonl(tmp_path, *({"text": line} for line in lines)), tokenizer)
    assert advise.count_file(path, tokenizer) == as_records
    assert as_records.supervised == as_records.tokens > len(lines)
    # what was called .txt and holds records
    path.write_text(json.dumps({"prompt": "how", "completion": " many"}) + "\n")
    assert list(data.examples(path, tokenizer)) == [{"prompt": "how", "completion": " many"}]
    path.write_text("how many")
    with pytest.raises(ValueError, match="line 1: no JSON .*; plain text is read from .txt files, a line each"):
        advise.count_file(path.rename(tmp_path / "data.md"), tokenizer)


def test_plain_text_is_read_as_datasets_reads_it(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the oracle needs datasets: pip install --no-deps datasets")
    path = tmp_path / "data.txt"
    path.write_bytes("how\r\n\n many\u2028\u0085\rfour\n\n".encode())
    read = datasets.load_dataset("text", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(data.examples(path, tokenizer)) == list(read)


@pytest.mark.parametrize("form", ["lines", "array", "text"])
def test_a_large_file_is_not_held(form, tokenizer, tmp_path, monkeypatch):
    # a 16th of the size that it is read by, as the file is of the size of those that this is for
    monkeypatch.setattr(data, "CHUNK", 4096)
    records = [{"prompt": "how many " * 30, "completion": "four " * 30}] * 600
    path = tmp_path / ("data.txt" if form == "text" else "data.json")
    lines = [r["prompt"] + r["completion"] for r in records] if form == "text" else map(json.dumps, records)
    path.write_text(json.dumps(records) if form == "array" else "\n".join(lines))
    tracemalloc.start()
    try:
        count = advise.count_file(path, tokenizer)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count.tokens > 70_000
    assert peak < count.tokens


def test_what_is_longer_than_the_sequence_is_cut_and_said(tokenizer, tmp_path):
    long, short = {"prompt": "how", "completion": " many" * 20}, {"prompt": "how many", "completion": " four"}
    beyond, empty = {"prompt": "how many" + " many" * 20, "completion": " four"}, {"prompt": "how", "completion": ""}
    path = jsonl(tmp_path, long, short, beyond, {"messages": [CHAT[0]]})
    own = with_template(tokenizer, TEMPLATE)
    whole = advise.Count(3, 22 + 4 + 24, 21 + 2 + 2, 24, unsupervised=1)
    assert advise.count_file(path, own) == whole
    assert advise.count_file(path, own, length=10) == advise.Count(2, 14, 9 + 2, 24, cut=2, lost=12, unsupervised=2)
    assert [(len(x["ids"]), x["on"]) for x in labels(path, own, 10)] == [(10, 9), (4, 2)]
    with pytest.raises(ValueError, match="none of its 1 examples has a supervised token within --length 3; raise it"):
        advise.count_file(jsonl(tmp_path, beyond), own, length=3)
    # of an empty completion the end of sequence is trained, as TRL does
    assert advise.count_file(jsonl(tmp_path, empty), own).supervised == 1


def labels(path, tokenizer, length):
    for row in data.labelled(path, tokenizer, length):
        assert [a for a, b in zip(row["input_ids"], row["labels"], strict=True) if b not in (a, -100)] == []
        yield {"ids": row["input_ids"], "on": sum(label != -100 for label in row["labels"])}


def test_prompts_of_reinforcement_learning(tokenizer, tmp_path):
    asked = {"question": "how many", "answer": "four"}
    records = [{"prompt": "how many"}, asked, {"messages": CHAT}, {"prompt": CHAT[:1], "answer": 4}, ASKED]
    own = with_template(tokenizer, TEMPLATE)
    path = jsonl(tmp_path, *records)
    count = advise.count_file(path, own, goal="rl")
    assert (count.examples, count.supervised) == (5, 0)
    actual = list(data.examples(path, own, "rl"))
    assert actual[1] == asked | {"prompt": CHAT[:1]}
    assert [x["prompt"] for x in actual] == ["how many", CHAT[:1], CHAT[:3], CHAT[:1], CHAT[:1]]
    with pytest.raises(ValueError, match="line 1: it holds 'text', none of which is a prompt"):
        advise.count_file(jsonl(tmp_path, {"text": "how"}), own, goal="rl")


def test_of_pairs_no_finding_speaks(tokenizer, tmp_path):
    pairs = jsonl(tmp_path, *[{"prompt": "great film", **PAIR}] * 3)
    advice = advise.plan_adapter(tiny("llama"), data=pairs, tokenizer=with_template(tokenizer, None))
    actual = {line.name: (line.sure, line.value) for line in advice.lines}
    assert actual["counted in the file"] == ("measured here", "3 pairs of answers, 48 tokens, 12 supervised, longest 8")
    assert actual["the data teaches"][0] == actual["learning rate"][0] == "assumption"
    assert "pairs a step" in actual["batch size"][1]
    assert "DPOTrainer" in advice.snippet
    # both answers of a pair are in a micro-batch
    asked = advice.request
    whole = advise.memory(advice.shapes, "lora", advice.rank, 2 * asked.micro_batch * asked.length, checkpointing=False)
    assert advice.memory["lora", False] == whole
