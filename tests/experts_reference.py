"""The reference that experts are tested against: the formula, token by token, in fp64."""

import math

import torch
from torch.nn import functional as F

from lorafuse.functional import lora_experts
from lorafuse.testing.numerics import relative_l2, tolerance

REFERENCE = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}


def _clamped_swiglu(gate, up):
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


REFERENCE_GATES = {"clamped_swiglu": _clamped_swiglu}


def block(
    T=23, E=5, k=2, H=12, I=8, R=3, dtype=torch.float64, gate=True, bias=False, transposed=False, concatenated=True,
    activation="silu", adapters=("gate_up", "down"), index=None, shared=(), adapter_dtype=None, device="cpu",
    size=1.0, **_,
):  # fmt: skip
    """Operands of one block by the names of `lora_experts`; no adapter is zero. `size` is that of x.

    With bias "levels", a small x puts gate and up on either side of a clamp's limits and none near them: rounding moves
    no gradient across.
    """
    generator = torch.Generator().manual_seed(T * 1000 + E * 100 + H + R)

    def normal(*shape, of=dtype, fan=1):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(fan)).to(of)

    up = (2 if gate else 1) * I
    scores = torch.rand(T, E, generator=generator)
    o = {
        "x": normal(T, H) * size,
        "topk_index": scores.topk(k, 1).indices if index is None else index,
        "topk_weight": torch.rand(T, k, generator=generator).to(dtype) + 0.1,
        "gate_up": normal(E, up, H, fan=H),
        "down": normal(E, H, I, fan=I),
    }
    if transposed:
        o |= {name: o[name].transpose(1, 2).contiguous() for name in ("gate_up", "down")}
    of = adapter_dtype or dtype
    for name, (n, fan) in {"gate_up": (up, H), "down": (H, I)}.items():
        if name in adapters:
            o[f"{name}_a"] = normal(*(() if f"{name}_a" in shared else (E,)), R, fan, of=of, fan=fan)
            o[f"{name}_b"] = normal(*(() if f"{name}_b" in shared else (E,)), n, R, of=of, fan=R)
    if bias:
        o |= {"gate_up_bias": normal(E, up), "down_bias": normal(E, H)}
        if bias == "levels":
            levels = torch.tensor([-12.0, -1.0, 1.0, 12.0])
            o["gate_up_bias"] = levels[torch.randint(4, (E, up), generator=generator)].to(dtype)
    settings = {"gate_up_scale": 1.7, "down_scale": 0.6, "activation": activation, "has_gate": gate}
    o = {name: t.to(device) for name, t in o.items()}
    return o, settings | {"is_transposed": transposed, "is_concatenated": concatenated}


def plain(o, gate_up_scale, down_scale, activation, has_gate, is_transposed, is_concatenated):
    """The formula, token by token."""
    out = []
    E = o["gate_up"].shape[0]

    def project(name, e, v, scale):
        w = o[name][e].t() if is_transposed else o[name][e]
        y = w @ v
        if f"{name}_bias" in o:
            y = y + o[f"{name}_bias"][e]
        if f"{name}_a" in o:
            a, b = (o[f"{name}_{f}"] for f in "ab")
            y = y + scale * ((b[e] if b.dim() == 3 else b) @ ((a[e] if a.dim() == 3 else a) @ v))
        return y

    for t, row in enumerate(o["topk_index"].tolist()):
        total = o["x"][t] * 0.0
        for j, e in enumerate(row):
            if e >= E:
                continue
            u = project("gate_up", e, o["x"][t], gate_up_scale)
            if callable(activation):
                h = activation(u.unsqueeze(0))[0]
            elif has_gate:
                gate, up = u.chunk(2) if is_concatenated else (u[::2], u[1::2])
                known = REFERENCE_GATES.get(activation)
                h = known(gate, up) if known else REFERENCE[activation](gate) * up
            else:
                h = REFERENCE[activation](u)
            total = total + o["topk_weight"][t, j] * project("down", e, h, down_scale)
        out.append(total)
    return torch.stack(out) if out else o["x"] * 0.0


def differentiated(run, o, settings, judge=lambda name, tensor: None):
    """`{"out": …, "x": …, "topk_weight": …, "gate_up_a": …, …}`: out and every gradient.

    `judge` is given the name and the tensor of each, out before backward runs.
    """
    o = {name: t.clone() for name, t in o.items()}
    requested = [name for name in o if name in ("x", "topk_weight") or name.endswith(("_a", "_b"))]
    for name in requested:
        o[name].requires_grad_()
    out = run(o, settings)
    judge("out", out.detach())
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(out)
    grads = torch.autograd.grad(out, [o[name] for name in requested], dout, allow_unused=True, materialize_grads=True)
    for name, grad in zip(requested, grads, strict=True):
        judge(name, grad)
    return {"out": out.detach(), **dict(zip(requested, grads, strict=True))}


def fused(o, settings, backend=None):
    positional = [o[name] for name in ("x", "topk_index", "topk_weight", "gate_up", "down")]
    keywords = {name: t for name, t in o.items() if name.endswith(("_a", "_b", "_bias"))}
    return lora_experts(*positional, **keywords, **settings, backend=backend)


def check(backend=None, **case):
    o, settings = block(**case)
    dtype = o["x"].dtype
    exact = {name: t if t.dtype is torch.int64 else t.double() for name, t in o.items()}
    expected = differentiated(lambda o, s: plain(o, **s), exact, settings)
    hit = bool((o["topk_index"] < o["gate_up"].shape[0]).any())

    def judge(name, tensor):
        assert tensor.dtype is (dtype if name == "out" else o[name].dtype), name
        error = relative_l2(tensor, expected[name])
        assert error <= tolerance(dtype), f"{name}: {error:.1e}"
        assert not hit or tensor.count_nonzero() > 0, f"{name}: all zero"

    return differentiated(lambda o, s: fused(o, s, backend), o, settings, judge)
