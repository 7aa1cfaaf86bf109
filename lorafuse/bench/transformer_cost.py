"""The cost of training a decoder from its sizes: weights, FLOPs, bytes, and how many layers fit.

T are the tokens of a step, S those of a sequence, L the layers, D heads · head size. FLOPs are model FLOPs (MFU, not
HFU): recomputation by checkpointing and overhead of an implementation are not counted. torch.utils.flop_counter would
count these too and needs a model that is built and run; the tests hold the formulas against it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

__all__ = [
    "VARIANTS", "Sizes", "Training", "fits", "fitting", "kept_bytes", "step_flops", "together_bytes", "training_bytes",
]  # fmt: skip

# what a comparison cannot do without
VARIANTS = ("frozen", "full", "peft", "lorafuse")
# share of the free memory to use: the rest is for fragments, the libraries' workspaces and the estimate's error
_SHARE = 0.8
# a vocabulary is not cut below it
_LEAST_VOCABULARY = 1024
# bytes of an adapter's parameter, of its gradient and of each of AdamW's two moments: PEFT keeps adapters in float32
_ADAPTER_BYTES = 4


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder: `H` hidden, `D` queries, `KV` keys, `I` inner (of one expert where E > 0), `E` and `k`."""

    layers: int
    vocabulary: int
    H: int
    D: int
    KV: int
    I: int  # noqa: E741
    E: int = 0
    k: int = 0
    tied: bool = False

    @classmethod
    def of(cls, config: Any) -> "Sizes":
        """The sizes of a transformers configuration: Llama's layers, or Qwen3-MoE's with experts in every layer."""
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        E = getattr(config, "num_experts", 0)
        return cls(
            config.num_hidden_layers, config.vocab_size, config.hidden_size,
            D=config.num_attention_heads * head, KV=config.num_key_value_heads * head,
            I=config.moe_intermediate_size if E else config.intermediate_size,
            E=E, k=config.num_experts_per_tok if E else 0, tied=config.tie_word_embeddings,
        )  # fmt: skip

    def layer_weights(self, experts: int) -> int:
        """Weights of one layer with that many experts; without norms, which are below a thousandth."""
        return self.H * (2 * self.D + 2 * self.KV + self.E) + 3 * self.H * self.I * (experts if self.E else 1)

    def weights(self) -> int:
        """Weights of layers, embedding and head."""
        return self.layers * self.layer_weights(self.E) + self.vocabulary * self.H * (1 if self.tied else 2)

    def active_weights(self) -> int:
        """Weights that multiply each token: k experts and the head, without the embedding, which is a look-up."""
        return self.layers * self.layer_weights(self.k) + self.vocabulary * self.H

    def adapter_weights(self, rank: int, experts: int) -> int:
        """Weights of adapters on every linear layer but the head, and on the projections of that many experts."""
        attention = 2 * (self.H + self.D) + 2 * (self.H + self.KV)
        inner = experts * (2 * self.H + 3 * self.I) if self.E else 3 * (self.H + self.I)
        return self.layers * rank * (attention + inner)


def step_flops(sizes: Sizes, variant: str, rank: int, tokens: int, sequence: int) -> int:
    """Model FLOPs of one step of `tokens` tokens in sequences of `sequence`.

    full: 6·N·T + 12·L·D·S·T with N active weights, two FLOPs each in forward, input gradient and weight gradient
    (Chowdhery et al., PaLM, 2022, appendix B, whose attention term counts the whole S × S square as this one does).
    LoRA: 4·N·T + 6·N_lora·T + 12·L·D·S·T, since frozen weights have no gradient. The first layer's input gradient is
    counted, though a frozen embedding does not need it. frozen: the same without adapters.
    """
    attention = 12 * sizes.layers * sizes.D * sequence * tokens
    if variant == "full":
        return 6 * sizes.active_weights() * tokens + attention
    adapters = 0 if _is_frozen(variant) else sizes.adapter_weights(rank, sizes.k)
    return (4 * sizes.active_weights() + 6 * adapters) * tokens + attention


@dataclass(frozen=True)
class Training:
    """How a model is trained: rank, tokens of one micro-batch, bytes of an element, checkpointing."""

    rank: int
    tokens: int
    itemsize: int
    checkpointing: bool


def _is_frozen(variant: str) -> bool:
    return variant.startswith("frozen")


def kept_bytes(sizes: Sizes, variant: str, training: Training) -> int:
    """Bytes of a variant between its steps: weights, and AdamW's two moments of each trained parameter in its dtype."""
    weights = training.itemsize * sizes.weights()
    if variant == "full":
        return 3 * weights
    return weights + (0 if _is_frozen(variant) else 3 * _ADAPTER_BYTES * sizes.adapter_weights(training.rank, sizes.E))


def training_bytes(sizes: Sizes, variant: str, training: Training) -> int:
    """An upper estimate of the peak bytes of a step of one variant, its weights included.

    What is kept; a gradient of each trained parameter, in its dtype; the tensors that autograd saves per layer and
    token (inputs of products, norms in float32, q and k before and after rotation, four tensors of inner size; PEFT's
    float32 copies of inputs where the base is not float32), of one layer with checkpointing; logits, three times more
    in float32. PEFT builds W + ΔW of the experts and keeps it for backward. Fused AdamW needs no more.
    """
    size, L = training.itemsize, sizes.layers
    is_peft = variant.startswith(("peft", "addmm", "liger-peft"))
    inner = sizes.I * max(sizes.k, 1)
    saved = size * (6 * sizes.H + 3 * sizes.D + 4 * sizes.KV + 4 * inner + 3 * sizes.k * sizes.H) + 16 * sizes.H
    if is_peft and size < 4:
        saved += 4 * (5 * sizes.H + sizes.D + inner)
    per_layer = training.tokens * saved
    stacks = size * sizes.layer_weights(sizes.E) if is_peft and sizes.E else 0
    alive = 1 if training.checkpointing else L
    total = kept_bytes(sizes, variant, training) + alive * (per_layer + stacks) + 3 * stacks
    if training.checkpointing:
        total += L * training.tokens * sizes.H * size
    total += training.tokens * sizes.vocabulary * (size + 3 * 4)
    if variant == "full":
        # a tied embedding has a gradient from the head and one from the look-up before they are added
        tied = size * sizes.vocabulary * sizes.H if sizes.tied else 0
        return total + size * sizes.weights() + tied
    return total + (0 if _is_frozen(variant) else _ADAPTER_BYTES * sizes.adapter_weights(training.rank, sizes.E))


def fitting(sizes: Sizes, needed: Callable[[Sizes], int], free: int) -> Sizes:
    """The sizes with as many layers, at most `sizes.layers`, as fit in 0.8 · `free` bytes when `needed(sizes)` do.

    If not even one layer fits, the vocabulary is halved until one does. 0 layers when none fits with 1024 words.
    """
    cut = sizes
    while True:
        layers = cut.layers
        while layers and not fits(needed(replace(cut, layers=layers)), free):
            layers -= 1
        if layers or cut.vocabulary // 2 < _LEAST_VOCABULARY:
            return replace(cut, layers=layers)
        cut = replace(cut, vocabulary=cut.vocabulary // 2)


def together_bytes(sizes: Sizes, variants: Sequence[str], training: Training, apart: Collection[str] = ()) -> int:
    """An upper estimate of the bytes of several variants in turns: what each keeps, and the largest step beyond that.

    All but full and those of `apart`, which have processes of their own, share one base.
    """
    sharing = [variant for variant in variants if variant != "full" and variant not in apart]
    shared = training.itemsize * sizes.weights() * max(0, len(sharing) - 1)
    kept = {variant: kept_bytes(sizes, variant, training) for variant in variants}
    step = max((training_bytes(sizes, variant, training) - kept[variant] for variant in variants), default=0)
    return sum(kept.values()) - shared + step


def fits(needed: int, free: int) -> bool:
    """Whether `needed` bytes are within 0.8 of the `free` bytes."""
    return needed <= _SHARE * free
