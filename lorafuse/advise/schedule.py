"""Learning rate, batch size and gradient accumulation for LoRA, after the findings."""

import math
from dataclasses import dataclass

__all__ = [
    "BATCH_CEILING",
    "BATCH_CLOSE",
    "ROLLOUTS",
    "SHORT_STEPS",
    "LearningRate",
    "accumulation",
    "full_learning_rate",
    "learning_rate",
    "optimizer_steps",
]

# the source's curves are close at 32 sequences (finding F3); 512 is a digest's, and a rule of thumb (NOTE)
BATCH_CEILING, BATCH_CLOSE = 512, 32
# answers of a prompt in reinforcement learning, of 32 prompts a step (R1)
ROLLOUTS = 16
# finding LR: learning rate over that of full fine-tuning; the source's "some 100 steps" is no sharp border
_MULTIPLE, _SHORT_MULTIPLE, SHORT_STEPS = 10.0, 15.0, 100
_BASE_RATE, _BASE_HIDDEN = 5e-5, 2000
_EXPONENTS = {"llama": 0.781, **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), 0.0775)}


@dataclass(frozen=True)
class LearningRate:
    """`lora` and `full` rates, the multiple between them, the exponent P, and whether P is published for the family and
    the size."""

    lora: float
    full: float
    multiple: float
    exponent: float
    published: bool


def full_learning_rate(hidden: int, exponent: float) -> float:
    """5e-5 (2000 / hidden)^P, the rate for full fine-tuning (finding LR)."""
    return _BASE_RATE * (_BASE_HIDDEN / hidden) ** exponent


def learning_rate(hidden: int, model_type: str, steps: int | None = None) -> LearningRate:
    """The rate of an adapter: 10 times that of full fine-tuning, 15 times for runs under 100 steps (finding LR).

    P is 0.781 for Llama and 0.0775 for Qwen; any other family, and any hidden size below the formula's base of 2000,
    gets the exponent of the two that gives the lower rate, which is an assumption. Llama-3.1-8B: 2.856e-4; Qwen3-8B:
    4.730e-4. Raises ValueError for a hidden size below 1.
    """
    if hidden < 1:
        raise ValueError(f"hidden size {hidden}: it must be at least 1")
    known = _EXPONENTS.get(model_type) if hidden >= _BASE_HIDDEN else None
    exponent = known
    if exponent is None:
        exponent = min(_EXPONENTS.values(), key=lambda value: full_learning_rate(hidden, value))
    full = full_learning_rate(hidden, exponent)
    multiple = _SHORT_MULTIPLE if steps is not None and steps < SHORT_STEPS else _MULTIPLE
    return LearningRate(multiple * full, full, multiple, exponent, known is not None)


def optimizer_steps(sequences: int, batch: int, epochs: float = 1) -> int:
    """Optimizer steps of a run, the last batch of an epoch included."""
    return max(1, math.ceil(math.ceil(sequences / batch) * epochs))


def accumulation(batch: int, micro_batch: int, devices: int = 1, rollouts: int = 1) -> int:
    """Micro-batches to accumulate so that an optimizer step sees at most `batch` sequences on all devices together, all
    `rollouts` answers of each prompt among them.

    Raises ValueError for a number below 1, and where the least that a step can have is more than that already.
    """
    for name, value in (("batch", batch), ("micro-batch", micro_batch), ("devices", devices)):
        if value < 1:
            raise ValueError(f"--{name} {value}: it must be at least 1")
    each = micro_batch * devices
    least = math.lcm(each, rollouts)
    if each > batch:
        raise ValueError(
            f"--micro-batch {micro_batch} on {devices} devices is {each} sequences a step, more than "
            f"the batch of {batch}; lower --micro-batch, or raise --batch"
        )
    if least > batch:
        raise ValueError(
            f"--batch {batch}: {least} is the least that is a multiple of --rollouts {rollouts} and of --micro-batch "
            f"{micro_batch} on {devices} devices; lower --micro-batch, or raise --batch"
        )
    return batch // least * least // each
