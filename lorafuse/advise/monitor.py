"""LoRAMonitor, a callback for transformers' Trainer that warns when a run leaves what the findings cover."""

import math
import statistics
import warnings
from typing import Any

from lorafuse.advise.capacity import capacity_bits
from lorafuse.advise.schedule import BATCH_CEILING
from lorafuse.errors import MissingDependency

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingDependency("LoRAMonitor needs transformers: pip install 'transformers>=5.7'") from error

__all__ = ["LoRAMonitor", "LoRAWarning"]

# rules of thumb, no finding gives them: the first step has no gradient of A, because B is zero, so zeros must stay for
# some steps; a norm is that of vanished gradients when it is so small a share of the first steps' median
_STEPS, _VANISHED = 3, 1e-4
# the loss has stopped falling when the mean of the last logs is not this share below that of as many before (assumed)
_LOGS, _FALLS = 5, 0.01


class LoRAWarning(UserWarning):
    """What `LoRAMonitor` warns of."""


class LoRAMonitor(TrainerCallback):
    """Warns, once for each reason, when

    - an optimizer step sees more sequences than `ceiling` (finding F3, 512 unless given);
    - the gradients of an adapter's matrix are exactly zero or absent for three steps in a row, or all adapter gradients
      together shrink below 1e-4 of what they were in the first ten steps;
    - capacity is exhausted: the data seen so far, its first pass at the measured loss in bits for each token, is more
      than the adapter's 2 bits a parameter (finding F2), and the loss has stopped falling (5 logs against 5 before).

    `tokens` are the supervised tokens of one epoch (`Advice.tokens`); without them the monitor counts what Trainer does
    (`include_num_input_tokens_seen`), and without that it cannot watch capacity, which `watches_capacity` says after
    the first log. Every message is a `LoRAWarning` and is kept in `messages`.
    """

    def __init__(self, *, tokens: int | None = None, ceiling: int = BATCH_CEILING) -> None:
        for name, value in (("tokens", tokens), ("ceiling", ceiling)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.tokens, self.ceiling = tokens, ceiling
        self.messages: list[str] = []
        self.watches_capacity = tokens is not None
        self._said: set[str] = set()
        self._zero: dict[str, int] = {}
        self._first_norms: list[float] = []
        self._losses: list[float] = []
        self._trained = self._seen = 0
        self._bits = 0.0

    def _warn(self, reason: str, message: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            self.messages.append(message)
            warnings.warn(message, LoRAWarning, stacklevel=3)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Checks the batch size and counts the adapter's parameters."""
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if batch > self.ceiling:
            self._warn(
                "batch",
                f"a step sees {batch} sequences, more than {self.ceiling}: LoRA loses more from large batches than "
                "full fine-tuning, at every rank; lower gradient_accumulation_steps or per_device_train_batch_size",
            )
        self._trained = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "lora_" in name)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Looks at the adapters' gradients; reads one number for each matrix from the device."""
        total = 0.0
        zero = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or "lora_" not in name:
                continue
            norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
            total += norm**2
            self._zero[name] = 0 if norm else self._zero.get(name, 0) + 1
            if self._zero[name] == _STEPS:
                zero.append(name)
        if zero:
            more = f" and {len(zero) - 3} more" if len(zero) > 3 else ""
            self._warn(
                "zero",
                f"no gradient reaches {', '.join(zero[:3])}{more}: exactly zero or absent for {_STEPS} steps; the "
                "layer may be frozen, detached or not run",
            )
        self._vanishing(math.sqrt(total))

    def _vanishing(self, norm: float) -> None:
        if len(self._first_norms) < 10:
            self._first_norms.append(norm)
            return
        usual = statistics.median(self._first_norms)
        if norm < _VANISHED * usual:
            self._warn(
                "vanishing",
                f"the adapters' gradients have vanished: norm {norm:.1e}, in the first steps {usual:.1e}; lower the "
                "learning rate, and look at the loss",
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Adds what the data since the last log can teach, and compares it with the adapter's capacity."""
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        self._losses.append(loss)
        if self.tokens is not None:
            # a second pass over the same data brings nothing new
            seen = round(min(state.epoch, 1.0) * self.tokens)
        else:
            seen = state.num_input_tokens_seen if state.epoch <= 1 else self._seen
            self.watches_capacity = state.num_input_tokens_seen > 0
        self._bits += max(seen - self._seen, 0) * loss / math.log(2)
        self._seen = max(seen, self._seen)
        capacity = capacity_bits(self._trained)
        if self.watches_capacity and self._bits > capacity and self._stopped():
            self._warn(
                "capacity",
                f"the adapter's capacity is used up: {self._bits:.3g} bits of data at the measured loss, "
                f"{capacity:.3g} bits in {self._trained:,} parameters, and the loss has stopped falling at {loss:.3g}; "
                "raise the rank, or use full fine-tuning",
            )

    def _stopped(self) -> bool:
        if len(self._losses) < 2 * _LOGS:
            return False
        before, last = self._losses[-2 * _LOGS : -_LOGS], self._losses[-_LOGS:]
        return sum(last) > (1 - _FALLS) * sum(before)
