"""The LoRA linear in Triton kernels (`lorafuse.kernels`), configured by the plan of each call.

Same operator as `eager`, shapes and meaning of arguments included. Launches go to the current stream of x's device and
nothing waits for the GPU, so that CUDA graphs, torch.compile and checkpointing see ordinary asynchronous work. On CPU
tensors the kernels run in Triton's interpreter, where TRITON_INTERPRET=1 asked for it.
"""

import contextlib

import torch
import triton
from torch import Tensor

from lorafuse.backends import eager, probe
from lorafuse.kernels import linear_bwd, linear_fwd
from lorafuse.philox import rescaled
from lorafuse.plan import DeviceSpec, Plan, Problem, find, select

__all__ = ["linear_backward", "linear_forward"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# the GPU whose plans the interpreter runs
_INTERPRETED_AS = "H200"


def linear_forward(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, seed: Tensor | None, scale: float, p: float
) -> tuple[Tensor, Tensor]:
    """`(y [..., N], xa [M, R])`, both in x's dtype. Raises ValueError or TypeError for what the kernels do not take."""
    _check(x)
    if x.numel() == 0 or w.numel() == 0:
        # nothing to launch over
        return eager.linear_forward(x, w, bias, a, b, seed, scale, p)
    flat, w, a, b = _rows(x), _rows(w), a.contiguous(), b.contiguous()
    bias = None if bias is None else bias.contiguous()
    plan, device = _plan(probe.linear_problem(flat, w, a, bias is not None, seed is not None), x.device)
    scale = scale if seed is None else rescaled(scale, p)
    with _guard(x.device):
        xa = None if plan.config("fwd").single else linear_fwd.lora_xa(flat, a, seed, p, plan.config("xa"))
        y, xa = linear_fwd.lora_linear_fwd(flat, w, bias, a, b, scale, xa, device.sms, plan.config("fwd"))
    return (y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])), xa


def linear_backward(
    dy: Tensor,
    x: Tensor | None,
    xa: Tensor | None,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    scale: float,
    p: float,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`(dx, da, db, dbias)`, None where not needed; da and db in their parameters' dtypes."""
    _check(dy)
    needs = need_dx, need_da, need_db, need_dbias
    if dy.numel() == 0 or w.numel() == 0 or not any(needs):
        return eager.linear_backward(dy, x, xa, w, a, b, seed, scale, p, *needs)
    flat, w = _rows(dy), _rows(w)
    wanted = tuple(name for name, need in zip(("dx", "da", "db", "dbias"), needs, strict=True) if need)
    plan, device = _plan(probe.linear_problem(flat, w, a, False, seed is not None, wanted), dy.device)
    scale = scale if seed is None else rescaled(scale, p)
    dx = da = db = dbias = dyb = None
    with _guard(dy.device):
        xa = xa.contiguous() if need_db and xa is not None else None
        dyb_parts, db_parts, dbias_parts = linear_bwd.lora_dyb_db_partials(
            flat, b.contiguous(), xa, need_dx or need_da, need_dbias, plan.config("dyb_db")
        )
        segments = []
        if dyb_parts is not None:
            dyb = dy.new_empty((flat.shape[0], a.shape[0]))
            segments.append((dyb_parts, dyb, scale))
        if db_parts is not None:
            db = b.new_empty(b.shape)
            segments.append((db_parts, db, scale))
        if dbias_parts is not None:
            dbias = dy.new_empty((w.shape[0],))
            segments.append((dbias_parts, dbias, 1.0))
        linear_bwd.sum_partials(segments, plan.config("reduce"))
        if need_dx:
            dx = linear_bwd.lora_linear_dx(flat, w, a.contiguous(), dyb, seed, p, device.sms, plan.config("dx"))
            dx = dx if dy.dim() == 2 else dx.view(*dy.shape[:-1], dx.shape[1])
        if need_da:
            assert x is not None
            da = a.new_empty(a.shape)
            parts = linear_bwd.lora_da_partials(_rows(x), dyb, seed, p, plan.config("da"))
            linear_bwd.sum_partials([(parts, da, 1.0)], plan.config("reduce"))
    return dx, da, db, dbias


def _check(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"backend='triton' got {x.dtype}; its kernels run float32, float16 and bfloat16: use 'eager'")
    if x.is_cuda:
        return
    if not triton.knobs.runtime.interpret:
        raise ValueError(
            f"backend='triton' got a tensor on {x.device}; its kernels run on CUDA devices: move the tensors with "
            ".cuda(), use backend='eager', or set TRITON_INTERPRET=1 before Python starts to interpret them slowly"
        )
    if x.dtype is torch.bfloat16:
        raise TypeError(
            "backend='triton' got torch.bfloat16 in Triton's interpreter, whose bfloat16 products are wrong "
            "(triton-lang/triton#11585): use float16 or float32 there, or backend='eager'"
        )


def _rows(t: Tensor) -> Tensor:
    """`t` as a matrix of contiguous rows that do not overlap; copies only where its strides leave no other way."""
    flat = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    if flat.shape[0] == 1:
        # the stride of a single row can be anything, and TMA reads it
        return flat.reshape(-1).unsqueeze(0)
    return flat if flat.stride(1) == 1 and flat.stride(0) >= flat.shape[1] else flat.contiguous()


def _plan(problem: Problem, device: torch.device) -> tuple[Plan, DeviceSpec]:
    """The plan among this backend's own kernels."""
    spec = probe.device_spec(device) or find(_INTERPRETED_AS)
    return select(problem, spec, (("triton", ""),)), spec


def _guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()
