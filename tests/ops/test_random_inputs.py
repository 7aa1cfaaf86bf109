"""Random inputs of every operator against the fp64 formula: no wrong value, nothing modified, equal run to run (T1).

Every element is held to `ROUNDINGS` roundings of the formula in absolute values, which bounds what a right order of
operations can differ by, however much cancels. 8,000 examples in half a minute; the same ones in every run.
"""

import itertools
import math
import random

import pytest
import torch

from lorafuse.functional import lora_experts, lora_grouped_linear, lora_linear
from lorafuse.philox import keep_mask, rescaled
from lorafuse.testing.numerics import rounding

# it would take a third of the time; the other tests have it
pytestmark = pytest.mark.no_poison

ROUNDINGS = 16
EXAMPLES = {"linear": 5000, "grouped": 2500, "experts": 500}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "transposed", "strided", "shifted", "expanded"]


def laid_out(t, layout):
    """The values of `t`, stored otherwise; "expanded" repeats its first row."""
    if layout == "transposed" and t.dim() > 1:
        return t.mT.contiguous().mT
    if layout == "strided":
        return torch.stack([t, t + 1], -1)[..., 0]
    if layout == "shifted":
        return torch.cat([t.flatten()[:1], t.flatten()])[min(1, t.numel()) :].view(t.shape)
    if layout == "expanded" and t.dim() > 1 and t.shape[0]:
        return t[:1].expand(t.shape)
    return t


class Drawer:
    """Normal tensors from one seed, in the layouts of a list."""

    def __init__(self, seed, layouts):
        self.generator, self.layouts = torch.Generator().manual_seed(seed), itertools.cycle(layouts)

    def __call__(self, shape, dtype):
        t = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)
        return laid_out(t, next(self.layouts))


def each(name, **choices):
    """Runs a test of a case for `EXAMPLES[name]` of them: one of each list, or what a function of the generator gives.

    A framework that shrinks what fails takes longer to draw a case than the operator to compute it. Every case is drawn
    from a seed of its own, and a failure is told with its case.
    """

    def decorate(check):
        def test():
            for number in range(EXAMPLES[name]):
                draw = random.Random(f"{name} {number}")
                case = {k: draw.choice(c) if isinstance(c, list) else c(draw) for k, c in choices.items()}
                # the ends of the range at times
                case["seed"] = draw.choice([0, 2**63 - 1]) if draw.random() < 1 / 16 else draw.randrange(2**63)
                case["layouts"] = draw.choices(LAYOUTS, k=8)
                try:
                    check(case)
                except Exception as error:
                    raise AssertionError(f"case {number}: {case}") from error

        return test

    return decorate


def lists(values, min_size, max_size):
    return lambda draw: draw.choices(values, k=draw.randint(min_size, max_size))


def subsets(*names):
    return lambda draw: sorted(name for name in names if draw.random() < 0.5)


def promoted(dtype, how):
    """The dtype of adapters over a base."""
    return {"same": dtype, "fp32": torch.float32, "wider": torch.promote_types(dtype, torch.float32)}[how]


def run_twice(function, operands, names, tensor):
    """`(y, {name: gradient}, dy)` of `function(**operands)`, after it was seen that a second run gives the same."""
    before = {name: t.clone() for name, t in operands.items() if isinstance(t, torch.Tensor)}
    for name in names:
        # a leaf with the layout of the operand
        operands[name].requires_grad_()
    results, dy = [], None
    for _ in range(2):
        y = function(**operands)
        if dy is None:
            dy = tensor(y.shape, y.dtype)
        leaves = [operands[name] for name in names]
        grads = torch.autograd.grad(y, leaves, dy) if names and y.requires_grad else []
        results.append((y.detach(), *grads))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second), "two runs differ"
    for name, t in before.items():
        assert torch.equal(operands[name].detach(), t), f"{name} was modified"
    y, *grads = results[0]
    return y, dict(zip(names, grads, strict=False)), dy


def assert_close(name, actual, expected, magnitude, eps):
    """`magnitude` is the formula in absolute values; results beyond the range of the dtype are not compared."""
    error = (actual.double() - expected).abs()
    bound = ROUNDINGS * eps * magnitude + torch.finfo(actual.dtype).smallest_normal
    assert actual.shape == expected.shape, name
    assert (error <= bound).all(), f"{name}: {error.max():.3e} where {bound[error > bound].min():.3e} is allowed"


def low_rank(x, w, a, b, dy, scale, keep):
    """The formula, its gradients too, of fp64 matrices."""
    xa, dyb = (x * keep) @ a.mT, dy @ b
    return {
        "y": x @ w.mT + scale * xa @ b.mT,
        "x": dy @ w + scale * keep * (dyb @ a),
        "a": scale * dyb.mT @ (x * keep),
        "b": scale * dy.mT @ xa,
    }


@each(
    "linear",
    leading=lists([0, 1, 2, 3, 5], 0, 3),
    N=[0, 1, 2, 5, 8],
    K=[0, 1, 3, 4, 7, 8],
    R=[1, 2, 3],
    dtype=DTYPES,
    adapters=["same", "fp32", "wider"],
    scale=[1.0, 0.0, -0.5, 3.0, 64.0],
    p=[0.0, 0.0, 0.3, 1.0],
    has_bias=[True, False],
    names=subsets("x", "a", "b", "bias"),
)
def test_linear(case):
    leading, N, K, R, dtype, scale, p, seed = (
        case[name] for name in ("leading", "N", "K", "R", "dtype", "scale", "p", "seed")
    )
    wide, tensor = promoted(dtype, case["adapters"]), Drawer(seed, case["layouts"])
    o = {
        "x": tensor((*leading, K), dtype),
        "weight": tensor((N, K), dtype),
        "a": tensor((R, K), wide),
        "b": tensor((N, R), wide),
    }
    if case["has_bias"]:
        o["bias"] = tensor((N,), dtype)
    names = [name for name in case["names"] if name in o]
    y, grads, dy = run_twice(
        lambda **given: lora_linear(**given, scale=scale, dropout_p=p, seed=seed), o, names, tensor
    )
    assert y.dtype is dtype
    M = math.prod(leading)
    x, w, a, b = (o[name].detach().double() for name in ("x", "weight", "a", "b"))
    x, flat = x.reshape(M, K), dy.double().reshape(M, N)
    keep = keep_mask(torch.tensor([seed]), p, slice(0, M), K).double() if p else torch.ones(M, K).double()
    factor = rescaled(scale, p)
    expected = low_rank(x, w, a, b, flat, factor, keep)
    size = low_rank(*(t.abs() for t in (x, w, a, b, flat)), abs(factor), keep)
    if "bias" in o:
        bias = o["bias"].detach().double()
        expected |= {"y": expected["y"] + bias, "bias": flat.sum(0)}
        size |= {"y": size["y"] + bias.abs(), "bias": flat.abs().sum(0)}
    # an fp32 or fp64 adapter over a 16-bit base is rounded to the base's dtype
    eps = max(rounding(dtype), rounding(wide))
    for name, actual in {"y": y, **grads}.items():
        assert actual.dtype is (dtype if name == "y" else o[name].dtype)
        shape = (*leading, N) if name == "y" else o[name].shape
        assert actual.shape == shape, name
        assert_close(name, actual.reshape(expected[name].shape), expected[name], size[name], eps)


def stack(tensor, E, N, K, R, dtype, wide, transposed, packed):
    """w, a and b of E layers, b as PEFT packs it (neighbours from different experts) where `packed`."""
    w = tensor((E, K, N) if transposed else (E, N, K), dtype)
    a, b = tensor((E, R, K), wide), tensor((E, N, R), wide)
    return w, a, b.permute(1, 2, 0).contiguous().permute(2, 0, 1) if packed else b


@each(
    "grouped",
    counts=lists([0, 1, 2, 3], 1, 3),
    beyond=[0, 1, 2],
    N=[0, 1, 4, 5],
    K=[0, 1, 3, 8],
    R=[1, 2],
    dtype=DTYPES,
    adapters=["same", "wider"],
    scale=[1.0, 0.0, -0.5, 3.0],
    transposed=[True, False],
    packed=[True, False],
    has_bias=[True, False],
    index_dtype=[torch.int32, torch.int64],
    names=subsets("x", "a", "b"),
)
def test_grouped(case):
    counts, N, K, R, dtype, scale, transposed, names = (
        case[name] for name in ("counts", "N", "K", "R", "dtype", "scale", "transposed", "names")
    )
    E, S, wide = len(counts), sum(counts) + case["beyond"], promoted(dtype, case["adapters"])
    tensor = Drawer(case["seed"], case["layouts"])
    w, a, b = stack(tensor, E, N, K, R, dtype, wide, transposed, case["packed"])
    o = {"x": tensor((S, K), dtype), "weight": w, "a": a, "b": b}
    if case["has_bias"]:
        o["bias"] = tensor((E, N), dtype)
    o["offsets"] = torch.tensor(counts).cumsum(0).to(case["index_dtype"])
    y, grads, dy = run_twice(
        lambda **given: lora_grouped_linear(**given, scale=scale, is_transposed=transposed), o, names, tensor
    )
    zero = {"y": torch.zeros(S, N).double(), "x": torch.zeros(S, K).double()}
    zero |= {"a": torch.zeros(E, R, K).double(), "b": torch.zeros(E, N, R).double()}
    expected, size = ({name: t.clone() for name, t in zero.items()} for _ in range(2))
    first = 0
    for e, count in enumerate(counts):
        rows = slice(first, first + count)
        first += count
        each = o["x"][rows], w[e].mT if transposed else w[e], a[e], b[e], dy[rows]
        each = [t.detach().double() for t in each]
        for into, operands in ((expected, each), (size, [t.abs() for t in each])):
            result = low_rank(*operands, scale if into is expected else abs(scale), torch.ones(1).double())
            into["y"][rows], into["x"][rows] = result["y"], result["x"]
            into["a"][e], into["b"][e] = result["a"], result["b"]
            if "bias" in o:
                bias = o["bias"][e].double()
                into["y"][rows] += bias if into is expected else bias.abs()
    eps = max(rounding(dtype), rounding(wide))
    for name, actual in {"y": y, **grads}.items():
        assert_close(name, actual, expected[name], size[name], eps)


@each(
    "experts",
    T=[0, 1, 2, 5],
    E=[1, 2, 4],
    k=[1, 2],
    H=[1, 3, 8],
    I=[1, 2, 5],
    R=[1, 2],
    dtype=[torch.float32, torch.float64, torch.bfloat16],
    transposed=[True, False],
    packed=[True, False],
    names=subsets("x", "topk_weight", "gate_up_a", "gate_up_b", "down_a", "down_b"),
)
def test_experts(case):
    T, E, k, H, I, R, dtype, transposed, packed, names = (
        case[name] for name in ("T", "E", "k", "H", "I", "R", "dtype", "transposed", "packed", "names")
    )
    tensor = Drawer(case["seed"], case["layouts"])
    up, up_a, up_b = stack(tensor, E, 2 * I, H, R, dtype, dtype, transposed, packed)
    down, down_a, down_b = stack(tensor, E, H, I, R, dtype, dtype, transposed, packed)
    o = {
        "x": tensor((T, H), dtype),
        # E is a sentinel
        "topk_index": torch.randint(0, E + 1, (T, k), generator=tensor.generator),
        "topk_weight": tensor((T, k), dtype),
        "gate_up": up / math.sqrt(H),
        "down": down / math.sqrt(I),
        "gate_up_a": up_a,
        "gate_up_b": up_b,
        "down_a": down_a,
        "down_b": down_b,
    }

    def fused(**given):
        return lora_experts(**given, gate_up_scale=0.7, down_scale=-0.5, is_transposed=transposed)

    y, grads, dy = run_twice(fused, o, names, tensor)
    exact = {n: t if t.dtype is torch.int64 else t.detach().double().requires_grad_(n in names) for n, t in o.items()}
    expected = _experts(**exact, transposed=transposed)
    leaves = [exact[name] for name in names]
    reference = torch.autograd.grad(expected, leaves, dy.double()) if leaves and expected.requires_grad else []
    for name, actual, right in zip(["y", *names], [y, *grads.values()], [expected, *reference], strict=False):
        bound = 64 * rounding(dtype) * max(1.0, right.abs().max().item() if right.numel() else 0.0) * (1 + T)
        assert (actual.double() - right).abs().max().item() <= bound if right.numel() else True, name


def _experts(
    x, topk_index, topk_weight, gate_up, down, gate_up_a, gate_up_b, down_a, down_b, transposed
):  # fmt: skip
    """The formula over all choices at once, each with the matrices of its expert."""
    chosen = topk_index < gate_up.shape[0]
    e = topk_index.clamp(max=gate_up.shape[0] - 1)
    up, down = (w.mT if transposed else w for w in (gate_up, down))
    u = torch.einsum("tkuh,th->tku", (up + 0.7 * gate_up_b @ gate_up_a)[e], x)
    gate, value = u.chunk(2, -1)
    h = torch.nn.functional.silu(gate) * value
    y = torch.einsum("tkhi,tki->tkh", (down - 0.5 * down_b @ down_a)[e], h)
    return (y * (topk_weight * chosen)[..., None]).sum(1)
