"""Memory of training, by full fine-tuning, LoRA and QLoRA, with and without checkpointing. A model, not a measurement.

Activations are counted from the layers: each distinct input and each output of a linear layer once, in bf16, two inputs
of a norm for each block; logits in bf16, in fp32 and as an fp32 gradient. What attention, activation functions and
allocators take besides is left out, so real peaks are higher. Adapters run patched: for each layer `[tokens, R]` more.
"""

from dataclasses import dataclass

from lorafuse.advise.capacity import rank_of, trainable
from lorafuse.advise.shapes import Linear, ModelShapes

__all__ = ["METHODS", "Memory", "memory"]

METHODS = ("full", "lora", "qlora")
# bf16 weights; weight, gradient and Adam's moments of a trained parameter (source ZERO); NF4 (source NF4)
_HALF, _TRAINED, _NF4 = 2, 16, 4.127 / 8
# logits in bf16, their fp32 copy, its gradient: what transformers' loss holds
_LOGITS = 2 + 4 + 4


@dataclass(frozen=True)
class Memory:
    """Bytes: of frozen weights, of trained ones with gradients and optimizer, of activations, of logits."""

    frozen: int
    trained: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.frozen + self.trained + self.activations + self.logits


def memory(shapes: ModelShapes, method: str, rank: int, tokens: int, *, checkpointing: bool) -> Memory:
    """Bytes on one device for a micro-batch of `tokens`, with nothing sharded.

    QLoRA holds the adapted `nn.Linear` weights in NF4 and everything else, stacked experts included, in bf16. With
    checkpointing each block keeps its input, and one block at a time its activations. Raises ValueError for an unknown
    method.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    own = 0 if method == "full" else rank
    block = _activation_bytes(shapes, own, tokens) // shapes.layers
    inputs = shapes.hidden * tokens * _HALF * shapes.layers
    activations = inputs + block if checkpointing else block * shapes.layers
    logits = shapes.vocabulary * tokens * _LOGITS
    if method == "full":
        return Memory(0, shapes.parameters * _TRAINED, activations, logits)
    packed = sum(x.weights for x in shapes.adapted if not x.parameter) if method == "qlora" else 0
    frozen = round((shapes.parameters - packed) * _HALF + packed * _NF4)
    return Memory(frozen, trainable(shapes, rank) * _TRAINED, activations, logits)


def _activation_bytes(shapes: ModelShapes, rank: int, tokens: int) -> int:
    inputs: dict[tuple[str, int], float] = {}
    outputs = 0.0
    for linear in shapes.linears:
        if linear.kind == "unembedding":
            continue
        inputs[_parent(linear), linear.K] = linear.active * linear.K
        outputs += linear.active * linear.N
        if rank and linear.adapted:
            outputs += linear.active * rank_of(linear, rank, shapes.active_experts)
    norms = 2 * shapes.layers * shapes.hidden
    return round((sum(inputs.values()) + outputs + norms) * tokens * _HALF)


def _parent(linear: Linear) -> str:
    """Layers of one module with as many in features read the same input: q, k and v, or gate and up."""
    return linear.name.rpartition(".")[0]
