"""The LoRA linear in Triton kernels (`lorafuse.kernels`), configured by the plan of each call.

Same operator as `eager`, shapes and meaning of arguments included. Launches go to the current stream of x's device and
nothing waits for the GPU, so that CUDA graphs, torch.compile and checkpointing see ordinary asynchronous work. On CPU
tensors the kernels run in Triton's interpreter, where TRITON_INTERPRET=1 asked for it.
"""

import torch
from torch import Tensor

from lorafuse.backends import eager, probe
from lorafuse.backends.on_gpu import check_device, device_guard
from lorafuse.backends.rows import contiguous_rows, shaped_like
from lorafuse.backends.triton_experts import experts_backward, experts_forward, grouped_backward, grouped_forward
from lorafuse.kernels import lowrank, matmul
from lorafuse.philox import rescaled
from lorafuse.plan import DeviceSpec, Plan, Problem, find, select

__all__ = [
    "experts_backward",
    "experts_forward",
    "grouped_backward",
    "grouped_forward",
    "linear_backward",
    "linear_forward",
]

# the GPU whose plans the interpreter runs
_INTERPRETED_AS = "H200"


def linear_forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    scale: float,
    p: float,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """`(y [..., N], xa [M, R])`, both in x's dtype, but xa in fp32 when `wide`.

    Raises ValueError or TypeError for what the kernels do not take.
    """
    check_device(x)
    if x.numel() == 0 or w.numel() == 0:
        # nothing to launch over
        return eager.linear_forward(x, w, bias, a, b, seed, scale, p, wide)
    flat, w, a, b = contiguous_rows(x), contiguous_rows(w), a.contiguous(), b.contiguous()
    bias = None if bias is None else bias.contiguous()
    plan, device = _plan(probe.linear_problem(flat, w, a, bias is not None, seed is not None, wide=wide), x.device)
    scale = scale if seed is None else rescaled(scale, p)
    with device_guard(x.device):
        xa = lowrank.project(flat, a, plan.config("project"), seed=seed, p=p, wide=wide)
        y = matmul.matmul(flat, w, bias, xa, b, scale, device.sms, plan.config("matmul"))
    return shaped_like(y, x), xa


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
    wide: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`(dx, da, db, dbias)`, None where not needed; da and db in their parameters' dtypes."""
    check_device(dy)
    needs = need_dx, need_da, need_db, need_dbias
    if dy.numel() == 0 or w.numel() == 0 or not any(needs):
        return eager.linear_backward(dy, x, xa, w, a, b, seed, scale, p, *needs, wide)
    flat, w = contiguous_rows(dy), contiguous_rows(w)
    wanted = tuple(name for name, need in zip(("dx", "da", "db", "dbias"), needs, strict=True) if need)
    plan, device = _plan(probe.linear_problem(flat, w, a, False, seed is not None, wanted, wide), dy.device)
    scale = scale if seed is None else rescaled(scale, p)
    dx = da = db = dbias = dyb = None
    with device_guard(dy.device):
        xa = xa.contiguous() if need_db and xa is not None else None
        dyb_parts, db_parts, dbias_parts = lowrank.project_outer(
            flat, b.contiguous(), xa, need_dx or need_da, need_dbias, plan.config("project_outer")
        )
        segments = []
        if dyb_parts is not None:
            dyb = dy.new_empty((flat.shape[0], a.shape[0]), dtype=torch.float32 if wide else dy.dtype)
            segments.append((dyb_parts, dyb, scale))
        if db_parts is not None:
            db = b.new_empty(b.shape)
            segments.append((db_parts, db, scale))
        if dbias_parts is not None:
            dbias = dy.new_empty((w.shape[0],))
            segments.append((dbias_parts, dbias, 1.0))
        lowrank.sum_partials(segments, plan.config("reduce"))
        if need_dx:
            given = flat, w.t(), None, dyb, a.contiguous().t(), None, device.sms, plan.config("matmul")
            dx = shaped_like(matmul.matmul(*given, seed=seed, p=p), dy)
        if need_da:
            assert x is not None
            da = a.new_empty(a.shape)
            parts = lowrank.outer_partials(contiguous_rows(x), dyb, plan.config("outer"), seed=seed, p=p)
            lowrank.sum_partials([(parts, da, 1.0)], plan.config("reduce"))
    return dx, da, db, dbias


def _plan(problem: Problem, device: torch.device) -> tuple[Plan, DeviceSpec]:
    """The plan among this backend's own kernels."""
    spec = probe.device_spec(device) or find(_INTERPRETED_AS)
    return select(problem, spec, (("triton", ""),)), spec
