"""`lorafuse._cpu`: decoding on a CPU in one pass, compiled from csrc/cpu where g++ is when lorafuse is installed.

ctypes calls it by address, without the interpreter's lock. Where it is absent bitsandbytes' kernel or torch decodes. It
also multiplies: by a whole weight (`lorafuse.backends.aten_blocks`), by the rank (`aten_rank`, there), and by a factor
for each column (`columns`); and it computes gated activations (`lorafuse.activation`). Its threads are those of the
OpenMP runtime that torch loads for all modules, which it must load before.
"""

import ctypes
import importlib.util
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafuse.formats.codec import decode_in_rows
from lorafuse.formats.sizes import NESTED_BLOCK

__all__ = [
    *("ARGUMENTS", "Codes", "Gated", "Matmul", "Stored", "decode", "has_addresses", "is_plain_fp32", "library"),
    *("opened", "reads", "stored", "threads_for", "why_not"),
]

# of the functions in csrc/cpu
_VERSION = 6
_P, _N, _F, _I = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_float, ctypes.c_int
ARGUMENTS: dict[str, Any] = {
    "lorafuse_decode": [_P, _N, _N, _I, _P],
    "lorafuse_matmul": [_P, _I],
    "lorafuse_rank_read": [_P, *[_N] * 4, _P, _N, _N, _F, _P, _N, _P, _N, _F, _P, _N, _N, _I],
    "lorafuse_rank_add": [_P, *[_N] * 4, _P, _N, _P, _N, _N, _F, _I],
    "lorafuse_gated": [_P, _I],
    "lorafuse_columns_backward": [_P, _N, _P, *[_N] * 3, _P, _P, _P, _I],
}
# a subclass of tensors has no address
_PLAIN = (Tensor, torch.nn.Parameter)
# kinds of codes: how many elements a byte holds, and values their table has
_KINDS = {"nibbles": (0, 2, 16), "low nibbles": (1, 2, 16), "bytes": (2, 1, 256), "integers": (3, 1, 0)}


class Stored(ctypes.Structure):
    """`lorafuse::Stored` of csrc/cpu/stored.hpp."""

    _fields_ = (
        *(("kind", _I), ("step", _F), ("code", _P), ("table", _P), ("plain", _P), ("coded", _P), ("scale_table", _P)),
        *(("outer", _P), ("offset", _P), ("block", _N)),
    )


class Matmul(ctypes.Structure):
    """`LorafuseMatmul` of csrc/cpu/matmul.cpp."""

    _fields_ = (
        *(("gemm", _P), ("x", _P), ("x_row", _N), ("M", _N), ("K", _N), ("N", _N), ("w", _P), ("stored", _P)),
        *(("w_row", _N), ("first", _N), ("y", _P), ("y_row", _N), ("bias", _P), ("narrow", _P), ("narrow_row", _N)),
        *(("R", _N), ("factor", _P), ("factor_column", _N), ("factor_rank", _N), ("alpha", _F), ("is_transposed", _I)),
        *(("adds", _I), ("rounds", _I)),
    )


class Gated(ctypes.Structure):
    """`LorafuseGated` of csrc/cpu/activation.cpp."""

    _fields_ = (
        *(("act", _I), ("gate", _P), ("gate_row", _N), ("up", _P), ("up_row", _N), ("h", _P), ("h_row", _N)),
        *(("dh", _P), ("dh_row", _N), ("dgate", _P), ("dgate_row", _N), ("dup", _P), ("dup_row", _N), ("M", _N)),
        ("C", _N),
    )


class Codes(NamedTuple):
    """Of a flat weight: `value(code i) · scale[i // block] · step`, each product in fp32.

    Attributes:
        kind: "nibbles" (the high one of a byte first), "low nibbles", "bytes" or "integers" (int8).
        data: its bytes.
        block: elements of a scale.
        scale: fp32, or uint8 with `scale_table`.
        table: fp32 `[16]` or `[256]`, what a code stands for; None of integers.
        scale_table: fp32 `[256]`, what the bytes of a scale stand for.
        outer, offset: fp32 `[⌈blocks / 256⌉]` and `[]` of nested statistics: `scale_table[byte] · outer + offset`.
        step: of integers alone.
        rounded: what a decoded element is rounded to, before it takes its own dtype.
        first: the element with which the weight begins.
    """

    kind: str
    data: Tensor
    block: int
    scale: Tensor
    table: Tensor | None = None
    scale_table: Tensor | None = None
    outer: Tensor | None = None
    offset: Tensor | None = None
    step: float = 1.0
    rounded: torch.dtype = torch.float32
    first: int = 0


def opened(file: str | None) -> tuple[Any, str]:
    """The library of that file, or None and the reason why there is none."""
    if file is None:
        return None, "it was not built when lorafuse was installed"
    try:
        loaded = ctypes.CDLL(file)
    except OSError as error:
        return None, f"it does not load here: {error}"
    if loaded.lorafuse_cpu_version() != _VERSION:
        return None, f"{file} was built from other sources"
    for name, arguments in ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded, ""


@cache
def _loaded() -> tuple[Any, str]:
    spec = importlib.util.find_spec("lorafuse._cpu")
    return opened(None if spec is None else spec.origin)


def library() -> Any:
    """The loaded module, or None."""
    return _loaded()[0]


def why_not() -> str:
    """Why it is not used here; "" where it is."""
    return _loaded()[1]


def has_addresses() -> bool:
    """Whether tensors lie in memory: those that Dynamo traces, or that torch's transforms wrap, do not."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def reads(data: Tensor) -> bool:
    """Whether it may decode these bytes."""
    return type(data) in _PLAIN and data.is_cpu and has_addresses() and library() is not None


def is_plain_fp32(t: Tensor) -> bool:
    """Whether a tensor's elements are the numbers at its address, in fp32 on a CPU."""
    return type(t) in _PLAIN and t.dtype is torch.float32 and t.is_cpu and not t.is_neg()


def threads_for(work: int, of_thread: int) -> int:
    """How many of torch's threads have so much to do each."""
    return max(1, min(torch.get_num_threads(), work // of_thread))


def stored(codes: Codes | None, stop: int) -> Stored | None:
    """The operand of csrc/cpu, for elements below `stop` of the flat weight; None for what cannot be read by address:
    it is checked here. Its tensors must outlive it.
    """
    if codes is None or not _fits(codes, stop):
        return None
    kind, data, block, scale, table, scale_table, outer, offset, step, *_ = codes
    scales = (None, scale, scale_table) if scale.dtype is torch.uint8 else (scale, None, None)
    addresses = [None if t is None else t.data_ptr() for t in (table, *scales, outer, offset)]
    return Stored(_KINDS[kind][0], step, data.data_ptr(), *addresses, block)


def decode(codes: Codes | None, out: Tensor) -> bool:
    """Decode the weight's elements, as many as `out` has, into `out`, contiguous on a CPU.

    False, with `out` as it was, where `stored` is None.
    """
    if not (type(out) in _PLAIN and out.is_cpu and out.is_contiguous()):
        return False
    if codes is None or (given := stored(codes, codes.first + out.numel())) is None:
        return False
    call, threads, address = library().lorafuse_decode, torch.get_num_threads(), ctypes.byref(given)

    def run(start: int, values: Tensor) -> None:
        call(address, start, values.numel(), threads, values.data_ptr())

    decode_in_rows(run, codes.rounded, codes.first, out)
    return True


def _fits(codes: Codes, stop: int) -> bool:
    kind, data, block, scale, table, scale_table, outer, offset, *_ = codes
    _, per_byte, values = _KINDS[kind]
    blocks = -(-stop // block)
    counts = (scale, blocks), (table, values), (scale_table, 256), (outer, -(-blocks // NESTED_BLOCK)), (offset, 1)
    given = [(t, n) for t, n in counts if t is not None]
    return (
        all(type(t) in _PLAIN and t.is_cpu and t.is_contiguous() for t in (data, *(t for t, _ in given)))
        and data.element_size() == 1
        and per_byte * data.numel() >= stop
        and all(t.numel() >= n and (t.dtype is torch.float32 or t is scale) for t, n in given)
        and scale.dtype is (torch.float32 if scale_table is None else torch.uint8)
    )
