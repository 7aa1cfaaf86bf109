"""Policy gradient on problems whose answers can be checked: REINFORCE, with each group's mean as its baseline."""

from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.study import tasks
from lorafuse.study.tasks import Data
from lorafuse.study.train import Spec, fit, prepared

__all__ = ["GROUP", "chances", "reward", "run", "sample", "split"]

# answers to each problem of a batch
GROUP = 8


def sample(model: nn.Module, prompts: Tensor, length: int, generator: torch.Generator) -> Tensor | None:
    """Answers `[B, length]` to `prompts [B, P]`, drawn at temperature 1; None where the model gives no numbers."""
    tokens = prompts
    with torch.no_grad():
        for _ in range(length):
            logits = model(tokens)[:, -1].cpu()
            if not torch.isfinite(logits).all():
                return None
            following = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, following.to(tokens.device)], 1)
    return tokens[:, prompts.shape[1] :]


def reward(answers: Tensor, right: Tensor) -> Tensor:
    """1 for each row that is right in every character, else 0."""
    return (answers == right).all(-1).float()


def chances(model: nn.Module, prompts: Tensor, answers: Tensor) -> Tensor:
    """Log-probability `[B]` of each whole answer."""
    logits = model(torch.cat([prompts, answers[:, :-1]], 1))[:, -answers.shape[1] :]
    return logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0].sum(-1)


def split(data: Data) -> Data:
    """Problems that are all of one shape, as whole prompts `[N, P]` and whole right answers `[N, length]`."""
    first = int((data.labels[0] >= 0).nonzero()[0])
    return Data(data.tokens[:, : first + 1], data.labels[:, first:])


def run(spec: Spec, base: nn.Module, device: torch.device) -> dict[str, Any]:
    """`fit`'s result, of which the losses are the expected share of wrong answers, at temperature 1.

    It is exact: 1 less the mean probability of the right answer, which is a product of two softmaxes. A step takes
    `batch` episodes: batch / GROUP problems, GROUP answers to each. One gradient step for each batch, so that the
    policy is the one that drew. The advantage is the reward less the group's mean.
    """
    model = prepared(spec, base, device)
    parts = tasks.arithmetic(spec.task, spec.count, spec.test, spec.seed)
    train, validation, test = (split(data.to(device)) for data in parts)
    generator = torch.Generator().manual_seed(spec.seed)

    def objective(chosen: Tensor) -> tuple[Tensor, Tensor]:
        prompts, right = (part[chosen].repeat_interleave(GROUP, 0) for part in (train.tokens, train.labels))
        answers = sample(model, prompts, right.shape[1], generator)
        if answers is None:
            return torch.tensor(torch.nan), torch.tensor(0.0)
        gained = reward(answers, right)
        groups = gained.view(-1, GROUP)
        advantage = (groups - groups.mean(1, keepdim=True)).flatten()
        return -(advantage * chances(model, prompts, answers)).mean(), gained.mean()

    def measure(problems: Data) -> float:
        with torch.no_grad():
            return 1 - float(chances(model, problems.tokens, problems.labels).exp().mean())

    return fit(spec, model, (train, validation, test), spec.batch // GROUP, objective, measure, 1.0)
