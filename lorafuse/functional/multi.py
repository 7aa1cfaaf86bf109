"""The public operators of dense layers whose rows are of many adapters."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafuse.operands import Weight
from lorafuse.ops import multi as _multi
from lorafuse.ops.autocast import autocast_is_on
from lorafuse.ops.checks import check_gate, check_scale, check_statistics, check_tensors
from lorafuse.ops.choose import requested_backend
from lorafuse.ops.multi_layers import MultiSettings
from lorafuse.ops.transforms import is_transformed

__all__ = [
    "MultiProjection",
    "Prepared",
    "linears",
    "lora_gated_mlp_multi",
    "lora_linear_multi",
    "lora_linears_multi",
    "prepared",
    "weight_of",
]


class MultiProjection(NamedTuple):
    """One frozen linear layer of a group, with the factors of L adapters; see `lora_linear_multi` for each.

    Of a stack of experts (`lora_experts_multi`) weight is `[E, N, K]`, bias `[E, N]`, a `[E, ΣR, K]`, b `[E, N, ΣR]`.

    Attributes:
        weight: `[N, K]`, frozen, of x's dtype, or a quantized `Weight` of `lorafuse.formats.adopt`.
        a, b: `[ΣR, K]` and `[N, ΣR]`; both None for a layer that no adapter adapts.
        ranks, scales: of each adapter; a rank of 0 does not adapt this layer.
        bias: `[N]`, frozen, or None.
        dropout_p, seeds: of each adapter's mask in this layer.
        grad_buffers: where the gradients of a and b are added, for all adapted layers of a group or for none.
    """

    weight: Tensor | Weight
    a: Tensor | None = None
    b: Tensor | None = None
    ranks: Sequence[int] = ()
    scales: Sequence[float] = ()
    bias: Tensor | None = None
    dropout_p: Sequence[float] | None = None
    seeds: Tensor | None = None
    grad_buffers: tuple[Tensor, Tensor] | None = None


class Prepared(NamedTuple):
    """Checked operands of an operator, as `lorafuse.ops.multi.apply` takes them."""

    x: Tensor
    settings: MultiSettings
    tensors: list[Tensor | None]
    buffers: list[tuple[Tensor, Tensor]] | None


def lora_linear_multi(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor | Weight,
    a: Tensor,
    b: Tensor,
    *,
    ranks: Sequence[int],
    scales: Sequence[float],
    bias: Tensor | None = None,
    dropout_p: Sequence[float] | None = None,
    seeds: Tensor | None = None,
    grad_buffers: tuple[Tensor, Tensor] | None = None,
    batch_invariant: bool = True,
    backend: str | None = None,
    wide: bool = False,
) -> Tensor:
    """One frozen linear layer over rows of L adapters: `y = x·weightᵀ + bias + scale[g] · (drop(x)·a[g]ᵀ)·b[g]ᵀ`.

    The base product is one over all rows; ranks may differ and are not padded. An adapter's rows of y and of the
    gradient of x, its da and its db are bit for bit those of a call with this adapter alone, on the same backend and
    device (and number of threads, on a CPU), whatever the others are, how many, and where it stands among them.

    Args:
        x: `[…, K]`, its rows those of adapter 0, then those of adapter 1, …
        offsets: int32 `[L]` on x's device: where the rows of each adapter end, ascending; an adapter may have none.
            Rows after the last end have no adapter. Their values are not waited for, but for backend "eager".
        weight: `[N, K]`, frozen, of x's dtype. Or a quantized one, as `lorafuse.formats.adopt` gives it.
        a: `[ΣR, K]`, the `lora_A.weight` of the adapters below each other.
        b: `[N, ΣR]`, their `lora_B.weight` next to each other.
        ranks: of each adapter, at least 0.
        scales: alpha / R of each adapter.
        bias: `[N]`, frozen, or None.
        dropout_p: probability of each adapter with which elements of x are dropped in its low-rank path; None for no
            dropout.
        seeds: of the masks, int64 `[L]` on x's device; an element's fate depends on its adapter's seed, its row among
            that adapter's and its column. None draws them from torch's default generator.
        grad_buffers: of a's and b's sizes and strides any; backward adds the gradients of a and b there, for the
            adapters that have rows, and gives a and b none; one that was asked for other gradients alone
            (`torch.autograd.grad` of x) adds nothing. a and b must require gradients. None for ordinary ones, which are
            zero for an adapter without rows.
        batch_invariant: False lets backend "eager" compute the base product of all rows at once, which is up to 1.5
            (y) and 2.3 (gradient of x) times as fast where adapters have few rows (16 each of 32 adapters, 4096 x 4096,
            fp32, one thread of an EPYC with AVX2, shared, 2026-11-29), and whose bits depend on all rows. "triton" is
            as fast either way, and always invariant.
        backend: "eager", "triton" or "auto"; None takes that of `lorafuse.use_backend`.
        wide: True computes the low-rank path in fp32 over x of bf16 too, as it is over fp16 where adapters are not.

    Returns y `[…, N]` in x's dtype; gradients reach x, a and b.

    Raises ValueError or TypeError for operands that do not fit, with the rule; NotImplementedError for a weight or bias
    that requires a gradient, and with buffers for second derivatives and under transforms of torch. Without buffers
    these run plain torch.
    """
    one = MultiProjection(weight, a, b, ranks, scales, bias, dropout_p, seeds, grad_buffers)
    return linears("lora_linear_multi", x, offsets, {"weight": one}, batch_invariant, backend, wide)[0]


def lora_linears_multi(
    x: Tensor,
    offsets: Tensor,
    projections: Sequence[MultiProjection],
    *,
    batch_invariant: bool = True,
    backend: str | None = None,
    wide: bool = False,
) -> tuple[Tensor, ...]:
    """Layers that read one x, such as q, k and v, over rows of L adapters, as one operator: `y_i = projections[i](x)`.

    Each is as `lora_linear_multi` computes it, bit for bit; dx is one sum, in which each layer's product is added to
    that of the layer before, and x is kept once.

    Args:
        x, offsets, batch_invariant, backend, wide: those of `lora_linear_multi`.
        projections: at least one, all with K in features and factors of the same L adapters.

    Returns one y `[…, N_i]` for each layer. Raises as `lora_linear_multi` does.
    """
    if not len(projections):
        raise ValueError("lora_linears_multi got no projection; it runs one or more layers of one x")
    named = {f"projection {i}": one for i, one in enumerate(projections)}
    return linears("lora_linears_multi", x, offsets, named, batch_invariant, backend, wide)


def lora_gated_mlp_multi(
    x: Tensor,
    offsets: Tensor,
    gate: MultiProjection,
    up: MultiProjection,
    down: MultiProjection,
    *,
    activation: str = "silu",
    batch_invariant: bool = True,
    backend: str | None = None,
    wide: bool = False,
) -> Tensor:
    """A gated MLP over rows of L adapters as one operator: `y = down(act(gate(x)) · up(x))`.

    Saved for backward are x, gate, up `[rows, I]` and each layer's xa; h is computed again.

    Args:
        x, offsets, batch_invariant, backend, wide: those of `lora_linear_multi`.
        gate, up, down: layers with factors of the same L adapters; I out features of gate and up, and in features of
            down.
        activation: of the gate, a name of `lorafuse.activation.ACTIVATIONS` or of `GATES`.

    Returns y `[…, N]`. Raises as `lora_linear_multi` does, and ValueError for an unknown activation.
    """
    check_gate("lora_gated_mlp_multi", activation)
    named = {"gate": gate, "up": up, "down": down}
    sizes = [weight_of(one).stored for one in named.values()]
    if any(len(size) != 2 for size in sizes) or sizes[0] != sizes[1] or sizes[2][1] != sizes[0][0]:
        shown = ", ".join(f"{name} {list(size)}" for name, size in zip(named, sizes, strict=True))
        raise ValueError(f"lora_gated_mlp_multi got {shown}; the rule is gate and up [I, H], down [N, I]")
    given = prepared("lora_gated_mlp_multi", x, offsets, named, batch_invariant, backend, wide)
    return _run("gated_mlp", (activation,), offsets, given)[0]


def linears(
    operator: str, x: Tensor, offsets: Tensor, named: Mapping[str, MultiProjection], batch_invariant: bool,
    backend: str | None, wide: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Layers of one x, by their names in messages."""
    return _run("linears", (), offsets, prepared(operator, x, offsets, named, batch_invariant, backend, wide))


def _run(form: str, options: tuple[Any, ...], offsets: Tensor, given: Prepared) -> tuple[Tensor, ...]:
    x, settings, tensors, buffers = given
    return _multi.apply(form, options, x, offsets, settings, tensors, buffers)


def weight_of(one: MultiProjection, is_transposed: bool = False) -> Weight:
    """The weight of a layer; `is_transposed` says it of a tensor."""
    return one.weight if isinstance(one.weight, Weight) else Weight(one.weight, is_transposed)


def prepared(
    operator: str, x: Tensor, offsets: Tensor, named: Mapping[str, MultiProjection], batch_invariant: bool,
    backend: str | None, wide: bool, is_stack: bool = False, is_transposed: bool = False,
) -> Prepared:  # fmt: skip
    """Checks the operands, and casts them as autocast does.

    Of stacks of experts autocast and the factors' shapes are the caller's. Raises as `lora_linear_multi` does.
    """
    L = offsets.shape[0] if isinstance(offsets, Tensor) and offsets.dim() == 1 else 0
    check_tensors(operator, x, {"offsets": offsets}, {})
    weights = {name: weight_of(one, is_transposed) for name, one in named.items()}
    autocast = not is_stack and autocast_is_on(x) and x.dtype is not torch.float64
    if autocast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    lists: tuple[list[Any], ...] = ([], [], [], [], [])
    statistics: list[Tensor] = []
    ranks: list[int] = []
    scales: list[float] = []
    dropout_ps: list[float] = []
    buffers: list[tuple[Tensor, Tensor]] = []
    with_buffers = {one.grad_buffers is not None for one in named.values() if one.a is not None}
    if len(with_buffers) > 1:
        raise ValueError(f"{operator} got grad_buffers for some layers; all layers with adapters have them, or none")
    for name, one in named.items():
        w = weights[name]
        if len(w.stored) != 2 + is_stack:
            rule = "[E, N, K]" if is_stack else "[N, K]"
            raise ValueError(f"{operator} got {name} {list(w.stored)}; the rule is {rule}")
        a, b = _factors(operator, name, one, w, x)
        check_tensors(operator, x, {name: w.data, f"{name}'s a": a, f"{name}'s b": b},
                      {f"{name}'s bias": one.bias, f"{name}'s seeds": one.seeds})  # fmt: skip
        check_statistics(operator, x, w)
        if w.data.requires_grad or (one.bias is not None and one.bias.requires_grad):
            raise NotImplementedError(f"{name} or its bias requires a gradient, which is never computed: freeze it")
        bias, data = one.bias, w.data
        if autocast:
            bias = None if bias is None else bias.to(x.dtype)
            data = data.to(x.dtype) if w.format == "dense" else data
        of_ranks = (0,) * L if one.a is None else tuple(one.ranks)
        of_scales = (1.0,) * L if one.a is None else tuple(map(float, one.scales))
        if isinstance(one.dropout_p, int | float):
            raise TypeError(f"{name} got dropout_p={one.dropout_p}; it is a sequence, one probability for each adapter")
        p = tuple(map(float, one.dropout_p)) if one.dropout_p is not None and any(one.dropout_p) else None
        _check_adapters(operator, of_ranks, of_scales, p, offsets, one.seeds)
        if not is_stack:
            stored = Weight(data, w.is_transposed, w.statistics, w.format)
            # down reads h, whose features are gate's
            features = w.sizes[1] if name == "down" else x.shape[-1] if x.dim() else 0
            _check_shapes(operator, name, x, features, stored, bias, a, b, of_ranks)
        if one.grad_buffers is not None:
            _check_buffers(operator, x, a, b, one.grad_buffers)
        seeds = one.seeds
        if p is not None and seeds is None:
            seeds = torch.randint(0, 2**63 - 1, (L,), dtype=torch.int64, device=x.device)
        for some, t in zip(lists, (data, bias, a, b, None if p is None else seeds), strict=True):
            some.append(t)
        statistics += w.statistics
        ranks += of_ranks
        scales += of_scales
        dropout_ps += p or (0.0,) * L
        # without an adapter nothing is written there
        buffers.append(one.grad_buffers or (a, b))
        # PEFT computes the low-rank path in the adapters' dtype; of those only fp16 is short of range
        wide |= x.dtype is torch.float16 and not autocast and (a.dtype is not x.dtype or b.dtype is not x.dtype)
    formats, counts = [w.format for w in weights.values()], [len(w.statistics) for w in weights.values()]
    backend = requested_backend(backend)
    settings = MultiSettings(
        ranks, scales, dropout_ps, formats, counts, is_transposed, batch_invariant, backend, wide
    )  # fmt: skip
    tensors = [*(t for some in lists for t in some), *statistics]
    return Prepared(x, settings, tensors, buffers if True in with_buffers else None)


def _factors(operator: str, name: str, one: MultiProjection, w: Weight, x: Tensor) -> tuple[Tensor, Tensor]:
    """a and b; without adapters, those of no ranks."""
    if (one.a is None) is not (one.b is None):
        raise ValueError(f"{operator} got only one of a and b for {name}; a layer has both, or neither")
    if one.a is not None and one.b is not None:
        return one.a, one.b
    *groups, _, _ = w.stored
    N, K = w.sizes
    return x.new_empty((*groups, 0, K)), x.new_empty((*groups, N, 0))


def _check_adapters(
    operator: str, ranks: tuple[int, ...], scales: tuple[float, ...], p: tuple[float, ...] | None, offsets: Tensor,
    seeds: Tensor | None,
) -> None:  # fmt: skip
    """Raises ValueError for adapters of different numbers, and for a rank, scale or probability that is none."""
    L = len(ranks)
    if L == 0 or len(scales) != L or (p is not None and len(p) != L):
        raise ValueError(
            f"{operator} got {L} ranks, {len(scales)} scales and {'no' if p is None else len(p)} probabilities "
            "of dropout; there must be at least one adapter, and one of each for every adapter"
        )
    if offsets.shape != (L,) or offsets.dtype is not torch.int32:
        raise ValueError(
            f"offsets is {offsets.dtype} {list(offsets.shape)}; it must hold the end of each of {L} adapters' rows, as "
            "int32"
        )
    if seeds is not None and (seeds.dtype is not torch.int64 or seeds.shape != (L,)):
        raise ValueError(f"seeds is {seeds.dtype} {list(seeds.shape)}; it must be int64, one of each of {L} adapters")
    for g, (R, scale) in enumerate(zip(ranks, scales, strict=True)):
        if not isinstance(R, int):
            raise TypeError(f"adapter {g} has rank {R!r}; it must be an int, at least 0")
        if R < 0:
            raise ValueError(f"adapter {g} has rank {R}; it must be at least 0")
        check_scale(f"scales[{g}]", scale)
    for g, one in enumerate(p or ()):
        if not 0.0 <= one <= 1.0:
            raise ValueError(f"dropout_p[{g}]={one} is not a probability; it must be between 0 and 1")


def _check_buffers(operator: str, x: Tensor, a: Tensor, b: Tensor, buffers: tuple[Tensor, Tensor]) -> None:
    """Raises ValueError for buffers that do not fit a and b, NotImplementedError under transforms."""
    if is_transformed(x) and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{operator} under a transform of torch (torch.func, vmap, forward-mode AD, jit.trace) runs plain torch, "
            "whose gradients would not reach the buffers; pass grad_buffers=None, or call it under torch.no_grad()"
        )
    if len(buffers) != 2:
        raise ValueError(f"{operator} got {len(buffers)} tensors as grad_buffers; they are two, for a and for b")
    for name, t, buffer in zip(("a", "b"), (a, b), buffers, strict=True):
        is_alike = buffer.shape == t.shape and buffer.device == t.device and buffer.is_floating_point()
        if not is_alike or not t.requires_grad:
            raise ValueError(
                f"grad_buffers has {buffer.dtype} {list(buffer.shape)} on {buffer.device} for {name} {list(t.shape)} "
                f"on {t.device}, requires_grad={t.requires_grad}; it must be as {name} is, which requires a gradient"
            )


def _check_shapes(
    operator: str, layer: str, x: Tensor, features: int, w: Weight, bias: Tensor | None, a: Tensor, b: Tensor,
    ranks: tuple[int, ...],
) -> None:  # fmt: skip
    """Raises ValueError or TypeError for operands that do not fit, with shapes or dtypes and the rule."""
    if w.is_transposed:
        raise ValueError(f"{operator} got a transposed {layer}; it reads [N, K], as nn.Linear stores it")
    shapes, total, (N, K) = {"x": x.shape, layer: w.stored, "a": a.shape, "b": b.shape}, sum(ranks), w.sizes
    fits = x.dim() >= 1 and features == K and a.shape == (total, K) and b.shape == (N, total)
    if not fits or not (bias is None or bias.shape == (N,)):
        shown = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(
            f"{operator} got {shown}, bias {None if bias is None else list(bias.shape)} and ranks that sum to "
            f"{total}; the rule is x [..., K], weight [N, K], a [ΣR, K], b [N, ΣR], bias [N]"
        )
    if not (a.is_floating_point() and b.is_floating_point()):
        raise TypeError(f"{operator} got a {a.dtype} and b {b.dtype}; adapters must be floating")
    dtypes = {t.dtype for t in (x, w.data if w.format == "dense" else x, bias) if t is not None}
    if len(dtypes) > 1 or not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}, {layer} {w.data.dtype}: they and the bias must have one floating dtype")
