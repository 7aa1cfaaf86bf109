"""Operators over quantized weights, as tests call them, and what they decode."""

import inspect
import math
import textwrap

import torch

from lorafuse import functional as LF
from lorafuse.backends import aten, workspace
from lorafuse.operands import Weight

NF4 = torch.tensor(
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626]
    + [0.7230, 1.0]
)  # fmt: skip


def nf4(*sizes, is_transposed=False):
    count = math.prod(sizes)
    data = torch.randint(0, 256, (-(-count // 2),), dtype=torch.uint8)
    statistics = torch.rand(-(-count // 64)) / 4 + 0.1, NF4
    return Weight(data, is_transposed, statistics, f"nf4:{','.join(map(str, sizes))};block=64;dtype=float32")


def int8(*sizes):
    return Weight(
        torch.randint(-128, 128, sizes, dtype=torch.int8), False, (torch.rand(*sizes[:-1], 1) * 0.02,), "int8"
    )


def leaf(*sizes, dtype=torch.float32):
    return torch.randn(sizes, dtype=dtype).requires_grad_()


class Call:
    """An operator on weights in any format: `results(weights)` are y and every gradient, by name."""

    def __init__(self, run, weights, **tensors):
        self.run, self.weights, self.tensors = run, weights, tensors

    def results(self, weights=None, dtype=None, needed=None):
        given = {
            name: t.detach().to(dtype or t.dtype).requires_grad_(needed is None or name in needed)
            for name, t in self.tensors.items()
        }
        y = self.run(self.weights if weights is None else weights, **given)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape))
        return {"y": y.detach()} | {name: t.grad for name, t in given.items() if t.requires_grad}

    def to(self, device, dtype):
        """The same call on a device and in a dtype."""
        weights = [
            Weight(w.data.to(device), w.is_transposed, tuple(t.to(device) for t in w.statistics), w.format)
            for w in self.weights
        ]
        return Call(self.run, weights, **{name: t.detach().to(device, dtype) for name, t in self.tensors.items()})

    def dense(self, dtype=torch.float32):
        return [w.decoded(dtype) for w in self.weights]


def linear(N=24, K=40, M=6, R=3, p=0.0, backend="eager"):
    def run(weights, x, a, b, bias):
        return LF.lora_linear(x, *weights, a, b, scale=1.5, bias=bias, dropout_p=p, seed=5, backend=backend)

    return Call(run, [nf4(N, K)], x=leaf(M, K), a=leaf(R, K), b=leaf(N, R), bias=leaf(N))


def grouped(E=5, N=24, K=40, R=3, backend="eager", is_transposed=False, ends=(4, 4, 9, 9, 12)):
    ends = torch.tensor(ends)
    bias = torch.randn(E, N)

    def run(weights, x, a, b):
        return LF.lora_grouped_linear(x, ends.to(x.device), *weights, a, b, scale=1.5, bias=bias.to(x), backend=backend)

    sizes = (K, N) if is_transposed else (N, K)
    weights = [nf4(E, *sizes, is_transposed=is_transposed)]
    return Call(run, weights, x=leaf(int(ends[-1]) + 2, K), a=leaf(E, R, K), b=leaf(E, N, R))


def experts(
    E=5, H=24, I=16, T=9, R=3, backend="eager", activation="silu", index=None, weights=None, adapters=True
):  # fmt: skip
    if index is None:
        # an expert without rows, and sentinels
        index = torch.tensor([0, 1, 3, 4, 5]).repeat(2 * T)[: 2 * T].view(T, 2)

    def run(weights, x, topk_weight, **factors):
        low = {"gate_up_scale": 1.5, "down_scale": 0.7, "activation": activation, "backend": backend}
        return LF.lora_experts(x, index.to(x.device), topk_weight, *weights, **factors, **low)

    factors = {
        "gate_up_a": leaf(E, R, H), "gate_up_b": leaf(E, 2 * I, R), "down_a": leaf(E, R, I), "down_b": leaf(E, H, R)
    } if adapters else {}  # fmt: skip
    weights = weights or [nf4(E, 2 * I, H), nf4(E, H, I)]
    return Call(run, weights, x=leaf(T, H), topk_weight=torch.rand(T, 2), **factors)


def siblings(K=40, R=3, N=24, backend="eager"):
    """Layers of one x: quantized with and without an adapter, dense, and quantized otherwise."""

    def run(weights, x, a, b, **others):
        adapters = (a, b), (None, None), (others["a2"], others["b2"])
        projections = [LF.Projection(w, *pair, scale=1.5) for w, pair in zip(weights, adapters, strict=True)]
        return torch.cat(LF.lora_linears(x, projections, backend=backend), -1)

    weights = [nf4(N, K), int8(16, K), nf4(8, K)]
    return Call(run, weights, x=leaf(6, K), a=leaf(R, K), b=leaf(N, R), a2=leaf(2, K), b2=leaf(8, 2))


def gated_mlp(H=24, I=40, R=3, backend="eager"):
    def run(weights, x, **factors):
        pairs = [(factors[f"{name}_a"], factors[f"{name}_b"]) for name in ("gate", "up", "down")]
        layers = [LF.Projection(w, *pair, scale=1.5) for w, pair in zip(weights, pairs, strict=True)]
        return LF.lora_gated_mlp(x, *layers, backend=backend)

    factors = {"gate_a": leaf(R, H), "gate_b": leaf(I, R), "up_a": leaf(R, H), "up_b": leaf(I, R)}
    factors |= {"down_a": leaf(R, I), "down_b": leaf(H, R)}
    return Call(run, [nf4(I, H), int8(I, H), nf4(H, I)], x=leaf(6, H), **factors)


CALLS = {"linear": linear, "grouped": grouped, "experts": experts, "siblings": siblings, "gated_mlp": gated_mlp}


def check_same(call):
    """What a call computes is bit for bit what it computes of the decoded weights."""
    actual, expected = call.results(), call.results(call.dense())
    for name, t in expected.items():
        assert t.abs().max() > 0, name
        assert torch.equal(actual[name], t), name


def changed(function, old, new):
    """The function with one place of its source changed."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1
    namespace = dict(inspect.unwrap(function).__globals__)
    made = {}
    exec(compile(source.replace(old, new), "changed", "exec"), namespace, made)
    return made[function.__name__]


def two_at_a_time():
    """Two weights are decoded at the same time, and then two others."""
    for _ in range(2):
        one, two = nf4(8, 64), nf4(8, 64)
        with aten.BACKEND.dense(one, torch.float32) as first, aten.BACKEND.dense(two, torch.float32) as second:
            assert torch.equal(first.data, one.decoded(torch.float32).data)
            assert torch.equal(second.data, two.decoded(torch.float32).data)
    assert len(workspace.FREE) == 2
