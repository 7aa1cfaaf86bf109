"""Step time of a model on a GPU, by the cost model of `lorafuse.plan` and a calibration. A model, not a measurement."""

import math
from collections import Counter
from dataclasses import replace

from lorafuse.advise.bases import decode_seconds
from lorafuse.advise.capacity import rank_of, trainable
from lorafuse.advise.memory import activation_bytes, expert_blocks
from lorafuse.advise.shapes import LAST, Linear, ModelShapes
from lorafuse.plan import DeviceSpec, Problem, cost, select

__all__ = ["TRAININGS", "micro_step_seconds", "update_seconds"]

TRAININGS = ("frozen", "full fine-tuning", "lorafuse", "QLoRA")
_GRADIENTS = ("dx", "da", "db")
# where nvcc is: without it, lorafuse has Triton and eager
_AVAILABLE = (("eager", ""), ("triton", ""), ("cuda", ""))
# torch's products alone, of weights that are decoded before each
_PLAIN = (("eager", ""),)
# bytes that transformers' loss moves for each logit, forward and backward: to fp32, log-softmax, gradients, to bf16
_LOSS_BYTES = 36
# of what cuBLAS sustains: FlashAttention-2 reaches 35% of an H100's peak (FlashAttention-3, Shah et al. 2024)
_ATTENTION_SHARE = 0.42
# norms, rotary embedding, activations, residuals and what the host leaves idle, in passes over the activations that are
# saved: chosen so that lorafuse's step is the 95.1 ms of bench/results/h200-2026-11-26-model.json (8 layers of
# Llama-3.1-8B, 4096 tokens); full fine-tuning of the same run, which was not fitted, comes out 7% low
_PASSES = 20.0
# fused AdamW reads weight, gradient and both moments, and writes all but the gradient
_FUSED_PASSES = 7


def micro_step_seconds(
    shapes: ModelShapes, rank: int, tokens: int, length: int, device: DeviceSpec, *, checkpointing: bool = False
) -> dict[str, float]:
    """Modelled seconds of one micro-batch of `tokens`, in sequences of `length`, forward and backward, for each of
    `TRAININGS`; half precision. Checkpointing runs forward twice. Raises ValueError for tokens below 1.

    "QLoRA" is a lower bound: each adapted `nn.Linear` weight is decoded to half precision before each of its products,
    which are torch's; PEFT's casts of x are left out.
    """
    if tokens < 1:
        raise ValueError(f"tokens {tokens}: it must be at least 1")
    total = dict.fromkeys(TRAININGS, 0.0)
    blocks, rest = expert_blocks(shapes.linears)
    again = 2 if checkpointing else 1
    dtype = "bfloat16" if device.arch >= 80 else "float16"
    sizes = Counter(
        (x.N, x.K, x.adapted, rank_of(x, rank, shapes.active_experts), x.active / x.experts, x.experts)
        for x in rest
        if x.kind != "tower"
    )
    for (N, K, adapted, R, active, copies), count in sizes.items():
        problem = Problem(math.ceil(tokens * active), N, K, R, dtype, "float32")
        for training, seconds in _linear(problem, device, adapted, again).items():
            total[training] += seconds * count * copies
    for (up, down), count in Counter((_sizes(up), _sizes(down)) for up, down in blocks).items():
        R = rank_of(blocks[0][0], rank, shapes.active_experts)
        base = Problem(tokens * shapes.active_experts, up[1], up[2], R, dtype, "float32", groups=up[0], is_ragged=True)
        base = replace(base, choices=shapes.active_experts)
        for training, seconds in _experts(base, down[2], device, again).items():
            total[training] += seconds * count
    total["QLoRA"] += decode_seconds(shapes, "NF4", device, checkpointing=checkpointing, experts=False)
    attention = _attention(shapes, rest, tokens * length, device, again)
    loss = shapes.vocabulary * tokens * _LOSS_BYTES
    for training in TRAININGS:
        saved = (
            activation_bytes(shapes, 0 if training == "full fine-tuning" else rank, tokens, groups=False)
            * (again + 2)
            / 3
        )
        total[training] += attention + (loss + _PASSES * saved) / device.sustained_bandwidth
    return total


def _attention(shapes: ModelShapes, rest: list[Linear], pairs: int, device: DeviceSpec, again: int) -> float:
    """Seconds of the products of scores and values, `pairs` of tokens, and of the passes over eager attention's."""
    width = sum(x.K for x in rest if x.kind == "attention" and shapes.hidden == x.N and x.name.endswith(LAST))
    if shapes.scores.heads:
        # all scores, the masked ones too: two products forward, four backward
        moved = shapes.scores.heads * shapes.scores.moved * pairs * (again + 2) / 3
        return (4 * again + 8) * pairs * width / device.sustained_flops + moved / device.sustained_bandwidth
    # causal: half of two products forward, two and a half times that backward
    return (2 * again + 5) * pairs * width / (device.sustained_flops * _ATTENTION_SHARE)


def update_seconds(
    shapes: ModelShapes, training: str, rank: int, device: DeviceSpec, *, passes: int = _FUSED_PASSES
) -> float:
    """Modelled seconds of one AdamW step: bf16 for full fine-tuning, fp32 for adapters."""
    moved = {"full fine-tuning": 2 * shapes.parameters, "frozen": 0}.get(training, 4 * trainable(shapes, rank))
    return passes * moved / device.sustained_bandwidth


def _sizes(linear: Linear) -> tuple[int, int, int]:
    return linear.experts, linear.N, linear.K


def _linear(problem: Problem, device: DeviceSpec, adapted: bool, again: int) -> dict[str, float]:
    modelled = _both((problem,), (replace(problem, gradients=_GRADIENTS),), device, again)
    return modelled if adapted else modelled | dict.fromkeys(("lorafuse", "QLoRA"), modelled["frozen"])


def _both(
    forward: tuple[Problem, ...], backward: tuple[Problem, ...], device: DeviceSpec, again: int
) -> dict[str, float]:
    """Seconds of `again` times forward and of backward, a problem for each projection."""
    frozen = ours = plain = 0.0
    for problems, times in ((forward, again), (backward, 1)):
        # the floor is the fastest known frozen, which for experts may be lorafuse's kernels, here at the least rank
        bare = select(tuple(replace(p, R=1) for p in problems), device, _AVAILABLE).chosen.seconds
        frozen += times * min(cost.frozen(problems, device).seconds, bare)
        ours += times * select(problems, device, _AVAILABLE).chosen.seconds
        plain += times * select(problems, device, _PLAIN).chosen.seconds
    # dw = dyᵀ x has as many products as y
    dw = sum(cost.frozen((p,), device).seconds for p in forward)
    return {"frozen": frozen, "full fine-tuning": frozen + dw, "lorafuse": ours, "QLoRA": plain}


def _experts(base: Problem, I: int, device: DeviceSpec, again: int) -> dict[str, float]:  # noqa: E741
    epilogue = "gated" if base.N == 2 * I else "activation"
    forward = replace(base, epilogue=epilogue), replace(base, N=base.K, K=I)
    up, down = (replace(problem, gradients=_GRADIENTS, epilogue="") for problem in forward)
    backward = up, replace(down, epilogue=epilogue)
    modelled = _both(forward, backward, device, again)
    # stacks stay bf16, and lorafuse's
    return modelled | {"QLoRA": modelled["lorafuse"]}
