"""Digests of what Triton's compiler is given. Compiling is deterministic: with the digest, its result is known."""

import ast
import functools
import hashlib
import io
import sys
import tokenize
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.runtime.jit import JITCallable

__all__ = ["digest", "drop_comments", "sample", "without_comments"]

_TRITON = str(Path(triton.__file__).parent)


def digest(source: Any, options: Any, backend: Any, readers: str) -> str:
    """Hash of all that decides what is compiled and what is read from it.

    `source` is Triton's `ASTSource`: the function with all it calls, its constants, types and specializations.
    `backend` holds the architecture and ptxas' version, `readers` is the source of the functions that read a binary.
    """
    parts = [triton.__version__, source.hash(), backend.hash(), readers]
    # files of Triton's own, whose contents are those of its version, lie elsewhere on every machine
    parts += [f"{name}={str(value).replace(_TRITON, '')}" for name, value in sorted(vars(options).items())]
    parts += [f"{name}={value}" for name, value in sorted(get_cache_invalidating_env_vars().items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def drop_comments(package: str) -> None:
    """Cut comments and line numbers, which decide nothing, from the kernels of a package that is imported."""
    functions = [
        function
        for name, module in list(sys.modules.items())
        for function in (vars(module).values() if name.startswith(package) else ())
        if isinstance(function, JITCallable)
    ]
    for function in functions:
        function._unsafe_update_src(without_comments(function.src))
        function.starting_line_number = 1
    # the hash of a function has the constants of one that it calls only where that was hashed before it (Triton 3.6)
    hashed = [function.cache_key for function in functions]
    assert all(hashed)
    for function in functions:
        function._unsafe_update_src(function.src)


@functools.cache
def without_comments(source: str) -> str:
    """The source of a function without comments, docstring and empty lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    first, *rest = function.body
    if rest and ast.get_docstring(function) is not None:
        lines[first.lineno - 1 : first.end_lineno] = []
    return "\n".join(line.rstrip() for line in lines if line.strip())


def sample(chosen: Iterable[Any]) -> set[str]:
    """Names of one specialization (`compile_only.Variant`) of each kernel, always the same ones."""
    picked: dict[str, str] = {}
    for name, kernel in ((variant.name, variant.kernel) for variant in chosen):
        picked[kernel] = min(name, picked.get(kernel, name), key=lambda n: zlib.crc32(n.encode()))
    return set(picked.values())
