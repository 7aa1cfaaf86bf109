"""The whole advice for a model, data and a goal: `plan_adapter`."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorafuse.advise import capacity as cap
from lorafuse.advise import schedule
from lorafuse.advise.data import Count, count_file, load_tokenizer
from lorafuse.advise.fit import Fit, fit, usable_bytes
from lorafuse.advise.layouts import Layout, fastest, layouts
from lorafuse.advise.lines import Line, lines_of
from lorafuse.advise.links import cluster_of, nodes_for
from lorafuse.advise.memory import METHODS, Memory, memory
from lorafuse.advise.page import page
from lorafuse.advise.shapes import ModelShapes, shapes_of
from lorafuse.advise.snippet import Settings, launch, snippet
from lorafuse.advise.sources import cite
from lorafuse.advise.step_time import TRAININGS, micro_step_seconds, update_seconds
from lorafuse.plan import DeviceSpec, find

__all__ = ["Advice", "Request", "plan_adapter"]

GOALS = ("sft", "rl")


@dataclass(frozen=True)
class Request:
    """What was asked: `length` tokens a sequence, `micro_batch` sequences a device, `batch` sequences a step.

    `sequences` are those of one epoch: as counted, else of tokens packed to `length`; `loss` nats for each token.
    """

    goal: str
    tokens: int | None
    episodes: int | None
    count: Count | None
    sequences: int
    loss: float | None
    length: int
    micro_batch: int
    devices: int
    nodes: int
    batch: int
    rollouts: int
    epochs: float
    rank_asked: int | None
    gpu: str | None


@dataclass(frozen=True)
class Advice:
    """The advice: every number by itself, and `lines` that say of each how sure it is and where it comes from.

    `rank` is the rank to train with, `tokens` the supervised tokens of an epoch (None for rl), `memory` bytes by
    `(method, checkpointing)` at the micro-batch asked for; `fit` are the settings that fit on the GPU, of several
    devices those of the fastest layout, with which `step_seconds` models one optimizer step of each way that fits:
    empty without a GPU, and where nothing does. `layouts` are those of several devices, empty for one and without a
    GPU.
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
    fit: Fit
    step_seconds: dict[str, float]
    layouts: list[Layout]
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
            "fit": asdict(self.fit),
            "step_seconds_model": self.step_seconds,
            "layouts_model": [asdict(each) for each in self.layouts],
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
    loss: float | None = None,
    goal: str | None = None,
    rank: int | None = None,
    gpu: str | None = None,
    tokenizer: Any = None,
    length: int = 2048,
    micro_batch: int = 4,
    devices: int = 1,
    nodes: int | None = None,
    batch: int | None = None,
    epochs: float = 1,
    rollouts: int | None = None,
    active_experts: int | None = None,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, int] | None = None,
) -> Advice:
    """Advice for a loaded model, a model's directory or its `config.json`, and data of one of three kinds.

    `tokens` are supervised tokens of one epoch, `episodes` policy-gradient episodes of the run, `data` a file that is
    counted with `tokenizer`, or the directory's own; under goal "rl" each of its records is a prompt with `rollouts`
    episodes (16) an epoch. Without `goal`, episodes mean "rl" and the others "sft". `loss` is the mean of a first epoch
    in nats a token. `devices` train together, as many on each of `nodes`, 8 unless given. `batch` is 32 sequences, or
    32 prompts' episodes, and more only where there are more devices; `micro_batch` is the most of them on a device at a
    time. `rank` overrides the advised one; patterns are those of a probe; `gpu` is a name that `lorafuse.plan.find`
    knows.

    Raises ValueError and FileNotFoundError, with the option, its value and the fix.
    """
    shapes = shapes_of(model, active_experts=active_experts)
    device = find(gpu) if gpu is not None else None
    if sum(given is not None for given in (tokens, episodes, data)) != 1:
        raise ValueError("give the data in one way: --tokens N, --episodes N or --data FILE")
    goal = goal or ("sft" if episodes is None else "rl")
    rollouts = rollouts if rollouts is not None else schedule.ROLLOUTS if goal == "rl" else 1
    numbers = {"length": length, "micro-batch": micro_batch, "devices": devices, "rollouts": rollouts}
    numbers |= {} if nodes is None else {"nodes": nodes}
    for name, value in (numbers | ({} if batch is None else {"batch": batch})).items():
        if value < 1:
            raise ValueError(f"--{name} {value}: it must be at least 1")
    if epochs <= 0:
        raise ValueError(f"--epochs {epochs}: it must be above 0")
    if goal not in GOALS:
        raise ValueError(f"--goal {goal}: it must be one of {', '.join(GOALS)}")
    if (goal == "rl" and tokens is not None) or (goal == "sft" and episodes is not None):
        want = "--episodes N" if goal == "rl" else "--tokens N"
        raise ValueError(f"--goal {goal} counts its data by {want}, or from --data FILE")
    if goal == "rl" and loss is not None:
        raise ValueError(f"--loss {loss}: it measures supervised tokens; of --goal rl each episode counts")
    count = None
    if data is not None:
        if tokenizer is None:
            if not isinstance(model, (str, Path)):
                raise ValueError("a loaded model has no tokenizer; pass tokenizer= to count the data with")
            tokenizer = load_tokenizer(Path(model))
        count = count_file(Path(data), tokenizer, length=length, goal=goal)
        if goal == "rl":
            episodes = round(count.examples * rollouts * epochs)
        else:
            tokens = count.supervised
    bits = cap.data_bits(tokens=tokens, episodes=episodes, loss=loss)
    ranks = cap.rank_for(shapes, bits, goal)
    if rank is not None:
        cap.check_rank(shapes, rank)
    used = rank or ranks.advised
    nodes = nodes_for(devices) if nodes is None else nodes
    if devices % nodes:
        raise ValueError(f"--devices {devices} --nodes {nodes}: every node must have as many devices")
    if batch is not None and batch % rollouts:
        raise ValueError(
            f"--batch {batch}: it must be a multiple of --rollouts {rollouts}, so that a step has all answers"
        )
    # a batch that was asked for is kept with the micro-batch that was, the usual one with a smaller micro-batch
    most = batch or max(schedule.BATCH_CLOSE * rollouts, math.lcm(devices, rollouts))
    if batch is None:
        micro_batch = next(m for m in range(micro_batch, 0, -1) if math.lcm(m * devices, rollouts) <= most)
    schedule.accumulation(most, micro_batch, devices, rollouts)
    is_paired = bool(count and count.is_paired)
    # both answers of a pair are trained on
    each = 2 if is_paired else 1
    settings, copies = fit(shapes, used, length, micro_batch, device, sequences=each), devices
    offered: list[Layout] = []
    if device is not None and devices > 1:
        cluster = cluster_of(device, devices, nodes)
        offered = layouts(shapes, used, length, micro_batch, most, device, cluster, sequences=each, rollouts=rollouts)
        if (best := fastest(offered)) is not None:
            settings, copies = _settings(best), best.copies
        elif settings.fits:
            settings = replace(settings, fits=False, elsewhere="DDP's buckets of gradients are too much")
    # what a smaller micro-batch lacks, accumulation makes up for
    accumulation = schedule.accumulation(most, settings.micro_batch, copies, rollouts)
    used_batch = accumulation * settings.micro_batch * copies
    sequences = episodes or (count.examples if count else -(-(tokens or 0) // length))
    steps = schedule.optimizer_steps(sequences, used_batch, 1 if goal == "rl" else epochs)
    rate = schedule.learning_rate(shapes.hidden, shapes.model_type, steps)
    request = Request(
        goal=goal,
        tokens=tokens,
        episodes=episodes,
        count=count,
        sequences=sequences,
        loss=loss,
        length=length,
        micro_batch=micro_batch,
        devices=devices,
        nodes=nodes,
        batch=used_batch,
        rollouts=rollouts,
        epochs=epochs,
        rank_asked=rank,
        gpu=device.name if device else None,
    )
    prompt = min(count.longest, length // 2) if count else length // 2
    written = Settings(
        rank=used,
        learning_rate=rate.lora,
        micro_batch=settings.micro_batch,
        accumulation=accumulation,
        epochs=epochs,
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
        trainer="GRPO" if goal == "rl" else "DPO" if is_paired else "SFT",
        model=_name_of(model),
        data=str(data or "data.jsonl"),
        length=length - prompt if goal == "rl" else length,
        packing=count is None,
        rollouts=rollouts,
        checkpointing=settings.checkpointing,
        quantized=settings.method == "qlora",
        half="float16" if device and device.arch < 80 else "bfloat16",
        launch=launch(settings.layout, devices // nodes, nodes),
    )
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
            (method, saved): memory(
                shapes, method, used, micro_batch * each * length, checkpointing=saved, length=length
            )
            for method in METHODS
            for saved in (False, True)
        },
        fit=settings,
        step_seconds=(
            _step_seconds(shapes, used, each, length, settings, accumulation * copies / devices, device)
            if device
            else {}
        ),
        layouts=offered,
        rank_pattern=written.rank_pattern,
        alpha_pattern=written.alpha_pattern,
        snippet=snippet(shapes, written),
    )


def _settings(best: Layout) -> Fit:
    """Those of a layout that fits."""
    method = "qlora" if best.name == "DDP, QLoRA" else "lora"
    return Fit(method, best.checkpointing, best.micro_batch, best.memory, True, layout=best.name)


def _name_of(model: Any) -> str:
    """What `from_pretrained` takes: the directory of a path, or the name that a loaded model has."""
    if not isinstance(model, (str, Path)):
        return getattr(getattr(model, "config", None), "_name_or_path", "") or "MODEL"
    path = Path(model)
    return str(path.parent if path.is_file() else path)


def _step_seconds(
    shapes: ModelShapes, rank: int, each: int, length: int, settings: Fit, micro_steps: float, device: DeviceSpec
) -> dict[str, float]:
    """Seconds of an optimizer step of so many micro-batches (of one that several devices share its part), of each of
    `TRAININGS` that fits with the same settings."""
    if settings.fits is False:
        return {}
    tokens = settings.micro_batch * each * length
    micro = micro_step_seconds(shapes, rank, tokens, length, device, checkpointing=settings.checkpointing)
    shown = ["QLoRA"]
    if settings.method == "lora":
        full = memory(shapes, "full", rank, tokens, checkpointing=settings.checkpointing, length=length).total
        fits = full <= usable_bytes(device)
        shown = [one for one in TRAININGS if one != "QLoRA" and (fits or one != "full fine-tuning")]
    return {one: micro[one] * micro_steps + update_seconds(shapes, one, rank, device) for one in shown}
