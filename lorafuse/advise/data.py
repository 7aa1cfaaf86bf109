"""How many supervised tokens a JSON-lines file holds, counted with the model's own tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafuse.advise.configuration import load_pretrained
from lorafuse.errors import MissingDependency, one_line
from lorafuse.files import parse, read_text

__all__ = ["Count", "Row", "count_file", "load_tokenizer", "read_rows"]

# so many bad lines are named before the rest is only counted
_NAMED = 5
_FORMS = '{"messages": […]}, {"prompt": …, "completion": …} or {"text": …}'
# what a chat template holds around the tokens that it says are trained on
_MARK = "generation %}"


@dataclass(frozen=True)
class Row:
    """The tokens of one example, and for each of them whether a loss is computed on it."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]


@dataclass(frozen=True)
class Count:
    """`tokens` in all, `supervised` of them, in `examples`; the longest has `longest` tokens."""

    examples: int
    tokens: int
    supervised: int
    longest: int


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model's directory. Raises FileNotFoundError where there is none, ValueError as
    `load_pretrained` does.
    """
    folder = directory if directory.is_dir() else directory.parent
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / name).is_file() for name in names):
        raise FileNotFoundError(
            f"--model {folder}: no tokenizer there (none of {', '.join(names)}), so --data cannot be counted; add the "
            "tokenizer's files, or give the number of supervised tokens: --tokens N"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependency("counting tokens needs transformers: pip install 'transformers>=5.7'") from error
    return load_pretrained(AutoTokenizer, folder)


def count_file(path: Path, tokenizer: Any) -> Count:
    """Tokens of all examples of a file. Raises as `read_rows` does."""
    rows = read_rows(path, tokenizer)
    lengths = [len(row.ids) for row in rows]
    return Count(len(rows), sum(lengths), sum(sum(row.supervised) for row in rows), max(lengths))


def read_rows(path: Path, tokenizer: Any) -> list[Row]:
    """The examples of a file, one JSON object a line, as tokens.

    Supervised are: of `messages` what the chat template marks for training, or where it marks nothing, what it renders
    after the prompt of each assistant's turn; of `prompt` and `completion` (texts or lists of messages) the completion;
    of `text` everything. Raises FileNotFoundError without the file, ValueError with the numbers of all lines that are
    empty, no JSON, of another form, or without a supervised token.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: no such file; it must be a JSON-lines file")
    rows, bad = [], []
    try:
        lines = read_text(path).removesuffix("\n").split("\n")
    except ValueError as error:
        raise ValueError(f"--data {path}: {error}") from error
    for number, line in enumerate(lines if lines != [""] else (), 1):
        row = _row(line, tokenizer)
        if isinstance(row, str):
            bad.append(f"line {number}: {row}")
        else:
            rows.append(row)
    if bad:
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise ValueError(f"--data {path}: {'; '.join(bad[:_NAMED])}{more}. A line must be {_FORMS}")
    if not rows:
        raise ValueError(f"--data {path}: it is empty; a line must be {_FORMS}")
    return rows


def _row(line: str, tokenizer: Any) -> Row | str:
    """The example of a line, or what is wrong with it."""
    if not line.strip():
        return "it is empty"
    try:
        record = parse(line)
    except ValueError as error:
        return f"no JSON ({error})"
    if not isinstance(record, dict):
        return f"a {type(record).__name__}, not an object"
    try:
        row = _encode(record, tokenizer)
    except Exception as error:
        # of a chat template, or of a tokenizer that gets other types than text
        return f"the tokenizer cannot read it ({type(error).__name__}: {one_line(str(error))})"
    if isinstance(row, Row) and not any(row.supervised):
        return "no supervised token in it"
    return row


def _encode(record: dict[str, Any], tokenizer: Any) -> Row | str:
    prompt, completion = record.get("prompt"), record.get("completion")
    if _are_messages(record.get("messages")):
        return _chat(record["messages"], 0, tokenizer)
    if _are_messages(prompt) and _are_messages(completion):
        assert isinstance(prompt, list)
        assert isinstance(completion, list)
        return _chat(prompt + completion, len(prompt), tokenizer)
    if isinstance(prompt, str) and isinstance(completion, str):
        return _after(prompt, prompt + completion, lambda text: tokenizer(text)["input_ids"])
    if isinstance(record.get("text"), str):
        ids = tuple(tokenizer(record["text"])["input_ids"])
        return Row(ids, (True,) * len(ids))
    return f"it holds {', '.join(map(repr, record)) or 'nothing'}, or those of another type"


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
    )


def _chat(messages: list[dict[str, Any]], first: int, tokenizer: Any) -> Row | str:
    """Messages as the template renders them; those before `first` are not trained on."""
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return "messages, but the tokenizer has no chat template"
    if not isinstance(template, str) or (_MARK in template and not first):
        found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        return Row(tuple(found["input_ids"]), tuple(bool(mask) for mask in found["assistant_masks"]))

    def render(part: list[dict[str, Any]], prompt: bool) -> str:
        return tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    whole = tokens(render(messages, False))
    mask = [False] * len(whole)
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first:
            continue
        turn = _after(render(messages[:index], True), render(messages[: index + 1], False), tokens)
        if isinstance(turn, str):
            return turn
        if list(turn.ids) != whole[: len(turn.ids)]:
            return "the chat template renders earlier turns otherwise later on; give each turn a line of its own"
        mask[: len(turn.ids)] = [a or b for a, b in zip(mask, turn.supervised, strict=False)]
    return Row(tuple(whole), tuple(mask))


def _after(prompt: str, whole: str, tokens: Callable[[str], list[int]]) -> Row | str:
    """`whole` as tokens, of which those after the prompt's are supervised."""
    if not whole.startswith(prompt):
        return "the chat template renders the prompt otherwise with its answer; give prompt and completion as texts"
    ids, before = tokens(whole), len(tokens(prompt))
    return Row(tuple(ids), tuple(index >= before for index in range(len(ids))))
