"""How much an adapter can hold, how much the data holds, and the rank that follows. Counts are exact."""

import math
from dataclasses import dataclass

from lorafuse.advise.shapes import KINDS, Linear, ModelShapes

__all__ = [
    "BITS_PER_EPISODE",
    "BITS_PER_PARAMETER",
    "BITS_PER_TOKEN",
    "COMFORT",
    "HIGHEST_RANK",
    "LEAST_RANK",
    "Rank",
    "capacity_bits",
    "check_rank",
    "data_bits",
    "expert_rank",
    "flops_ratio",
    "highest_rank",
    "per_rank",
    "rank_for",
    "rank_of",
    "smallest_rank",
    "square_flops_ratio",
    "trainable",
]

# finding F2, about what a token or an episode teaches; a measured loss says it of tokens
BITS_PER_PARAMETER, BITS_PER_TOKEN, BITS_PER_EPISODE = 2.0, 1.0, 1.0
# capacity over data where training is comfortable: as many parameters as supervised tokens (finding F2b), 2 bits to 1
COMFORT = 2.0
# the highest rank for which the findings hold learning curves, and the lowest to advise: of a digest for sft (NOTE), of
# the finding for rl (F5)
HIGHEST_RANK = 512
LEAST_RANK = {"sft": 8, "rl": 1}


def expert_rank(rank: int, active_experts: int) -> int:
    """Rank of each expert's adapter: the total rank over the active experts, rounded up (finding MOE). At least 1."""
    return max(1, math.ceil(rank / active_experts))


def rank_of(linear: Linear, rank: int, active_experts: int) -> int:
    """The rank that a layer gets where `rank` is that of dense layers."""
    return expert_rank(rank, active_experts) if linear.kind == "experts" else rank


def per_rank(shapes: ModelShapes) -> dict[str, int]:
    """Adapter parameters per unit of rank for each kind of module: the sum of N + K, of every expert.

    Experts are counted at rank 1 of each. Llama-3.1-8B: mlp 1,769,472, attention 851,968, unembedding 132,352.
    """
    counts = {kind: sum(linear.per_rank for linear in shapes.linears if linear.kind == kind) for kind in KINDS}
    return {kind: count for kind, count in counts.items() if count}


def trainable(shapes: ModelShapes, rank: int, *, unembedding: bool = False) -> int:
    """Parameters that the advised adapter trains at a rank; the unembedding's, which PEFT's "all-linear" leaves out, on
    request (the published counts hold it). A matrix each of `[R, K]` and `[N, R]`."""
    linears = [x for x in shapes.linears if x.adapted or (unembedding and x.kind == "unembedding")]
    return sum(rank_of(linear, rank, shapes.active_experts) * linear.per_rank for linear in linears)


def capacity_bits(parameters: int) -> float:
    """Bits that so many adapter parameters can hold: about 2 each (finding F2)."""
    return BITS_PER_PARAMETER * parameters


def data_bits(*, tokens: int | None = None, episodes: int | None = None, loss: float | None = None) -> float:
    """Bits that data teaches: about 1 for each supervised token or policy-gradient episode (finding F2), or for each
    token what its measured mean `loss` in nats says.

    Raises ValueError unless exactly one of the two is given, for a number below 1 and a loss of 0 or less.
    """
    if (tokens is None) == (episodes is None):
        raise ValueError("give the data as tokens or as episodes, one of the two")
    if loss is not None and not 0 < loss < math.inf:
        raise ValueError(f"--loss {loss}: it must be above 0, the mean loss in nats of a first epoch")
    per_token = BITS_PER_TOKEN if loss is None else loss / math.log(2)
    number, bits, name = (tokens, per_token, "tokens") if episodes is None else (episodes, BITS_PER_EPISODE, "episodes")
    assert number is not None
    if number < 1:
        raise ValueError(f"--{name} {number}: it must be at least 1")
    return bits * number


def smallest_rank(shapes: ModelShapes, bits: float, margin: float = 1.0) -> int | None:
    """The least rank whose capacity is `margin` times the bits; None above `highest_rank`."""
    return next(
        (r for r in range(1, highest_rank(shapes) + 1) if capacity_bits(trainable(shapes, r)) >= margin * bits), None
    )


def check_rank(shapes: ModelShapes, rank: int) -> None:
    """Raises ValueError for a rank below 1, or above min(N, K) of a layer that it would go to."""
    if rank < 1:
        raise ValueError(f"--rank {rank}: it must be at least 1")
    for linear in shapes.adapted:
        least, own = min(linear.N, linear.K), rank_of(linear, rank, shapes.active_experts)
        if own > least:
            given = f"--rank {rank}" + (f", {own} for each expert" if own != rank else "")
            raise ValueError(
                f"{given}: {linear.name} is {linear.N} x {linear.K}; a rank above min(N, K) = {least} adds parameters "
                f"but no matrix that a lower one cannot make. Use at most {_rank_within(shapes)}"
            )


def _rank_within(shapes: ModelShapes) -> int:
    """The highest rank that is within min(N, K) of every adapted layer."""
    each = [min(x.N, x.K) * (shapes.active_experts if x.kind == "experts" else 1) for x in shapes.adapted]
    return min(each)


def square_flops_ratio(N: int, rank: int) -> float:
    """Multiply-adds of a LoRA step over those of full fine-tuning, of an `[N, N]` layer: 2/3 + 2R/N (FLOPS)."""
    return 2 / 3 + 2 * rank / N


def flops_ratio(shapes: ModelShapes, rank: int) -> float:
    """The same of a model's linear layers: (2 sum NK + 3 sum R(N + K)) / (3 sum NK), over what a token passes through.

    Layers without an adapter, the unembedding, have no gradient of their weight either. Attention itself, which both
    need, is left out, as in the source.
    """
    base = sum(linear.active * linear.N * linear.K for linear in shapes.linears)
    low = sum(
        linear.active * rank_of(linear, rank, shapes.active_experts) * (linear.N + linear.K)
        for linear in shapes.adapted
    )
    return (2 * base + 3 * low) / (3 * base)


def highest_rank(shapes: ModelShapes) -> int:
    """The highest rank worth advising: within min(N, K) of every layer, within 512, the highest rank that the findings
    cover, and with no more FLOPs than full fine-tuning."""
    rank = min(HIGHEST_RANK, _rank_within(shapes))
    while rank > 1 and flops_ratio(shapes, rank) > 1:
        rank -= 1
    return rank


@dataclass(frozen=True)
class Rank:
    """The rank advised. `verdict`: "lora" (comfortable), "tight" (the data fits, without room) or "full" (it does not).

    `fits` and `comfortable` are the least ranks that hold the data once and twice, None above `highest`. `advised` is
    the rank to train with, under "full" the highest.
    """

    verdict: str
    fits: int | None
    comfortable: int | None
    highest: int
    advised: int


def rank_for(shapes: ModelShapes, bits: float, goal: str) -> Rank:
    """The rank for so many bits: the smallest comfortable one, up to the next power of two, not below 8 for sft (NOTE)
    and 1 for rl (F5); above the highest, full fine-tuning.
    """
    highest = highest_rank(shapes)
    fits, comfortable = smallest_rank(shapes, bits), smallest_rank(shapes, bits, COMFORT)
    if comfortable is None:
        return Rank("full" if fits is None else "tight", fits, None, highest, highest)
    least = max(comfortable, LEAST_RANK[goal])
    return Rank("lora", fits, comfortable, highest, min(highest, 1 << (least - 1).bit_length()))
