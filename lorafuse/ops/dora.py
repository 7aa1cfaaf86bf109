"""What DoRA adds to a layer with LoRA: `lorafuse::row_norms`, and a factor for each column of y with its gradient.

    norm[n] = ‖w[n] + s · b[n] a‖                       [N], a constant to autograd, as in DoRA's paper (section 4.3)
    y = factor ⊙ z + addend                             dz = factor ⊙ dy,  dfactor = Σ dy ⊙ z

z `[…, N]` is y of `lora_linear` without its bias, factor `[N]` in fp32 at least; addend is the bias `[N]`, or what the
base adds `[…, N]`. Saved for backward are z, where factor has a gradient, and factor.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, arXiv 2402.09353.
"""

import torch
from torch import Tensor

from lorafuse.backends.base import candidates, load, resolve
from lorafuse.backends.columns import scaled_columns
from lorafuse.backends.protocol import Backend
from lorafuse.operands import Weight, matrix, shaped_like
from lorafuse.ops._define import LIBRARY, implement
from lorafuse.ops.autocast import outside_autocast
from lorafuse.ops.choose import ATEN
from lorafuse.ops.transforms import is_transformed, needs_plain_backward

__all__ = ["row_norms", "scale_columns"]

LIBRARY.define(
    "row_norms(Tensor weight, Tensor a, Tensor b, float scale, ScalarType dtype, str backend, str format='dense',"
    " Tensor[]? statistics=None) -> Tensor"
)


def _run(backend: str, t: Tensor) -> Backend:
    """The backend whose kernels read `t`: torch's, where neither Triton is there nor the backend has such kernels."""
    name = resolve(backend)
    if t.dtype is torch.float64 or name == "eager" or not t.numel():
        return ATEN
    has_triton = name == "triton" or "triton" in candidates(t.device.type)
    return load("triton") if has_triton and (name == "triton" or t.is_cuda) else ATEN


def _row_norms(weight, a, b, scale, dtype, backend, format="dense", statistics=None):
    w = Weight(weight, False, tuple(statistics or ()), format)
    run = _run(backend, a)
    with outside_autocast(a), run.guard(a.device), run.dense(w, dtype) as dense:
        return run.row_norms(dense, a, b, scale, weight.data_ptr())


def _fake_row_norms(weight, a, b, scale, dtype, backend, format="dense", statistics=None):
    return b.new_empty(b.shape[0], dtype=torch.promote_types(dtype, torch.float32))


implement("row_norms", _row_norms, _fake_row_norms)


def row_norms(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype, backend: str, format: str,
    statistics: list[Tensor] | None,
) -> Tensor:  # fmt: skip
    """The norms, without a gradient; `dtype` is that into which a quantized weight is decoded."""
    given = weight.detach(), a.detach(), b.detach()
    return torch.ops.lorafuse.row_norms(*given, scale, dtype, backend, format, statistics)


class _ScaledColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, factor, addend, backend):
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.of_addend = backend, None if addend is None else (addend.dim(), addend.dtype)
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, factor)
        return scaled_columns(z, factor, addend)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return None, None, None, None
        z, factor = ctx.saved_tensors
        need_dz, need_dfactor, need_addend, _ = ctx.needs_input_grad
        daddend = None
        if need_addend:
            dims, dtype = ctx.of_addend
            daddend = (matrix(dy).sum(0) if dims == 1 else dy).to(dtype)
        with outside_autocast(dy):
            if needs_plain_backward(dy):
                dz = (dy * factor).to(dy.dtype) if need_dz else None
                dfactor = (dy.to(factor.dtype) * z).reshape(-1, z.shape[-1]).sum(0) if need_dfactor else None
                return dz, dfactor, daddend, None
            run = _run(ctx.backend, dy)
            flat = matrix(dy).contiguous()
            with run.guard(dy.device):
                dz, dfactor = run.columns_backward(flat, None if z is None else matrix(z), factor, need_dz)
        return None if dz is None else shaped_like(dz, dy), dfactor, daddend, None


def scale_columns(z: Tensor, factor: Tensor, addend: Tensor | None, backend: str) -> Tensor:
    """`factor ⊙ z + addend` in z's dtype."""
    # a compiler fuses the formula into what stands next to it
    if torch.compiler.is_compiling() or is_transformed(z):
        y = z * factor
        return (y if addend is None else y + addend).to(z.dtype)
    return _ScaledColumns.apply(z, factor, addend, backend)
