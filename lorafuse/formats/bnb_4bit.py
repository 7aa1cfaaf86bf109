"""bitsandbytes' NF4 and FP4: 4 bits an element and one scale a block of consecutive elements.

data is uint8 `[⌈N·K / 2⌉]` of the matrix or stack in row-major order, the even element in the high nibble; a
`quant_storage` of another dtype is viewed as bytes. Blocks run over that order, so they cross rows (and matrices) whose
sizes are no multiple of the block; the last one may be short. Statistics are

    absmax   fp32 `[blocks]`, or uint8 when it is quantized itself (nested, "double quantization")
    code     fp32 `[16]`
    and of a nested absmax: absmax₂ fp32 `[⌈blocks / 256⌉]`, code₂ fp32 `[256]`, offset fp32 `[]`

and a weight is `code[nibble] · absmax`, a nested absmax `code₂[byte] · absmax₂ + offset`, both in fp32 and in this
order; the product is rounded to `dtype`, the one the weight had (bitsandbytes 0.50, bit for bit; its AVX512 kernel is
left out where K is no multiple of the block, since it reads other blocks' scales there, unlike all its others).

Parameters: sizes; `block`; `dtype`; `first`, the flat index of the first element where that is not 0 (`select` moves
it, so that any matrices of a stack are read where they lie).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from ctypes import c_longlong, c_void_p
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList

from lorafuse.formats import cpu
from lorafuse.formats.codec import decode_flat, decode_in_rows, held, is_of, parse, remembered, spell, target
from lorafuse.formats.sizes import NESTED_BLOCK
from lorafuse.formats.weight import Weight

__all__ = ["adopt", "codes", "decode", "kernel", "parameters_of", "select", "shape"]

_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# products with the smallest value of a code, 0.0052, are normal fp32 and bf16 from here on
_SMALLEST = 1e-30
_TYPES = ("nf4", "fp4")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# of the statistics in quant_state
_NAMES = "absmax", "code", "state2.absmax", "state2.code", "offset"


class _Parameters(NamedTuple):
    sizes: tuple[int, ...]
    block: int
    dtype: torch.dtype
    first: int


@remembered
def parameters_of(parameters: str) -> _Parameters:
    """`(sizes, block, dtype, first)` of a weight's parameters."""
    sizes, fields = parse(parameters)
    return _Parameters(sizes, int(fields["block"]), getattr(torch, fields["dtype"]), int(fields.get("first", 0)))


def shape(data: Tensor, statistics: tuple[Tensor, ...], parameters: str) -> tuple[int, ...]:
    """`(N, K)` or `(G, N, K)`."""
    return parameters_of(parameters).sizes


def decode(
    data: Tensor, statistics: tuple[Tensor, ...], parameters: str, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The dense weight in `dtype`, in chunks: temporaries are those of one chunk."""
    sizes, block, rounded, first = parameters_of(parameters)
    out = target(out, sizes, dtype, data.device)
    if cpu.reads(data) and cpu.decode(codes(data, statistics, parameters), out):
        return out
    run = _library_kernel(data, statistics[1], block, first, out)
    scales = None if run is None else _scales_for_library(statistics, first + out.numel(), block)
    if run is not None and scales is not None:
        return _decode_by_library(run, data, scales, block, rounded, first, out)
    return decode_flat(data, statistics[1], lambda *blocks: _absmax(statistics, *blocks), block, rounded, first, out)


def codes(data: Tensor, statistics: tuple[Tensor, ...], parameters: str) -> cpu.Codes:
    """What a CPU decodes."""
    _, block, rounded, first = parameters_of(parameters)
    absmax, code, outer, scale_table, offset = (*statistics, None, None, None)[:5]
    return cpu.Codes("nibbles", data, block, absmax, code, scale_table, outer, offset, rounded=rounded, first=first)


def _library_kernel(data: Tensor, code: Tensor, block: int, first: int, out: Tensor) -> Callable[..., object] | None:
    """bitsandbytes' own CPU kernel, `(bytes, scales, out, block, rows, columns)` by address; None where other bits may
    come of it, or none is loaded.

    With AVX512 it takes wrong scales for blocks across rows and has "accuracy issues" from blocks of 2048 on
    (bitsandbytes 0.50.2). It writes into `out` without its operator, which allocates what it returns.
    """
    if data.device.type != "cpu" or not out.numel() or out.shape[-1] % block or block > 1024:
        return None
    # whoever quantized the weight has brought its library; a subclass of tensors, or what Dynamo traces, has no address
    library = sys.modules.get("bitsandbytes.backends.cpu.ops")
    if library is None or not type(data) is type(out) is Tensor or not cpu.has_addresses():
        return None
    # its reads are not checked
    if not data.is_contiguous() or data.numel() * 2 < first + out.numel():
        return None
    # its tables are its own
    kind = next((kind for kind in _TYPES if torch.equal(code, _library_table(kind))), None)
    # a library that did not load has no symbols
    return getattr(getattr(library.lib, "_lib", None), f"cdequantize_blockwise_cpu_{kind}_fp32", None)


@cache
def _library_table(kind: str) -> Tensor:
    table: Tensor = sys.modules["bitsandbytes.functional"].get_4bit_type(kind, device="cpu")
    return table


def _scales_for_library(statistics: tuple[Tensor, ...], stop: int, block: int) -> Tensor | None:
    """The scales of all blocks; None where bitsandbytes' kernel may flush a subnormal product to zero, or would read
    beyond the last, before element `stop`.
    """
    if statistics[0].numel() * block < stop:
        return None
    scales = _absmax(statistics, 0, statistics[0].numel()).contiguous()
    magnitude = scales.abs()
    # zeros are exact, and rare
    exact = bool(magnitude.min() > _SMALLEST) or bool(((magnitude == 0) | (magnitude > _SMALLEST)).all())
    return scales if exact else None


def _decode_by_library(
    run: Callable[..., object], data: Tensor, scales: Tensor, block: int, rounded: torch.dtype, first: int, out: Tensor
) -> Tensor:
    def rows(begin: int, values: Tensor) -> None:
        addresses = data.data_ptr() + begin // 2, scales.data_ptr() + begin // block * 4, values.data_ptr()
        run(*map(c_void_p, addresses), *map(c_longlong, (block, *values.shape)))

    return decode_in_rows(rows, rounded, first, out)


def _absmax(statistics: tuple[Tensor, ...], start: int, stop: int) -> Tensor:
    """fp32 `[stop - start]`: the scales of these blocks."""
    absmax = statistics[0][start:stop]
    if len(statistics) == 2:
        return absmax.float()
    _, _, outer, code, offset = statistics
    first = start // NESTED_BLOCK
    outer = outer[first : -(-stop // NESTED_BLOCK)].repeat_interleave(NESTED_BLOCK)
    return code.index_select(0, absmax.int()).mul_(outer[start - first * NESTED_BLOCK :][: stop - start]).add_(offset)


def select(
    data: Tensor, statistics: tuple[Tensor, ...], parameters: str, start: int, stop: int
) -> tuple[Tensor, tuple[Tensor, ...], str]:
    """The matrices start … stop - 1 of a stack: the same tensors, read from another element on."""
    (_, rows, columns), block, dtype, first = parameters_of(parameters)
    first += start * rows * columns
    return data, statistics, spell((stop - start, rows, columns), block=block, dtype=dtype, first=first or None)


def kernel(data: Tensor, statistics: tuple[Tensor, ...], parameters: str) -> tuple[str, dict[str, Any]] | None:
    """The decode kernel, and what it reads; None for strided tensors."""
    if not all(t.is_contiguous() for t in (data, *statistics)):
        return None
    _, block, dtype, first = parameters_of(parameters)
    scale, table, *outer = statistics
    given = {"code": data, "table": table, "scale": scale, "block": block, "first": first, "rounded": dtype}
    return "codebook", given | {"outer": tuple(outer) or None}


def adopt(storage: object, name: str = "weight") -> Weight | None:
    """The weight of a `Params4bit`, of the layer that holds one, or of a stack that
    `bitsandbytes.nn.parametrize.replace_parameter_4bit` quantized: parameter `name` of its module, or the
    `module.parametrizations[name]`.

    A layer's own quant_state is read where the parameter has lost it (FSDP). Raises ValueError for what is not
    quantized yet, is repacked for inference on a CPU, is a shard, or has statistics that bitsandbytes cannot decode.
    """
    if isinstance(storage, torch.nn.Module) and torch.nn.utils.parametrize.is_parametrized(storage, name):
        storage = storage.parametrizations[name]  # type: ignore[index]
    if isinstance(storage, ParametrizationList):
        if not len(storage) or not is_of(storage[0], "bitsandbytes", "Bnb4bitParametrization"):
            return None
        if len(storage) > 1:
            raise ValueError(
                f"a 4-bit stack is parametrized by {', '.join(type(p).__name__ for p in storage)}; only the first is "
                "bitsandbytes': remove the others with torch.nn.utils.parametrize.remove_parametrizations"
            )
        return _weight(storage.original, storage[0].quant_state, "Bnb4bitParametrization")
    if not is_of(storage, "bitsandbytes", "Linear4bit"):
        stored = held(storage, name)
        is_params = is_of(stored, "bitsandbytes", "Params4bit")
        return _weight(stored, stored.quant_state, "Params4bit") if is_params else None  # type: ignore
    layer: Any = storage
    state = getattr(layer.weight, "quant_state", None)
    state = layer.quant_state if state is None else state
    weight = _weight(layer.weight, state, type(layer).__name__)
    expected = layer.out_features, layer.in_features
    if tuple(state.shape) != expected:
        raise ValueError(
            f"{type(layer).__name__} holds a weight quantized as {list(state.shape)}; [N, K] is {list(expected)}: "
            "quantize it anew, as nn.Linear stores it"
        )
    return weight


def _weight(stored: Tensor, state: Any, owner: str) -> Weight:
    data = stored.data
    if state is None:
        raise ValueError(
            f"{owner} {data.dtype} {list(data.shape)} on {data.device} is not quantized yet: move the model to its "
            "device first, with .to(), which quantizes it, or load its quantized checkpoint"
        )
    sizes, block, dtype, nested = tuple(state.shape or ()), state.blocksize, state.dtype, getattr(state, "state2", None)
    kind = state.quant_type
    statistics: tuple[Any, ...] = state.absmax, state.code
    if nested is not None:
        statistics += nested.absmax, nested.code, state.offset
    # every forward of every layer comes here, so that texts are made for what is refused alone
    if not (
        kind in _TYPES and isinstance(block, int) and block in _BLOCKS and dtype in _DTYPES and len(sizes) in (2, 3)
        and (nested is None or nested.blocksize == NESTED_BLOCK)
        and not getattr(state, "packing_format_for_cpu", False)
        and data.numel() * data.element_size() == -(-math.prod(sizes) // 2) and data.is_contiguous()
        and not _misfit(statistics, sizes, block)
    ):  # fmt: skip
        raise ValueError(_problem(data, statistics, state, owner))
    packed = (data if data.dtype is torch.uint8 else data.view(torch.uint8)).view(-1)
    return Weight(packed, statistics=statistics, format=f"{kind}:{spell(sizes, block=block, dtype=dtype)}")


def _misfit(statistics: tuple[Any, ...], sizes: tuple[int, ...], block: int) -> str:
    """Which of the statistics has another dtype or shape than those of bitsandbytes, and theirs; "" where none has.

    A kernel would read beyond a short one, and a product broadcasts one of a single number.
    """
    blocks = -(-math.prod(sizes) // block)
    counts = blocks, 16, -(-blocks // NESTED_BLOCK), 256, 1
    is_nested = len(statistics) > 2
    for index, (t, count) in enumerate(zip(statistics, counts, strict=False)):
        dtype = torch.uint8 if is_nested and not index else torch.float32
        # an offset is one number, the others are vectors
        if t is None or t.dtype is not dtype or t.numel() != count or (index < 4 and t.dim() != 1):
            given = None if t is None else f"{t.dtype} {list(t.shape)}"
            return f"{_NAMES[index]} {given}; it is {dtype} [{count}] of {'nested ' * is_nested}blocks of {block}"
    return ""


def _problem(data: Tensor, statistics: tuple[Any, ...], state: Any, owner: str) -> str:
    """Why bitsandbytes' storage cannot be held, and the fix."""
    sizes, block, dtype, kind = list(state.shape or ()), state.blocksize, state.dtype, state.quant_type
    if getattr(state, "packing_format_for_cpu", False):
        return (
            f"{owner} {sizes} was repacked by bitsandbytes for inference on this CPU, its absmax rounded to bfloat16: "
            "load the model anew and patch it before its first forward in eval mode"
        )
    nested = getattr(state, "state2", None)
    nested_block = NESTED_BLOCK if nested is None else nested.blocksize
    rules = {
        f"quant_type {kind!r}": (kind in _TYPES, f"one of {', '.join(_TYPES)}"),
        f"blocksize {block!r}": (isinstance(block, int) and block in _BLOCKS, f"one of {', '.join(map(str, _BLOCKS))}"),
        f"dtype {dtype}": (dtype in _DTYPES, "bfloat16, float16 or float32"),
        f"shape {sizes}": (len(sizes) in (2, 3), "a matrix [N, K] or a stack [G, N, K]"),
        f"nested blocksize {nested_block}": (nested_block == NESTED_BLOCK, str(NESTED_BLOCK)),
    }
    for given, (is_held, rule) in rules.items():
        if not is_held:
            return f"{owner} has {given}; bitsandbytes decodes {rule}: quantize the weight anew"
    expected = -(-math.prod(sizes) // 2)
    if data.numel() * data.element_size() == expected and data.is_contiguous():
        misfit = _misfit(statistics, tuple(sizes), block)
        return f"{owner} {sizes} has {misfit}: quantize the weight anew, or load its checkpoint again"
    return (
        f"{owner} {sizes} holds {data.numel() * data.element_size()} bytes with strides {list(data.stride())}; it must "
        f"be {expected} contiguous ones: gather a shard, and make a view contiguous"
    )
