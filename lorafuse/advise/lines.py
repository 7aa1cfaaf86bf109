"""The lines of an advice: each with its value, how sure it is and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafuse.advise import capacity as cap
from lorafuse.advise import schedule

if TYPE_CHECKING:
    from lorafuse.advise.advice import Advice

__all__ = ["Line", "lines_of"]


@dataclass(frozen=True)
class Line:
    """One thing advised. `sure` is one of `sources.SURE`, `source` names entries of `sources.FINDINGS`."""

    section: str
    name: str
    value: str
    sure: str
    source: str


def lines_of(a: Advice) -> list[Line]:
    """All lines, section by section."""
    return [*_capacity(a), *_rank(a), *_schedule(a), *_cost(a)]


def _big(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.3g} "


def _capacity(a: Advice) -> list[Line]:
    section, request = "capacity", a.request
    kinds = cap.per_rank(a.shapes)
    lines = [
        Line(section, f"{kind}, per rank", f"{count:,} parameters", "formula", "MODULES")
        for kind, count in kinds.items()
    ]
    dense = not a.shapes.experts
    if dense and "unembedding" in kinds:
        every = cap.trainable(a.shapes, 1, unembedding=True)
        value = f'{every:,} with the unembedding, {cap.trainable(a.shapes, 1):,} as "all-linear" adapts'
        lines.append(Line(section, "all, per rank", value, "formula", "MODULES"))
    what = f"{a.trainable:,} parameters at rank {a.rank}" + ("" if dense else f", {a.expert_rank} for each expert")
    lines.append(
        Line(section, "trainable", f"{what}, {a.trainable / a.shapes.parameters:.2%} of all", "formula", "MODULES")
    )
    held = cap.capacity_bits(a.trainable)
    lines.append(Line(section, "the adapter holds", f"{_big(held)}bit", "published figure", "F2"))
    numbers = {"sft": (request.tokens, "supervised tokens"), "rl": (request.episodes, "episodes")}[request.goal]
    given = f"{numbers[0]:,} {numbers[1]}"
    lines.append(
        Line(
            section,
            "the data teaches",
            f"at most {_big(a.bits)}bit ({given}), {a.bits / held:.0%} of that",
            "published figure",
            "F2, GIVEN",
        )
    )
    if request.count:
        c = request.count
        value = f"{c.examples:,} examples, {c.tokens:,} tokens, {c.supervised:,} supervised, longest {c.longest:,}"
        lines.append(Line(section, "counted in the file", value, "measured here", "GIVEN"))
    return lines


def _rank(a: Advice) -> list[Line]:
    section, r, goal = "rank", a.ranks, a.request.goal
    lines = []
    if r.comfortable is not None:
        lines.append(Line(section, "smallest comfortable rank", f"{r.comfortable}", "rule of thumb", "F2, F2b"))
        value = f"{r.advised}: up to a power of two, from {cap.SHOWN_RANK[goal]} on, where equality was shown"
        lines.append(Line(section, "train with rank", value, "published figure", "F1" if goal == "sft" else "F5"))
    elif r.fits is not None:
        value = f"{r.highest}, the highest worth it: the data fits from rank {r.fits} on, but without room"
        lines.append(Line(section, "train with rank", value, "rule of thumb", "F2, F2b"))
    else:
        value = f"use full fine-tuning; or QLoRA at rank {r.highest}, and expect 2 to 5 times the steps"
        lines.append(Line(section, "more data than LoRA holds", value, "published figure", "F2"))
    limit = f"{r.highest}: 512, min(N, K) and the FLOPs of full fine-tuning bound it"
    lines.append(Line(section, "highest rank worth it", limit, "formula", "FLOPS, LR, MODULES"))
    if a.request.rank_asked is not None:
        lines.append(Line(section, "rank asked for", f"{a.rank}, used below", "assumption", "GIVEN"))
    if a.shapes.experts:
        value = (
            f"{a.expert_rank}: rank {a.rank} over {a.shapes.active_experts} active of {a.shapes.experts}, at least 1"
        )
        lines.append(Line(section, "rank of each expert", value, "published figure", "MOE"))
    layers = "all linear layers" + (" and all experts" if a.shapes.experts else "") + ", not the unembedding"
    lines.append(Line(section, "adapt", layers, "published figure", "F4"))
    lines.append(Line(section, "alpha", "32 for every layer, scale alpha / r", "published figure", "FORM"))
    if a.rank_pattern:
        low, high = min(a.rank_pattern.values()), max(a.rank_pattern.values())
        value = f"{len(a.rank_pattern)} layers off rank {a.rank}, {low} to {high}, by the gradient probe"
        if any(linear.parameter for linear in a.shapes.adapted):
            value += "; it does not see stacks of experts, which keep theirs"
        lines.append(Line(section, "rank by layer", value, "rule of thumb", "F6"))
    return lines


def _schedule(a: Advice) -> list[Line]:
    section, request, rate = "schedule", a.request, a.learning_rate
    sure = "formula" if rate.published else "assumption"
    family = (
        ""
        if rate.published
        else f" (no exponent published for {a.shapes.model_type or 'this family'}: the lower of two)"
    )
    unit = "episodes" if request.goal == "rl" else "sequences"
    ceiling = f"{schedule.BATCH_CEILING} {unit} a step, at every rank"
    each = f"{request.micro_batch} x {request.devices} x {a.accumulation} = {request.batch} {unit} a step"
    if request.batch_asked and request.batch_asked > schedule.BATCH_CEILING:
        each += f" (cut from {request.batch_asked})"
    assumed = "" if request.count or request.goal == "rl" else f", sequences packed to {request.length} tokens"
    return [
        Line(section, "learning rate", f"{rate.lora:.3e}, {rate.multiple:g} times full's{family}", sure, "LR"),
        Line(section, "for full fine-tuning", f"{rate.full:.3e}", sure, "LR"),
        Line(section, "optimizer steps", f"{a.steps:,}{assumed}", "assumption" if assumed else "formula", "GIVEN"),
        # the finding is of supervised runs
        Line(section, "batch ceiling", ceiling, "published figure" if request.goal == "sft" else "assumption", "F3"),
        Line(section, "micro-batch, devices, accumulation", each, "formula", "F3, GIVEN"),
    ]


def _cost(a: Advice) -> list[Line]:
    section, request = "cost", a.request
    ratio = cap.flops_ratio(a.shapes, a.rank)
    lines = [Line(section, "FLOPs of full fine-tuning", f"{ratio:.4f} of a step", "formula", "FLOPS")]
    for method in ("full", "lora", "qlora"):
        without, saved = (a.memory[method, checkpointing].total / 2**30 for checkpointing in (False, True))
        value = f"{without:.1f} GiB (model), {saved:.1f} GiB with checkpointing (model)"
        source = {"full": "ZERO", "lora": "ZERO", "qlora": "ZERO, NF4"}[method]
        name = {"full": "memory, full", "lora": "memory, LoRA", "qlora": "memory, QLoRA"}[method]
        lines.append(Line(section, f"{name}", value, "model", source))
    if not a.step_seconds:
        return [*lines, Line(section, "step time", "name a GPU: --gpu H200", "model", "PLAN")]
    for way, seconds in a.step_seconds.items():
        value = (
            f"{seconds:.3g} s (model), {seconds / a.step_seconds['full fine-tuning']:.2f} of full fine-tuning (model)"
        )
        lines.append(Line(section, f"step on {request.gpu}, {way}", value, "model", "PLAN"))
    return lines
