"""Memory of training, by full fine-tuning, LoRA and QLoRA, with and without checkpointing. A model, not a measurement.

Activations are what autograd saves in a transformers model patched by lorafuse: each distinct input of a linear layer
and each output that an attention or an activation function keeps, in bf16, what enters a norm in fp32, `[tokens, R]`
for each adapter, and the scores of eager attention. Of logits there are three fp32 copies when their gradient is made:
log-probabilities, their gradient, and the logits'. Within 2% of the peaks measured on an H200 and 10% of what hooks see
on a CPU, both in tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lorafuse.advise.bases import frozen_bytes
from lorafuse.advise.capacity import rank_of, trainable
from lorafuse.advise.shapes import Linear, ModelShapes

__all__ = ["METHODS", "Memory", "activation_bytes", "expert_blocks", "memory"]

# bytes of a trained parameter with its gradient and Adam's two moments: all bf16, as a model loaded in bf16 is trained;
# with fp32 master weights (source ZERO); fp32 adapters, PEFT's default
_TRAINED = {"full": 8, "master": 16, "lora": 16, "qlora": 16}
_GRADIENT = {"full": 2, "master": 2, "lora": 4, "qlora": 4}
METHODS = tuple(_TRAINED)
_HALF, _SINGLE = 2, 4
# activations of a block and the gradients of about half of them, in its backward (peaks of a Llama on a CPU, in tests)
_BACKWARD = 1.5
# bytes of a score in eager attention's backward, beside what is kept: gradients in fp32 and bf16 (as above)
_SCORE_GRADIENTS = 6


@dataclass(frozen=True)
class Memory:
    """Bytes: of frozen weights, of trained ones with gradients and optimizer, of activations, of logits; `total` is the
    peak, at which not all of them need be there."""

    frozen: int
    trained: int
    activations: int
    logits: int
    total: int


def memory(
    shapes: ModelShapes, method: str, rank: int, tokens: int, *, checkpointing: bool, length: int | None = None,
    accumulates: bool = True, groups: bool = True,
) -> Memory:  # fmt: skip
    """Bytes on one device for a micro-batch of `tokens` in sequences of `length` (one, unless given), nothing sharded.

    `method` is "full" (bf16 weights, gradients and moments), "master" (full with fp32 master weights), "lora" or
    "qlora", which holds the adapted `nn.Linear` weights in NF4 and everything else, stacked experts included, in bf16.
    With checkpointing each block keeps its input, and one at a time its activations, once the logits are gone.
    Without accumulation gradients grow while activations go; `groups` is that of `lorafuse.patch`. Raises
    ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    is_full = method in ("full", "master")
    block = activation_bytes(shapes, 0 if is_full else rank, tokens, groups=groups) // shapes.layers
    pairs = shapes.scores.heads * tokens * (length or tokens) // shapes.layers
    scores, gradients_of_scores = shapes.scores.kept * pairs, _SCORE_GRADIENTS * pairs
    logits = shapes.vocabulary * tokens * 3 * _SINGLE
    if checkpointing:
        inputs = shapes.hidden * tokens * _HALF * shapes.layers
        activations = inputs + block + scores
        held = inputs + max(round(_BACKWARD * block) + scores + gradients_of_scores, logits)
    else:
        activations = (block + scores) * shapes.layers
        held = activations + max(logits, gradients_of_scores)
    number = shapes.parameters if is_full else trainable(shapes, rank)
    trained = number * _TRAINED[method]
    frozen = 0 if is_full else shapes.parameters * _HALF
    if method == "qlora":
        frozen = frozen_bytes(shapes, "NF4", experts=False)
    gradients = 0 if accumulates else number * _GRADIENT[method]
    return Memory(frozen, trained, activations, logits, frozen + trained - gradients + max(held, gradients))


def activation_bytes(shapes: ModelShapes, rank: int, tokens: int, *, groups: bool = True) -> int:
    """Bytes that autograd saves for all blocks; rank 0 is full fine-tuning, which saves more of norms and experts.

    Without `groups` (`lorafuse.patch(model, groups=False)`) a gated MLP saves its activation and its product too.
    """
    blocks, rest = expert_blocks(shapes.linears)
    halves = sum(_experts(up, down, rank) for up, down in blocks)
    modules: dict[str, list[Linear]] = {}
    for linear in rest:
        if linear.kind not in ("unembedding", "tower"):
            modules.setdefault(linear.name.rpartition(".")[0], []).append(linear)
    halves += sum(_module(linears, shapes.hidden, rank > 0 and groups) for linears in modules.values())
    if rank:
        halves += sum(x.active * rank_of(x, rank, shapes.active_experts) for x in shapes.adapted)
    # of a trained norm the normalized input too
    norms = shapes.normed * (_SINGLE if rank else _SINGLE + _HALF)
    return round((halves * _HALF + norms) * tokens)


def _module(linears: list[Linear], hidden: int, groups: bool) -> float:
    """bf16 elements a token of the layers of one module. Those with as many in features read the same input: q, k and
    v, or gate and up."""
    saved = 0.0
    if groups and (gate := _gate(linears)) is not None:
        # the rest is computed again from the outputs of gate and up
        return gate.active * (gate.K + 2 * gate.N)
    readers: dict[int, list[Linear]] = {}
    for linear in linears:
        readers.setdefault(linear.K, []).append(linear)
    for K, group in readers.items():
        active = max(linear.active for linear in group)
        saved += active * K
        out = sum(linear.N for linear in group)
        # what is added to the residual stream is not needed again
        if not (len(group) == 1 and out == hidden and len(linears) > 1):
            saved += active * out
        # a gate's activation, beside its product with up, which is down's input
        if any(out == 2 * other.K and other.K != K and other.kind != "attention" for other in linears):
            saved += active * out / 2
    return saved


def _gate(linears: list[Linear]) -> Linear | None:
    """One of gate and up, where the layers are a gated MLP that runs as one operator."""
    if len(linears) == 3:
        for i, down in enumerate(linears):
            gate, up = linears[i - 1], linears[i - 2]
            if (gate.N, gate.K) == (up.N, up.K) == (down.K, down.N) and down.kind != "attention":
                return gate
    return None


def _experts(up: Linear, down: Linear, rank: int) -> float:
    """bf16 elements a token of a block of stacked experts: by lorafuse its input and the first projection's output, in
    full fine-tuning, by transformers, rows gathered for each expert, the gate's activation and the outputs too."""
    if rank:
        return up.K + up.active * up.N
    return up.K + up.active * (up.K + up.N + (2 if up.N == 2 * down.K else 1) * down.K + down.N)


def expert_blocks(linears: Sequence[Linear]) -> tuple[list[tuple[Linear, Linear]], list[Linear]]:
    """Pairs of stacks that make the experts of a block, gate_up and down, and all that is no such pair."""
    modules: dict[str, list[Linear]] = {}
    rest = [linear for linear in linears if not linear.parameter]
    for linear in linears:
        if linear.parameter:
            modules.setdefault(linear.name.rpartition(".")[0], []).append(linear)
    pairs = []
    for stacks in modules.values():
        by_order = [(up, down) for up in stacks for down in stacks if up is not down and _pair(up, down)]
        if len(stacks) == 2 and by_order:
            # where H is I without gate both orders fit; the first parameter is then the first projection
            pairs.append(by_order[0])
        else:
            rest += stacks
    return pairs, rest


def _pair(up: Linear, down: Linear) -> bool:
    return up.K == down.N and up.N in (down.K, 2 * down.K) and up.experts == down.experts
