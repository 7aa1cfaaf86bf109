"""The whole advice for a model, data and a goal: `plan_adapter`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafuse.advise import capacity as cap
from lorafuse.advise import schedule
from lorafuse.advise.data import Count, count_file, load_tokenizer
from lorafuse.advise.lines import Line, lines_of
from lorafuse.advise.memory import METHODS, Memory, memory
from lorafuse.advise.page import page
from lorafuse.advise.shapes import ModelShapes, shapes_of
from lorafuse.advise.snippet import Settings, snippet
from lorafuse.advise.sources import cite
from lorafuse.advise.step_time import step_seconds
from lorafuse.plan import find

__all__ = ["Advice", "Request", "plan_adapter"]

GOALS = ("sft", "rl")


@dataclass(frozen=True)
class Request:
    """What was asked: `length` tokens a sequence, `micro_batch` sequences a device, `batch` sequences a step."""

    goal: str
    tokens: int | None
    episodes: int | None
    count: Count | None
    length: int
    micro_batch: int
    devices: int
    batch: int
    batch_asked: int | None
    epochs: float
    rank_asked: int | None
    gpu: str | None


@dataclass(frozen=True)
class Advice:
    """The advice: every number by itself, and `lines` that say of each how sure it is and where it comes from.

    `rank` is the rank to train with, `tokens` the supervised tokens of an epoch (None for rl), `memory` bytes by
    `(method, checkpointing)`, `step_seconds` modelled seconds of one optimizer step for each way, empty without a GPU.
    `str()` is the page, `as_dict()` what `--json` prints.
    """

    shapes: ModelShapes
    request: Request
    bits: float
    ranks: cap.Rank
    rank: int
    expert_rank: int
    trainable: int
    steps: int
    learning_rate: schedule.LearningRate
    accumulation: int
    memory: dict[tuple[str, bool], Memory]
    step_seconds: dict[str, float]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, int]
    snippet: str

    @property
    def tokens(self) -> int | None:
        """Supervised tokens of one epoch."""
        return self.request.tokens

    @property
    def lines(self) -> list[Line]:
        """One line for each thing advised, in the order of the page."""
        return lines_of(self)

    def __str__(self) -> str:
        return page(self)

    def as_dict(self) -> dict[str, Any]:
        """The same for machines: `lines` with the texts of their sources, and the numbers."""
        shapes = {k: v for k, v in asdict(self.shapes).items() if k != "linears"}
        return {
            "model": shapes | {"per_rank": cap.per_rank(self.shapes)},
            "request": asdict(self.request),
            "bits": {"data": self.bits, "capacity": cap.capacity_bits(self.trainable)},
            "rank": asdict(self.ranks) | {"used": self.rank, "expert": self.expert_rank},
            "trainable": self.trainable,
            "steps": self.steps,
            "learning_rate": asdict(self.learning_rate),
            "batch": {
                "ceiling": schedule.BATCH_CEILING,
                "batch": self.request.batch,
                "gradient_accumulation_steps": self.accumulation,
            },
            "flops_ratio": cap.flops_ratio(self.shapes, self.rank),
            "memory_bytes": {
                f"{method}{', checkpointing' if saved else ''}": asdict(m) | {"total": m.total}
                for (method, saved), m in self.memory.items()
            },
            "step_seconds_model": self.step_seconds,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "snippet": self.snippet,
            "lines": [asdict(line) | {"sources": cite(line.source)} for line in self.lines],
        }


def plan_adapter(
    model: Any,
    *,
    tokens: int | None = None,
    episodes: int | None = None,
    data: str | Path | None = None,
    goal: str | None = None,
    rank: int | None = None,
    gpu: str | None = None,
    tokenizer: Any = None,
    length: int = 2048,
    micro_batch: int = 4,
    devices: int = 1,
    batch: int | None = None,
    epochs: float = 1,
    rollouts: int = 1,
    active_experts: int | None = None,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, int] | None = None,
) -> Advice:
    """Advice for a loaded model, a model's directory or its `config.json`, and data of one of three kinds.

    `tokens` are supervised tokens of one epoch, `episodes` policy-gradient episodes of the run, `data` a JSON-lines
    file that is counted with `tokenizer`, or the directory's own; under goal "rl" each of its lines is a prompt with
    `rollouts` episodes an epoch. Without `goal`, episodes mean "rl" and the others "sft". `batch` is cut to 512.
    `rank` overrides the advised one; patterns are those of a probe; `gpu` is a name that `lorafuse.plan.find` knows.

    Raises ValueError and FileNotFoundError, with the option, its value and the fix.
    """
    shapes = shapes_of(model, active_experts=active_experts)
    device = find(gpu) if gpu is not None else None
    numbers = {"length": length, "micro-batch": micro_batch, "devices": devices, "rollouts": rollouts}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"--{name} {value}: it must be at least 1")
    if epochs <= 0:
        raise ValueError(f"--epochs {epochs}: it must be above 0")
    if batch is not None and batch < 1:
        raise ValueError(f"--batch {batch}: it must be at least 1")
    if sum(given is not None for given in (tokens, episodes, data)) != 1:
        raise ValueError("give the data in one way: --tokens N, --episodes N or --data FILE")
    goal = goal or ("sft" if episodes is None else "rl")
    if goal not in GOALS:
        raise ValueError(f"--goal {goal}: it must be one of {', '.join(GOALS)}")
    if (goal == "rl" and tokens is not None) or (goal == "sft" and episodes is not None):
        want = "--episodes N" if goal == "rl" else "--tokens N"
        raise ValueError(f"--goal {goal} counts its data by {want}, or from --data FILE")
    count = None
    if data is not None:
        if tokenizer is None:
            if not isinstance(model, (str, Path)):
                raise ValueError("a loaded model has no tokenizer; pass tokenizer= to count the data with")
            tokenizer = load_tokenizer(Path(model))
        count = count_file(Path(data), tokenizer)
        if goal == "rl":
            episodes = round(count.examples * rollouts * epochs)
        else:
            tokens = count.supervised
    bits = cap.data_bits(tokens=tokens) if goal == "sft" else cap.data_bits(episodes=episodes)
    ranks = cap.rank_for(shapes, bits, goal)
    if rank is not None:
        cap.check_rank(shapes, rank)
    used = rank or ranks.advised
    least = micro_batch * devices
    used_batch = min(max(schedule.BATCH_CLOSE, least) if batch is None else batch, schedule.BATCH_CEILING)
    accumulation = schedule.accumulation(used_batch, micro_batch, devices)
    used_batch = accumulation * least
    if goal == "rl":
        assert episodes is not None
        steps = schedule.optimizer_steps(episodes, used_batch)
    else:
        assert tokens is not None
        sequences = count.examples if count else -(-tokens // length)
        steps = schedule.optimizer_steps(sequences, used_batch, epochs)
    rate = schedule.learning_rate(shapes.hidden, shapes.model_type, steps)
    micro_tokens = micro_batch * length
    seconds = step_seconds(shapes, used, micro_tokens, device) if device else {}
    patterns = rank_pattern or {}, alpha_pattern or {}
    request = Request(
        goal, tokens, episodes, count, length, micro_batch, devices, used_batch, batch, epochs, rank,
        device.name if device else None,
    )  # fmt: skip
    return Advice(
        shapes=shapes,
        request=request,
        bits=bits,
        ranks=ranks,
        rank=used,
        expert_rank=cap.expert_rank(used, shapes.active_experts) if shapes.experts else 0,
        trainable=cap.trainable(shapes, used),
        steps=steps,
        learning_rate=rate,
        accumulation=accumulation,
        memory={
            (method, saved): memory(shapes, method, used, micro_tokens, checkpointing=saved)
            for method in METHODS
            for saved in (False, True)
        },
        step_seconds={way: value * accumulation for way, value in seconds.items()},
        rank_pattern=patterns[0],
        alpha_pattern=patterns[1],
        snippet=snippet(shapes, Settings(used, rate.lora, micro_batch, accumulation, epochs, *patterns)),
    )
