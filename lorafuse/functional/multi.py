"""The public operator of a layer whose rows are of many adapters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorafuse.operands import Weight
from lorafuse.ops import multi as _multi
from lorafuse.ops.autocast import autocast_is_on
from lorafuse.ops.checks import check_scale, check_statistics, check_tensors
from lorafuse.ops.choose import requested_backend

__all__ = ["lora_linear_multi"]


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
            adapters that have rows, and gives a and b none. a and b must require gradients. None for ordinary ones,
            which are zero for an adapter without rows.
        batch_invariant: False lets backend "eager" compute the base product of all rows at once, which is up to 1.5
            (y) and 2.3 (gradient of x) times as fast where adapters have few rows (16 each of 32 adapters, 4096 x 4096,
            fp32, one thread of an EPYC with AVX2, shared, 2026-11-29), and whose bits depend on all rows. "triton" is
            as fast either way, and always invariant.
        backend: "eager", "triton" or "auto"; None takes that of `lorafuse.use_backend`.
        wide: True computes the low-rank path in fp32 over x of bf16 too, as it is over fp16 where adapters are not.

    Returns y `[…, N]` in x's dtype; gradients reach x, a and b.

    Raises ValueError or TypeError for operands that do not fit, with the rule; NotImplementedError for a weight or bias
    that requires a gradient, and for second derivatives with buffers. Other transforms of torch run plain torch.
    """
    stored = weight if isinstance(weight, Weight) else Weight(weight)
    w = stored.data
    check_tensors(
        "lora_linear_multi", x, {"offsets": offsets, "weight": w, "a": a, "b": b}, {"bias": bias, "seeds": seeds}
    )
    check_statistics("lora_linear_multi", x, stored)
    ranks, scales = tuple(ranks), tuple(map(float, scales))
    p = None if dropout_p is None or not any(dropout_p) else tuple(map(float, dropout_p))
    _check_adapters(ranks, scales, p, offsets, seeds)
    if w.requires_grad or (bias is not None and bias.requires_grad):
        raise NotImplementedError("weight or its bias requires a gradient, which is never computed: freeze it")
    if stored.is_transposed:
        raise ValueError("lora_linear_multi got a transposed weight; it reads [N, K], as nn.Linear stores it")
    autocast = autocast_is_on(x) and x.dtype is not torch.float64
    if autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        w = w.to(dtype) if stored.format == "dense" else w
    _check_shapes(x, Weight(w, False, stored.statistics, stored.format), bias, a, b, ranks)
    if grad_buffers is not None:
        for name, t, buffer in zip(("a", "b"), (a, b), grad_buffers, strict=True):
            if buffer.shape != t.shape or buffer.device != t.device or not t.requires_grad:
                raise ValueError(
                    f"grad_buffers has {list(buffer.shape)} on {buffer.device} for {name} {list(t.shape)} on "
                    f"{t.device}, requires_grad={t.requires_grad}; it must be as {name} is, which requires a gradient"
                )
    if p is not None and seeds is None:
        seeds = torch.randint(0, 2**63 - 1, (len(ranks),), dtype=torch.int64, device=x.device)
    # PEFT computes the low-rank path in the adapters' dtype; of those only fp16 is short of range
    wide |= x.dtype is torch.float16 and not autocast and (a.dtype is not x.dtype or b.dtype is not x.dtype)
    return _multi.lora_linear_multi(
        x, offsets, w, bias, a, b, None if p is None else seeds, ranks, scales, p, batch_invariant,
        requested_backend(backend), wide, stored.format, list(stored.statistics) or None, grad_buffers,
    )  # fmt: skip


def _check_adapters(
    ranks: tuple[int, ...], scales: tuple[float, ...], p: tuple[float, ...] | None, offsets: Tensor,
    seeds: Tensor | None,
) -> None:  # fmt: skip
    """Raises ValueError for adapters of different numbers, and for a rank, scale or probability that is none."""
    L = len(ranks)
    if L == 0 or len(scales) != L or (p is not None and len(p) != L):
        raise ValueError(
            f"lora_linear_multi got {L} ranks, {len(scales)} scales and {'no' if p is None else len(p)} probabilities "
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
        if R < 0:
            raise ValueError(f"adapter {g} has rank {R}; it must be at least 0")
        check_scale(f"scales[{g}]", scale)
    for g, one in enumerate(p or ()):
        if not 0.0 <= one <= 1.0:
            raise ValueError(f"dropout_p[{g}]={one} is not a probability; it must be between 0 and 1")


def _check_shapes(x: Tensor, w: Weight, bias: Tensor | None, a: Tensor, b: Tensor, ranks: tuple[int, ...]) -> None:
    """Raises ValueError or TypeError for operands that do not fit, with shapes or dtypes and the rule."""
    shapes, total = {"x": x.shape, "weight": w.stored, "a": a.shape, "b": b.shape}, sum(ranks)
    fits = x.dim() >= 1 and len(w.stored) == 2
    if fits:
        N, K = w.sizes
        fits = x.shape[-1] == K and a.shape == (total, K) and b.shape == (N, total)
        fits = fits and (bias is None or bias.shape == (N,))
    if not fits:
        shown = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(
            f"lora_linear_multi got {shown}, bias {None if bias is None else list(bias.shape)} and ranks that sum to "
            f"{total}; the rule is x [..., K], weight [N, K], a [ΣR, K], b [N, ΣR], bias [N]"
        )
    if not (a.is_floating_point() and b.is_floating_point()):
        raise TypeError(f"lora_linear_multi got a {a.dtype} and b {b.dtype}; adapters must be floating")
    dtypes = {t.dtype for t in (x, w.data if w.format == "dense" else x, bias) if t is not None}
    if len(dtypes) > 1 or not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}, weight {w.data.dtype}: they and the bias must have one floating dtype")
