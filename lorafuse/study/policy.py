"""Policy gradient on problems whose answers can be checked: REINFORCE, with each group's mean as its baseline."""

from typing import Any

import torch
from torch import Tensor

from lorafuse.study import tasks
from lorafuse.study.model import Transformer, trained
from lorafuse.study.tasks import Data
from lorafuse.study.train import Spec, batches, due, optimizer, prepared, result, rounded

__all__ = ["GROUP", "reward", "run", "sample"]

# answers to each problem of a batch
GROUP = 8


def sample(model: Transformer, prompts: Tensor, length: int, generator: torch.Generator | None) -> Tensor:
    """Answers `[B, length]` to `prompts [B, P]`, drawn at temperature 1; without a generator the likeliest ones."""
    tokens = prompts
    with torch.no_grad():
        for _ in range(length):
            logits = model(tokens)[:, -1].cpu()
            if generator is None:
                following = logits.argmax(-1, keepdim=True)
            else:
                following = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, following.to(tokens.device)], 1)
    return tokens[:, prompts.shape[1] :]


def reward(answers: Tensor, right: Tensor) -> Tensor:
    """1 for each row that is right in every character, else 0."""
    return (answers == right).all(-1).float()


def split(data: Data) -> tuple[Tensor, Tensor]:
    """Prompts and right answers of problems that are all of one shape."""
    supervised = data.labels[0] >= 0
    first = int(supervised.nonzero()[0])
    return data.tokens[:, : first + 1], data.labels[:, first:]


def run(spec: Spec, base: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """A `result` of which the losses are the share of other problems answered wrongly, drawn at temperature 1.

    A step takes `batch` episodes: batch / GROUP problems, GROUP answers to each. One gradient step for each batch, so
    that the policy is the one that drew. The advantage is the reward less the group's mean.
    """
    model = prepared(spec, base, device)
    train, test = (split(data.to(device)) for data in tasks.arithmetic(spec.task, spec.count, spec.test, spec.seed))
    length = train[1].shape[1]
    adam, schedule = optimizer(model, spec.lr)
    generator = torch.Generator().manual_seed(spec.seed)

    def evaluate() -> float:
        same = torch.Generator().manual_seed(spec.seed)
        return rounded(1 - float(reward(sample(model, test[0], length, same), test[1]).mean()))

    curve = [[0, evaluate()]]
    rewards = []
    broken = None
    for step, chosen in enumerate(batches(len(train[0]), spec.batch // GROUP, spec.steps, spec.seed), 1):
        prompts = train[0][chosen].repeat_interleave(GROUP, 0)
        answers = sample(model, prompts, length, generator)
        gained = reward(answers, train[1][chosen].repeat_interleave(GROUP, 0))
        groups = gained.view(-1, GROUP)
        advantage = (groups - groups.mean(1, keepdim=True)).flatten()
        logits = model(torch.cat([prompts, answers[:, :-1]], 1))[:, -length:]
        chances = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0].sum(-1)
        adam.zero_grad()
        (-(advantage * chances).mean()).backward()
        adam.step()
        schedule.step()
        rewards.append(float(gained.mean()))
        if not all(torch.isfinite(parameter).all() for parameter in trained(model)):
            broken = 1.0
            curve.append([step, broken])
            break
        if due(step, spec.steps):
            curve.append([step, evaluate()])
    return result(model, curve, rewards, broken)
