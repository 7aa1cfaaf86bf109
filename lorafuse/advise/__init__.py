"""How much LoRA is enough: rank, learning rate, batch, memory and time for a model and its data, with sources.

`plan_adapter` gives the whole; the functions behind it are pure. `LoRAMonitor` watches a run of transformers' Trainer.
Importing this package loads neither transformers nor PEFT.
"""

from typing import Any

from lorafuse.advise.advice import Advice, plan_adapter
from lorafuse.advise.bases import decode_seconds, frozen_bytes
from lorafuse.advise.capacity import (
    Rank,
    capacity_bits,
    data_bits,
    expert_rank,
    flops_ratio,
    per_rank,
    rank_for,
    smallest_rank,
    square_flops_ratio,
    trainable,
)
from lorafuse.advise.data import Count, count_file
from lorafuse.advise.fit import Fit, fit
from lorafuse.advise.lines import Line
from lorafuse.advise.memory import Memory, memory
from lorafuse.advise.probe import Probe, probe_ranks
from lorafuse.advise.schedule import (
    BATCH_CEILING,
    LearningRate,
    accumulation,
    full_learning_rate,
    learning_rate,
    optimizer_steps,
)
from lorafuse.advise.shapes import Linear, ModelShapes, shapes_of
from lorafuse.advise.step_time import micro_step_seconds, update_seconds

__all__ = [
    "BATCH_CEILING",
    "Advice",
    "Count",
    "Fit",
    "LearningRate",
    "Line",
    "Linear",
    "LoRAMonitor",
    "LoRAWarning",
    "Memory",
    "ModelShapes",
    "Probe",
    "Rank",
    "accumulation",
    "capacity_bits",
    "count_file",
    "data_bits",
    "decode_seconds",
    "expert_rank",
    "fit",
    "flops_ratio",
    "frozen_bytes",
    "full_learning_rate",
    "learning_rate",
    "memory",
    "micro_step_seconds",
    "optimizer_steps",
    "per_rank",
    "plan_adapter",
    "probe_ranks",
    "rank_for",
    "shapes_of",
    "smallest_rank",
    "square_flops_ratio",
    "trainable",
    "update_seconds",
]


def __getattr__(name: str) -> Any:
    # the monitor's base class is transformers', which this package does not load by itself
    if name in ("LoRAMonitor", "LoRAWarning"):
        from lorafuse.advise import monitor

        return getattr(monitor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
