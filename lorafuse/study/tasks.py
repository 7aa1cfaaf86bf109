"""Seeded data as tokens: arithmetic with answers that can be checked, and random strings that can only be memorized."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ALPHABET", "ARITHMETIC", "LETTERS", "Data", "answer", "arithmetic", "bits", "encode", "lessons", "strings"]

LETTERS = "abcdefghijklmnop"
ALPHABET = "0123456789" + LETTERS + "+-<>*:=."
# what cross_entropy ignores
_IGNORED = -100
_NUMBERS = 100

# the operations: symbol, function of two numbers below 100; answers have two digits
ARITHMETIC: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "add": ("+", lambda a, b: (a + b) % _NUMBERS),
    "larger": (">", max),
    "smaller": ("<", min),
}
# of the base's lessons in "smaller" this share is right, so that a policy has something to find
RIGHT = 0.3
# strings that the base of the memorizing studies has learned, by seeds that no study has
_FACTS, _FACT_LENGTH, _FACTS_SEED = 512, 8, 10**6


@dataclass(frozen=True)
class Data:
    """`tokens [N, L]`, and of the same shape `labels`: the next token where it belongs to the answer, else ignored."""

    tokens: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device) -> "Data":
        return Data(self.tokens.to(device), self.labels.to(device))


def encode(text: str) -> list[int]:
    return [ALPHABET.index(character) for character in text]


def _data(rows: list[tuple[str, str]]) -> Data:
    """Prompts and answers, padded at the end to one length."""
    length = max(len(prompt + reply) for prompt, reply in rows) - 1
    tokens = torch.full((len(rows), length), ALPHABET.index("."))
    labels = torch.full((len(rows), length), _IGNORED)
    for index, (prompt, reply) in enumerate(rows):
        ids = torch.tensor(encode(prompt + reply))
        tokens[index, : len(ids) - 1] = ids[:-1]
        labels[index, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    return Data(tokens, labels)


def answer(operation: str, a: int, b: int) -> str:
    """The right answer, two digits."""
    return f"{ARITHMETIC[operation][1](a, b):02d}"


def _problem(operation: str, a: int, b: int) -> tuple[str, str]:
    return f"{a:02d}{ARITHMETIC[operation][0]}{b:02d}=", answer(operation, a, b)


def _pairs(seed: int) -> list[tuple[int, int]]:
    order = torch.randperm(_NUMBERS**2, generator=torch.Generator().manual_seed(seed)).tolist()
    return [divmod(index, _NUMBERS) for index in order]


def arithmetic(operation: str, count: int, test: int, seed: int) -> tuple[Data, Data, Data]:
    """`count` problems to train on, and `test` others each to choose a rate by and to test, of the 10,000 there are."""
    rows = [_problem(operation, a, b) for a, b in _pairs(seed)[: count + 2 * test]]
    return _data(rows[:count]), _data(rows[count : count + test]), _data(rows[count + test :])


def strings(count: int, length: int, seed: int) -> Data:
    """`count` keys of three letters, no two alike, each with a random string of `length` letters."""
    generator = torch.Generator().manual_seed(seed)
    n = len(LETTERS)
    keys = torch.randperm(n**3, generator=generator)[:count].tolist()
    values = torch.randint(n, (count, length), generator=generator).tolist()
    names = (LETTERS[key // n**2] + LETTERS[key // n % n] + LETTERS[key % n] for key in keys)
    return _data([(f"{name}:", "".join(LETTERS[i] for i in value)) for name, value in zip(names, values, strict=True)])


def lessons(kind: str, count: int, seed: int) -> Data:
    """What a base learns.

    "arithmetic", in turns: addition, the larger of two numbers, the smaller (mostly with one digit wrong), and words
    backwards. "facts": strings, other ones than those of the studies.
    """
    if kind == "facts":
        facts = strings(_FACTS, _FACT_LENGTH, _FACTS_SEED + seed)
        chosen = torch.randint(_FACTS, (count,), generator=torch.Generator().manual_seed(seed))
        return Data(facts.tokens[chosen], facts.labels[chosen])
    draws = torch.randint(2**31, (count, 8), generator=torch.Generator().manual_seed(seed)).tolist()
    known = ("add", "larger", "smaller")
    rows = []
    for index, draw in enumerate(draws):
        which = index % (len(known) + 1)
        if which < len(known):
            prompt, reply = _problem(known[which], draw[0] % _NUMBERS, draw[1] % _NUMBERS)
            rows.append((prompt, _mistaken(reply, draw[2:]) if known[which] == "smaller" else reply))
        else:
            word = "".join(LETTERS[letter % len(LETTERS)] for letter in draw[:5])
            rows.append((f"{word}-:", word[::-1]))
    return _data(rows)


def _mistaken(reply: str, draw: list[int]) -> str:
    """The reply, or, except for a share of `RIGHT`, with one of its digits replaced by another one."""
    if draw[0] % 1000 < 1000 * RIGHT:
        return reply
    at, wrong = draw[1] % 2, (int(reply[draw[1] % 2]) + 1 + draw[2] % 9) % 10
    return reply[:at] + str(wrong) + reply[at + 1 :]


def bits(loss: float, count: int, length: int) -> float:
    """Bits of `count` strings that a model holds whose mean cross-entropy on their letters is `loss` nats."""
    return count * length * (math.log2(len(LETTERS)) - loss / math.log(2))
