"""How many supervised tokens a file of examples holds, as TRL trains them, counted with the model's own tokenizer."""

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafuse.advise.configuration import load_pretrained
from lorafuse.advise.forms import FORMS, as_example
from lorafuse.errors import MissingDependency, one_line
from lorafuse.files import open_regular, parse

__all__ = ["Count", "Row", "count_file", "examples", "labelled", "load_tokenizer", "read_rows"]

# so many bad records are named before the rest is only counted
_NAMED = 5
# what a chat template holds around the tokens that are trained on
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# what such a file holds is text, unless it begins with an object
_TEXT = ".txt"
# of a JSON array so many characters are read at a time
CHUNK = 1 << 16


@dataclass(frozen=True)
class Row:
    """The tokens of one example, and for each of them whether a loss is computed on it."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]


@dataclass(frozen=True)
class Count:
    """`tokens` in all, `supervised` of them, in `examples`; the longest has `longest` tokens, before it is cut.

    Each is cut at a sequence's length: `cut` examples are longer, and lose `lost` supervised tokens. `unsupervised`
    examples have no supervised token, within that length, and are left out of all the others. `is_paired`: examples are
    a chosen and a rejected answer, both counted.
    """

    examples: int
    tokens: int
    supervised: int
    longest: int
    cut: int = 0
    lost: int = 0
    unsupervised: int = 0
    is_paired: bool = False


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


def count_file(path: Path, tokenizer: Any, *, length: int | None = None, goal: str = "sft") -> Count:
    """Tokens of all examples of a file, each cut at `length` tokens; under goal "rl" those of prompts, none supervised.

    One example is held at a time. Raises as `read_rows` does, and ValueError where none is left to train on.
    """
    number = tokens = supervised = longest = cut = lost = bare = 0
    is_paired = False
    for example, rows in _encoded(path, tokenizer, goal):
        is_paired = is_paired or (goal == "sft" and "chosen" in example)
        kept = [sum(row.supervised[:length]) for row in rows]
        longest = max(longest, *(len(row.ids) for row in rows))
        cut += any(length is not None and len(row.ids) > length for row in rows)
        if goal == "sft" and not any(kept):
            bare += 1
            continue
        number += 1
        tokens += sum(len(row.ids[:length]) for row in rows)
        supervised += sum(kept)
        lost += sum(sum(row.supervised) for row in rows) - sum(kept)
    if not number:
        why = f"none of its {bare} examples has a supervised token" if bare else "it is empty"
        within = f" within --length {length}; raise it" if bare and cut else f"; a record must be {FORMS}"
        raise ValueError(f"--data {path}: {why}{within}")
    return Count(number, tokens, supervised, longest, cut, lost, bare, is_paired)


def read_rows(path: Path, tokenizer: Any) -> Iterator[Row]:
    """The examples of a file of JSON lines, of one JSON array, or of plain text (`.txt`), as tokens; of a pair, one row
    for each answer.

    Supervised are, as TRL trains them: of messages what the chat template marks for training, or where it marks
    nothing, what it renders after the prompt of each assistant's turn; of a completion or an answer all tokens from the
    first that the prompt alone does not have; of a text everything. Texts end with the tokenizer's end of sequence.
    Lines end at a newline only; a byte-order mark and blank lines are left out. Each line of plain text is a text, a
    blank one too, as datasets' "text" loader has it; a `.txt` file that begins with a JSON object is JSON lines. Raises
    FileNotFoundError without the file, ValueError with the numbers of the records that are no JSON, of another form or
    that the tokenizer refuses.
    """
    return (row for _, rows in _encoded(path, tokenizer, "sft") for row in rows)


def labelled(path: str | Path, tokenizer: Any, length: int) -> Iterator[dict[str, list[int]]]:
    """What a trainer takes for each example that `count_file` counts: `input_ids` and `labels`, -100 where there is no
    loss, cut at `length` tokens. Raises as `read_rows` does.
    """
    for row in read_rows(Path(path), tokenizer):
        if any(row.supervised[:length]):
            kept = zip(row.ids[:length], row.supervised[:length], strict=True)
            yield {"input_ids": list(row.ids[:length]), "labels": [i if on else -100 for i, on in kept]}


def examples(path: str | Path, tokenizer: Any, goal: str = "sft") -> Iterator[dict[str, Any]]:
    """The records of a file in the forms of `lorafuse.advise.forms.as_example`. Raises as `read_rows` does."""
    return (example for example, _ in _encoded(Path(path), tokenizer, goal))


class _Unusable(ValueError):
    """Why a record is no example."""


def _encoded(path: Path, tokenizer: Any, goal: str) -> Iterator[tuple[dict[str, Any], list[Row]]]:
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: no such file; it must be one of JSON lines, of a JSON array, or .txt")
    bad: list[str] = []
    wrong = 0
    try:
        for place, record in _records(path):
            try:
                example = _example(record, tokenizer, goal)
                rows = _rows(example, tokenizer, goal)
            except Exception as error:
                # of a chat template, or of a tokenizer that gets other types than text
                own = isinstance(error, _Unusable)
                reason = str(error) if own else f"the tokenizer cannot read it ({type(error).__name__}: {error})"
                wrong += 1
                bad += [f"{place}: {one_line(reason)}"] if wrong <= _NAMED else []
            else:
                yield example, rows
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data {path}: {error}") from error
    if bad:
        more = f"; and {wrong - _NAMED} more" if wrong > _NAMED else ""
        text = "" if path.suffix == _TEXT else f"; plain text is read from {_TEXT} files, a line each"
        raise ValueError(f"--data {path}: {'; '.join(bad)}{more}. A record must be {FORMS}{text}")


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of JSON lines, of an array or of text, each with its place; what is no JSON as an `_Unusable`."""
    with open_regular(path) as file:
        if path.suffix == _TEXT and not file.peek(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b'{"'):
            lines = io.TextIOWrapper(file, encoding="utf-8-sig")
            yield from ((f"line {i}", {"text": line.removesuffix("\n")}) for i, line in enumerate(lines, 1))
            return
        if file.peek(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            yield from _array(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
            return
        # not by str.splitlines, which also cuts at a U+2028 within a string
        for number, line in enumerate(file, 1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                yield f"line {number}", _parsed(text)


def _parsed(line: bytes) -> Any:
    try:
        return parse(line.decode("utf-8"))
    except ValueError as error:
        return _Unusable(f"no JSON ({error})")


def _array(text: io.TextIOWrapper) -> Iterator[tuple[str, Any]]:
    """Elements of one JSON array, read bit by bit."""
    decoder, rest, number = json.JSONDecoder(), "", 0

    def begun(held: str) -> str:
        """What is held and not blank, with more of the file if it is nothing; "" at its end."""
        held = held.lstrip()
        while not held and (more := text.read(CHUNK)):
            held = more.lstrip()
        return held

    rest = begun(begun("")[1:])
    is_open = not rest.startswith("]")
    while is_open:
        place = f"record {number + 1}"
        try:
            record, end = decoder.raw_decode(rest)
        except RecursionError:
            yield place, _Unusable("no JSON (its brackets are nested too deep)")
            return
        except ValueError as error:
            # as much again as is held, so that a long record is read in linear time
            more = text.read(max(CHUNK, len(rest)))
            if more:
                rest += more
                continue
            yield place, _Unusable(f"no JSON ({error})")
            return
        rest = begun(rest[end:])
        if not rest.startswith((",", "]")):
            yield place, _Unusable("it is not followed by a comma or the array's end")
            return
        number += 1
        yield place, record
        is_open = rest.startswith(",")
        rest = begun(rest[1:]) if is_open else rest
    if begun(rest[1:]):
        yield f"after record {number}", _Unusable("more follows the array's end")


def _example(record: Any, tokenizer: Any, goal: str) -> dict[str, Any]:
    if isinstance(record, _Unusable):
        raise record
    if not isinstance(record, dict):
        raise _Unusable(f"a {type(record).__name__}, not an object")
    chat = getattr(tokenizer, "chat_template", None) is not None
    example = as_example(record, chat=chat, goal=goal)
    if isinstance(example, str):
        raise _Unusable(example)
    if not chat and any(isinstance(example.get(key), list) for key in ("messages", "prompt", "chosen")):
        raise _Unusable("messages, but the tokenizer has no chat template")
    return example


def _rows(example: dict[str, Any], tokenizer: Any, goal: str) -> list[Row]:
    def tokens(part: Any, **options: Any) -> list[int]:
        if isinstance(part, str):
            return list(tokenizer(part)["input_ids"])
        rendered = tokenizer.apply_chat_template(part, return_dict=True, tools=example.get("tools"), **options)
        return list(rendered["input_ids"])

    def ended(text: Any) -> Any:
        end = tokenizer.eos_token
        return text if not isinstance(text, str) or not end or text.endswith(end) else text + end

    if "messages" in example:
        return [_chat(example["messages"], tokenizer, example.get("tools"), tokens)]
    if "text" in example and goal == "sft":
        ids = tokens(ended(example["text"]))
        return [Row(tuple(ids), (True,) * len(ids))]
    prompt = example["prompt"]
    before = tokens(prompt, add_generation_prompt=True)
    if goal == "rl":
        return [Row(tuple(before), (False,) * len(before))]
    wholes = [tokens(prompt + ended(example[key])) for key in ("completion", "chosen", "rejected") if key in example]
    start = min(_shared(before, whole) for whole in wholes)
    return [Row(tuple(ids), (False,) * start + (True,) * (len(ids) - start)) for ids in wholes]


def _shared(before: list[int], whole: list[int]) -> int:
    """With how many of the prompt's tokens the whole begins: one that merges with the answer is the answer's."""
    return next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole))
    )


def _chat(messages: list[dict[str, Any]], tokenizer: Any, tools: Any, tokens: Callable[..., list[int]]) -> Row:
    template = tokenizer.chat_template
    if not isinstance(template, str) or _MARK.search(template):
        encoded = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, tools=tools
        )
        return Row(tuple(encoded["input_ids"]), tuple(bool(mask) for mask in encoded["assistant_masks"]))
    whole = tokens(messages)
    mask = [False] * len(whole)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        turn = tokens(messages[: index + 1])
        if turn != whole[: len(turn)]:
            raise _Unusable("the chat template renders earlier turns otherwise later on; give each a record of its own")
        start = _shared(tokens(messages[:index], add_generation_prompt=True), turn) if index else 0
        mask[start : len(turn)] = [True] * (len(turn) - start)
    return Row(tuple(whole), tuple(mask))
