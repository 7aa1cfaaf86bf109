"""Layouts of a LoRA step on many devices: memory of one, what it sends, and time. A model, not a measurement.

P devices, g in a node. W is the frozen base, split into blocks and the rest (embeddings, `root`); A the adapters, whose
gradients are fp32; T the tokens of a micro-batch.

| layout | a device holds | it sends |
| --- | --- | --- |
| DDP | W, A, the gradients of A twice (its buckets) | the gradients of A, once a step |
| DDP, QLoRA | W in NF4, else the same | the same |
| HSDP | W/g, A/g, the root and two blocks whole | as FSDP2 in a node; the gradients of A/g between nodes |
| FSDP2 | W/P, A/P, the same | W and A gathered twice, gradients of A: every micro-batch |
| ZeRO-3 | W/P, A/P, 10^9 elements whole (its default) | as FSDP2, layer by layer |
| TP | W/g but the root, A/g but what is whole | for each layer a sum of `[T, N]` or of `[T, K]`: every micro-batch |
| EP | W without g−1 of g experts, A alike, chosen rows | those to their experts and back: every micro-batch |

FSDP2, HSDP and ZeRO-3 gather while they compute, so that only what takes longer counts, the first block and, between
nodes, the last. TP's sums and EP's exchanges are waited for. Experts get as many rows each, TP divides products evenly:
both are bounds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from lorafuse.advise.capacity import rank_of, trainable
from lorafuse.advise.fit import usable_bytes
from lorafuse.advise.links import Cluster
from lorafuse.advise.memory import Memory, activation_bytes, memory
from lorafuse.advise.schedule import accumulation
from lorafuse.advise.shapes import LAST, Linear, ModelShapes
from lorafuse.advise.step_time import micro_step_seconds, update_seconds
from lorafuse.plan import DeviceSpec

__all__ = ["Layout", "fastest", "layouts"]

_HALF, _SINGLE, _TRAINED = 2, 4, 16
# gradients that DDP sums at a time (torch's default), elements that ZeRO-3 keeps whole and gathers ahead (DeepSpeed's)
_BUCKET, _LIVE, _AHEAD = 25 * 2**20, 10**9, 5 * 10**7
# rates nearer to each other are one (assumed: the step's model is within 10%, but its error is common to all layouts)
_CLOSE = 0.02
# layers whose x a column-parallel layer made: they are row parallel
_ROWS = (*LAST, "down_proj", "fc2", "w2")


@dataclass(frozen=True)
class Layout:
    """A layout with the settings that are fastest among those that fit: bytes of one device, bytes that it sends and
    seconds of one optimizer step over `batch` sequences, `accumulation` micro-batches in each of `copies` (all devices,
    or groups of them under TP). `waited` are the seconds of `seconds` in which it only communicates. `fits` is False
    where no setting does; the settings are then the smallest."""

    name: str
    micro_batch: int
    checkpointing: bool
    copies: int
    accumulation: int
    batch: int
    memory: int
    sent: int
    seconds: float
    waited: float
    fits: bool

    @property
    def rate(self) -> float:
        """Sequences a second, of all devices."""
        return self.batch / self.seconds


@dataclass(frozen=True)
class _Step:
    """One micro-batch and one update of a device under a layout."""

    memory: float
    compute: float
    # of a micro-batch, of a step: bytes sent, seconds waited
    micro: tuple[float, float]
    final: tuple[float, float]


@dataclass(frozen=True)
class _Case:
    """What all layouts are computed from: sizes in bytes, of gradients (fp32) where not said otherwise."""

    shapes: ModelShapes
    rank: int
    tokens: int
    length: int
    checkpointing: bool
    device: DeviceSpec
    cluster: Cluster

    @property
    def blocks(self) -> float:
        """The frozen weights of all blocks."""
        return _HALF * sum(x.weights for x in self.shapes.linears if x.kind not in ("unembedding", "tower"))

    @property
    def root(self) -> float:
        """The other frozen weights."""
        return _HALF * self.shapes.parameters - self.blocks

    @property
    def experts(self) -> float:
        """The frozen weights of all experts."""
        return _HALF * sum(x.weights for x in self.shapes.adapted if x.parameter)

    @property
    def gradients(self) -> float:
        """Those of all adapters."""
        return _SINGLE * trainable(self.shapes, self.rank)

    @property
    def of_experts(self) -> float:
        """Those of the experts' adapters."""
        return _SINGLE * sum(x.per_rank * self.rank_of(x) for x in self.shapes.adapted if x.parameter)

    @property
    def again(self) -> int:
        """How often forward runs."""
        return 2 if self.checkpointing else 1

    def rank_of(self, linear: Linear) -> int:
        return rank_of(linear, self.rank, self.shapes.active_experts)

    def memory(self, method: str = "lora") -> Memory:
        """That of a device that holds everything."""
        return memory(self.shapes, method, self.rank, self.tokens, checkpointing=self.checkpointing, length=self.length)

    @property
    def held(self) -> float:
        """Activations, logits and what backward needs."""
        each = self.memory()
        return each.total - each.frozen - each.trained

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Those of a micro-batch on one device, by the names of `step_time`."""
        return micro_step_seconds(
            self.shapes, self.rank, self.tokens, self.length, self.device, checkpointing=self.checkpointing
        )


def fastest(offered: Sequence[Layout]) -> Layout | None:
    """The fastest layout that fits; among those that the model cannot tell apart the first of the table, which sends
    least over the slowest links. None where nothing fits.
    """
    able = [each for each in offered if each.fits]
    best = max((each.rate for each in able), default=0.0)
    return next((each for each in able if each.rate >= (1 - _CLOSE) * best), None)


def layouts(
    shapes: ModelShapes, rank: int, length: int, micro_batch: int, batch: int, device: DeviceSpec, cluster: Cluster, *,
    sequences: int = 1, rollouts: int = 1,
) -> list[Layout]:  # fmt: skip
    """Every layout that the model and the cluster can have, in the order of the table.

    `batch` examples a step at most, a multiple of `rollouts`, of `sequences` sequences of `length` tokens each;
    `micro_batch` of them on a device at a time at most. A batch that does not fill all devices once is raised to what
    does.
    """
    # how many devices share a micro-batch
    offered: dict[str, tuple[Callable[[_Case], _Step], int]] = {"DDP": (_ddp, 1)}
    stacks = [x for x in shapes.adapted if x.parameter]
    if not stacks:
        offered["DDP, QLoRA"] = _ddp_qlora, 1
    if cluster.nodes > 1 and cluster.per_node > 1:
        offered["HSDP"] = _hsdp, 1
    offered["FSDP2"] = _fsdp2, 1
    offered["ZeRO-3"] = _zero3, 1
    if cluster.per_node > 1:
        offered["TP"] = _tp, cluster.per_node
        if stacks and not shapes.experts % cluster.per_node:
            offered["EP"] = _ep, 1
    cases = [
        (size, _Case(shapes, rank, size * sequences * length, length, saved, device, cluster))
        for size in (micro_batch >> shift for shift in range(micro_batch.bit_length()))
        for saved in (False, True)
    ]
    chosen = []
    for name, (step, together) in offered.items():
        copies = cluster.devices // together
        # settings that keep the batch
        sizes = [size for size, _ in cases if math.lcm(size * copies, rollouts) <= batch] or [1]
        settings = [
            _layout(name, step, copies, size, max(batch, math.lcm(size * copies, rollouts)), rollouts, case)
            for size, case in cases
            if size in sizes
        ]
        able = [each for each in settings if each.fits]
        chosen.append(max(able, key=lambda each: each.rate) if able else min(settings, key=lambda each: each.memory))
    return chosen


def _layout(
    name: str, step: Callable[[_Case], _Step], copies: int, size: int, batch: int, rollouts: int, case: _Case
) -> Layout:
    times = accumulation(batch, size, copies, rollouts)
    one = step(case)
    waited = times * one.micro[1] + one.final[1]
    seconds = times * one.compute + waited + update_seconds(case.shapes, "lorafuse", case.rank, case.device)
    fits = not usable_bytes(case.device) or one.memory <= usable_bytes(case.device)
    return Layout(
        name, size, case.checkpointing, copies, times, times * size * copies, round(one.memory),
        round(times * one.micro[0] + one.final[0]), seconds, waited, fits,
    )  # fmt: skip


def _added(*several: tuple[float, float]) -> tuple[float, float]:
    return sum(sent for sent, _ in several), sum(seconds for _, seconds in several)


def _ddp(case: _Case, method: str = "lora", training: str = "lorafuse") -> _Step:
    c = case.cluster
    whole = case.memory(method)
    final = c.all_reduce(case.gradients, c.per_node, c.nodes, -(-case.gradients // _BUCKET))
    # its buckets are a second copy (gradient_as_bucket_view is False unless told); one device has none
    buckets = case.gradients if c.devices > 1 else 0.0
    return _Step(whole.total + buckets, case.seconds[training], (0.0, 0.0), final)


def _ddp_qlora(case: _Case) -> _Step:
    return _ddp(case, "qlora", "QLoRA")


def _sharded(
    case: _Case, g: int, m: int, units: int, root: int, whole: float, between: tuple[float, float] = (0.0, 0.0)
) -> _Step:
    """Weights and adapters in g·m parts, gathered in so many `units` forward and again backward, the root `root` times;
    `whole` bytes are there at a time. `between` is what each micro-batch sends to other groups, block by block."""
    c, layers, n = case.cluster, case.shapes.layers, g * m
    moved = _added(
        c.all_gather(2 * (case.blocks + case.gradients) + root * case.root, g, m, 2 * units + root),
        c.all_gather(case.gradients, g, m, units),
        between,
    )
    # nothing hides the gathers of the first block, nor the sums of the last
    first = c.all_gather((case.blocks + case.gradients) / layers, g, m)[1] + between[1] / layers
    compute = case.seconds["lorafuse"]
    # adapters are as large as their gradients
    held = (_HALF * case.shapes.parameters + _TRAINED / _SINGLE * case.gradients) / n + case.held
    return _Step(held + whole, compute, (moved[0], max(moved[1] - compute, 0.0) + first), (0.0, 0.0))


def _blocks(case: _Case) -> float:
    """The root and two blocks."""
    return case.root + 2 * (case.blocks + case.gradients) / case.shapes.layers


def _fsdp2(case: _Case) -> _Step:
    return _sharded(case, case.cluster.per_node, case.cluster.nodes, case.shapes.layers, 1, _blocks(case))


def _hsdp(case: _Case) -> _Step:
    c = case.cluster
    between = c.all_reduce(case.gradients / c.per_node, 1, c.nodes, case.shapes.layers)
    return _sharded(case, c.per_node, 1, case.shapes.layers, 1, _blocks(case), between)


def _zero3(case: _Case) -> _Step:
    live = min(_HALF * case.shapes.parameters, _HALF * (_LIVE + _AHEAD))
    units = sum(x.kind not in ("unembedding", "tower") for x in case.shapes.linears)
    return _sharded(case, case.cluster.per_node, case.cluster.nodes, units, 2, live)


def _is_row(linear: Linear) -> bool:
    return linear.name.endswith(_ROWS)


def _tp(case: _Case) -> _Step:
    """Within a node; nodes are data parallel."""
    c, shapes, g = case.cluster, case.shapes, case.cluster.per_node
    moved, trained = [], 0.0
    for x in shapes.linears:
        if x.kind not in ("attention", "mlp", "experts", "other"):
            continue
        R, copies = case.rank_of(x), x.experts if x.parameter else 1
        # of a row-parallel layer y forward and db backward; of a column-parallel one dx and da backward
        sides, times = ((x.N, x.K), case.again) if _is_row(x) else ((x.K, x.N), 1)
        moved.append(c.all_reduce(_HALF * sides[0] * case.tokens * times, g, 1, times))
        moved.append(c.all_reduce(_SINGLE * copies * R * sides[0], g, 1))
        trained += copies * R * (sides[0] + sides[1] / g)
    # the residual stream, norms and the inputs of column-parallel layers are whole on every device
    whole = (_SINGLE * shapes.normed + 2 * _HALF * shapes.hidden * shapes.layers) * case.tokens
    fraction = min(whole / activation_bytes(shapes, case.rank, case.tokens), 1.0)
    logits = 3 * _SINGLE * shapes.vocabulary * case.tokens
    held = max(case.held * (fraction + (1 - fraction) / g), logits)
    frozen = case.root + case.blocks / g
    final = c.all_reduce(_SINGLE * trained, 1, c.nodes, -(-_SINGLE * trained // _BUCKET))
    return _Step(frozen + _TRAINED * trained + held, case.seconds["lorafuse"] / g, _added(*moved), final)


def _ep(case: _Case) -> _Step:
    """Experts over the devices of a node; all else as in DDP."""
    c, shapes, g = case.cluster, case.shapes, case.cluster.per_node
    frozen = _HALF * shapes.parameters - case.experts * (g - 1) / g
    gradients = case.gradients - case.of_experts
    trained = _TRAINED / _SINGLE * (gradients + case.of_experts / g)
    rows = _HALF * case.tokens * shapes.active_experts * shapes.hidden
    # there and back, forward and backward
    modules = len({x.name.rpartition(".")[0] for x in shapes.adapted if x.parameter})
    times = 2 * (case.again + 1) * modules
    # saved are rows that came, in place of x, and those that came back, for the router's gradient
    saved = (2 * rows - _HALF * case.tokens * shapes.hidden) * (1 if case.checkpointing else modules)
    final = _added(
        c.all_reduce(gradients, c.per_node, c.nodes, -(-gradients // _BUCKET)),
        c.all_reduce(case.of_experts / g, 1, c.nodes, -(-case.of_experts // g // _BUCKET)),
    )
    held = frozen + trained + case.held + saved
    return _Step(held, case.seconds["lorafuse"], c.all_to_all(rows * times, g, 1, times), final)
