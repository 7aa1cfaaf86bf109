"""DoRA in fp64: the formula of PEFT, which is the paper's, and its gradients by name."""

import torch

__all__ = ["operands", "reference"]


def operands(M=7, N=40, K=48, R=4, dtype=torch.float64, bias=True, size=1.0):
    """`(x, weight, bias, a, b, magnitude, dy)`: the delta is `size` times as large as the weight."""
    x, w, dy = torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(M, N)
    a, b = torch.randn(R, K) / K**0.5, size * torch.randn(N, R) / R**0.5
    magnitude = w.norm(dim=1) * (1 + 0.3 * torch.randn(N))
    bias = torch.randn(N) if bias else None
    return tuple(None if t is None else t.to(dtype) for t in (x, w, bias, a, b, magnitude, dy))


def reference(x, w, bias, a, b, magnitude, dy, scale, keep=None, p=0.0):
    """`{"y", "dx", "da", "db", "dm", "norm"}` in fp64; `keep` is dropout's mask."""
    x, a, b, m = (t.detach().double().requires_grad_() for t in (x, a, b, magnitude))
    w = w.double()
    norm = (w + scale * b @ a).norm(dim=1).detach()
    c, base = m / norm, x @ w.T
    d = x if keep is None else x * keep / (1 - p)
    y = base + (c - 1) * (d @ w.T) + c * scale * (d @ a.T @ b.T)
    y = y if bias is None else y + bias.double()
    grads = torch.autograd.grad(y, (x, a, b, m), dy.double())
    return {"y": y.detach(), "norm": norm} | dict(zip(("dx", "da", "db", "dm"), grads, strict=True))
