"""The same training run of two models, step by step side by side."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorafuse.testing.memory import peak_bytes

__all__ = ["Leg", "train"]


@dataclass
class Leg:
    """One side of the comparison, and what was seen of it: a loss and a time for each step, peak bytes of one step."""

    name: str
    model: Any
    lr: float
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    def __post_init__(self) -> None:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=self.lr, weight_decay=0.0, fused=True)

    def backward(self, batch: Tensor) -> Tensor:
        """Loss of one batch, with gradients."""
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        return loss.detach()

    def step(self, batch: Tensor) -> None:
        """One optimizer step, timed."""
        _synchronize(batch.device)
        start = time.perf_counter()
        loss = self.backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        _synchronize(batch.device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(legs: list[Leg], data: Tensor, batch_size: int, on_step: Callable[[int], None]) -> None:
    """Train every leg on the same batches in the same order; `data` is `[steps · batch_size, length]`.

    The legs take turns at every step, and in who goes first, so that a machine that slows down slows down both. Peak
    memory is measured before, on a step that leaves no trace.
    """
    batches = data.split(batch_size)
    for leg in legs:
        leg.model.train()
        leg.peak = peak_bytes(lambda leg=leg: leg.backward(batches[0]), data.device)  # type: ignore[misc]
        leg.optimizer.zero_grad()
    for index, batch in enumerate(batches):
        for leg in legs if index % 2 == 0 else reversed(legs):
            leg.step(batch)
        on_step(index)
