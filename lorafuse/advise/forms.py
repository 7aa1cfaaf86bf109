"""Forms of training data: every record as one of the examples that TRL documents, whatever its keys are called."""

import json
from typing import Any

__all__ = ["FORMS", "as_example"]

FORMS = (
    '{"messages": […]}, {"conversations": […]}, {"prompt": …, "completion": …}, {"instruction": …, "output": …}, '
    '{"question": …, "answer": …}, {"chosen": …, "rejected": …}, {"text": …} or, for rl, {"prompt": …}'
)
_SHAREGPT = {"human": "user", "gpt": "assistant", "bot": "assistant"}
# Stanford Alpaca's own prompts, which a model without a chat template was trained with
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


def as_example(record: dict[str, Any], *, chat: bool, goal: str) -> dict[str, Any] | str:
    """The record as `{"messages"}`, `{"prompt", "completion"}`, `{"prompt", "chosen", "rejected"}` or `{"text"}`; under
    goal "rl" as `{"prompt"}` with its other keys. Or a reason why it is none of them.

    Values are texts, or lists of `{"role", "content"}`. `chat` says that the tokenizer has a chat template: Alpaca's
    and question-answer records then become messages, else texts. `tools` are kept.
    """
    record = {key: _messages(value) or value for key, value in record.items() if value is not None}
    if goal == "rl":
        return _prompt(record, chat)
    example = _supervised(record, chat)
    if example is None:
        return f"it holds {', '.join(map(repr, record)) or 'nothing'}, or those of another type"
    tools = record.get("tools")
    return example | ({"tools": json.loads(tools) if isinstance(tools, str) else tools} if tools else {})


def _messages(value: Any) -> list[dict[str, Any]] | None:
    """A list of messages, ShareGPT's `from` and `value` included, with the roles of chat templates; None for others."""
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        return None
    renamed = [{{"from": "role", "value": "content"}.get(key, key): v for key, v in m.items()} for m in value]
    if not all(isinstance(m.get("role"), str) and "content" in m for m in renamed):
        return None
    return [m | {"role": _SHAREGPT.get(m["role"], m["role"])} for m in renamed]


def _supervised(record: dict[str, Any], chat: bool) -> dict[str, Any] | None:
    for key in ("messages", "conversations"):
        if _messages(record.get(key)):
            return {"messages": record[key]}
    if _alike(record, "chosen", "rejected"):
        if _alike(record, "prompt", "chosen"):
            return {key: record[key] for key in ("prompt", "chosen", "rejected")}
        if "prompt" not in record:
            return _shared_start(record["chosen"], record["rejected"])
        return None
    if _alike(record, "prompt", "completion"):
        return {key: record[key] for key in ("prompt", "completion")}
    asked = _question(record, chat)
    answer = next((record[key] for key in ("output", "response", "answer") if isinstance(record.get(key), str)), None)
    if asked is not None and answer is not None:
        if chat:
            return {"messages": [*asked, {"role": "assistant", "content": answer}]}
        return {"prompt": asked, "completion": answer if "instruction" in record else f" {answer}"}
    return {"text": record["text"]} if isinstance(record.get("text"), str) else None


def _alike(record: dict[str, Any], *keys: str) -> bool:
    """Whether all of the keys hold texts, or all hold messages."""
    values = [record.get(key) for key in keys]
    return all(isinstance(v, str) for v in values) or all(_messages(v) for v in values)


def _question(record: dict[str, Any], chat: bool) -> Any:
    """What Alpaca's or a question-answer record asks, as messages or as text; None for another record."""
    instruction, more = record.get("instruction"), record.get("input") or ""
    if isinstance(instruction, str) and isinstance(more, str):
        if chat:
            return [{"role": "user", "content": "\n\n".join(filter(None, (instruction, more)))}]
        paired = ", paired with an input that provides further context" if more else ""
        return _ALPACA.format(paired=paired, instruction=instruction, input=f"### Input:\n{more}\n\n" if more else "")
    question = record.get("question")
    if not isinstance(question, str):
        return None
    return [{"role": "user", "content": question}] if chat else f"Question: {question}\nAnswer:"


def _shared_start(chosen: Any, rejected: Any) -> dict[str, Any]:
    """A pair without a prompt: what both answers begin with is the prompt, up to a space in texts, as TRL cuts them."""
    least = min(len(chosen), len(rejected))
    at = next((i for i in range(least) if chosen[i] != rejected[i]), least)
    if isinstance(chosen, str) and 0 < at < least and chosen[at - 1] == " ":
        at -= 1
    return {"prompt": chosen[:at], "chosen": chosen[at:], "rejected": rejected[at:]}


def _prompt(record: dict[str, Any], chat: bool) -> dict[str, Any] | str:
    """What a policy is prompted with, and all other keys for the reward; an answer's turn at the end is left out."""
    prompt = record.get("prompt")
    for key in ("messages", "conversations"):
        turns = _messages(record.get(key)) or []
        while turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        prompt = prompt or turns
    prompt = prompt or _question(record, chat)
    if not isinstance(prompt, str) and not _messages(prompt):
        return f"it holds {', '.join(map(repr, record)) or 'nothing'}, none of which is a prompt"
    return {"prompt": prompt} | {k: v for k, v in record.items() if k not in ("prompt", "messages", "conversations")}
