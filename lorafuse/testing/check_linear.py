"""The correctness gate of the LoRA linear: one case, forward and backward, every tensor judged by its name.

Tests and benchmarks ask here, so that a result that counts as right is right everywhere in the same sense.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorafuse import functional
from lorafuse.philox import keep_mask
from lorafuse.testing.numerics import assert_three_way

__all__ = [
    "GATE",
    "LinearCase",
    "Operands",
    "check_linear",
    "gradients",
    "make_operands",
    "plain_lora_linear",
]


# rows of the other input of a case that has more: more than any tile has
_FEW = 130


@dataclass(frozen=True)
class LinearCase:
    """One problem. `leading` are x's sizes before K; `base` multiplies w: at 0 the result is the delta alone.

    At scale 1 the delta is as large as the base. `adapter_dtype` None means `dtype`.
    """

    leading: tuple[int, ...] = (63,)
    N: int = 96
    K: int = 67
    R: int = 8
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    dropout_p: float = 0.0
    scale: float = 1.7
    base: float = 1.0
    seed: int = 2**40 + 7


@dataclass
class Operands:
    """Tensors of one case, in the order of the formula; b is never zero."""

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    dy: Tensor

    def to(self, to: torch.dtype | torch.device) -> "Operands":
        return Operands(*(None if t is None else t.to(to) for t in vars(self).values()))

    def clone(self) -> "Operands":
        return Operands(*(None if t is None else t.clone() for t in vars(self).values()))


# what a change must keep right before anything else is worth running: every dtype, both sides of each switch,
# shapes off every block
GATE = (
    LinearCase(),
    LinearCase(base=0.0, bias=False, scale=-0.5),
    LinearCase(dropout_p=0.25, R=13),
    LinearCase(leading=(3, 21), N=65, K=130, R=6, dtype=torch.bfloat16),
    LinearCase(leading=(3, 21), N=65, K=130, R=6, dtype=torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.5),
    LinearCase(leading=(2, 3, 21), N=65, K=130, R=16, dtype=torch.float16),
)


def make_operands(case: LinearCase, seed: int = 0, device: torch.device | str = "cpu") -> Operands:
    """Operands of a case from a generator of their own, the device's; products of them have unit size."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, size: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(size).to(dtype)

    adapter = case.adapter_dtype or case.dtype
    return Operands(
        x=normal(*case.leading, case.K),
        w=normal(case.N, case.K, size=case.base / math.sqrt(case.K)),
        a=normal(case.R, case.K, size=1 / math.sqrt(case.K), dtype=adapter),
        b=normal(case.N, case.R, size=1 / math.sqrt(case.R), dtype=adapter),
        bias=normal(case.N) if case.bias else None,
        dy=normal(*case.leading, case.N),
    )


def plain_lora_linear(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """The formula as one writes it in torch, with lorafuse's dropout mask; adapters are cast to x's dtype."""
    low = x
    if dropout_p:
        tokens = math.prod(x.shape[:-1])
        keep = keep_mask(torch.tensor([seed], device=x.device), dropout_p, slice(0, tokens), x.shape[-1]).view(x.shape)
        low = x * keep / (1.0 - dropout_p) if dropout_p < 1.0 else x * 0.0
    return linear(x, w, bias) + scale * linear(linear(low, a.to(x.dtype)), b.to(x.dtype))


def gradients(y: Tensor, operands: Operands) -> dict[str, Tensor]:
    """`{"y": …, "dx": …, …}`: y and the gradient of each operand that has one."""
    inputs = {"dx": operands.x, "da": operands.a, "db": operands.b}
    if operands.bias is not None:
        inputs["dbias"] = operands.bias
    return {
        "y": y.detach(),
        **dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), operands.dy), strict=True)),
    }


def _prepare(operands: Operands) -> Operands:
    for tensor in (operands.x, operands.a, operands.b, operands.bias):
        if tensor is not None:
            tensor.requires_grad_()
    return operands


def _results(case: LinearCase, backend: str, device: torch.device, sample: int) -> list[dict[str, Tensor]]:
    """Ours, plain torch's in the same dtype, and the fp64 reference (on the CPU), for one draw of the operands."""
    settings = {"scale": case.scale, "dropout_p": case.dropout_p, "seed": case.seed}

    def run(function: Callable[..., Tensor], o: Operands, **more: str) -> Tensor:
        return function(o.x, o.w, o.a, o.b, bias=o.bias, **settings, **more)

    exact = _prepare(make_operands(case, 2 * sample).to(torch.float64))
    given = make_operands(case, 2 * sample).to(device)
    ours, theirs = _prepare(given.clone()), _prepare(given.clone())
    # the other input; of further samples it is the one before. Up to _FEW rows it has the same sizes: a buffer that is
    # kept by its sizes is written again
    rows = math.prod(case.leading)
    another = case if rows <= _FEW else replace(case, leading=(_FEW,))
    others = [_prepare(make_operands(another, 1).to(device))] if sample == 0 else []
    for other in others:
        run(functional.lora_linear, other, backend=backend)
    y = run(functional.lora_linear, ours, backend=backend)
    for other in others:
        run(functional.lora_linear, other, backend=backend)
    actual = gradients(y, ours)
    for name, before in vars(given).items():
        after = getattr(ours, name)
        assert before is None or torch.equal(before, after.detach()), f"{name}: the operand was written"
    results = [actual, *(gradients(run(plain_lora_linear, o), o) for o in (theirs, exact))]
    return [{name: tensor.cpu() for name, tensor in tensors.items()} for tensors in results]


def check_linear(case: LinearCase, backend: str = "eager", device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Assert y, dx, da, db and dbias of one case by the three-way rule, and return them, one sample behind another.

    The message starts with the tensor's name. Also asserted: dtypes and shapes; that no gradient is zero where the
    formula's is not; that no operand was written; that calls on another input, before and after, change nothing.
    """
    # at M = R = 1 the error of the whole low-rank gradient is that of one number, and luck alone breaks the rule in one
    # draw of five; over this many numbers the errors of two right results are within a factor of two
    tokens = math.prod(case.leading)
    samples = -(-32 // (tokens * case.R)) if tokens else 1
    drawn = [_results(case, backend, torch.device(device), sample) for sample in range(samples)]
    actual, same_dtype, reference = (
        {name: torch.stack([r[i][name] for r in drawn]) for name in drawn[0][i]} for i in range(3)
    )

    assert actual.keys() == reference.keys()
    no_delta = case.scale == 0.0 or case.dropout_p == 1.0
    for name, tensor in actual.items():
        assert tensor.dtype is same_dtype[name].dtype, f"{name}: {tensor.dtype}, not {same_dtype[name].dtype}"
        assert_three_way(name, tensor, same_dtype[name], reference[name])
        if tokens and not (no_delta and name in ("dx", "da", "db")):
            assert tensor.count_nonzero() > 0, f"{name}: all zero"
    return actual
