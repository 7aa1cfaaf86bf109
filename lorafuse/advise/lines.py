"""The lines of an advice: each with its value, how sure it is and where it comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafuse.advise import bases, schedule
from lorafuse.advise import capacity as cap
from lorafuse.advise.fit import usable_bytes
from lorafuse.advise.layouts import Layout, fastest
from lorafuse.plan import find

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
    return [*_capacity(a), *_rank(a), *_schedule(a), *_cost(a), *_layouts(a)]


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
        value = f"{every:,} with the unembedding, {cap.trainable(a.shapes, 1):,} as adapted"
        lines.append(Line(section, "all, per rank", value, "formula", "MODULES"))
    what = f"{a.trainable:,} parameters at rank {a.rank}" + ("" if dense else f", {a.expert_rank} for each expert")
    lines.append(
        Line(section, "trainable", f"{what}, {a.trainable / a.shapes.parameters:.2%} of all", "formula", "MODULES")
    )
    held = cap.capacity_bits(a.trainable)
    lines.append(Line(section, "the adapter holds", f"about {_big(held)}bit", "published figure", "F2"))
    if request.goal == "rl":
        given = f"{request.episodes:,} episodes"
    else:
        each = "about 1 bit each; --loss measures it" if request.loss is None else f"{request.loss:g} nats each"
        given = f"{request.tokens:,} supervised tokens, {each}"
    about, sure = ("about", "published figure") if request.loss is None else ("at most", "formula")
    if request.count and request.count.is_paired:
        # no finding speaks of pairs
        sure = "assumption"
    value = f"{about} {_big(a.bits)}bit ({given}), {a.bits / held:.2g} of that"
    return [*lines, Line(section, "the data teaches", value, sure, "F2, GIVEN"), *_counted(a)]


def _counted(a: Advice) -> list[Line]:
    c, length = a.request.count, a.request.length
    if c is None:
        return []
    what = "pairs of answers" if c.is_paired else "prompts" if a.request.goal == "rl" else "examples"
    value = f"{c.examples:,} {what}, {c.tokens:,} tokens, {c.supervised:,} supervised, longest {c.longest:,}"
    lines = [Line("capacity", "counted in the file", value, "measured here", "TRL")]
    if c.cut:
        value = f"{c.cut:,} longer than --length {length}: their ends, {c.lost:,} supervised tokens, are not trained on"
        lines.append(Line("capacity", "cut", value, "measured here", "TRL"))
    if c.unsupervised:
        value = f"{c.unsupervised:,} without a supervised token within --length {length}"
        lines.append(Line("capacity", "left out", value, "measured here", "TRL"))
    return lines


def _rank(a: Advice) -> list[Line]:
    section, r, goal = "rank", a.ranks, a.request.goal
    lines = []
    if r.comfortable is not None:
        lines.append(Line(section, "smallest comfortable rank", f"{r.comfortable}", "rule of thumb", "F2, F2b"))
        low = cap.LEAST_RANK[goal]
        if r.comfortable < low:
            value, sure, source = f"{r.advised}: the least that is named for such data", "secondary digest", "NOTE"
        elif r.comfortable == low == 1:
            value, sure, source = "1, which is enough", "published figure", "F5"
        else:
            value, sure, source = f"{r.advised}: that, up to a power of two", "rule of thumb", "F2, F2b"
        lines.append(Line(section, "train with rank", value, sure, source))
    elif r.fits is not None:
        value = f"{r.highest}, the highest worth it: the data fits from rank {r.fits} on, but without room"
        lines.append(Line(section, "train with rank", value, "rule of thumb", "F2, F2b"))
    else:
        value = f"use full fine-tuning: LoRA at rank {r.highest} learns less efficiently, and QLoRA holds no more"
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
    towers = sum(x.kind == "tower" for x in a.shapes.linears)
    if towers:
        value = f"the {towers} linear layers of other modalities: text gives them no gradient"
        lines.append(Line(section, "do not adapt", value, "formula", "MODULES"))
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
    is_paired = bool(request.count and request.count.is_paired)
    sure = "formula" if rate.published and not is_paired else "assumption"
    known = schedule.learning_rate(2000, a.shapes.model_type).published
    family = "" if rate.published else f" (no exponent published for {a.shapes.model_type or 'this family'})"
    if not rate.published and known:
        family = f" (hidden {a.shapes.hidden} is below what the formula was fitted on)"
    if is_paired:
        family += " (fitted on supervised training, not on pairs)"
    is_rl = request.goal == "rl"
    unit = "episodes" if is_rl else "pairs" if is_paired else "sequences"
    copies = request.batch // (a.fit.micro_batch * a.accumulation)
    each = f"{a.fit.micro_batch} x {copies} x {a.accumulation} = {request.batch} {unit} a step"
    if copies != request.devices:
        each += f"; {request.devices // copies} devices share a micro-batch"
    assumed = "" if request.count or is_rl else f", sequences packed to {request.length} tokens"
    lines = [
        Line(section, "learning rate", f"{rate.lora:.3e}, {rate.multiple:g} times full's{family}", sure, "LR"),
        Line(section, "for full fine-tuning", f"{rate.full:.3e}", sure, "LR"),
        Line(section, "optimizer steps", f"{a.steps:,}{assumed}", "assumption" if assumed else "formula", "GIVEN"),
        *_few_steps(a),
        Line(section, "micro-batch, devices, accumulation", each, "formula", "F3, GIVEN"),
    ]
    if is_rl:
        prompts = request.batch / request.rollouts
        value = f"{request.rollouts} answers for each of {prompts:g} prompts"
        usual = (request.rollouts, prompts) == (schedule.ROLLOUTS, schedule.BATCH_CLOSE)
        sure, source = ("published figure", "R1") if usual else ("assumption", "GIVEN")
        return [*lines, Line(section, "a step", value, sure, source)]
    value = f"at most about {schedule.BATCH_CLOSE} {unit} a step, at every rank"
    if request.batch > schedule.BATCH_CEILING:
        large = f"{request.batch} is above {schedule.BATCH_CEILING}, where losses get worse"
        lines.append(Line(section, "large batch", large, "secondary digest", "NOTE"))
    return [*lines, Line(section, "batch size", value, "rule of thumb", "F3")]


def _few_steps(a: Advice) -> list[Line]:
    """What to mind in a short run: no noise in the gradient, too few steps, the border between two learning rates."""
    section, request, short = "schedule", a.request, schedule.SHORT_STEPS
    lines = []
    if a.steps < short:
        epoch = "an epoch is one step, without gradient noise; " if request.batch >= request.sequences else ""
        # what the same command takes: all answers of a prompt in a step, and a sequence on every device
        lower = round(request.batch * a.steps / short) // request.rollouts * request.rollouts
        lower = max(lower, math.lcm(request.devices, request.rollouts))
        steps = schedule.optimizer_steps(request.sequences, lower, 1 if request.goal == "rl" else request.epochs)
        least = math.lcm(request.micro_batch * request.devices, request.rollouts)
        size = f"--batch {lower}" + (" --micro-batch 1" if lower < least else "")
        more = f"{size} makes {steps}" if steps > a.steps else "more epochs or more data make more"
        lines.append(Line(section, "few steps", f"{epoch}{more}", "rule of thumb", "F3"))
    if short / 2 <= a.steps < 2 * short:
        value = f"10 times from {short} steps on, 15 below: no sharp border, either may be better here"
        lines.append(Line(section, "multiple of the learning rate", value, "rule of thumb", "LR"))
    return lines


_METHODS = {
    "full": ("memory, full, bf16 AdamW", "ADAM, SAVED"),
    "master": ("memory, full, fp32 master", "ADAM, SAVED"),
    "lora": ("memory, LoRA, fp32 adapters", "ADAM, SAVED"),
    "qlora": ("memory, QLoRA", "ADAM, SAVED, NF4"),
}


def _cost(a: Advice) -> list[Line]:
    section, request = "cost", a.request
    ratio = cap.flops_ratio(a.shapes, a.rank)
    lines = [Line(section, "FLOPs of full fine-tuning", f"{ratio:.4f} of a step", "formula", "FLOPS")]
    for method, (name, source) in _METHODS.items():
        without, saved = (a.memory[method, checkpointing].total / 2**30 for checkpointing in (False, True))
        value = f"{without:.1f} GiB (model), {saved:.1f} GiB with checkpointing (model)"
        if method == "qlora" and any(x.parameter for x in a.shapes.adapted):
            value += "; stacks of experts stay bf16"
        lines.append(Line(section, name, value, "model", source))
    lines.append(_bases(a))
    if a.shapes.scores.heads:
        value = "eager, which keeps a score of each pair of tokens; a flash kernel, by attn_implementation, keeps none"
        lines.append(Line(section, "attention", value, "measured here", "MODULES"))
    if request.gpu is None:
        return [*lines, Line(section, "does it fit, how long", "name a GPU: --gpu H200", "model", "CARD, PLAN")]
    lines.append(_fits(a, request.gpu))
    for training, seconds in a.step_seconds.items():
        full = a.step_seconds.get("full fine-tuning")
        alone = " on one" if request.devices > 1 else ""
        whole = f"{seconds / full:.2f} of full fine-tuning (model)" if full else f"full fine-tuning does not fit{alone}"
        value = f"{seconds:.3g} s (model), {whole}"
        if training == "QLoRA":
            value = f"at least {value}; weights are decoded before each product, PEFT's casts left out"
        lines.append(Line(section, f"step on {request.gpu}, {training}", value, "model", "PLAN"))
    return lines


def _layouts(a: Advice) -> list[Line]:
    request = a.request
    if request.devices == 1:
        return []
    section, source = f"layouts of {request.devices} devices", "CARD, PLAN, LAYOUT, LINKS"
    if request.gpu is None:
        return [Line(section, "which fits, which is fastest", "name a GPU: --gpu H200", "model", source)]
    best = fastest(a.layouts)
    lines = [Line(section, each.name, _laid_out(each), "model", source) for each in a.layouts]
    if best is None:
        value = f"none: more devices, a shorter --length, or a GPU with more memory than {request.gpu} (model)"
    else:
        value = f"{best.name} (model); within 2% the first of the list; the schedule is its"
    lines.append(Line(section, "fastest that fits", value, "model", source))
    if best is not None and best.batch > schedule.BATCH_CEILING:
        large = f"{best.batch} sequences a step, above {schedule.BATCH_CEILING}, where losses get worse: fewer devices"
        lines.append(Line(section, "large batch", large, "secondary digest", "NOTE"))
    return lines


def _laid_out(each: Layout) -> str:
    settings = f"micro-batch {each.micro_batch}{', checkpointing' if each.checkpointing else ''}, {each.batch} a step"
    size = f"{each.memory / 2**30:.1f} GiB a device{'' if each.fits else ', does not fit'}"
    fraction = f"waits {each.waited / each.seconds:.1%}"
    return f"{each.rate:.3g} sequences/s, {size}, {each.sent / 1e9:.3g} GB sent a step, {fraction} (model); {settings}"


def _bases(a: Advice) -> Line:
    """The frozen weights by the format of the base; where a GPU is named, what decoding adds to a step of lorafuse."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for base in bases.BASES:
        values = [f"{bases.frozen_bytes(a.shapes, base) / 2**30:.1f} GiB"]
        if a.request.gpu is not None:
            seconds = bases.decode_seconds(a.shapes, base, find(a.request.gpu), checkpointing=a.fit.checkpointing)
            values.append(f"decoding {seconds * a.accumulation:.3g} s a step")
        groups.setdefault(tuple(values), []).append(base)
    parts = [f"{' and '.join(names)} {', '.join(values)}" for values, names in groups.items()]
    half = 2 * a.shapes.parameters / 2**30
    experts = ", experts too" if any(x.parameter for x in a.shapes.adapted) else ""
    value = f"16 bits {half:.1f} GiB; as adapted{experts} (model): {'; '.join(parts)}"
    return Line("cost", "frozen weights by format", value, "model", "BASES, NF4")


def _fits(a: Advice, gpu: str) -> Line:
    f, held = a.fit, usable_bytes(find(gpu)) / 2**30
    method = {"lora": "LoRA", "qlora": "QLoRA"}[f.method]
    settings = f"{method}{' with checkpointing' if f.checkpointing else ''} at micro-batch {f.micro_batch}"
    settings += f" under {f.layout.partition(',')[0]}" if f.layout else ""
    of = f"{f.total / 2**30:.1f} of {held:.1f} GiB (model)"
    if f.fits:
        return Line("cost", f"fits on {gpu}", f"{settings}, {of}", "model", "CARD, SAVED")
    value = f"{settings} is {of}; {f.elsewhere}"
    return Line("cost", f"does not fit on {gpu}", value, "model", "CARD, SAVED")
