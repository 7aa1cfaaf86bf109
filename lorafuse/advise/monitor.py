"""LoRAMonitor, a callback for transformers' Trainer that measures whether a run leaves what the findings cover."""

import math
import statistics
import warnings
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.advise.capacity import capacity_bits
from lorafuse.errors import MissingDependency

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingDependency("LoRAMonitor needs transformers: pip install 'transformers>=5.7'") from error

__all__ = ["LoRAMonitor", "LoRAWarning"]

# Rules of thumb; no finding gives them. The first step has no gradient of A, because B is zero, so zeros must stay for
# some steps; a norm has vanished when it is so small a share of the first steps' median.
_STEPS, _VANISHED = 3, 1e-4
# A mean counts as other than zero from so many of its standard errors on: every log is one more look at the same run.
_ERRORS = 4.0
# The trend is fitted to the second half of the tokens, from so many logs on; a fall is slow up to this share of the
# loss for a doubling of the tokens, and a loss is above its reference from this share on.
_LOGS, _SLOW, _ABOVE = 6, 0.10, 0.01
# Neighbouring intervals are merged from so many on, so that a log costs the same at the end of a long run.
_INTERVALS = 256
# The noise scale is the mean of the last steps, from so many on. At twice the noise scale a run takes three times the
# tokens and 1.5 times the steps that it needs at least: 1 + B / B_noise and 1 + B_noise / B (McCandlish et al. 2018).
_FEWEST_STEPS, _RECENT_STEPS, _BEYOND = 20, 64, 2.0


class LoRAWarning(UserWarning):
    """What `LoRAMonitor` warns of."""


class LoRAMonitor(TrainerCallback):
    """Measures a run and warns, once for each reason, when

    - the gradients of an adapter's matrix are exactly zero or absent for three steps in a row, or all adapters'
      gradients together shrink below 1e-4 of what they were in the first ten steps;
    - the run is beyond the adapter's capacity and slower for it (finding F2: about 2 bits a parameter, and no floor).
      Bits are the excess of the first pass's losses over a reference, for every supervised token. The reference is the
      loss that a model with room reaches on this data, where given (`reference`, nats a token: full fine-tuning or a
      much higher rank), and the symptom is that the loss stays above it. Without one it is where the run's own trend
      leads after as many tokens again, and the symptom is that the loss still falls, slowly: a plateau has no excess;
    - an optimizer step takes more than twice the tokens of the gradient-noise scale tr(S) / |G|^2 (McCandlish et al.
      2018, appendix A.1), measured from the norms of the first and of the last-but-one micro-batch's accumulated
      gradients, which no clipping has changed yet. It needs `gradient_accumulation_steps` of 3 or more.

    Supervised tokens are counted from the labels that reach the model; `tokens`, those of one epoch (`Advice.tokens`),
    replaces the count, and where labels do not reach the model Trainer's `include_num_input_tokens_seen` does.
    `watches_capacity` and `watches_batch` say what could be measured; `learned_bits` and `noise_scale` (tokens) are the
    last values. Every message is a `LoRAWarning` and is kept in `messages`. Raises ValueError for `tokens` below 1 and
    for a `reference` that is not above 0.
    """

    def __init__(self, *, tokens: int | None = None, reference: float | None = None) -> None:
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens is {tokens}; it must be at least 1")
        if reference is not None and not reference > 0:
            raise ValueError(f"reference is {reference}; it must be a loss above 0, in nats a token")
        self.tokens, self.reference = tokens, reference
        self.messages: list[str] = []
        self.watches_capacity = self.watches_batch = False
        self.learned_bits = 0.0
        self.noise_scale: float | None = None
        self._said: set[str] = set()
        self._zero: dict[str, int] = {}
        self._first_norms: list[float] = []
        self._trained = self._substeps = self._before = 0
        # (mean loss, tokens) of each interval between logs, and over the first pass alone: tokens, and nats in them
        self._logs: list[tuple[float, float]] = []
        self._first_tokens = self._first_nats = 0.0
        self._seen = self._epoch = 0.0
        # supervised tokens of this process: of all steps, and at the start of the step
        self._counted: Tensor | int = 0
        self._at_start: Tensor | int = 0
        self._norms: list[tuple[Tensor, Tensor | int]] = []
        self._pairs: deque[list[tuple[Tensor, Tensor | int]]] = deque(maxlen=_RECENT_STEPS)
        self._hook: Any = None

    def _warn(self, reason: str, message: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            self.messages.append(message)
            warnings.warn(message, LoRAWarning, stacklevel=3)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Counts the adapter's parameters, and from here on the labels that reach the model."""
        self._trained = sum(p.numel() for _, p in _adapters(model))
        # a run that goes on from a checkpoint has seen the data before it
        self._epoch, self._before = state.epoch or 0.0, state.num_input_tokens_seen
        self._seen = self.tokens * self._epoch if self.tokens else 0.0
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        if model.training and isinstance(labels, Tensor):
            # the first label of a row is no target; the sum stays on the device
            self._counted = self._counted + (labels[..., 1:] != -100).sum().detach()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._substeps, self._norms, self._at_start = 0, [], self._counted

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keeps the norms of one and of all but one of the step's accumulated micro-batches, on the device."""
        self._substeps += 1
        last = args.gradient_accumulation_steps - 1
        if last < 2 or self._substeps not in (1, last):
            return
        gradients = [p.grad for _, p in _adapters(model) if p.grad is not None]
        if gradients:
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            self._norms.append((norm, self._counted - self._at_start))
        if len(self._norms) == 2:
            self._pairs.append(self._norms)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Looks at the adapters' gradients; reads one tensor of norms from the device."""
        named = _adapters(model)
        gradients = [p.grad for _, p in named if p.grad is not None]
        values = iter(torch.stack(torch._foreach_norm(gradients)).tolist() if gradients else [])
        norms = {name: 0.0 if parameter.grad is None else next(values) for name, parameter in named}
        self._zero = {name: 0 if norm else self._zero.get(name, 0) + 1 for name, norm in norms.items()}
        zero = [name for name, steps in self._zero.items() if steps == _STEPS]
        if zero:
            more = f" and {len(zero) - 3} more" if len(zero) > 3 else ""
            self._warn(
                "zero",
                f"no gradient reaches {', '.join(zero[:3])}{more}: exactly zero or absent for {_STEPS} steps; the "
                "layer may be frozen, detached or not run",
            )
        self._vanishing(math.hypot(*norms.values()))

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
        """Compares what the data taught since the start with the capacity, and the step's tokens with their noise."""
        if not logs or "loss" not in logs:
            return
        counted = int(self._counted) * args.world_size
        seen = self.tokens * state.epoch if self.tokens else counted or state.num_input_tokens_seen - self._before
        new, passed = seen - self._seen, state.epoch - self._epoch
        if new > 0:
            # a second pass over the same data brings nothing new
            first = new * min(1.0, max(0.0, 1.0 - self._epoch) / passed) if passed > 0 else new
            self._first_tokens += first
            self._first_nats += first * float(logs["loss"])
            self._logs = _merged([*self._logs, (float(logs["loss"]), new)])
            self._seen, self._epoch = seen, state.epoch
            self.watches_capacity = True
            self._capacity()
        self._batch(args.world_size, args.gradient_accumulation_steps)

    def _capacity(self) -> None:
        trend = trend_of(self._logs)
        if trend is None:
            return
        level, level_error, slope, slope_error = trend
        doubled = min(0.0, slope * math.log(2)) if slope < -_ERRORS * slope_error else 0.0
        reference = level + doubled if self.reference is None else self.reference
        self.learned_bits = (self._first_nats - self._first_tokens * reference) / math.log(2)
        capacity = capacity_bits(self._trained)
        if self.reference is None:
            symptom = -_SLOW * level < doubled < 0
            how = f"the loss, {level:.3g}, still falls, by {-doubled / level:.1%} for a doubling of the tokens"
        else:
            symptom = level - reference > max(_ERRORS * level_error, _ABOVE * reference)
            how = f"the loss, {level:.3g}, stays above its reference"
        if self.learned_bits > capacity and symptom:
            self._warn(
                "capacity",
                f"the data are beyond the adapter's capacity: about {self.learned_bits:.3g} bits over a loss of "
                f"{reference:.3g}, some {capacity:.3g} in {self._trained:,} parameters, and {how}; training goes "
                "on, but slower than a higher rank or full fine-tuning would (both figures are estimates)",
            )

    def _batch(self, processes: int, accumulated: int) -> None:
        """Noise scale of the recent steps; each pair of norms estimates |G|^2 and tr(S) of a token without bias."""
        signals, noises = [], []
        per_micro_batch = 1.0
        for pair in self._pairs:
            (small, few), (large, many) = ((float(norm) ** 2, int(tokens)) for norm, tokens in pair)
            if not few or many <= few:
                few, many = 1, accumulated - 1
            small, large = small / few**2, large / many**2
            signals.append((many * large - few * small) / (many - few))
            noises.append((small - large) / (1 / few - 1 / many))
            per_micro_batch = many / (accumulated - 1)
        if len(signals) < _FEWEST_STEPS:
            return
        self.watches_batch = True
        signal, noise = statistics.fmean(signals), statistics.fmean(noises)
        self.noise_scale = noise / signal if signal > 0 else math.inf
        batch = per_micro_batch * accumulated * processes
        # linear in both estimates, so that it has a mean and an error where their ratio has neither
        excess = [batch * s - _BEYOND * n for s, n in zip(signals, noises, strict=True)]
        error = statistics.stdev(excess) / math.sqrt(len(excess))
        if statistics.fmean(excess) > _ERRORS * error:
            unit = "supervised tokens" if int(self._counted) else "micro-batches"
            self._warn(
                "batch",
                f"a step takes {batch:,.0f} {unit}, the gradient-noise scale is {max(self.noise_scale, 0.0):,.0f}: "
                "more of them make a step hardly better, and LoRA loses more from large batches than full fine-tuning; "
                "lower gradient_accumulation_steps or per_device_train_batch_size",
            )


def _adapters(model: Any) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]


def _merged(logs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(logs) < _INTERVALS:
        return logs
    pairs = zip(logs[::2], logs[1::2], strict=True)
    return [((a * m + b * n) / (m + n), m + n) for (a, m), (b, n) in pairs]


def trend_of(logs: list[tuple[float, float]]) -> tuple[float, float, float, float] | None:
    """Level at the end and slope, nats for each e-fold of tokens, each with its standard error.

    `logs` are (mean loss, tokens) of each interval. A line is fitted by least squares over the logarithm of the tokens
    to the intervals of the second half of them, weighted by their tokens: None below `_LOGS` of them.
    """
    total = sum(tokens for _, tokens in logs)
    points, at = [], 0.0
    for loss, tokens in logs:
        if at >= total / 2:
            points.append((math.log(at + tokens / 2), loss, tokens))
        at += tokens
    if len(points) < _LOGS or not all(math.isfinite(loss) for _, loss, _ in points):
        return None
    weight = sum(w for _, _, w in points)
    x_mean, y_mean = (sum(w * value for value, w in pairs) / weight for pairs in
                      ([(x, w) for x, _, w in points], [(y, w) for _, y, w in points]))  # fmt: skip
    spread = sum(w * (x - x_mean) ** 2 for x, _, w in points)
    slope = sum(w * (x - x_mean) * (y - y_mean) for x, y, w in points) / spread
    residual = sum(w * (y - y_mean - slope * (x - x_mean)) ** 2 for x, y, w in points) / (len(points) - 2)
    ahead = math.log(total) - x_mean
    level_error = math.sqrt(residual * (1 / weight + ahead**2 / spread))
    return y_mean + slope * ahead, level_error, slope, math.sqrt(residual / spread)
