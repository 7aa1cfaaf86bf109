"""Triton's interpreter in a fraction of the time: what it decides from types is decided once.

A function of `triton.language` looks at the types of its arguments and then calls the interpreter's builder, which
computes with numpy. The builder is what a test is about, and takes less than a tenth of the time (Triton 3.6,
2026-11-29). So its calls are recorded when a function first meets these types, and repeated from then on: arithmetic,
checks of overflow, loads and stores stay Triton's own. `install` is called where kernels are interpreted
(tests/conftest.py); another version of Triton is left as it is, which takes longer and computes the same.
"""

import copy
import inspect
import math
import re
from bisect import bisect_right

import numpy as np
import triton
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

__all__ = ["ORIGINALS", "REPLACEMENTS", "VERSION", "install"]

# whose internals these are
VERSION = "3.6."

ORIGINALS = {
    (core.block_type, "__init__"): core.block_type.__init__,
    (core.dtype, "__eq__"): core.dtype.__eq__,
    (core.tensor, "__init__"): core.tensor.__init__,
    (interpreter, "_get_np_dtype"): interpreter._get_np_dtype,
    (interpreter, "_patch_attr"): interpreter._patch_attr,
    (interpreter, "_patch_builtin"): interpreter._patch_builtin,
    (interpreter, "_patch_lang_tensor"): interpreter._patch_lang_tensor,
    (interpreter.InterpretedFunction, "__call__"): interpreter.InterpretedFunction.__call__,
    (interpreter.InterpreterBuilder, "create_expand_dims"): interpreter.InterpreterBuilder.create_expand_dims,
    (interpreter.TensorHandle, "__init__"): interpreter.TensorHandle.__init__,
    (interpreter.TritonSemantic, "to_tensor"): interpreter.TritonSemantic.to_tensor,
}

_MEMBERS = {
    (owner, name): member
    for owner in (tl, core, tl.math, core.tensor, core.tensor_descriptor_base)
    for name, member in inspect.getmembers(owner, core.is_builtin)
}

_block_types, _shapes, _np_dtypes, _builtins, _languages, _functions, _widths = {}, {}, {}, {}, {}, {}, set()


def _block_type(self, element_ty, shape):
    """Fields of a type of a block, by element and shape; what the original refuses is never held."""
    # a float is equal to an integer, and refused
    if not all(type(size) is int for size in shape):
        return ORIGINALS[core.block_type, "__init__"](self, element_ty, shape)
    # the name of a pointer does not hold its address space
    key = type(element_ty), element_ty.name, getattr(element_ty, "address_space", None), tuple(shape)
    if key not in _block_types:
        ORIGINALS[core.block_type, "__init__"](self, element_ty, shape)
        _block_types[key] = vars(self).copy()
    vars(self).update(_block_types[key])


def _tensor(self, handle, type):
    """A tensor of the interpreter; `shape` and `numel` are one object for all tensors of a type."""
    if type.name not in _shapes:
        shape = tuple(type.shape) if type.is_block() else ()
        _shapes[type.name] = core.tuple([core.constexpr(size) for size in shape]), core.constexpr(math.prod(shape))
    self.shape, self.numel = _shapes[type.name]
    self.handle, self.type, self.dtype = handle, type, type.scalar


def _np_dtype(tt_dtype):
    name = tt_dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = ORIGINALS[interpreter, "_get_np_dtype"](tt_dtype)
    return _np_dtypes[name]


def _handle(self, data, dtype, attr=None):
    """A handle; that numbers are not wider than their type is checked once."""
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
    width = dtype.name, data.itemsize
    if width not in _widths:
        self.__post_init__()
        _widths.add(width)


def _equal(self, other):
    return self.name == other.name if type(other) is core.dtype else ORIGINALS[core.dtype, "__eq__"](self, other)


def _expand_dims(self, arg, axis):
    # what numpy does for one axis, without its checks
    return interpreter.TensorHandle(arg.data[(slice(None),) * axis + (None,)], arg.dtype.scalar)


def _to_tensor(self, x, check_type=True):
    return x if type(x) is core.tensor else ORIGINALS[interpreter.TritonSemantic, "to_tensor"](self, x, check_type)


def _patch_builtin(package, builder, scope):
    """Replace the builtins that no caller has replaced."""
    if package not in _builtins:
        _builtins[package] = [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]
    for name in _builtins[package]:
        member = getattr(package, name)
        if core.is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


def _call(self, *args, **kwargs):
    """Run a function of a kernel; what it sees of Triton is replaced unless a caller saw the same."""
    fn = self.rewrite()
    if fn not in _languages:
        _languages[fn] = [value for value in fn.__globals__.values() if value is tl or value is core]
    if any(core.is_builtin(language.load) for language in _languages[fn]):
        interpreter._patch_lang(self.fn)
    try:
        return fn(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


# what a comparison with the limits of an integer type can tell apart
_LIMITS = sorted(
    {0, 1, 2, 2**8, 2**16, 2**32, 2**64, *(sign * 2**bits for bits in (7, 15, 31, 63) for sign in (-1, 1))}
)
# whether the function that is recorded looked at a value
_looked = [False]


class _Unrepeatable(Exception):
    """A call that cannot be repeated from a record."""


class _Integer(int):
    """An argument, known by its identity."""


class _Float(float):
    """An argument, known by its identity."""


_NUMBERS = _Integer, _Float
_VALUES = interpreter.TensorHandle, interpreter.TensorDescHandle, *_NUMBERS


def _patch_lang_tensor(tensor, scope):
    ORIGINALS[interpreter, "_patch_lang_tensor"](tensor, scope)
    for name in ("__bool__", "__index__"):
        scope.set_attr(tensor, name, _seen(getattr(tensor, name)))


def _seen(read):
    def look(tensor):
        # a block is true
        _looked[0] |= tensor.handle.data.size == 1
        return read(tensor)

    return look


class _Recorder:
    """A builder that records the functions of another that are called for values."""

    def __init__(self, builder):
        self.builder, self.steps = builder, []

    def __getattr__(self, name):
        function = getattr(self.builder, name)
        if not name.startswith(("create_", "get_")) or name.endswith("_ty"):
            return function

        def recorded(*args):
            value = function(*args)
            self.steps.append((name, function, args, value))
            return value

        return recorded


def _flat(values):
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _broadcasts(name, function):
    code = function.__func__.__code__
    return name == "create_addptr" or code.co_name == "<lambda>" and {"binary_op", "ternary_op"} & {*code.co_names}


def _direct(steps, results):
    """The steps without those whose values nobody reads; numpy broadcasts operands by itself."""
    narrower, direct, kept, read = {}, [], [], {id(one.handle) for one in results}
    for name, function, args, value in steps:
        if name in ("create_splat", "create_broadcast"):
            narrower[id(value)] = args[name == "create_splat"]
        elif _broadcasts(name, function):
            narrow = [narrower.get(id(arg), arg) for arg in args]
            if np.broadcast_shapes(*[arg.data.shape for arg in narrow]) == value.data.shape:
                args = narrow
        direct.append((name, function, args, value))
    for name, function, args, value in reversed(direct):
        parts = value if isinstance(value, tuple) else [value]
        if value is None or "atomic" in name or any(id(part) in read for part in parts):
            read |= {id(arg) for arg in _flat(args)}
            kept.append((name, function, args, value))
    return kept[::-1]


def _compiled(leaves, steps, result):
    """A function of the values of a call's arguments that calls the builder as the call did, and returns the like."""
    kind = type(result) if isinstance(result, tuple | core.tuple) else None
    results = [result] if kind is None else list(result)
    if not all(type(one) is core.tensor for one in results):
        raise _Unrepeatable
    # arguments are called a…, values v…, and constants c…
    names = {id(leaf): f"a{i}" for i, leaf in enumerate(leaves)}
    scope, lines, arguments = {"tensor": core.tensor, "kind": kind}, [], ", ".join(names.values())

    def name_of(value):
        if isinstance(value, list) and any(isinstance(one, _VALUES) for one in value):
            return f"[{', '.join(map(name_of, value))}]"
        if id(value) not in names:
            # made by nothing that was recorded
            if isinstance(value, _VALUES):
                raise _Unrepeatable
            constant(value)
        return names[id(value)]

    def constant(value):
        names[id(value)] = f"c{len(scope)}"
        scope[names[id(value)]] = value

    for name, function, args, value in _direct(steps, results):
        sources = [name_of(arg) for arg in args]
        if (name.startswith("get_") or name == "create_splat") and all(source.startswith("c") for source in sources):
            constant(value)
            continue
        made = f"v{len(lines)}"
        scope[f"f{made}"] = function
        lines.append(f"{made} = f{made}({', '.join(sources)})")
        names |= {id(part): f"{made}[{i}]" for i, part in enumerate(value if isinstance(value, tuple) else ())}
        if value is not None:
            names[id(value)] = made
    # a number that no call reads decided something, or another number was made of it
    text = "; ".join(lines)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, _NUMBERS) and leaf not in (0, 1) and not re.search(rf"\ba{i}\b", text):
            raise _Unrepeatable
    made = []
    for one in results:
        scope[f"t{len(made)}"] = one.type
        made.append(f"tensor({name_of(one.handle)}, t{len(made)})")
    lines.append(f"return kind([{', '.join(made)}])" if kind else f"return {made[0]}")
    exec(f"def repeat({arguments}):\n    " + "\n    ".join(lines), scope)
    return scope["repeat"]


class _Function:
    """A builtin of Triton in the interpreter, and what repeats it, by the types of its arguments.

    Numbers are told apart by their values, or where `by_range` by what types depend on.
    """

    def __init__(self, member, by_range):
        self.member, self.by_range, self.records = member, by_range, {}

    def describe(self, args, leaves):
        """Types of the arguments; their values are appended to `leaves`."""
        key = []
        for arg in args:
            kind = type(arg)
            if kind is core.tensor:
                key.append(arg.type.name)
                leaves.append(arg.handle)
            elif arg is None or kind is bool:
                key.append(arg)
            elif kind is int and self.by_range:
                key.append((kind, bisect_right(_LIMITS, arg)))
                leaves.append(arg)
            elif kind is float and self.by_range:
                # what fp32 may not hold is left alone
                if arg != 0 and not 1e-30 < abs(arg) < 1e30:
                    raise _Unrepeatable
                key.append((kind, arg == 0))
                leaves.append(arg)
            elif kind is int or kind is float or kind is str:
                key.append((kind, arg))
            elif kind is slice and arg == slice(None):
                key.append(kind)
            elif kind is core.constexpr:
                key.append((kind, type(arg.value), arg.value))
            elif kind is core.dtype:
                key.append((kind, arg.name))
            elif kind is tuple or kind is list or kind is core.tuple:
                key.append((kind, self.describe(arg, leaves)))
            elif kind is core.tensor_descriptor:
                key.append((kind, arg.type.block_type.name))
                leaves.append(arg.handle)
            else:
                raise _Unrepeatable
        return tuple(key)

    def distinct(self, arg, leaves):
        """The argument, or a copy whose value is no other's; values are appended to `leaves` as `describe` does."""
        kind = type(arg)
        if kind is tuple or kind is list or kind is core.tuple:
            return kind([self.distinct(one, leaves) for one in arg])
        if kind is core.tensor or kind is core.tensor_descriptor:
            arg = copy.copy(arg)
            arg.handle = copy.copy(arg.handle)
            leaves.append(arg.handle)
        elif self.by_range and kind in (int, float):
            arg = _Integer(arg) if kind is int else _Float(arg)
            leaves.append(arg)
        return arg

    def record(self, key, args, kwargs):
        """Call the member; what it does is repeated from then on if that is known."""
        leaves, recorder = [], _Recorder(interpreter.interpreter_builder)
        args = self.distinct(args, leaves)
        kwargs = {name: self.distinct(arg, leaves) for name, arg in kwargs.items()}
        _looked[0] = False
        result = self.member(*args, **kwargs, _semantic=interpreter.TritonSemantic(recorder))
        try:
            self.records[key] = None if _looked[0] else _compiled(leaves, recorder.steps, result)
        except _Unrepeatable:
            self.records[key] = None
        return result

    def call(self, *args, _semantic=None, **kwargs):
        # another builtin calls it, which may be recorded
        if _semantic is not None:
            return self.member(*args, **kwargs, _semantic=_semantic)
        leaves = []
        try:
            key = self.describe(args, leaves)
            if kwargs:
                key += *kwargs, self.describe(kwargs.values(), leaves)
            repeat = self.records[key]
        except KeyError:
            return self.record(key, args, kwargs)
        # a type that is not described, a constant that has no hash
        except (_Unrepeatable, TypeError):
            repeat = None
        if repeat is None:
            return self.member(*args, **kwargs, _semantic=interpreter.interpreter_semantic)
        return repeat(*leaves)


def _patch_attr(owner, name, member, builder, scope):
    if (owner, name) not in _functions:
        arithmetic = owner is core.tensor and name.startswith("__") and name != "__getitem__"
        call = _Function(member, arithmetic or owner is core.tensor_descriptor_base).call
        # a method of tensors gets the tensor
        _functions[owner, name] = lambda *args, **kwargs: call(*args, **kwargs)
    scope.set_attr(owner, name, _functions[owner, name])


REPLACEMENTS = {
    (core.block_type, "__init__"): _block_type,
    (core.dtype, "__eq__"): _equal,
    (core.tensor, "__init__"): _tensor,
    (interpreter, "_get_np_dtype"): _np_dtype,
    (interpreter, "_patch_attr"): _patch_attr,
    (interpreter, "_patch_builtin"): _patch_builtin,
    (interpreter, "_patch_lang_tensor"): _patch_lang_tensor,
    (interpreter.InterpretedFunction, "__call__"): _call,
    (interpreter.InterpreterBuilder, "create_expand_dims"): _expand_dims,
    (interpreter.TensorHandle, "__init__"): _handle,
    (interpreter.TritonSemantic, "to_tensor"): _to_tensor,
}


def install(functions=REPLACEMENTS):
    """Put these functions, by owner and name, in place of what is there."""
    if triton.__version__.startswith(VERSION):
        # the interpreter leaves its own in `core` when a kernel has ended
        for (owner, name), function in (_MEMBERS | functions).items():
            setattr(owner, name, function)
