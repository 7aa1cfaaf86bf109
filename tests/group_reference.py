"""Layers of one x: operands, the formulas as one writes them in torch, and results by name."""

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from lorafuse import functional as LF
from lorafuse.activation import gate_differentiable
from lorafuse.testing.check_linear import plain_lora_linear
from lorafuse.testing.numerics import assert_three_way

SCALES = (0.7, -1.3, 2.0, 0.4)


@dataclass(frozen=True)
class Case:
    """One group. `R` has 0 for a layer without an adapter, `p` 0 for one without a mask."""

    N: tuple = (12, 8, 10)
    R: tuple = (4, 3, 2)
    p: tuple = (0.0, 0.0, 0.0)
    bias: tuple = (True, False, True)
    leading: tuple = (2, 9)
    K: int = 14
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None


# every kind of layer beside every other; sizes differ, so that no two layers can be exchanged unseen
CASES = (
    Case(),
    Case(R=(4, 0, 2)),
    Case(R=(0, 0, 0)),
    Case(p=(0.4, 0.0, 0.25)),
    Case(p=(0.3, 0.5, 0.5), R=(1, 13, 6), leading=(31,)),
    Case(N=(8,), R=(3,), p=(0.0,), bias=(True,)),
    Case(N=(8, 8, 8), R=(2, 2, 2), leading=(3, 2, 4), bias=(False, False, False)),
    Case(dtype=torch.bfloat16, adapter_dtype=torch.float32, leading=(3, 21), N=(64, 32, 32), K=66),
    Case(dtype=torch.float16, leading=(64,), N=(64, 32, 32), K=66, p=(0.0, 0.2, 0.0)),
)


@dataclass
class Operands:
    """x, the projections, and a gradient of every result."""

    x: torch.Tensor
    projections: list = field(default_factory=list)
    dys: list = field(default_factory=list)

    def leaves(self):
        """What can have a gradient, by name."""
        actual = {"x": self.x}
        for i, one in enumerate(self.projections):
            actual |= {f"{key} {i}": t for key in ("a", "b", "bias") if (t := getattr(one, key)) is not None}
        return actual

    def with_leaves(self, tensors):
        """The same operands with other tensors, by name."""
        every = self.leaves() | tensors
        layers = [
            one._replace(**{key: every.get(f"{key} {i}") for key in ("a", "b", "bias")})
            for i, one in enumerate(self.projections)
        ]
        return Operands(every["x"], layers, self.dys)

    def fresh(self, names=None, dtype=None):
        """New leaves of the same values; those in `names`, or all, require a gradient."""
        made = {
            name: t.detach().clone().to(dtype or t.dtype).requires_grad_(names is None or name in names)
            for name, t in self.leaves().items()
        }
        new = self.with_leaves(made)
        if dtype is not None:
            new.projections = [one._replace(weight=one.weight.to(dtype)) for one in new.projections]
            new.dys = [dy.to(dtype) for dy in self.dys]
        return new


def make(case, seed=0, of_mlp=False):
    """Operands of a case; products of them have unit size. Of an MLP, N is (I, I, H) and down reads I."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, size=1.0, dtype=case.dtype):
        return torch.randn(shape, generator=generator).mul_(size).to(dtype)

    x, adapter, layers, dys = normal(*case.leading, case.K), case.adapter_dtype or case.dtype, [], []
    for i, (n, r, p, bias) in enumerate(zip(case.N, case.R, case.p, case.bias, strict=True)):
        k = case.N[0] if of_mlp and i == 2 else case.K
        a = normal(r, k, size=1 / math.sqrt(k), dtype=adapter) if r else None
        b = normal(n, r, size=1 / math.sqrt(r), dtype=adapter) if r else None
        w = normal(n, k, size=1 / math.sqrt(k))
        layers.append(LF.Projection(w, a, b, SCALES[i], normal(n, size=0.5) if bias else None, p, 2**40 + 7 * i))
        dys.append(normal(*case.leading, n))
    return Operands(x, layers, dys[2:] if of_mlp else dys)


def plain(x, one):
    """One layer."""
    if one.a is None:
        return F.linear(x, one.weight, one.bias)
    return plain_lora_linear(
        x, one.weight, one.a, one.b, scale=one.scale, bias=one.bias, dropout_p=one.dropout_p, seed=one.seed
    )


def linears(o, **more):
    return LF.lora_linears(o.x, o.projections, **more)


def plain_linears(o):
    return tuple(plain(o.x, one) for one in o.projections)


def single(o, **more):
    """The same by the operator of one layer."""
    settings = ("scale", "bias", "dropout_p", "seed")
    return tuple(
        LF.lora_linear(o.x, one.weight, one.a, one.b, **{key: getattr(one, key) for key in settings}, **more)
        if one.a is not None
        else F.linear(o.x, one.weight, one.bias)
        for one in o.projections
    )


def mlp(o, activation="silu", **more):
    return (LF.lora_gated_mlp(o.x, *o.projections, activation=activation, **more),)


def plain_mlp(o, activation="silu"):
    gate, up, down = o.projections
    return (plain(gate_differentiable(activation, plain(o.x, gate), plain(o.x, up)), down),)


def results(run, o, names=None, used=None):
    """`{"y 0": …, "dx": …, "da 0": …}` of fresh leaves; `used` are the results that have a gradient."""
    o = o.fresh(names)
    ys, used = run(o), range(len(o.dys)) if used is None else used
    trained = {name: t for name, t in o.leaves().items() if t.requires_grad}
    used = [i for i in used if ys[i].requires_grad]
    outputs, dys = [ys[i] for i in used], [o.dys[i].to(ys[i].dtype) for i in used]
    # a reentrant checkpoint refuses torch.autograd.grad
    torch.autograd.backward(outputs, dys)
    actual = {f"y {i}": y.detach() for i, y in enumerate(ys)} | {
        "differentiable": torch.tensor([y.requires_grad for y in ys])
    }
    return actual | {f"d{name}": t.grad for name, t in trained.items()}


def _drawn(o, draws):
    """o, and the same with other signs in x and the dys: other roundings of the same size."""
    yield o
    for seed in range(1, draws):
        generator = torch.Generator().manual_seed(seed)
        signed = [t * (1 - 2 * torch.randint(2, t.shape, generator=generator)).to(t.dtype) for t in (o.x, *o.dys)]
        yield Operands(signed[0], o.projections, signed[1:])


def check(run, reference, o, names=None, used=None, draws=None):
    """Assert every result and gradient by the three-way rule, the dtypes, and that no gradient is zero; return them.

    The errors of two right results of a few numbers are within a factor of two by luck alone: several draws are judged
    together where there are few.
    """
    drawn, draws = [], draws or (1 if o.x.dtype.itemsize == 2 else 3)
    for given in _drawn(o, draws):
        exact = results(reference, given.fresh(dtype=torch.float64), names, used)
        drawn.append([results(run, given, names, used), results(reference, given, names, used), exact])
    by_name = {key: [[one[i][key] for one in drawn] for i in range(3)] for key in drawn[0][2]}
    for name, (actual, same, exact) in by_name.items():
        assert [t is None for t in actual] == [t is None for t in exact], name
        if name == "differentiable":
            assert all(map(torch.equal, actual, exact)), name
        elif actual[0] is not None:
            assert actual[0].dtype is same[0].dtype, name
            assert_three_way(name, *(torch.stack(some) for some in (actual, same, exact)))
            assert actual[0].any() or not o.x.numel(), f"{name}: all zero"
    assert all(one[0].keys() == one[2].keys() for one in drawn)
    return drawn[0][0]
