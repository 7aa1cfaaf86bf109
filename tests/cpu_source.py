"""One source of csrc/cpu compiled alone, torch's threads, and layers that run its functions, for tests of them."""

import contextlib
import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from lorafuse.formats import cpu
from lorafuse.functional import Projection, lora_linear, lora_linears
from lorafuse.testing.numerics import relative_l2, tolerance

__all__ = ["SOURCES", "UNREADABLE", "compiled", "run_a_layer", "run_layers_of_one_x", "torch_threads"]

SOURCES = Path(__file__).parents[1] / "csrc" / "cpu"


class _Subclass(torch.Tensor):
    pass


# what makes of a tensor one whose elements are not fp32 numbers at its address on a CPU
UNREADABLE = {
    "fp64": lambda t: t.double(),
    "bf16": lambda t: t.bfloat16(),
    "meta": lambda t: t.to("meta"),
    "subclass": lambda t: t.as_subclass(_Subclass),
    "negated": lambda t: torch.complex(t, t).conj().imag,
}


def compiled(folder, name, source, *flags):
    """The module of a source in place of csrc/cpu's `name`, its functions declared. Skips where there is no g++."""
    file, module = folder / name, folder / f"{name}.so"
    file.write_text(source)
    command = ["g++", "-std=c++17", *flags, "-fPIC", "-shared", "-I", SOURCES, file, "-o", module]
    try:
        subprocess.run(command, check=True, timeout=300)
    except FileNotFoundError:
        pytest.skip("g++ is not here")
    library = ctypes.CDLL(str(module))
    for function, arguments in cpu.ARGUMENTS.items():
        if hasattr(library, function):
            getattr(library, function).argtypes, getattr(library, function).restype = arguments, None
    return library


@contextlib.contextmanager
def torch_threads(count):
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(former)


def _grads(formula, inputs, dys):
    """`[*outputs, *gradients]` of a formula of leaves."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    outputs = formula(*leaves)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, dys)]


def _agree(formula, exact, inputs, dys):
    """Outputs and gradients of a formula, against those of its exact twin in fp64."""
    expected = _grads(exact, [t.double() for t in inputs], [dy.double() for dy in dys])
    for i, (result, right) in enumerate(zip(_grads(formula, inputs, dys), expected, strict=True)):
        assert relative_l2(result, right) <= tolerance(torch.float32), i


def run_a_layer():
    """Forward and backward of one layer, whose sizes no block divides, against fp64."""
    x, w, bias, a, b = (torch.randn(sizes) for sizes in ((70, 90), (61, 90), (61,), (16, 90), (61, 16)))
    _agree(
        lambda x, a, b: [lora_linear(x, w, a, b, scale=2.0, bias=bias)],
        lambda x, a, b: [x @ w.double().T + bias.double() + 2.0 * (x @ a.T @ b.T)],
        (x, a, b), [torch.randn(70, 61)],
    )  # fmt: skip


def run_layers_of_one_x():
    """The same of three layers of one x."""
    x, sizes = torch.randn(70, 90), (61, 32, 33)
    ws, (q, k, v) = [torch.randn(n, 90) for n in sizes], [(torch.randn(8, 90), torch.randn(n, 8)) for n in sizes]
    _agree(
        lambda x, *f: lora_linears(x, [Projection(w, a, b, 2.0) for w, a, b in zip(ws, f[::2], f[1::2], strict=True)]),
        lambda x, *f: [
            x @ w.double().T + 2.0 * (x @ a.T @ b.T) for w, a, b in zip(ws, f[::2], f[1::2], strict=True)
        ],
        (x, *q, *k, *v), [torch.randn(70, n) for n in sizes],
    )  # fmt: skip
