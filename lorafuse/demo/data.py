"""Word problems as blocks of tokens: generated and seeded, or read from a JSON-lines file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafuse.errors import MissingDependency
from lorafuse.files import parse, read_text

__all__ = ["Example", "blocks", "generate", "read"]

# a user's question and the expected answer
Example = tuple[str, str]


def generate(count: int, seed: int) -> list[Example]:
    """`count` GSM-style word problems (reasoning-gym's gsm_symbolic), the same ones for the same seed."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise MissingDependency("the demo's word problems need reasoning-gym: pip install reasoning-gym") from error
    dataset = reasoning_gym.create_dataset("gsm_symbolic", size=count, seed=seed)
    return [(row["question"], str(row["answer"])) for row in dataset]


def read(path: Path) -> list[Example]:
    """Examples of a file whose lines are `{"question": …, "answer": …}` or `{"messages": [user, assistant]}`.

    Raises FileNotFoundError for a missing file and ValueError, with the line's number, for a line of another form.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: no such file; it must be a JSON-lines file of questions and answers")
    examples = []
    for number, line in enumerate(_lines_of(path), 1):
        if not line.strip():
            continue
        try:
            row = parse(line)
            if "messages" in row:
                question, answer = (message["content"] for message in row["messages"][-2:])
            else:
                question, answer = row["question"], row["answer"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'--data {path}, line {number}: a line must be {{"question": …, "answer": …}} or '
                f'{{"messages": [user, assistant]}} ({type(error).__name__}: {error})'
            ) from error
        examples.append((str(question), str(answer)))
    if len(examples) < 2:
        raise ValueError(f"--data {path} holds {len(examples)} examples; it must hold at least 2, one kept for the end")
    return examples


def _lines_of(path: Path) -> list[str]:
    try:
        return read_text(path).split("\n")
    except ValueError as error:
        raise ValueError(f"--data {path}: {error}") from error


def text(tokenizer: Any, question: str, answer: str | None) -> str:
    """An example as the model reads it; without an answer, the prompt that asks for one."""
    if tokenizer.chat_template is None:
        return f"Question: {question}\nAnswer:" + ("" if answer is None else f" {answer}{tokenizer.eos_token}\n")
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None))


def blocks(tokenizer: Any, examples: list[Example], count: int, length: int) -> Tensor:
    """`[count, length]` token ids: the examples one after another, cut into full blocks, repeated if too few."""
    ids: list[int] = []
    for question, answer in examples:
        ids += tokenizer(text(tokenizer, question, answer), add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError("the data holds no tokens; give it questions and answers that are not empty")
    ids *= -(-count * length // len(ids))
    return torch.tensor(ids[: count * length]).view(count, length)
