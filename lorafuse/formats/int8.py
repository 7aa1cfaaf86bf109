"""int8 weights with one scale per output row: torchao's weight-only tensors and bitsandbytes' `Linear8bitLt`.

data is int8 `[N, K]` or `[G, N, K]`. The scale is fp32, as its library holds it, and is applied in that library's order
of rounding (torchao 0.18, bitsandbytes 0.50, bit for bit):

    torchao        scale `[…, N, 1]`, what one step is worth      `(data · scale)` in fp32, then rounded
    bitsandbytes   absmax `[…, N]`, what 127 is worth             `((data · absmax) · fp32(1 / 127))`, then rounded
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lorafuse.formats import cpu
from lorafuse.formats.codec import held, is_of, row_chunks, target
from lorafuse.formats.weight import Weight

__all__ = ["adopt", "codes", "decode", "kernel", "select", "shape"]

# of 1 / 127 in fp32, as bitsandbytes writes it
_STEP = 7.874015718698502e-3


def shape(data: Tensor, statistics: tuple[Tensor, ...], parameters: str) -> tuple[int, ...]:
    """`(N, K)` or `(G, N, K)`."""
    return tuple(data.shape)


def decode(
    data: Tensor, statistics: tuple[Tensor, ...], parameters: str, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The dense weight in `dtype`, in chunks of rows. Raises ValueError for a scale that is not one per output row."""
    per_row, step = _scale(data, statistics)
    out = target(out, tuple(data.shape), dtype, data.device)
    if cpu.reads(data) and cpu.decode(codes(data, statistics, parameters), out):
        return out
    rows, to = data.flatten(0, -2), out.flatten(0, -2)
    for start, stop in row_chunks(out):
        wide = rows[start:stop].float().mul_(per_row[start:stop])
        to[start:stop] = wide if step is None else wide.mul_(step)
    return out


def codes(data: Tensor, statistics: tuple[Tensor, ...], parameters: str) -> cpu.Codes | None:
    """What a CPU decodes; None for other integers, and for scales in fp64."""
    per_row, step = _scale(data, statistics)
    # numbers of 16 bits enter a product in fp32
    if data.dtype is not torch.int8 or per_row.element_size() > 4:
        return None
    return cpu.Codes("integers", data, max(1, data.shape[-1]), per_row.float(), step=1.0 if step is None else step)


def _scale(data: Tensor, statistics: tuple[Tensor, ...]) -> tuple[Tensor, float | None]:
    """`([rows, 1], what follows it)`: the factor of each row, and the one of all."""
    (scale,) = statistics
    is_absmax = scale.dim() < data.dim()
    per_row = scale.unsqueeze(-1) if is_absmax else scale
    if per_row.shape != (*data.shape[:-1], 1):
        raise ValueError(
            f"the scale of an int8 weight {list(data.shape)} is {list(scale.shape)}; it must be "
            f"{[*data.shape[:-1], 1]} (torchao) or {list(data.shape[:-1])} (bitsandbytes)"
        )
    return per_row.reshape(-1, 1), _STEP if is_absmax else None


def kernel(data: Tensor, statistics: tuple[Tensor, ...], parameters: str) -> tuple[str, dict[str, Any]] | None:
    """The decode kernel, and what it reads; None for strided tensors."""
    scale, step = _scale(data, statistics)
    fits = data.is_contiguous() and scale.is_contiguous()
    return ("grid", {"code": data, "scale": scale, "step": step}) if fits else None


def select(
    data: Tensor, statistics: tuple[Tensor, ...], parameters: str, start: int, stop: int
) -> tuple[Tensor, tuple[Tensor, ...], str]:
    """The matrices start … stop - 1 of a stack: views."""
    return data[start:stop], tuple(t[start:stop] for t in statistics), parameters


def adopt(storage: object, name: str = "weight") -> Weight | None:
    """The weight of a torchao int8 tensor with one scale a row and no zero points, of bitsandbytes' `Int8Params`, or of
    a layer that holds one as parameter `name`, by reference; None for anything else. Raises ValueError for an
    `Int8Params` that is not quantized yet, or has other sizes or dtypes.
    """
    weight: Any = held(storage, name)
    if is_of(weight, "torchao", "Int8Tensor"):
        data, scale, zero = weight.qdata, weight.scale, weight.zero_point
        plain = all(getattr(weight, key) is None for key in ("act_quant_kwargs", "act_pre_scale"))
        fits = data.dtype is torch.int8 and data.shape == weight.shape and scale.is_floating_point()
        if not (plain and fits) or scale.shape != (*data.shape[:-1], 1) or not _is_zero(zero):
            return None
        return Weight(data, statistics=(scale,), format="int8")
    # torch.save and FSDP make a plain parameter of an `Int8Params`
    if not (is_of(weight, "bitsandbytes", "Int8Params") or is_of(storage, "bitsandbytes", "Linear8bitLt")):
        return None
    # the first forward moves both from the parameter to the layer's state
    state = getattr(storage, "state", None)
    data, absmax = (
        next((t for t in (getattr(weight, key, None), getattr(state, key, None)) if t is not None), None)
        for key in ("CB", "SCB")
    )
    # a forward with has_fp16_weights=True leaves the int8 numbers of its call in the state
    is_trained = getattr(state, "has_fp16_weights", False)
    if is_trained or data is None or absmax is None:
        why = "has_fp16_weights=True" if is_trained else f"no {'CB' if data is None else 'SCB'}"
        raise ValueError(
            f"Int8Params {weight.dtype} {list(weight.shape)} on {weight.device} is not quantized yet: build its layer "
            "with has_fp16_weights=False and move it to its device, with .to(), which quantizes it, or load its "
            f"quantized checkpoint, SCB included, after that; it has {why}"
        )
    layer: Any = storage
    sizes = (layer.out_features, layer.in_features) if isinstance(layer, torch.nn.Linear) else data.shape
    is_int8 = data.dtype is torch.int8 and absmax.dtype is torch.float32
    if not is_int8 or data.shape != sizes or absmax.shape != sizes[:1]:
        raise ValueError(
            f"Int8Params has CB {data.dtype} {list(data.shape)} and SCB {absmax.dtype} {list(absmax.shape)}; they are "
            f"int8 {list(sizes)} and fp32 {list(sizes[:1])}: quantize the weight anew, or load its checkpoint again"
        )
    return Weight(data, statistics=(absmax,), format="int8")


# of the zero points of tensors that were adopted: a look at the values waits for a GPU
_zeros = WeakIdKeyDictionary()
# whether any were not zero
any_shifted = False


def _is_zero(zero: Tensor | None) -> bool:
    """Whether there are no zero points but 0. Looked at once.

    A compiler cannot look: there all count as zeros only as long as none that was adopted before had others; then all
    tensors are left to `intx`, which is right for both.
    """
    global any_shifted
    if zero is None or torch.compiler.is_compiling():
        return zero is None or not any_shifted
    if zero not in _zeros:
        _zeros[zero] = not bool(zero.any())
        any_shifted |= not _zeros[zero]
    return _zeros[zero]
